"""Operators: what runs inside a quantized model and inside the solver. One file each; `jit.path` says which code runs where."""
