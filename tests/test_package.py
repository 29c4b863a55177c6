"""What an installation must look like, and what importing must not do."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import fused_ignore_ce

ROOT = Path(__file__).parent.parent


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


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_distributions_hold_the_kernels_and_nothing_else(kind, tmp_path):
    """Built without isolation, from what the environment has."""
    backend = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(tmp_path)!r}))"
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    built = tmp_path / python(backend, cwd=copy).splitlines()[-1]
    if kind == "wheel":
        import zipfile

        names = zipfile.ZipFile(built).namelist()
        assert {n.split("/")[0] for n in names} == {"fused_ignore_ce", "fused_ignore_ce-0.1.0.dist-info"}
        assert "fused_ignore_ce/kernels/forward.py" in names
        assert "fused_ignore_ce/kernels/tables.json" in names
        assert "fused_ignore_ce/py.typed" in names
    else:
        import tarfile

        with tarfile.open(built) as archive:
            names = archive.getnames()
            assert all(
                any(name.endswith(f"kernels/{file}") for name in names) for file in ("forward.py", "tables.json")
            )
