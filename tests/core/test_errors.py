"""Bad input: PyTorch's class of error, a message that names the argument, nothing written."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import FusedCrossEntropyLoss, fused_cross_entropy, fused_linear_cross_entropy

X = torch.randn(3, 5)
Y = torch.tensor([1, 2, -100])

#: (name, arguments, keywords): mistakes that F.cross_entropy rejects too.
MISTAKES = [
    ("int32 target", (X, Y.int()), {}),
    ("bool target", (X, Y > 0), {}),
    ("float target of another shape", (X, torch.rand(3)), {}),
    ("integer target of input's shape", (X, torch.zeros(3, 5, dtype=torch.long)), {}),
    ("batch mismatch", (X, Y[:2]), {}),
    ("0-d input", (torch.tensor(1.0), torch.tensor(0)), {}),
    ("target with a dimension too many", (X, Y[:, None]), {}),
    ("spatial mismatch", (torch.randn(2, 5, 3), torch.zeros(2, 4, dtype=torch.long)), {}),
    ("spatial rank", (torch.randn(2, 5, 3, 3), torch.zeros(2, 3, dtype=torch.long)), {}),
    ("target past the classes", (X, torch.tensor([1, 2, 5])), {}),
    ("negative target", (X, torch.tensor([1, 2, -1])), {}),
    ("target for no classes", (torch.randn(2, 0), torch.tensor([0, 0])), {}),
    ("weight length", (X, Y, torch.ones(4)), {}),
    ("weight rank", (X, Y, torch.ones(1, 5)), {}),
    ("weight dtype", (X, Y, torch.ones(5).double()), {}),
    ("integer weight", (X, Y, torch.ones(5).long()), {}),
    ("weight that wants a gradient", (X, Y, torch.ones(5, requires_grad=True)), {}),
    ("ignore_index with probabilities", (X, torch.rand(3, 5)), {"ignore_index": 3}),
    ("reduction", (X, Y), {"reduction": "average"}),
    ("smoothing", (X, Y), {"label_smoothing": 1.5}),
    ("integer logits", (X.long(), Y), {}),
    ("complex logits", (X + 0j, Y), {}),
    ("no tensor", ([1.0], Y), {}),
    ("another device", (X, Y.to("meta")), {}),
    ("unknown keyword", (X, Y), {"label_smothing": 0.1}),
]


@pytest.mark.parametrize(("args", "kwargs"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_same_class_as_pytorch(args, kwargs, backend):
    with pytest.raises(Exception) as theirs:  # noqa: PT011 (whatever PyTorch raises is what we have to raise)
        F.cross_entropy(*args, **kwargs)
    with pytest.raises(theirs.type):
        fused_cross_entropy(*args, backend=backend, **kwargs)


def test_a_right_call_makes_no_other_call_right(backend):
    """A checked call is remembered together with everything that the checks depend on."""
    weight, probs, tokens = torch.ones(5, requires_grad=True), torch.rand(3, 5), torch.ones(3)
    with torch.no_grad():
        fused_cross_entropy(X, Y, weight, backend=backend)
    with pytest.raises(RuntimeError, match="weight: no gradient"):
        fused_cross_entropy(X, Y, weight, backend=backend)
    fused_cross_entropy(X, probs, ignore_index=-3, backend=backend)
    with pytest.raises(RuntimeError, match="ignore_index"):
        fused_cross_entropy(X, probs, ignore_index=3, backend=backend)
    fused_cross_entropy(X, Y, token_weight=tokens, backend=backend)
    with pytest.raises(TypeError, match="token_weight"):
        fused_cross_entropy(X, Y, token_weight=tokens.long(), backend=backend)
    with pytest.raises(ValueError, match="backend"):
        fused_cross_entropy(X, Y, backend="cuda")


def test_what_is_remembered_of_a_call_is_the_calls(backend):
    half = X.bfloat16()

    def loss(**options):
        return fused_cross_entropy(half, Y, backend=backend, **options)

    first = loss()
    assert first.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss().dtype == torch.float32
    assert loss(loss_dtype=torch.float64).dtype == torch.float64
    assert len(loss(return_stats=True)) == 2
    assert loss(reduction="none").shape == (3,)
    assert loss(ignore_index=[2, 1, -100]).isnan()
    softcap = torch.tensor(30.0)
    loss(softcap=softcap)
    assert torch.equal(loss(softcap=softcap.fill_(1.0)), loss(softcap=1.0))
    assert torch.equal(loss(), first)


#: (name, keywords, class, what the message must say): mistakes that are ours to reject.
OWN_MISTAKES = [
    ("softcap", {"softcap": 0.0}, ValueError, "softcap.*above 0.*0.0"),
    ("infinite softcap", {"softcap": float("inf")}, ValueError, "softcap.*finite.*inf"),
    ("text", {"softcap": "30"}, TypeError, "softcap: expected a number, got '30'"),
    ("z_loss", {"z_loss": float("nan")}, ValueError, "z_loss.*finite.*nan"),
    ("tensor of ids", {"ignore_index": torch.tensor([1, 2])}, TypeError, "ignore_index.*tolist"),
    ("negative smoothing", {"label_smoothing": -0.1}, RuntimeError, "label_smoothing.*-0.1"),
    ("float id", {"ignore_index": 1.5}, TypeError, "ignore_index.*1.5"),
    ("bool id", {"ignore_index": True}, TypeError, "ignore_index.*True"),
    ("text id", {"ignore_index": "pad"}, TypeError, "ignore_index.*pad"),
    ("no ids", {"ignore_index": []}, ValueError, "ignore_index.*at least one"),
    ("normalizer with sum", {"normalizer": 3, "reduction": "sum"}, ValueError, "normalizer.*mean.*sum"),
    ("normalizer shape", {"normalizer": torch.ones(3)}, ValueError, r"normalizer.*0-d.*\(3,\)"),
    ("token_weight shape", {"token_weight": torch.ones(2)}, ValueError, r"token_weight.*\(3,\).*\(2,\)"),
    ("token_weight dtype", {"token_weight": torch.ones(3).long()}, TypeError, "token_weight.*int64"),
    ("backend", {"backend": "cuda"}, ValueError, "backend.*cuda"),
    (
        "process_group",
        {"process_group": object()},
        TypeError,
        "process_group: expected a torch.distributed ProcessGroup",
    ),
]


@pytest.mark.parametrize(("kwargs", "error", "says"), [m[1:] for m in OWN_MISTAKES], ids=[m[0] for m in OWN_MISTAKES])
def test_own_errors_name_the_argument(kwargs, error, says):
    with pytest.raises(error, match=says):
        fused_cross_entropy(X, Y, **kwargs)


@pytest.mark.parametrize(("kwargs", "error", "says"), [m[1:] for m in OWN_MISTAKES], ids=[m[0] for m in OWN_MISTAKES])
def test_the_module_rejects_options_when_built(kwargs, error, says):
    if kwargs.keys() & {"normalizer", "token_weight"}:
        with pytest.raises(error, match=says):
            FusedCrossEntropyLoss(reduction=kwargs.pop("reduction", "mean"))(X, Y, **kwargs)
    else:
        with pytest.raises(error, match=says):
            FusedCrossEntropyLoss(**kwargs)


@pytest.mark.parametrize("target", [5, -1, 2**40, -(2**40)])
def test_out_of_range_reads_and_writes_nothing(target, backend):
    """The logits lie between guard rows. A target out of range is an error before anything is written."""
    guarded = torch.full((9, 5), float("nan"))
    x = guarded[3:6]
    x.copy_(X)
    before = guarded.clone()
    x = x.requires_grad_()
    with pytest.raises(IndexError, match=rf"target {target} is out of bounds.*\[0, 5\).*-100"):
        fused_cross_entropy(x, torch.tensor([1, target, -100]), backend=backend, inplace_backward=True)
    torch.testing.assert_close(guarded, before, equal_nan=True)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@pytest.mark.parametrize("ignore_index", [-1, [-1]], ids=str)
def test_ignore_index_replaces_minus_100_and_the_error_says_so(ignore_index, linear, backend):
    h, w, y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([1, -1, -100, 2])

    def loss(y, ignore_index):
        if linear:
            return fused_linear_cross_entropy(h, w, y, ignore_index=ignore_index, backend=backend)
        return fused_cross_entropy(h @ w.T, y, ignore_index=ignore_index, backend=backend)

    with pytest.raises(IndexError, match=r"target -100 is out of bounds.*replaces -100.*ignore_index=\[-100, -1\]$"):
        loss(y, ignore_index)
    with pytest.raises(IndexError, match=r"ignore_index=-1$"):  # the message does not speak of -100
        loss(torch.tensor([1, -1, 7, 2]), ignore_index)
    torch.testing.assert_close(loss(y, [-100, -1]), loss(torch.tensor([1, -100, -100, 2]), -100))


def test_ignore_index_none_is_minus_100(backend):
    y = torch.tensor([1, -100, 2])
    assert torch.equal(
        fused_cross_entropy(X, y, ignore_index=None, backend=backend), fused_cross_entropy(X, y, backend=backend)
    )


def test_likely_mistakes_are_named():
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with pytest.raises(NotImplementedError, match="input and target seem to be swapped"):
        fused_cross_entropy(target, logits)
    with pytest.raises(RuntimeError, match=r"got torch\.int32; pass target\.long\(\)"):
        fused_cross_entropy(logits, target.int())
    with pytest.raises(TypeError, match="linear_weight: expected a Tensor, got Linear; pass its weight"):
        fused_linear_cross_entropy(logits, torch.nn.Linear(5, 7), target)
