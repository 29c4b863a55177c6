"""The fixtures of all tests, and what a run sets before anything is imported."""

import atexit
import gc
import importlib.util
import os
import shutil
import sys
import tempfile

import pytest
import torch

from .helpers.device import DEVICE
from .helpers.judging import no_worse as judge
from .helpers.paths import ROOT
from .helpers.quick import select
from .helpers.versions import release

COMPILED = os.environ.get("TEST_COMPILED")  # an architecture, such as 90: see bench/proofs/emulator
if COMPILED:
    os.environ.pop("TRITON_INTERPRET", None)
elif DEVICE == "cpu":
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


if DEVICE == "cpu" and not COMPILED and release("triton") >= (3, 7):
    from .helpers.interpreter import make_it_fast

    make_it_fast()


def _import_from_root(name):
    """Makes only this package importable. With the repository's root on sys.path, `kernels` would be, too."""
    spec = importlib.util.spec_from_file_location(name, ROOT / name / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_import_from_root("bench")
_import_from_root("scripts")

if COMPILED:
    from bench.proofs.emulator.launching import emulated

    emulator = emulated(int(COMPILED), all_orders=True)
    emulator.__enter__()


def pytest_unconfigure():
    if COMPILED:
        emulator.__exit__(None, None, None)


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


@pytest.fixture
def no_worse():
    """The rule by which results are judged, see `helpers/judging.py`."""
    return judge


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
    from fused_ignore_ce.deferred import affine, loss

    taken = []

    def spy(module, name, what):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (taken.append(what), original(*a, **k))[1])

    spy(affine, "fused_linear_cross_entropy", "linear")
    spy(loss, "fused_cross_entropy", "logits")
    return taken


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Four processes of a gloo group, see `helpers/ranks.py`."""
    from .helpers.ranks import Ranks

    group = Ranks(4, tmp_path_factory)
    yield group
    group.stop()
