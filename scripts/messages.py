"""Lists every message of an error or a warning with its place: `python -m scripts.messages`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Message(NamedTuple):
    """An error or a warning. In its text, `{...}` is what is filled in, and `{name()}` what a function returns."""

    place: str
    kind: str
    text: str


def messages(root: Path = ROOT) -> Iterator[Message]:
    """Those of the package and of its kernels, by file and line.

    An error that a function returns is listed there, and not where it is raised.
    """
    files = sorted([*root.glob("fused_ignore_ce/**/*.py"), *root.glob("kernels/*.py")])
    sources = {path: path.read_text() for path in files if path.resolve() == path}  # a link leads to kernels/
    makers = {name for source in sources.values() for name in re.findall(r"def (\w+)\([^)]*\) -> \w+Error:", source)}
    for path, source in sources.items():
        found = of_source(source, str(path.relative_to(root)))
        yield from (message for message in found if message.kind not in makers)


def of_source(source: str, place: str) -> Iterator[Message]:
    tree = ast.parse(source)
    scopes = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Module))]
    assigned = {
        scope: {
            target.id: node.value
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for scope in scopes
    }
    found: dict[int, Message] = {}
    for scope in scopes:  # from the outside to the inside, so that the names of the innermost function count
        for node in ast.walk(scope):
            call = _made(node)
            if call is not None:
                text = _text(call.args[0], assigned[scope]) if call.args else ""
                found[call.lineno] = Message(f"{place}:{call.lineno}", ast.unparse(call.func), text)
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name) and node.exc.id.endswith("Error"):
                found[node.lineno] = Message(f"{place}:{node.lineno}", node.exc.id, "")
    yield from (found[line] for line in sorted(found))


def _made(node: ast.AST) -> ast.Call | None:
    """The call that makes an error, or that warns."""
    if isinstance(node, (ast.Raise, ast.Return)):
        call = node.exc if isinstance(node, ast.Raise) else node.value
        if isinstance(call, ast.Call) and (isinstance(node, ast.Raise) or ast.unparse(call.func).endswith("Error")):
            return call
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
        return node
    return None


def _text(value: ast.expr, names: dict[str, ast.expr]) -> str:
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.JoinedStr):
        return "".join(_text(part, {}) for part in value.values)
    if isinstance(value, ast.FormattedValue):
        inner = value.value
        return f"{{{ast.unparse(inner.func)}()}}" if isinstance(inner, ast.Call) else "{...}"
    if isinstance(value, ast.Name) and value.id in names:
        return _text(names[value.id], {})
    return f"{{{ast.unparse(value.func)}()}}" if isinstance(value, ast.Call) else "{...}"


if __name__ == "__main__":
    for message in messages():
        print(f"{message.place}: {message.kind}: {message.text}")
