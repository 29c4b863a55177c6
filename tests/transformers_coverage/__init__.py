"""Trains a tiny model of every class of transformers whose loss is a cross entropy, with and without `patch_model`.

`tiny` builds a small model of any class and `batch` its inputs; `overrides` holds what these two cannot guess.
`compare` judges one class, `isolation` gives it a process, and `python -m tests.transformers_coverage` judges all.
"""
