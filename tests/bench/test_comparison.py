"""The comparison says what the installed packages do, and a check can fail."""

import re

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pandas")
pytest.importorskip("tabulate")
pytest.importorskip("transformers")

from bench import reading
from bench.comparison import models, peers, rows, running, tables
from bench.machine import ROOT
from bench.packages import PACKAGES, version

from ..helpers.device import DEVICE

_, RESULT = reading.Results().newest("comparison", "cells")
CHECKED = [(row, kind) for row in rows.ALL for kind in row.kinds if row.check]


def ids(cases):
    return [f"{kind}-{row.check.__name__}" for row, kind in cases]


def is_what_was_compared(package):
    if package == "PyTorch":
        return torch.__version__.split("+")[0] in tables.releases(RESULT)
    names = (PACKAGES[package], "torch", "triton", "transformers")
    compared = RESULT["header"]["versions"]
    return all((version(name) or "").split("+")[0] == compared[name].split("+")[0] for name in names)


@pytest.mark.skipif(DEVICE == "cuda", reason="the comparison is made on a CPU, where Triton interprets")
@pytest.mark.parametrize(("row", "kind"), CHECKED, ids=ids(CHECKED))
def test_packages_do_what_the_table_says(row, kind):
    """If this fails, run `python -m bench.comparison`, and then `make readme-figures`."""
    if kind == "models":
        pytest.importorskip("peft")
    for package, arguments in running.subjects(kind):
        if package in row.stated[kind]:
            continue
        release = torch.__version__.split("+")[0] if package == "PyTorch" else None
        cell = tables.cell(RESULT, row, kind, package, release)
        if package == "fused_ignore_ce":
            assert (cell["answer"], cell["basis"]) == ("yes", "checked")
        elif not is_what_was_compared(package):
            continue  # another release may differ
        found = running.answer(row, arguments)
        assert (found["answer"], found["basis"]) == (cell["answer"], cell["basis"]), f"{package}: {found['why']}"


def test_every_cell_is_in_the_result():
    found = {(cell["question"], cell["kind"], cell["package"], cell["basis"]) for cell in RESULT["cells"]}
    for row in rows.ALL:
        for kind in row.kinds:
            for package, (answer, why) in row.stated.get(kind, {}).items():
                cell = tables.cell(RESULT, row, kind, package)
                if not answer:
                    assert cell is None
                    continue
                assert (cell["answer"], cell["why"], cell["basis"]) == (answer, why, "stated")
    assert {key[:3] for key in found if key[3] == "checked"} >= {
        (row.question, kind, "fused_ignore_ce") for row, kind in CHECKED
    }
    assert {row.question for row in rows.ALL} == {key[0] for key in found}


def wrong(*operands, **options):
    """Accepts every option, ignores all of them, overwrites its input and returns a wrong loss."""
    *inputs, target = operands
    logits = F.linear(*inputs) if len(inputs) == 2 else inputs[0]
    loss = (logits.float() ** 2).mean() + 0 * target.float().mean()
    inputs[0].data.add_(1)
    return loss


WRONG = peers.Peer(
    "wrong", wrong, lambda *operands: torch.zeros(operands[-1].shape), lambda *operands: wrong(*operands)[None],
    token_loss=lambda *operands: (wrong(*operands), torch.zeros(operands[-1].shape)), one_pass=wrong,
    distil=lambda h, w, th, tw, y, **options: wrong(h, w, y),
)  # fmt: skip


def damaged(model, monkeypatch):
    """A model whose loss is wrong, and whose class is changed until the test is over."""
    forward = model.forward

    def other(*arguments, **keywords):
        outputs = forward(*arguments, **keywords)
        return type(outputs)(loss=outputs.loss * 1.5)

    model.forward = other
    monkeypatch.setattr(type(model), "forward", other)
    return model


@pytest.mark.parametrize(("row", "kind"), CHECKED, ids=ids(CHECKED))
def test_a_check_sees_what_is_wrong(row, kind, monkeypatch):
    if kind != "models":
        arguments = (WRONG, kind)
    else:
        pytest.importorskip("peft")

        def patch(model, **options):
            return damaged(model, monkeypatch)

        def defer(head):
            return head.register_forward_hook(lambda module, inputs, output: output * 1.5) and head

        arguments = (models.Patcher("wrong", patch, lambda model: model, defer),)
    found = running.answer(row, arguments)
    assert (found["answer"], found["basis"]) == ("no", "checked")
    assert found["why"]


def test_what_is_stated_of_others_says_where_it_was_read():
    for row in rows.ALL:
        for answers in row.stated.values():
            for package, (answer, why) in answers.items():
                if answer and package != "fused_ignore_ce":
                    assert re.search(r"`[\w/]+(\.py|\.cpp)?`|README|documentation", why), (row.question, package)


def test_every_column_names_its_version():
    found = RESULT["header"]["versions"]
    for package, name in PACKAGES.items():
        if package not in ("fused_ignore_ce", "QuACK"):
            assert rows.SOURCES[package][0] == found[name].split("+")[0]
    releases = " / ".join(tables.releases(RESULT))
    assert releases.startswith(found["torch"].split("+")[0])
    head = next(line for line in tables.short(RESULT).splitlines() if "this package" in line)
    peers = [f"{package} {said}" for package, (said, _) in rows.SOURCES.items() if package != "PyTorch"]
    assert {*(cell.strip() for cell in head.split("|"))} == {"", "this package", f"PyTorch {releases}", *peers}


def test_releases_of_pytorch_that_differ_are_told_apart():
    row = next(row for row in rows.ALL if row.check and row.check.__name__ == "probabilities")
    own = {"question": row.question, "kind": "linear", "package": "PyTorch", "basis": "checked"}
    result = {
        "header": {"versions": {"torch": "2.13.0+cpu"}},
        "cells": [own | {"answer": "no", "why": "a reason"}],
        "other torch": [{"torch": "2.14.1+cu130", "cells": [own | {"answer": "yes", "why": ""}]}],
    }
    found = tables._cells(result, row, "linear", "PyTorch")
    assert tables._text(found) == "no / yes"
    assert tables._reasons(result, row, "linear", ["PyTorch"]).endswith("PyTorch 2.13.0: `a reason`.")
    result["other torch"][0]["cells"][0] |= {"answer": "no", "why": "a reason"}
    assert tables._text(tables._cells(result, row, "linear", "PyTorch")) == "no"
    assert tables._reasons(result, row, "linear", ["PyTorch"]).endswith(" PyTorch: `a reason`.")


def test_the_commit_of_cce_is_the_one_that_is_installed():
    commit = rows.SOURCES["CCE"][1].rpartition("/")[2]
    assert f"ml-cross-entropy.git@{commit}\n" in (ROOT / "Makefile").read_text()


def test_what_is_only_stated_is_marked():
    text = tables.long("name", RESULT)
    lines = [line for line in text.splitlines() if line.startswith("| Speed was measured on a GPU")]
    assert len(lines) == 1
    assert lines[0].split("|")[2].strip() == f"no {tables.MARK}"
    assert f"An answer with {tables.MARK} was read in documentation or source and not run, as all of QuACK's" in text
