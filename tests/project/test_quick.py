"""The quick selection has a test of every file, and the tests that it leaves out exist."""

import ast

import pytest

from ..helpers.quick import SLOW, TESTS

FILES = {path.relative_to(TESTS).as_posix(): path for path in sorted(TESTS.rglob("test_*.py"))}


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_a_quick_test(name):
    text = FILES[name].read_text()
    functions = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    tests = {function for function in functions if function.startswith("test_")}
    slow = SLOW.get(name, set())
    assert slow < tests, f"{sorted(slow - tests)} do not exist, or no test of {name} is quick"


def test_slow_files_exist():
    assert set(SLOW) <= set(FILES)
