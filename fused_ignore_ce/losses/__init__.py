"""What users call: every loss as a function and as a module. How they are computed is in `logits` and `linear`."""
