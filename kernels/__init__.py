"""Triton kernels and their launchers, shipped as ``drl_fast.kernels``: plain functions on tensors.

They register no operators and import nothing of drl_fast. drl_fast/ops/gpu adapts them to the operators' schemas.
"""
