"""A vocabulary sharded over ranks: process groups and DTensors. The losses of shards are in `logits` and `linear`."""

from .ranks import global_token_count

__all__ = ["global_token_count"]
