"""The operations, one package each: the formula in plain PyTorch, and the compiled backends."""
