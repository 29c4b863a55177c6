"""Shared by all tests: the device, poisoned memory, and the rule by which results are judged.

Without a CUDA device, the Triton kernels run in Triton's interpreter on CPU tensors.
"""

import atexit
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from .helpers.quick import select
from .helpers.versions import release

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
else:  # cuBLAS refuses matrix products in deterministic mode without it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if "PYTEST_XDIST_WORKER" in os.environ:  # one core per process
    torch.set_num_threads(1)
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    # PyTorch's compile cache confuses code for AVX-512 with code for AVX2: the result is wrong, or the process dies. So
    # a run never finds what another one compiled. The processes of one run share the folder.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="fused_ignore_ce-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


if DEVICE == "cpu" and release("triton") >= (3, 7):
    from .helpers.interpreter import make_it_fast

    make_it_fast()


def _import_from_root(name):
    """Makes only this package importable. With the repository's root on sys.path, `kernels` would be, too."""
    file = Path(__file__).parent.parent / name / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_import_from_root("bench")
_import_from_root("scripts")


def pytest_addoption(parser):
    help = "one case of every test and backend, see tests/helpers/quick.py"
    parser.addoption("--quick", action="store_true", help=help)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        items[:], left_out = select(items)
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish():
    """Excludes what the test modules imported from garbage collection, which would take a fifth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """Every run draws the same numbers. Memory that nobody wrote is NaN: PyTorch fills it in deterministic mode."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def precision_of_its_own(monkeypatch):
    """Resets mixed precision: transformers 4 leaves a trainer's in the environment, and accelerate in its state."""
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def triton_kernels():
    """Skips the test where the kernels cannot run."""
    if DEVICE == "cpu" and release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 takes no range over a tensor from NumPy 2.4 on")


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        request.getfixturevalue("triton_kernels")
    return request.param


def _worst(name, ours, ref, gt, tiny):
    error_ours, error_ref = (gt - ours).abs(), (gt - ref).abs()
    at = int(error_ours.argmax())
    return (
        f"{name}: off by {error_ours.max():.3e} at flat position {at} (ours {ours.flatten()[at]:.9g}, true "
        f"{gt.flatten()[at]:.9g}), PyTorch is off by {error_ref.max():.3e} and {tiny:.3e} more are allowed"
    )


@pytest.fixture
def no_worse():
    """`|gt - ours| <= |gt - ref| + tiny`, in the largest element: ours may not be worse than PyTorch.

    `gt` is the truth, in float64, and `ref` is PyTorch in the dtype of ours. One run of PyTorch shows one draw of its
    rounding errors. Another order of summation, which another processor or another matrix product kernel may choose,
    shows another draw. `tiny` bounds how far two draws lie apart, as a sum of these parts:

    - 2 units in the last place of the result's dtype, and 2 of `via`, the dtype to which values on the way are rounded;
    - sqrt(terms) units of the dtype in which sums are computed, for sums of `terms` numbers. Rounding errors are
      independent of each other, so those of a sum grow with the root of its length. This is six standard deviations
      of numbers of one sign that are added one after the other; any other order is more accurate (Higham and Mary, "A
      new approach to probabilistic rounding error analysis", 2019);
    - `logits` such units, if logits are as large as that: the last place of a logit of 100 is worth 100 units, and the
      probability changes by as much relative to itself.

    A unit is relative to the largest value of `gt`, or to `scale` if that is larger: the size of the terms of a sum
    that may cancel, as in a gradient's p - 1. Float64 results, whose truth is itself rounded, may differ from it by
    1e-14 absolute and 1e-12 relative.
    """

    def check(name, ours, ref, gt, *, terms, logits=1.0, via=None, scale=0.0):
        assert ours.shape == ref.shape, f"{name}: shape {tuple(ours.shape)}, PyTorch has {tuple(ref.shape)}"
        assert ours.dtype == ref.dtype, f"{name}: dtype {ours.dtype}, PyTorch has {ref.dtype}"
        relative = 2 * sum(torch.finfo(dtype).eps for dtype in (ours.dtype, via) if dtype is not None)
        relative, floor = relative + (terms**0.5 + logits) * torch.finfo(torch.float32).eps, 0.0
        if ours.dtype == torch.float64:
            relative, floor = 1e-12, 1e-14
        ours, ref, gt = ours.detach().double().cpu(), ref.detach().double().cpu(), gt.detach().double().cpu()
        odd = ~gt.isfinite()
        assert ((ours == gt) | (ours.isnan() & gt.isnan()))[odd].all(), f"{name}: NaN or inf differ"
        ours, ref, gt = ours[~odd], ref[~odd], gt[~odd]
        if gt.numel():
            tiny = relative * max(gt.abs().max(), scale) + floor
            assert (gt - ours).abs().max() <= (gt - ref).abs().max() + tiny, _worst(name, ours, ref, gt, tiny)

    return check


@pytest.fixture(params=["one block", "token chunks", "vocabulary blocks"])
def plan(request, monkeypatch):
    """Forces a plan of the linear loss, with chunks and blocks that divide nothing."""
    from fused_ignore_ce.linear import calls
    from fused_ignore_ce.linear.plan import LinearPlan

    def choose(sizes, memory_budget):
        blocks = max(1, sizes.V * 2 // 5)
        chunk = {"one block": max(sizes.N, 1), "token chunks": 3, "vocabulary blocks": blocks}[request.param]
        return LinearPlan(request.param, chunk, 0)

    monkeypatch.setattr(calls, "choose", choose)
    return request.param


@pytest.fixture
def took(monkeypatch):
    """How the losses of a patched model were computed: "linear" from hidden states, "logits" from logits."""
    from fused_ignore_ce.deferred import loss, product

    taken = []

    def spy(module, name, what):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (taken.append(what), original(*a, **k))[1])

    spy(product, "fused_linear_cross_entropy", "linear")
    spy(loss, "fused_cross_entropy", "logits")
    return taken


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Four processes of a gloo group, see `helpers/ranks.py`."""
    from .helpers.ranks import Ranks

    group = Ranks(4, tmp_path_factory)
    yield group
    group.stop()
