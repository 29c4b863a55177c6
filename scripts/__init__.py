"""Programs for maintainers. They build a release, and the layout that Hugging Face's `kernels` loads."""
