"""Operators on CUDA tensors: Triton kernels, and what the schema and the kernels do not share."""
