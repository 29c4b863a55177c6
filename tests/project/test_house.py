"""The architecture, read from the source: imports point downward, functions take few parameters, files are short."""

import ast
from pathlib import Path

import pytest

import fused_ignore_ce

PACKAGE = Path(fused_ignore_ce.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts)

#: From the leaves up: a file imports files of its own layer and of layers before it.
LAYERS = [
    ["options", "extras", "keywords", "rows", "operators", "torch_blocks", "reference", "measure", "demo_data"],
    ["arguments", "torch_backend"],
    ["reduction", "backends"],
    ["distributed", "dtensor", "shards"],
    ["autograd", "problem", "grad_in_forward", "kernel_reduction", "linear.plan", "linear.tiles", "linear.gradients"],
    ["functional", "linear.sweep", "linear.calls", "linear.row_results", "linear.scaled_sum", "linear.problem"],
    ["linear.cross_entropy", "linear.log_probs", "linear.summed_log_probs", "cost"],
    ["causal_lm", "modules", "collator", "deferred"],
    ["hf", "per_token"],
    ["trl", "demo"],
    ["__init__", "__main__"],
]


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def layer_of(name):
    name = "deferred" if name.startswith("deferred") else name
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert found, f"{name}: no layer of LAYERS has it"
    return found[0]


def imports(tree, name):
    """The package's own modules that a module imports, but for those that only type checkers import."""
    folder = name.split(".")[:-1]
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or node in typing_only:
            continue
        base = folder[: len(folder) - node.level + 1]
        path = [*base, *(node.module or "").split(".")] if node.module else base
        target = ".".join(path)
        if node.module:
            yield target
        else:
            yield from (".".join([*path, alias.name]) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_downward(path):
    name = name_of(path)
    if path.name == "__init__.py" and name != "__init__":
        return_of_init = ast.parse(path.read_text())
        assert all(target.startswith(name.split(".")[0]) for target in imports(return_of_init, name))
        return
    for target in imports(ast.parse(path.read_text()), name):
        if target.split(".")[0] in ("kernels", "__version__"):
            continue
        assert layer_of(target) <= layer_of(name), f"{name} imports {target}, which lies above it"


def test_there_is_no_circle():
    graph = {}
    for path in FILES:
        name = name_of(path)
        names = {name_of(other) for other in FILES}
        graph[name] = {target for target in imports(ast.parse(path.read_text()), name) if target in names}

    def visit(name, above):
        assert name not in above, f"circle: {' -> '.join([*above[above.index(name) :], name])}"
        for target in graph[name]:
            visit(target, [*above, name])

    for name in graph:
        visit(name, [])


def test_kernels_import_nothing_of_the_package():
    for path in (PACKAGE / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name} imports from above kernels/"
                assert node.level == 1 or "fused_ignore_ce" not in (node.module or "")
            elif isinstance(node, ast.Import):
                assert all("fused_ignore_ce" not in alias.name for alias in node.names)


#: The functions that users call, and the operators. They may have a parameter for each option.
PUBLIC = ("fused_", "plan_linear_loss", "linear_cost", "__init__", "cross_entropy", "nll_loss")


@pytest.mark.parametrize("path", [*FILES, *sorted((PACKAGE / "kernels").glob("*.py"))], ids=name_of)
def test_functions_take_at_most_ten_parameters(path):
    if path.name == "reference.py":
        return  # its functions take options as arguments, as the public functions do
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith(PUBLIC):
            if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue  # code of a GPU, whose values have no objects to travel in
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [a.arg for a in arguments if a.arg not in ("self", "cls", "ctx")]
            assert len(names) <= 10, f"{path.name}: {node.name} takes {len(names)}: {names}"


def test_files_are_short():
    for path in [*FILES, *(PACKAGE / "kernels").glob("*.py")]:
        lines = len(path.read_text().splitlines())
        assert lines <= 320, f"{name_of(path)} has {lines} lines"
