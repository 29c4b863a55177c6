"""The loss from hidden states: logits exist a tile at a time, and ignored rows not at all.

`functional` is what users call, `autograd` the operators, `plan` the choice of tiles, `sweep` the walk over them.
"""
