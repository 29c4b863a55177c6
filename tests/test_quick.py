"""The quick selection has a test of every file, and the tests that it leaves out exist."""

import ast
from pathlib import Path

import pytest

from .quick import SLOW

FILES = sorted(Path(__file__).parent.glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_has_a_quick_test(file):
    functions = (node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef))
    tests = {name for name in functions if name.startswith("test_")}
    slow = SLOW.get(file.name, set())
    assert slow < tests, f"{sorted(slow - tests)} do not exist, or no test of {file.name} is quick"


def test_slow_files_exist():
    assert set(SLOW) <= {file.name for file in FILES}
