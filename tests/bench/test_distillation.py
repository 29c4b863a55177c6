"""The distillation losses that are compared compute the same, and the picture has their figures."""

import os

import pytest
import torch

pytest.importorskip("tabulate")
pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from bench import distillation
from bench.comparison.peers import as_in_kernels
from bench.packages import version
from bench.speed import plots
from fused_ignore_ce import fused_distillation_loss

SMALL = distillation.Case(12, 40, 8, 0.5, 0.3)


@pytest.mark.parametrize("name", distillation.LOSSES)
def test_losses_are_the_divergence_they_are_compared_by(name):
    if name not in distillation.installed():
        pytest.skip(f"the package of {name} is not installed")
    for case in (SMALL, SMALL._replace(beta=0.0)):
        assert max(distillation.errors(distillation.LOSSES[name][1], case)) < 0.05  # some round to bfloat16 all along


@pytest.mark.skipif(not version("liger-kernel"), reason="Liger is not installed")
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on CPU tensors, Liger's kernel needs Triton's interpreter"
)
def test_the_kernel_of_liger_has_the_same_value_and_gradient():
    from liger_kernel.ops.jsd import LigerJSDFunction

    *operands, y = SMALL.tensors()
    h, w, th, tw = (t.detach().float() for t in operands)
    own, theirs = (h @ w.T).requires_grad_(), (h @ w.T).requires_grad_()
    teacher = th @ tw.T
    mine = fused_distillation_loss(own, teacher, y, divergence="jsd", beta=SMALL.beta)
    with as_in_kernels():
        value = LigerJSDFunction.apply(theirs.log_softmax(-1), teacher.log_softmax(-1), y, SMALL.beta, -100)
        (found,) = torch.autograd.grad(value, theirs)
    torch.testing.assert_close(value, mine, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, torch.autograd.grad(mine, own)[0], rtol=1e-4, atol=1e-6)


def test_medians_and_peaks_are_measured():
    name = "fused_linear_distillation_loss"
    ms = distillation.milliseconds(distillation.installed(), SMALL, rounds=1)
    assert set(ms) == set(distillation.installed())
    case = distillation.Case(256, 65536, 16, 0.0, 0.5)
    plain, fused = (distillation.machine.in_processes(distillation.peak, n, case)[0] for n in (next(iter(ms)), name))
    assert plain > 4 * 4 * case.N * case.V > fused


def test_the_picture_has_times_and_peaks_of_the_vocabularies():
    rows = [
        {**case._asdict(), "compared": case in distillation.COMPARED, "loss": name, "ms": 1.0, "bytes": 2**20}
        for case in (*distillation.COMPARED, *distillation.DRAWN)
        for name in distillation.LOSSES
    ]
    data = plots.distillation(rows)
    assert set(data["x"]) == {case.V for case in distillation.DRAWN}
    assert set(data["measure"]) == {plots.TIME, plots.PEAK}
