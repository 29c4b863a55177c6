"""What all losses share: options, checks of tensors, rows and their reduction. Nothing here computes a loss."""
