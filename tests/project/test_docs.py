"""The README and docs/: their code runs, their commands parse, their links lead somewhere, the site builds."""

import inspect
import os
import pydoc
import re
import shlex
import subprocess
import sys
import types

import pytest
import torch
from transformers.models.llama import modeling_llama

import fused_ignore_ce.__main__ as command_line

from ..helpers.hf_worker import batches, llama
from ..helpers.paths import ROOT
from ..helpers.snippets import DOCS, PAGES, anchors, blocks, links, name_of, programs
from ..helpers.trl_patches import unpatch_trainers

README = ROOT / "README.md"
#: Packages that the code of a page needs beside those that the package itself needs.
NEEDS = {"docs/guides/trl.md": ["trl"], "docs/guides/migrating.md": ["liger_kernel"]}
#: Pages whose code tests/trainers runs, with the packages that they are about.
WITH_PACKAGES = {path for path in PAGES if path.is_relative_to(DOCS / "guides" / "trainers")}
WITH_CODE = [page for page in PAGES if page.is_relative_to(DOCS) and blocks(page) and page not in WITH_PACKAGES]
#: For each kind of user, the page that begins with the lines to paste and ends with the report.
FIRST_PAGES = [
    "trainer", "trl", "plain-pytorch", "accelerate", "sharded-heads", "distillation", "reinforcement-learning",
]  # fmt: skip
#: The last lines of such a page.
REPORT = r"```text\nfused: .*\nlogits read: never\nlogits not allocated: \d\.\d MiB\n```\s*$"
#: Whole programs of the pages. tests/deepspeed runs those that need DeepSpeed.
PROGRAMS = [program for page in PAGES for program in programs(page) if "import deepspeed" not in program.code]
COMMANDS = [
    (block, line)
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.code.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


class LightningModule(torch.nn.Module):
    def log(self, name, value, **_):
        assert value.isfinite(), name


def run_exp():
    """Stands for LLaMA-Factory's function, which builds a model and trains it."""
    model = llama()
    run_exp.outputs = model.train()(**batches(1)[0])
    run_exp.outputs.loss.backward()


def module(**names):
    made = types.ModuleType("stand_in")
    vars(made).update(names)
    return made


#: Stand-ins for packages that guides name and nothing here installs, with the classes and functions that are used.
STAND_INS = {
    "axolotl": module(),
    "axolotl.integrations": module(),
    "axolotl.integrations.base": module(BasePlugin=object),
    "lightning": module(LightningModule=LightningModule),
    "llamafactory": module(),
    "llamafactory.train": module(),
    "llamafactory.train.tuner": module(run_exp=run_exp),
}


@pytest.fixture
def _as_a_reader(precision_of_its_own, monkeypatch, tmp_path):
    """Runs in an empty folder with stand-ins for the packages that guides name. Undoes patches and process groups."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.use_deterministic_algorithms(False)
    for name, stand_in in STAND_INS.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    llamas = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(llamas)  # Liger replaces classes of this module
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if "fused_ignore_ce.hf" in sys.modules:
        sys.modules["fused_ignore_ce.hf"].unpatch_transformers()
    unpatch_trainers()


@pytest.mark.usefixtures("_as_a_reader")
@pytest.mark.parametrize("block", blocks(README), ids=lambda block: str(block.line))
def test_the_readme_s_code(block):
    """Each block runs alone, as it does when it is copied."""
    scope = {"__name__": "__main__"}
    block.run(scope)
    assert block.checks or scope["loss"].isfinite()


@pytest.mark.usefixtures("_as_a_reader")
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page(page):
    """The blocks of a page run in one scope, from top to bottom, as a reader tries them."""
    for package in NEEDS.get(name_of(page), []):
        pytest.importorskip(package)
    code = blocks(page)
    assert any(block.checks for block in code), "no block of the page checks what it says"
    scope = {"__name__": "__main__"}
    for block in code:
        block.run(scope)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.page)
def test_a_program_prints_what_its_page_shows(program, tmp_path):
    assert program.run(tmp_path) == program.output


@pytest.mark.parametrize("name", FIRST_PAGES)
def test_a_first_page_begins_with_lines_to_paste_and_ends_with_the_report(name):
    page = DOCS / "guides" / f"{name}.md"
    text = page.read_text()
    beginning = text.partition("\n## ")[0].partition("\n```py\n")
    assert len(beginning[0].split()) < 60, "there is much to read before the lines to paste"
    lines = beginning[2].partition("```")[0]
    assert re.search(r"^from fused_ignore_ce\.\w+ import .*patch_(model|trainer)", lines, re.MULTILINE)
    assert re.search(r"^patch_(model|trainer)\(", lines, re.MULTILINE)
    *_, last = re.split(r"^## ", text, flags=re.MULTILINE)
    assert last.startswith("What the report then prints\n")
    assert re.search(REPORT, last, re.DOTALL)
    output = last.rpartition("```text\n")[2].partition("```")[0]
    checked = [block.output for block in blocks(page)] + [program.output for program in programs(page)]
    assert output in checked, "no test compares the report with what is printed"


def test_the_stand_in_was_trained_with_the_fused_loss(monkeypatch):
    """The page about LLaMA-Factory says that a model which is made in run_exp() is patched."""
    for name in ("llamafactory", "llamafactory.train", "llamafactory.train.tuner"):
        monkeypatch.setitem(sys.modules, name, STAND_INS[name])
    for block in blocks(DOCS / "guides" / "axolotl-llama-factory.md"):
        if "run_exp()" in block.code:
            block.run({"__name__": "__main__"})
    sys.modules["fused_ignore_ce.hf"].unpatch_transformers()
    assert not run_exp.outputs.logits.is_materialized


@pytest.mark.parametrize(("block", "line"), COMMANDS, ids=[f"{b.page}:{line}" for b, line in COMMANDS])
def test_a_command_exists(block, line, capsys):
    """Options parse, and files and make targets exist. Commands that take no time are run."""
    words = shlex.split(line, comments=True)
    if words[:3] == ["python", "-m", "fused_ignore_ce"]:
        options = command_line._parser().parse_args(words[3:])
        if options.command in ("env", "plan"):
            assert command_line.main(words[3:]) == 0
            assert capsys.readouterr().out.strip()
    for word in words:
        if re.match(r"(examples|bench|tests|kernels)/", word):
            assert (ROOT / word).exists(), f"{block.page}:{block.line}: {word}"
    if words[0] == "make":
        verbs = re.search(r"^\.PHONY:(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
        assert [word for word in words[1:] if "=" not in word and word not in verbs] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_to_places_in_them(page):
    """Of other pages, too: that the site builds says nothing of pages outside of docs/, and needs MkDocs."""
    missing = []
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(link)
    assert not missing, f"{name_of(page)} links to {missing}"


def test_links_are_of_the_form_that_is_checked():
    """Neither HTML nor references to a link that stands elsewhere."""
    for page in PAGES:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        others = re.findall(r"<(?:a|img)\b|\]\[|^\[[^\]]+\]:", text, re.MULTILINE)
        assert not others, f"{name_of(page)} has {others}"


def test_a_name_that_is_linked_to_is_one_of_the_package():
    """Pages of the reference are made of docstrings; their anchors are the names."""
    names = {anchor for page in PAGES for anchor in anchors(page) if anchor.startswith("fused_ignore_ce.")}
    assert len(names) > 20
    assert not [name for name in names if pydoc.locate(name) is None]


def test_a_trainer_s_page_has_a_test_and_fits_on_a_screen():
    tests = {path.stem for path in (ROOT / "tests" / "trainers").glob("test_*.py")}
    for page in WITH_PACKAGES:
        assert f"test_{page.stem.replace('-', '_')}" in tests, name_of(page)
        assert len(page.read_text().splitlines()) <= 60, name_of(page)
        assert sum(block.code.count("\n") for block in blocks(page)) <= 60, name_of(page)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        name = re.escape(page.relative_to(DOCS).as_posix())
        assert re.search(rf"^ +- (\w+: )?{name}$", navigation, re.MULTILINE), f"{name_of(page)} is in no menu"


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    """Links, anchors and docstrings are checked by MkDocs; anything that it warns of is an error."""
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    example = "examples/trainer.py"  # a page links to it, so the site has to contain a copy
    assert (tmp_path / "files" / example).read_bytes() == (ROOT / example).read_bytes()
    assert f'href="../files/{example}"' in (tmp_path / "guides" / "trainer.html").read_text()
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(https?:[^\">\s]*)", page.read_text())
        assert not loaded, f"{page.name} loads {loaded}"


def test_the_migration_guide_names_what_others_have():
    """Names and order of Liger's and TRL's arguments are those of the installed versions."""
    liger = pytest.importorskip("liger_kernel.transformers")
    kernels = pytest.importorskip("trl.kernels")
    guide = (DOCS / "guides" / "migrating.md").read_text()

    def names(function):
        return list(inspect.signature(function).parameters)

    assert names(liger.LigerFusedLinearCrossEntropyLoss.forward) == ["self", "lin_weight", "_input", "target", "bias"]
    options = names(liger.LigerFusedLinearCrossEntropyLoss) + names(liger.LigerCrossEntropyLoss)
    for name in ("lse_square_scale", "return_z_loss", "ce_weight", "accum_dtype", "use_token_scaling", "softcap"):
        assert name in options
        assert f"`{name}`" in guide
    theirs = names(kernels.ChunkedLogProbFunction.forward)[1:]
    named = re.search(r"ChunkedLogProbFunction\.apply\((.*?)\)", guide)[1].split(", ")
    assert [name.replace("final_logit_softcapping", "softcap") for name in theirs] == named
