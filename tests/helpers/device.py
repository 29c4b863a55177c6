"""The device on which the tests run. Without a CUDA device, the kernels run in Triton's interpreter on CPU tensors."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
