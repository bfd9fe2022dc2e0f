"""The networks, in plain PyTorch, with the checkpoints' own parameter names."""
