"""Linear loss, forward and backward, side by side: `python -m pytest bench --benchmark-only`."""

import pytest
import torch

from bench.compare import gate, in_turns
from bench.providers import LINEAR_LOSSES
from bench.workload import hidden_and_target

#: N, V, D, dtype, share of ignored rows, rounds.
CASES = [
    (2048, 32768, 1024, torch.float32, 0.0, 5),
    (2048, 32768, 1024, torch.float32, 0.75, 5),
    (1024, 32768, 1024, torch.bfloat16, 0.0, 9),
    (1024, 32768, 1024, torch.bfloat16, 0.75, 9),
]
BASELINE = next(iter(LINEAR_LOSSES))


def case_id(case):
    N, V, D, dtype, share, _ = case
    return f"N{N}-V{V}-D{D}-{str(dtype).removeprefix('torch.')}-{share:.0%} ignored"


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("name", LINEAR_LOSSES)
def test_forward_and_backward(benchmark, name, case):
    N, V, D, dtype, share, rounds = case
    loss = LINEAR_LOSSES[name]
    gate(loss, LINEAR_LOSSES[BASELINE], *hidden_and_target(64, 1000, 40, 0.5, dtype))
    arguments = hidden_and_target(N, V, D, share, dtype)
    benchmark.group = f"{case_id(case)}, {arguments[0].device}, {torch.get_num_threads()} threads"
    in_turns(benchmark, loss, LINEAR_LOSSES[BASELINE], arguments, rounds)
