"""Operators in plain PyTorch, block by block: what runs where no kernel exists. Bounded memory, the same numbers."""
