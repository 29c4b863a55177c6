"""What an installation must look like, and what importing must not do."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import fused_ignore_ce
from fused_ignore_ce.core.extras import needed
from scripts import project

ROOT = Path(__file__).parents[2]


def python(code: str, *flags: str, cwd: Path = ROOT) -> str:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout.strip()


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


@pytest.mark.parametrize(
    ("missing", "extra", "calls"),
    [
        ("transformers", "hf", ("patch_model(torch.nn.Linear(1, 1))", "patch_transformers()")),
        ("trl", "trl", ("patch_trainer(object())",)),
    ],
)
def test_what_is_missing_is_named_with_its_extra(missing, extra, calls, tmp_path):
    code = f"""
import sys
sys.modules[{missing!r}] = None  # importing it fails
import torch
from fused_ignore_ce import {extra} as module
for call in {calls!r}:
    try:
        eval(f"module.{{call}}")
    except ModuleNotFoundError as e:
        print(e.name, e)
"""
    expected = f"{missing}: needed here and not installed; pip install 'fused_ignore_ce[{extra}]'"
    assert python(code, cwd=tmp_path).splitlines() == [f"{missing} {expected}"] * len(calls)
    assert any(missing in line for line in project.metadata()["optional-dependencies"][extra])


def test_an_extra_is_not_blamed_for_what_its_package_lacks(tmp_path, monkeypatch):
    (tmp_path / "broken_extra.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError) as raised:
        needed("broken_extra", "hf")
    assert raised.value.name == "not_there_at_all"
