"""Kernels read tuples by name, and a launch is one call away from the function that the package calls."""

import ast
import inspect
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from fused_ignore_ce.core.options import LossOptions
from fused_ignore_ce.core.rows import Block, Saved, Upstream
from fused_ignore_ce.kernels import cross_entropy, prepare, structs

FOLDER = Path(structs.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))
STRUCTS = {name: value for name, value in vars(structs).items() if hasattr(value, "_fields")}


def is_a_number(node: ast.AST | None) -> bool:
    if isinstance(node, ast.UnaryOp):
        return is_a_number(node.operand)
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


def numbers(tree: ast.AST) -> list[str]:
    """The subscripts that read an element, or a stretch of elements, by a number."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            indices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            ends = [end for i in indices for end in ((i.lower, i.upper) if isinstance(i, ast.Slice) else (i,))]
            if any(map(is_a_number, ends)):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("code", ["a[0]", "a[-1]", "a.b[1]", "a[0][b]", "a[:2]", "a[1:]", "a[:, 2]"])
def test_reading_by_position_is_found(code):
    assert numbers(ast.parse(code))


@pytest.mark.parametrize("code", ["a[:, part:]", "a[None, :, None]", "a[part:]", "tuple[int, int]", "a[b]"])
def test_other_subscripts_are_not(code):
    assert numbers(ast.parse(code)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_is_read_by_position(path):
    assert numbers(ast.parse(path.read_text())) == []


def test_structs_have_nothing_but_fields():
    """From Triton 3.9 on, a compiled kernel reads nothing else of a tuple, neither properties nor methods."""
    for name, struct in STRUCTS.items():
        assert {attribute for attribute in vars(struct) if attribute[0] != "_"} == {*struct._fields}, name


def test_structs_are_documented_once():
    assert STRUCTS
    for name, struct in STRUCTS.items():
        assert (struct.__doc__ or "").strip(), name
        assert not struct.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"
    others = [path for path in FILES if path.stem != "structs"]
    defined = {
        node.name for path in others for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
    }
    assert not defined & STRUCTS.keys()


def kernels() -> dict[str, Any]:
    return {name: value for name, value in vars(prepare).items() if name.endswith("_kernel")}


@pytest.mark.parametrize("name", sorted(kernels()))
def test_signatures_show_what_a_kernel_takes(name):
    """At most five parameters are tensors or tuples of them, and each tuple is annotated with its struct."""
    parameters = inspect.signature(kernels()[name].fn).parameters
    assert parameters
    bundles = [p for p, of in parameters.items() if of.annotation in STRUCTS.values()]
    pointers = [p for p in parameters if p.endswith("_ptr")]
    assert "strides" not in parameters or "strides" in bundles
    assert len({*bundles, *pointers} - {"strides", "place"}) <= 5
    assert len(pointers) <= 1


X, TARGET = torch.randn(1, 3, 300), torch.tensor([1, -100, 299])
OPTIONS = LossOptions()
LOGITS = X, TARGET, None, None
ONES = torch.ones(3)


def forward_part():
    parts = cross_entropy.new_parts(X, 1, False)
    cross_entropy.forward_part(LOGITS, OPTIONS, parts=parts, part=0, block=Block(0, 300))


CALLS = {
    "forward": lambda: cross_entropy.forward(LOGITS, OPTIONS),
    "forward_reduce": lambda: cross_entropy.forward_reduce(LOGITS, None, None, OPTIONS, mean=True),
    "forward_part": forward_part,
    "merge": lambda: cross_entropy.merge(TARGET, cross_entropy.new_parts(X, 1, False), OPTIONS),
    "reduce": lambda: cross_entropy.reduce((ONES,), (TARGET, None, None, None), OPTIONS, mean=True),
    "backward": lambda: cross_entropy.backward(
        Upstream(ONES), LOGITS, Saved(torch.ones(3, 3), None), OPTIONS, dx=torch.empty_like(X), dprobs=None
    ),
    "forward_backward": lambda: cross_entropy.forward_backward(
        Upstream(ONES), LOGITS, OPTIONS, dx=torch.empty_like(X)
    ),
    "forward_backward_reduce": lambda: cross_entropy.forward_backward_reduce(
        LOGITS, None, None, OPTIONS, dx=torch.empty_like(X), mean=True
    ),
    "scale": lambda: cross_entropy.scale(X.clone(), None, torch.tensor(2.0)),
}  # fmt: skip


def frames_of_launches(call) -> list[list[str]]:
    """The functions of `kernels/` that are running at each launch, the outermost first."""
    found = []
    launch = prepare.Prepared.__call__

    def recorded(self, *arguments):
        names, frame = [], sys._getframe(1)
        while frame is not None:
            if Path(frame.f_code.co_filename).resolve().parent == FOLDER.resolve():
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        found.append(names[::-1])
        return launch(self, *arguments)

    with mock.patch.object(prepare.Prepared, "__call__", recorded):
        call()
    return found


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.skipif(not cross_entropy.interpreted(), reason="on CPU tensors, kernels need Triton's interpreter")
@pytest.mark.parametrize("name", CALLS)
def test_a_launch_is_one_call_away(name):
    """Between a function that the package calls and a kernel's launch stands `Prepared.__call__` alone."""
    launches = frames_of_launches(CALLS[name])
    assert launches
    assert all(frames == [name] for frames in launches)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.skipif(not cross_entropy.interpreted(), reason="on CPU tensors, kernels need Triton's interpreter")
def test_two_passes_in_place_of_one_are_two_calls_away():
    probs = X, TARGET, None, torch.rand_like(X)
    launches = frames_of_launches(
        lambda: cross_entropy.forward_backward(Upstream(ONES), probs, OPTIONS, dx=torch.empty_like(X))
    )
    assert launches == [["forward_backward", "forward"], ["forward_backward", "backward"]]


def test_every_launcher_is_tried():
    public = {
        name
        for name, value in vars(cross_entropy).items()
        if inspect.isfunction(value) and value.__module__ == cross_entropy.__name__ and not name.startswith("_")
    }
    assert public - CALLS.keys() == {"interpreted", "can_one_pass"}


def test_prepared_launches_by_itself():
    """It calls Triton, and no function of `kernels/` in between but `kinds`."""
    tree = ast.parse(Path(prepare.__file__).read_text())
    [call] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__call__"]
    called = {node.func.id for node in ast.walk(call) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert called == {"kinds", "run", "self"}
