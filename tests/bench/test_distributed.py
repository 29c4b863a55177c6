"""What `bench.distributed` counts is what was sent."""

import json
import math

import pytest
from torch.multiprocessing.spawn import ProcessRaisedException

from bench import distributed


def test_bytes_are_counted_from_shapes_and_types(tmp_path):
    class Profile:
        def export_chrome_trace(self, path):
            def event(name, dims, kind):
                return {"name": name, "args": {"Input Dims": [dims], "Input type": [kind]}}

            events = [
                event("gloo:all_reduce", [10, 3], "float"),
                event("gloo:all_gather", [7], "long int"),
                event("aten::mm", [100, 100], "float"),
                {"name": "a thread", "args": {}},
            ]
            with open(path, "w") as file:
                json.dump({"traceEvents": events}, file)

    assert distributed.bytes_sent(Profile(), 4) == 10 * 3 * 4 * 2 * 3 / 4 + 7 * 8 * 3


@pytest.mark.parametrize("name", [list(distributed.LOGITS)[-1], list(distributed.LINEAR)[-1]])
def test_the_losses_send_a_few_numbers_a_kept_token(name):
    """The loss of logits sends 16 bytes per row. The linear loss sends 16 and a gradient per kept row."""
    found = distributed.on_ranks(name, 2)
    kept = 1 - distributed.IGNORED
    header = 2 * 7 * 8 / distributed.N
    expected = 16.0 if name in distributed.LOGITS else kept * (16 + distributed.D * 4)
    assert math.isclose(found["bytes_per_token"], expected, abs_tol=header)
    assert found["peak_bytes"] < distributed.N * distributed.V * 4 / 2 / 2  # half of a rank's logits


def test_a_rank_that_fails_is_an_error():
    with pytest.raises(ProcessRaisedException, match=r"(?s)Process \d terminated.*KeyError: 'nobody'"):
        distributed.on_ranks("nobody", 2)
