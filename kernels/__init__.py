"""Triton kernels and their launchers, installed as ``drl_fast.kernels``: plain functions on tensors.

They register no operators and import nothing from drl_fast. drl_fast/ops/gpu.py adapts them to the operators' schemas.
"""
