"""The loss from hidden states, from a checked call to tiles and gradients. What users call is in `losses`.

`problem` selects the kept rows, `plan` chooses the tiles, `sweep` walks over them, and `scaled_sum` and `row_results`
are the differentiable functions.
"""
