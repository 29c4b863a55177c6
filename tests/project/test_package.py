"""What an installation must look like, and what importing must not do."""

import importlib.util
from pathlib import Path

import fused_ignore_ce

from ..helpers.paths import ROOT
from ..helpers.processes import python


def test_kernels_shadow_no_other_package():
    """transformers imports a package named `kernels`; ours must not be taken for it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or "site-packages" in str(spec.origin)
    code = "import fused_ignore_ce.kernels.launch as l; from transformers import LlamaForCausalLM; print(l.__name__)"
    assert python(code) == "fused_ignore_ce.kernels.launch"  # with the repository root on sys.path


def test_the_link_leads_to_the_kernels():
    link = ROOT / "fused_ignore_ce" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert link.resolve() == ROOT / "kernels"


def test_import_is_light(tmp_path):
    """Neither Triton nor transformers is imported before it is needed, so a machine without them can start."""
    code = (
        "import sys, torch; before = set(sys.modules); import fused_ignore_ce; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} & {'triton', 'transformers', 'matplotlib'}))"
    )
    assert python(code, cwd=tmp_path) == "[]"


def test_a_cpu_call_needs_no_triton(tmp_path):
    code = (
        "import sys; sys.modules['triton'] = None; import torch, fused_ignore_ce as f; "
        "print(f.fused_cross_entropy(torch.zeros(2, 4), torch.tensor([1, 2])).item())"
    )
    assert python(code, cwd=tmp_path).startswith("1.386")


def test_public_names_are_documented():
    for name in fused_ignore_ce.__all__:
        assert getattr(fused_ignore_ce, name).__doc__, name
    assert (ROOT / "fused_ignore_ce" / "py.typed").exists()
