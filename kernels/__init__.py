"""Triton kernels and their launchers, shipped as ``drl_fast.kernels``: plain functions on tensors.

They register nothing and import nothing of drl_fast. None has landed yet, so CUDA tensors run on chunked PyTorch.
"""
