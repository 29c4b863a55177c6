"""The loss of logits that are there, from a checked call to rows and gradients. What users call is in `losses`."""
