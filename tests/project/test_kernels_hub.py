"""The layout that Hugging Face's `kernels` loads, and what it asks of the package: relative imports only."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fused_ignore_ce
from scripts import kernels_hub

PACKAGE = Path(fused_ignore_ce.__file__).parent
NAMES = [name for name, _ in kernels_hub.sources()]

#: What a file may import at its top. What only an extra installs is imported where it is needed.
INSTALLED = {*sys.stdlib_module_names, "torch", "triton", "typing_extensions", "numpy"}

LOAD = """
import importlib, sys, torch
import torch.nn.functional as F
from pathlib import Path
from kernels import get_local_kernel

losses = get_local_kernel(Path(sys.argv[1]))
assert losses.__name__ == sys.argv[2], losses.__name__
for name in sys.argv[3:]:
    importlib.import_module(f"{losses.__name__}.{name}")
assert not [name for name in sys.modules if name.startswith("fused_ignore_ce")]

x = torch.randn(6, 300, requires_grad=True)
y = torch.tensor([0, 299, -100, 5, -100, 17])
expected = F.cross_entropy(x, y)
expected_dx, = torch.autograd.grad(expected, x)
compiled = torch.compile(losses.fused_cross_entropy, backend="aot_eager", fullgraph=True)
for loss in (
    losses.fused_cross_entropy(x, y),
    losses.fused_cross_entropy(x, y, backend="triton"),
    losses.fused_linear_cross_entropy(x, torch.eye(300), y),
    compiled(x, y),
):
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected_dx)

import fused_ignore_ce  # the installed one, beside the loaded one

assert fused_ignore_ce.fused_cross_entropy is not losses.fused_cross_entropy
both = torch.compile(fused_ignore_ce.fused_cross_entropy, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(both(x, y), expected)
torch.testing.assert_close(compiled(x.detach(), y), expected.detach())
own = getattr(torch.ops, losses.__name__).cross_entropy_forward.default
assert own is not torch.ops.fused_ignore_ce.cross_entropy_forward.default
print("loaded")
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "fused-ignore-ce"
    kernels_hub.write(out)
    return out


def entry(repository):
    return json.loads((repository / "build" / "torch-universal" / "metadata.json").read_text())


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".py")])
def test_a_file_imports_its_own_package_relatively(name):
    tree = ast.parse((PACKAGE / name).read_text())
    lazy = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported = set() if node.level else {node.module.partition(".")[0]}
        else:
            continue
        assert not imported & {"fused_ignore_ce", "kernels"}, f"{name}:{node.lineno}"
        assert node in lazy or imported <= INSTALLED, f"{name}:{node.lineno}"


def test_the_repository_holds_the_package_and_its_kernels(repository):
    variant = repository / "build" / "torch-universal"
    for name in NAMES:
        assert (variant / name).read_bytes() == (PACKAGE / name).read_bytes()
    assert {"kernels/forward.py", "kernels/tables.json", "linear/sweep.py", "hf/patching.py"} <= set(NAMES)
    assert not [path for path in repository.rglob("*") if path.is_symlink()]
    assert (repository / "LICENSE").exists()
    assert "get_kernel" in (repository / "README.md").read_text()


def test_the_id_changes_with_the_content(repository, tmp_path, monkeypatch):
    before = entry(repository)["id"]
    assert before.isidentifier()
    files = [*kernels_hub.sources(), ("another.py", b"")]
    monkeypatch.setattr(kernels_hub, "sources", lambda: iter(files))
    kernels_hub.write(tmp_path / "other")
    assert entry(tmp_path / "other")["id"] != before


def test_only_a_kernel_repository_is_replaced(repository, tmp_path):
    kernels_hub.write(repository)  # once more
    (tmp_path / "precious.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="kernel repository"):
        kernels_hub.write(tmp_path)
    assert (tmp_path / "precious.txt").exists()


def test_kernels_loads_it(repository, tmp_path):
    """It gets a name of its own, also beside an installed package. The Triton kernels run in Triton's interpreter."""
    pytest.importorskip("kernels.load", reason="make test-kernels-hub installs it")
    modules = [n[:-3].replace("/", ".").removesuffix(".__init__") for n in NAMES if n.endswith(".py")]
    code = [sys.executable, "-c", LOAD, str(repository), entry(repository)["id"], *modules]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(code, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "loaded"


def test_older_releases_of_kernels_find_it(repository):
    """Older releases import the folder that has the package's name."""
    path = repository / "build" / "torch-universal" / "fused_ignore_ce" / "__init__.py"
    spec = importlib.util.spec_from_file_location("found_by_its_folder", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        assert set(module.__all__) == set(fused_ignore_ce.__all__)
        assert module.fused_cross_entropy.__module__ == f"{entry(repository)['id']}.losses.cross_entropy"
    finally:
        for name in [name for name in sys.modules if name.startswith(entry(repository)["id"])]:
            del sys.modules[name]
