"""What is not installed is named together with the extra that installs it."""

import pytest

from fused_ignore_ce.core.optional_packages import needed
from scripts import project

from ..helpers.processes import python


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
