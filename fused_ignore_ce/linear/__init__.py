"""The loss from hidden states, from a checked call to tiles and gradients. What users call is in `losses`.

`problem` checks a call, `kept_rows` drops the ignored rows, `plan` chooses the tiles, `sweep` walks over them, and
`grad_in_forward` and `row_results` are the differentiable functions.
"""
