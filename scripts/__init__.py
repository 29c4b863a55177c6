"""What maintainers run: a release, and the layout of Hugging Face's `kernels`."""
