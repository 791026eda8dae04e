"""The operators in plain PyTorch, block by block. They serve every device without a kernel, in bounded memory."""
