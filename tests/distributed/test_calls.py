"""A sharded vocabulary in all the ways the losses are called, and what it costs in collectives."""

import math

import pytest
import torch
from torch.nn import functional as F

import fused_ignore_ce

from ..helpers.log_probs import CAP, SCALE, TEMPERATURE
from ..helpers.log_probs import plain as of_pytorch
from ..helpers.log_probs import problem as small_head
from ..helpers.shards import IGNORED_IDS, SHARDS, D, N, V, joined, parts, problem, run

UNEVEN = SHARDS["4, one empty"]
KINDS = ["fused_cross_entropy", "fused_linear_cross_entropy"]


def tensors_of(loss, **kwargs):
    tensors = problem(**kwargs)
    if loss != "fused_cross_entropy":
        dtype = tensors["input"].dtype
        tensors |= {"input": torch.randn(N, D, dtype=dtype), "linear_weight": torch.randn(V, D, dtype=dtype)}
    return tensors


def alone(loss, tensors, wanted, upstream, **options):
    """(result, gradients) of the same function in one process."""
    tensors = {name: t.clone().requires_grad_(name in wanted) for name, t in tensors.items()}
    found = getattr(fused_ignore_ce, loss)(**tensors, **options)
    scalar = found[0] if type(found) is tuple else found
    (scalar * upstream).sum().backward()
    return found, {name: tensors[name].grad for name in wanted}


def assert_equal(loss, tensors, wanted, shards, ranks, tolerance=1e-6, more=(), **options):
    upstream = torch.tensor(1.3)
    expected, grads = alone(loss, tensors, wanted, upstream, **options)
    found = run(ranks, loss, tensors, shards, wanted=wanted, upstream=upstream, **options, **dict(more))
    assert "error" not in found[0], found[0]
    stats = None
    if type(expected) is tuple:
        expected, stats = expected
    close = {"rtol": tolerance, "atol": tolerance}
    for f in found:
        torch.testing.assert_close(f["loss"], expected.detach(), **close)
        assert torch.equal(f["loss"], found[0]["loss"])
        for ours, theirs in zip(f["stats"] or (), stats or (), strict=True):
            torch.testing.assert_close(ours, theirs, **close)
    for name in wanted:
        torch.testing.assert_close(joined(name, found, tensors, loss), grads[name], **close)
    return found


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("shards", [SHARDS["2 uneven"], UNEVEN], ids=str)
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.usefixtures("triton_kernels")
def test_triton_kernels(ranks, loss, shards, probs):
    tensors = tensors_of(loss, ignored="none" if probs else "some", probs=probs, weighted=True)
    options = {"ignore_index": -100 if probs else IGNORED_IDS, "label_smoothing": 0.1, "return_stats": True}
    wanted = ["input", *["linear_weight"] * (loss != KINDS[0])]
    assert_equal(loss, tensors, wanted, shards, ranks, backend="triton", **options)


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_statistics_and_token_weights(ranks, loss, probs, reduction, dtype):
    tensors = tensors_of(loss, ignored="none" if probs else "some", probs=probs, weighted=not probs, dtype=dtype)
    tensors["token_weight"] = torch.tensor([1.0, 0.5, 0.0, 2.0, 3.0, 0.25], dtype=dtype)
    logits = tensors["input"] if loss == KINDS[0] else tensors["input"] @ tensors["linear_weight"].t()
    if probs:  # in half of the rows, the likeliest class is that of the largest logit
        tensors["target"][::2].scatter_(1, logits[::2].argmax(1, keepdim=True), 1.0)
    options = {"ignore_index": -100 if probs else IGNORED_IDS, "reduction": reduction, "return_stats": True}
    wanted = ["input", "token_weight"]
    assert_equal(loss, tensors, wanted, UNEVEN, ranks, 1e-6 if dtype == torch.float32 else 1e-12, **options)


@pytest.mark.parametrize("loss", KINDS)
def test_ties_are_the_first_class_of_all(ranks, loss):
    tensors = tensors_of(loss)
    tensors["input"].zero_()
    found = assert_equal(loss, tensors, ["input"], UNEVEN, ranks, return_stats=True, ignore_index=IGNORED_IDS)
    assert found[3]["stats"].correct.tolist() == [t == 0 for t in tensors["target"].tolist()]


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(ranks, loss, dtype):
    tensors = tensors_of(loss, ignored="some", dtype=dtype)
    wanted = ["input", *["linear_weight"] * (loss != KINDS[0])]
    tolerance = 2 * torch.finfo(dtype).eps
    found = assert_equal(loss, tensors, wanted, UNEVEN, ranks, tolerance, ignore_index=IGNORED_IDS)
    assert found[0]["loss"].dtype == dtype
    assert found[0]["input"].dtype == dtype


@pytest.mark.parametrize("plan", [None, "vocabulary blocks"])
def test_logits_that_are_not_rounded(ranks, plan):
    """Of 16-bit operands: the losses of tokens are those of float64, to float32's precision, on every rank."""
    tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors_of(KINDS[1]).items()}
    logits = tensors["input"].double() @ tensors["linear_weight"].double().t()
    expected = F.cross_entropy(logits, tensors["target"], reduction="none")
    options = {"logits_dtype": torch.float32, "loss_dtype": torch.float32, "return_stats": True}
    for found in run(ranks, KINDS[1], tensors, UNEVEN, plan=plan, **options):
        torch.testing.assert_close(found["stats"].token_loss.double(), expected, rtol=3e-6, atol=3e-6)
        mean = F.cross_entropy(logits, tensors["target"])
        torch.testing.assert_close(found["loss"].double(), mean, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("normalizer", [7, torch.tensor(7.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("loss", KINDS)
def test_normalizer(ranks, loss, normalizer):
    tensors = tensors_of(loss, ignored="some", weighted=True)
    assert_equal(loss, tensors, ["input"], UNEVEN, ranks, normalizer=normalizer, ignore_index=IGNORED_IDS)


def test_causal_lm_loss(ranks):
    """The logits' last dimension is a shard of the vocabulary, whose full size is `vocab_size`."""
    logits, labels = torch.randn(2, 5, V), torch.randint(V, (2, 5))
    labels[:, :2] = -100
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / 3
    arguments = [
        {
            "ranks": 4,
            "loss": "fused_causal_lm_loss",
            "tensors": {"logits": logits[..., part].contiguous(), "labels": labels},
            "vocab_size": V,
            "num_items_in_batch": 3,
        }
        for part in parts(UNEVEN)
    ]
    for found in ranks.run("call", arguments):
        torch.testing.assert_close(found["loss"], expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_dimensions(ranks, reduction):
    """(N, C, d1) logits, as images have them, and hidden states (B, T, D)."""
    x, target = torch.randn(2, V, 3), torch.randint(V, (2, 3))
    expected = F.cross_entropy(x, target, reduction=reduction)
    tensors = [{"input": x[:, part].contiguous(), "target": target} for part in parts(UNEVEN)]
    call = {"ranks": 4, "loss": "fused_cross_entropy", "reduction": reduction}
    for found in ranks.run("call", [{**call, "tensors": t} for t in tensors]):
        torch.testing.assert_close(found["loss"], expected)

    h, w = torch.randn(2, 3, D), torch.randn(V, D)
    expected = F.cross_entropy((h @ w.t()).movedim(2, 1), target, reduction=reduction)
    tensors = [{"input": h, "linear_weight": w[part], "target": target} for part in parts(UNEVEN)]
    call = {"ranks": 4, "loss": "fused_linear_cross_entropy", "reduction": reduction}
    for found in ranks.run("call", [{**call, "tensors": t} for t in tensors]):
        torch.testing.assert_close(found["loss"], expected)


def test_a_masked_shard_and_nan_in_ignored_rows(ranks):
    """All logits of one rank are -inf, and an ignored row is NaN."""
    tensors = problem("some")
    tensors["input"][:, parts(UNEVEN)[2]] = -math.inf
    tensors["target"][2:4] = 1
    expected, grads = alone(KINDS[0], tensors, ["input"], torch.tensor(1.0), ignore_index=IGNORED_IDS)
    tensors["input"][1] = math.nan
    found = run(
        ranks, KINDS[0], tensors, UNEVEN, wanted=["input"], upstream=torch.tensor(1.0), ignore_index=IGNORED_IDS
    )
    torch.testing.assert_close(found[0]["loss"], expected.detach())
    torch.testing.assert_close(joined("input", found, tensors, KINDS[0]), grads["input"])


@pytest.mark.parametrize("loss", KINDS)
def test_second_backward(ranks, loss):
    tensors = tensors_of(loss)
    once = run(ranks, loss, tensors, UNEVEN, wanted=["input"], upstream=torch.tensor(2.0))
    twice = run(ranks, loss, tensors, UNEVEN, wanted=["input"], upstream=torch.tensor(2.0), backwards=2)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(b["input"], 2 * a["input"])


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("full", [False, True], ids=["", "weight, smoothing, stats"])
def test_collectives(ranks, loss, full):
    """Forward takes two collectives. Backward takes none for logits and one for the linear loss."""
    tensors = tensors_of(loss, ignored="some", weighted=full)
    options = {"label_smoothing": 0.1, "return_stats": True} if full else {}
    wanted = ["input", *["linear_weight"] * (loss != KINDS[0])]
    found = run(ranks, loss, tensors, UNEVEN, wanted=wanted, upstream=torch.tensor(1.0), ignore_index=IGNORED_IDS,
                **options)  # fmt: skip
    backward = [] if loss == KINDS[0] else ["all_reduce"]
    for f in found:
        assert f["collectives"] == {"forward": ["all_gather", "all_gather"], "backward": backward}


@pytest.mark.parametrize("loss", KINDS)
def test_frozen_operands_cost_no_collective(ranks, loss):
    wanted = ["linear_weight"] if loss != KINDS[0] else []
    tensors = tensors_of(loss)
    found = run(ranks, loss, tensors, UNEVEN, wanted=wanted, upstream=torch.tensor(1.0) if wanted else None)
    assert all(f["collectives"].get("backward", []) == [] for f in found)


@pytest.mark.parametrize("loss", KINDS)
def test_a_group_of_one_is_one_process(ranks, loss):
    found = run(ranks, loss, tensors_of(loss), (V,), wanted=["input"], upstream=torch.tensor(1.0))
    assert found[0]["collectives"] == {"forward": [], "backward": []}


@pytest.mark.parametrize(("loss", "plan"), [(KINDS[0], None), (KINDS[1], None), (KINDS[1], "vocabulary blocks")])
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
def test_compiled(ranks, loss, plan, probs):
    tensors = tensors_of(loss, ignored="none" if probs else "some", probs=probs, weighted=True)
    options = {"ignore_index": -100 if probs else IGNORED_IDS, "label_smoothing": 0.1, "return_stats": True}
    wanted = ["input", *["linear_weight"] * (loss != KINDS[0])]
    more = {"compiled": "inductor", "plan": plan}
    assert_equal(loss, tensors, wanted, SHARDS["2 uneven"], ranks, more=more, **options)


def bad_target(tensors):
    tensors["target"][3] = V


def negative_target(tensors):
    tensors["target"][3] = -7


def short_target(tensors):
    tensors["target"] = tensors["target"][:-1]


def other_target(tensors):
    tensors["target"] = tensors["target"].flip(0)


def fewer_rows(tensors):
    tensors["target"], tensors["input"] = tensors["target"][:4], tensors["input"][:4]


def other_dtype(tensors):
    for name, t in tensors.items():
        tensors[name] = t.double() if t.is_floating_point() else t


MISTAKES = {
    "target too large": (bad_target, "IndexError", f"target {V} is out of bounds: expected a class in [0, {V})"),
    "target negative": (negative_target, "IndexError", "target -7 is out of bounds"),
    "target shape": (short_target, "ValueError", "to match target batch_size (5)"),
    "other targets": (other_target, "ValueError", "expected the same targets on all ranks, rank 2 differs"),
    "other rows": (fewer_rows, "ValueError", "expected the same numbers of rows on all ranks, rank 2 differs"),
    "other dtype": (other_dtype, "ValueError", "expected the same arguments or dtypes on all ranks"),
}


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize(("break_it", "error", "says"), MISTAKES.values(), ids=MISTAKES)
def test_one_rank_s_mistake_is_the_same_error_on_all(ranks, loss, break_it, error, says):
    """After the error, the ranks can go on with the next call."""
    tensors = tensors_of(loss, ignored="none")
    arguments = []
    for rank, part in enumerate(parts(UNEVEN)):
        own = {name: t.clone() for name, t in tensors.items()}
        if loss == KINDS[0]:
            own["input"] = own["input"][:, part].contiguous()
        else:
            own["linear_weight"] = own["linear_weight"][part]
        if rank == 2:
            break_it(own)
        arguments.append({"ranks": 4, "loss": loss, "tensors": own})
    found = ranks.run("call", arguments)
    assert all(f["error"] == found[0]["error"] for f in found)
    kind, text = found[0]["error"]
    assert kind == error
    assert says in text
    assert "rank 2" in text
    assert "loss" in run(ranks, loss, tensors, UNEVEN)[0]


def test_a_budget_that_one_rank_cannot_meet(ranks):
    tensors = tensors_of(KINDS[1], ignored="none")
    found = run(ranks, KINDS[1], tensors, SHARDS["2 uneven"], wanted=["input"], memory_budget=1000)
    assert all(f["error"][0] == "ValueError" and "memory_budget: expected at least" in f["error"][1] for f in found)
    assert len({f["error"] for f in found}) == 1


def test_create_graph_is_refused(ranks):
    found = ranks.run("second_derivative", [{"ranks": 2}] * 2)
    assert all("create_graph: expected False with a sharded vocabulary" in f for f in found)


@pytest.mark.parametrize("plan_name", [None, "vocabulary blocks"])
@pytest.mark.parametrize("shards", [(40, 30), (5, 0, 45, 20)], ids=["2", "4, one empty"])
def test_log_probs(shards, plan_name, ranks):
    *leaves, y = small_head()
    h, w, b = leaves
    given = y.clone()
    given[1], ignore_index = 50, (-100, 50)  # row 1 is ignored by a class of one of the shards
    upstream = torch.linspace(-1.5, 2.0, len(y), dtype=torch.float64)
    log_probs, entropy = of_pytorch(h, w, b, y)
    dh, dw, db = torch.autograd.grad((log_probs * upstream - 0.3 * entropy * upstream.flip(0)).sum(), leaves)
    options = {"ignore_index": ignore_index, "softcap": CAP, "logit_scale": SCALE, "temperature": TEMPERATURE}
    found = ranks.run(
        "log_probs_and_entropy",
        [
            {
                "ranks": len(shards),
                "tensors": {
                    "input": h.detach(), "linear_weight": w.detach()[part], "linear_bias": b.detach()[part],
                    "target": given,
                },
                "upstream": upstream, "plan": plan_name, **options,
            }
            for part in parts(shards)
        ],
    )  # fmt: skip
    for of_rank in found:
        torch.testing.assert_close(of_rank["log_probs"], log_probs.detach())
        torch.testing.assert_close(of_rank["entropy"], entropy.detach())
        torch.testing.assert_close(of_rank["input"], dh)
    torch.testing.assert_close(torch.cat([f["linear_weight"] for f in found]), dw)
    torch.testing.assert_close(torch.cat([f["linear_bias"] for f in found]), db)
