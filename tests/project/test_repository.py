"""The files that GitHub and pre-commit read match their schemas, and name commands that exist."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ..helpers.paths import ROOT

yaml = pytest.importorskip("yaml")

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
VERBS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def read(path):
    return yaml.safe_load(path.read_text())


def jobs():
    return {name: job for path in WORKFLOWS for name, job in read(path)["jobs"].items()}


def commands(job):
    """What a job's steps run, for every entry of its matrix."""
    entries = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
    for step in job["steps"]:
        for entry in entries:
            text = step.get("run", "")
            for key, value in entry.items():
                text = text.replace(f"${{{{ matrix.{key} }}}}", value)
            yield text


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("github-workflows", WORKFLOWS),
        ("github-issue-forms", FORMS),
        ("github-issue-config", [GITHUB / "ISSUE_TEMPLATE" / "config.yml"]),
        ("dependabot", [GITHUB / "dependabot.yml"]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_are_of_their_schema(schema, paths):
    """The package check-jsonschema contains the schemas, so that nothing is fetched."""
    if find_spec("check_jsonschema") is None:
        pytest.skip("check-jsonschema, which has the schemas, is not installed")
    assert paths
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_workflows_call_verbs_that_exist():
    called = {verb for job in jobs().values() for text in commands(job) for verb in re.findall(r"\bmake (\S+)", text)}
    assert {"check", "test", "test-oldest", "test-newest", "test-transformers-4", "docs", "gpu"} <= called
    assert called <= VERBS, called - VERBS


def test_workflows_and_hooks_run_modules_that_exist():
    texts = [text for job in jobs().values() for text in commands(job)]
    texts += (ROOT / "Makefile").read_text().splitlines()
    modules = {name for text in texts for name in re.findall(r"python -m ([\w.]+)", text)}
    assert {"fused_ignore_ce", "scripts.release", "bench.gpu"} <= modules
    for name in modules - {"build", "pip", "pytest", "venv"}:
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_tests_run_on_every_python_that_is_promised():
    from scripts import project

    promised = [line for line in project.metadata()["classifiers"] if "Python :: 3." in line]
    run = jobs()["tests"]["strategy"]["matrix"]["python"]
    assert [line.rpartition(" ")[2] for line in promised] == run
    assert project.metadata()["requires-python"] == f">={run[0]}"


def test_workflows_hold_few_rights():
    """Workflows may only read, except for the job that publishes. Pull requests do not run on a GPU."""
    for path in WORKFLOWS:
        assert read(path)["permissions"] == {"contents": "read"}
    for name, job in jobs().items():
        assert job.get("permissions") == ({"id-token": "write"} if name == "publish" else None)
        assert "timeout-minutes" in job
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
    assert "vars.GPU_RUNNER != ''" in jobs()["gpu"]["if"]
    assert "github.event_name != 'pull_request'" in jobs()["gpu"]["if"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_ask_for_the_environment(path):
    fields = {field["id"]: field for field in read(path)["body"] if field["type"] != "markdown"}
    assert "python -m fused_ignore_ce env" in fields["env"]["attributes"]["label"]
    assert fields["env"]["validations"]["required"]


def test_hooks_are_the_environments_own_tools():
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    tools = [hook["entry"].split()[0] for hook in repository["hooks"]]
    assert tools == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/mypy"]
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    checked = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    assert all(f"$(BIN)/{tool.rpartition('/')[2]}" in checked for tool in tools)


def test_contributing_names_every_verb_and_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for verb in VERBS - {"clean"}:
        assert f"`make {verb}" in text, verb
    for folder in ("bench", "docs", "examples", "kernels", "scripts", "tests"):
        assert f"`{folder}/" in text, folder
    for command in re.findall(r"`make ([a-z0-9-]+)", text):
        assert command in VERBS, command
    for path in re.findall(r"`((?:bench|docs|examples|kernels|scripts|tests|\.github)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_contributing_names_every_part():
    """Every file of the package and of scripts/, and every file and folder at the top of bench/."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = {name.rpartition("/")[2] for name in re.findall(r"`([\w/]+\.py)`", text)}
    for folder in ("fused_ignore_ce", "kernels", "scripts"):
        files = {path.name for path in (ROOT / folder).rglob("*.py")} - {"__init__.py"}
        assert files <= named, f"{folder}: {sorted(files - named)}"
    bench = {path for path in (ROOT / "bench").iterdir() if not path.name.startswith(("_", "."))}
    assert {path.name for path in bench if path.suffix == ".py"} <= named
    for path in bench:
        assert not path.is_dir() or f"{path.name}/" in text or f"`bench/{path.name}`" in text, path


#: Files that users write, or that other programs do.
OF_OTHERS = {"my_plugins.py", "train.py", "metadata.json", "gpt_builders.py"}

#: These name files of other packages, in which answers were read.
ABOUT_OTHERS = ("bench/comparison/rows.py", "docs/comparison.md")


def test_files_that_text_names_exist():
    """Docstrings, comments and pages name no file that has moved."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this copy of the project is no git repository, whose files could be listed")
    paths = listed.stdout.split()
    ends = {"/".join(Path(path).parts[-n:]) for path in paths for n in range(1, len(Path(path).parts) + 1)}
    wrong = []
    for path in paths:
        if path.endswith((".py", ".md")) and path not in ("CHANGELOG.md", *ABOUT_OTHERS):
            for name in re.findall(r"`([\w./-]+\.(?:py|json|c|toml|txt))`", (ROOT / path).read_text()):
                if name.removeprefix("../") not in ends | OF_OTHERS:
                    wrong.append(f"{path}: {name}")
    assert not wrong
