"""The wheel and the sdist: what they hold, and that a wheel works where nothing of the repository is in reach."""

import email
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fused_ignore_ce
from scripts import project, release

from ..helpers.paths import ROOT

VERSION = fused_ignore_ce.__version__

#: What is tried in the environment: losses and gradients, the kernels and their tables, the type marker.
SCRIPT = """
import importlib, json
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
import fused_ignore_ce as f

x = torch.randn(6, 50, requires_grad=True)
y = torch.tensor([0, 49, -100, 5, -100, 17])
expected = F.cross_entropy(x, y)
for loss in (
    f.fused_cross_entropy(x, y),
    f.FusedCrossEntropyLoss()(x, y),
    f.fused_linear_cross_entropy(x, torch.eye(50), y),
):
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x, retain_graph=True))
kernels = importlib.import_module("fused_ignore_ce.kernels.forward")
tables = json.loads(files("fused_ignore_ce.kernels").joinpath("tables.json").read_text())
print(json.dumps({
    "package": f.__file__, "kernels": kernels.__file__, "version": f.__version__, "tables": tables,
    "typed": files("fused_ignore_ce").joinpath("py.typed").is_file(),
    "reachable": [name for name in ("bench", "tests", "scripts") if importlib.util.find_spec(name)],
}))
"""


def listed(root, *arguments):
    """Names of files that git knows or would add."""
    done = subprocess.run(["git", "ls-files", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist) of the files as they are now; the wheel is built from the sdist."""
    for module in ("build", "twine", "check_wheel_contents"):
        pytest.importorskip(module)
    copy = tmp_path_factory.mktemp("copy")
    names = [name for name in listed(ROOT, "-co", "--exclude-standard") if os.path.lexists(ROOT / name)]
    for name in names:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())
    return release.build(copy, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def interpreter(built, tmp_path_factory):
    """Python of an environment with the wheel. It also sees this environment's packages, but not this repository."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    (site,) = (path for path in environment.rglob("site-packages") if not path.parent.is_symlink())
    # Python searches a path in a .pth file, but reads no .pth files there, so that an editable install is not found.
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    install = ["-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(built[0])]
    subprocess.run([sys.executable, *install], check=True)
    return python


def run(python, *arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True, text=True).stdout


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    package = {
        name for name in listed(ROOT, "-co", "--exclude-standard", "fused_ignore_ce") if Path(ROOT, name).is_file()
    }
    kernels = {f"fused_ignore_ce/{name}" for name in listed(ROOT, "-co", "--exclude-standard", "kernels")}
    assert {"fused_ignore_ce/kernels/forward.py", "fused_ignore_ce/kernels/tables.json"} <= kernels
    assert "fused_ignore_ce/py.typed" in package
    own = {name for name in names if not name.startswith(f"fused_ignore_ce-{VERSION}.dist-info/")}
    assert own == package | kernels


def test_the_sdist_holds_what_the_wheel_is_built_from(built):
    with tarfile.open(built[1]) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= set(members)
    assert members["fused_ignore_ce/kernels/forward.py"].isfile()  # where the repository has a symbolic link
    assert not {name.partition("/")[0] for name in members} & {
        "kernels",
        "tests",
        "bench",
        "docs",
        "examples",
        "scripts",
    }


def test_what_an_index_shows(built):
    wheel = zipfile.ZipFile(built[0])
    said = email.message_from_bytes(wheel.read(f"fused_ignore_ce-{VERSION}.dist-info/METADATA"))
    assert said["Version"] == VERSION
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Author"] == "The fused_ignore_ce maintainers"
    assert not [line for line in said.get_all("Classifier") if line.startswith("License")]
    assert not said.get_all("Project-URL")  # until the repository is published
    assert set(said.get_all("Provides-Extra")) == set(project.metadata()["optional-dependencies"])


def test_the_wheel_works_in_an_empty_folder(interpreter, tmp_path):
    said = json.loads(run(interpreter, "-c", SCRIPT, cwd=tmp_path))
    home = interpreter.parent.parent
    assert Path(said["package"]).is_relative_to(home)
    assert Path(said["kernels"]).is_relative_to(home)
    assert said["version"] == VERSION
    assert said["typed"]
    assert said["tables"] == json.loads((ROOT / "kernels" / "tables.json").read_text())
    assert said["reachable"] == []


def test_its_commands_work_in_an_empty_folder(interpreter, tmp_path):
    lines = run(interpreter, "-m", "fused_ignore_ce", "env", cwd=tmp_path).splitlines()
    assert lines[0].split() == ["fused_ignore_ce", VERSION]
    assert any(line.split()[0] == "cpu" and "backend: " in line for line in lines)
    plan = ("plan", "--model-shape", "128256x4096", "--tokens", "8192")
    assert "GiB" in run(interpreter, "-m", "fused_ignore_ce", *plan, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
