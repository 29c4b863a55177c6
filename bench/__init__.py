"""Measurements of this package and its peers, and proofs of its kernels. Nothing of the package depends on it."""
