"""Loops over a model and data: training and evaluation."""
