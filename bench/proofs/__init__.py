"""Examines kernels without a GPU: bytes, machine code, launches and the host's time."""
