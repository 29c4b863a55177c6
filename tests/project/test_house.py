"""The architecture, read from the source: few rooms, imports that point downward, few frames before a launch."""

import ast
import sys
from pathlib import Path

import pytest
import torch

import fused_ignore_ce

PACKAGE = Path(fused_ignore_ce.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts)
KERNELS = sorted((PACKAGE / "kernels").glob("*.py"))

#: From the ground up: a room imports what lies on floors below its own.
FLOORS = [
    ["core"],
    ["backends"],
    ["distributed"],
    ["logits", "linear"],
    ["losses"],
    ["deferred"],
    ["hf", "__init__"],
    ["trl", "tools"],
    ["__main__"],
]


def name_of(path):
    """A module's dotted name in the package; a folder's `__init__` has the folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path):
    """The package's own modules that a module imports, wherever in its file."""
    folder = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*folder[: len(folder) - node.level + 1], *(node.module or "").split(".")]
            base = [part for part in base if part]
            for alias in node.names:
                names = (".".join([*base, alias.name]), ".".join(base) or "__init__")
                found = next((name for name in names if name in MODULES), None)
                if found:
                    yield found
                else:
                    assert base[0] == "kernels", f"{name_of(path)} imports {names}, which is no module"


def room(name):
    return name.partition(".")[0]


GRAPH = {name: set(imports(path)) - {name} for name, path in MODULES.items()}


def test_a_newcomer_sees_at_most_twelve_names():
    names = {path.name for path in PACKAGE.iterdir()} - {"__pycache__", "py.typed", "kernels"}
    assert len(names) <= 12, sorted(names)


def test_there_are_at_most_ten_floors_and_imports_point_downward():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    assert len(FLOORS) <= 10
    assert floor.keys() == {room(name) for name in MODULES}
    for name, targets in GRAPH.items():
        for target in targets:
            below = floor[room(target)] < floor[room(name)]
            assert below or room(target) == room(name), f"{name} imports {target}, which does not lie below it"


def test_no_two_folders_import_each_other():
    folder = {name: path.parent for name, path in MODULES.items()}
    pairs = {(folder[name], folder[target]) for name, targets in GRAPH.items() for target in targets}
    assert not [pair for pair in pairs if pair[0] != pair[1] and pair[::-1] in pairs]


def test_there_is_no_circle():
    def visit(name, above):
        assert name not in above, f"circle: {' -> '.join([*above[above.index(name) :], name])}"
        for target in GRAPH[name]:
            visit(target, [*above, name])

    for name in GRAPH:
        visit(name, [])


def test_every_folder_says_what_is_inside_and_what_is_not():
    for path in FILES:
        if path.name == "__init__.py" and path.parent != PACKAGE:
            said = ast.get_docstring(ast.parse(path.read_text()))
            assert said, f"{name_of(path)}/__init__.py has no docstring"
            first = said.split("\n\n")[0].lower()  # names the room that has what is not here, or says "no" or "nothing"
            assert "`" in first or " no " in first or "nothing" in first, said


def test_kernels_import_nothing_of_the_package():
    for path in KERNELS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name} imports from above kernels/"
                assert node.level == 1 or "fused_ignore_ce" not in (node.module or "")
            elif isinstance(node, ast.Import):
                assert all("fused_ignore_ce" not in alias.name for alias in node.names)


@pytest.fixture
def frames(monkeypatch):
    """The number of the package's frames at every launch, the one that launches included."""
    from fused_ignore_ce.kernels import prepare

    found = []
    original = prepare.Prepared.__call__

    def counted(self, *first):
        frame, count = sys._getframe(1), 1
        while frame is not None:
            count += frame.f_code.co_filename.startswith(str(PACKAGE))
            frame = frame.f_back
        found.append(count)
        return original(self, *first)

    monkeypatch.setattr(prepare.Prepared, "__call__", counted)
    return found


def logits_and_targets(N=6, V=40, D=8):
    torch.manual_seed(0)
    target = torch.randint(V, (N,))
    target[1] = -100
    return torch.randn(N, V, requires_grad=True), torch.randn(N, D, requires_grad=True), torch.randn(V, D), target


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"return_stats": True},
        {"z_loss": 0.1},
        {"grad_in_forward": True},
        {"grad_in_forward": True, "z_loss": 0.1},
        {"label_smoothing": 0.1, "softcap": 5.0, "return_stats": "differentiable"},
    ],
    ids=str,
)
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_seven_frames_lie_between_logits_and_a_launch(options, probabilities, frames):
    x, _, _, target = logits_and_targets()
    if probabilities:
        target = torch.rand(x.shape)
    fused_ignore_ce.fused_cross_entropy(x, target, backend="triton", **options)
    assert frames
    # Probabilities are not read in one pass: the launcher that does so calls those of two passes.
    assert max(frames) <= (8 if probabilities and "grad_in_forward" in options else 7), frames


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "constant"])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"return_stats": "differentiable"}, {"label_smoothing": 0.1, "z_loss": 0.1}],
    ids=str,
)
def test_nine_frames_lie_between_hidden_states_and_a_launch(options, trained, plan, frames):
    _, h, w, target = logits_and_targets()
    w.requires_grad_(trained)
    fused_ignore_ce.fused_linear_cross_entropy(h if trained else h.detach(), w, target, backend="triton", **options)
    assert frames
    assert max(frames) <= 9, frames


#: The functions that users call, and the operators. They may have a parameter for each option.
PUBLIC = ("fused_", "plan_linear_loss", "linear_cost", "__init__", "cross_entropy", "nll_loss")


@pytest.mark.parametrize("path", [*FILES, *KERNELS], ids=lambda path: name_of(path))
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
    for path in [*FILES, *KERNELS]:
        lines = len(path.read_text().splitlines())
        assert lines <= 320, f"{name_of(path)} has {lines} lines"
