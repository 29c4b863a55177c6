"""The loss from hidden states, computed tile by tile; ignored rows are dropped before the first matrix product.

`cross_entropy` and `log_probs` have the functions that users call. `problem` checks their arguments and selects rows,
`plan` chooses the tiles, `sweep` walks over them, and `scaled_sum` and `row_results` are the differentiable functions.
"""
