"""Every class of transformers whose loss is a cross entropy, tiny, with and without `patch_model`.

`tiny` builds a small model of any class, `batch` its inputs, `overrides` holds what these two cannot guess; `compare`
judges one class, `isolation` gives it a process, and `python -m bench.sweep` does so for all.
"""
