"""What computes the rows of logits: the protocol, the choice, and PyTorch's implementation; Triton's is `kernels`."""
