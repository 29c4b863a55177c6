"""Every error and warning starts with the argument that it is about, and says what came or what to do.

No two say the same.
"""

import ast
import re
from collections import defaultdict

import pytest

from scripts.messages import ROOT, messages, of_source

MESSAGES = [*messages()]

#: Words of PyTorch's own errors, for the same mistakes.
PYTORCHS = (
    "label_smoothing must be between",
    "{...} is not a valid value for reduction",
    "Expected floating point type for target",
    "Expected input batch_size",
    "expected equal input and linear_weight last dimensions",
    "weight tensor should be defined either for all",
    "ignore_index is not supported for floating point target",
    "Trying to backward through the graph a second time",
    "one of the variables needed for gradient computation",
    "module {...} has no attribute",
)

#: A message starts with one or more names and a colon. A name that is filled in stands in braces here; an option of a
#: command has dashes.
NAMED = re.compile(r"(?P<names>(?:--)?(?:\w+|\{[^}]*\})(?:, (?:\w+|\{[^}]*\}))*): ")

#: Names that are no argument of a function of this package: an argument of `torch.autograd.grad`, and a package.
OTHERS = {"create_graph", "trl"}

#: A message without a value says what to do, or what came.
ADVICE = re.compile(r"\b(pass|use|call|gather|leave|write|read|specify|unpatch_model|Set|set|patch|got)\b")


def arguments():
    """The names of all arguments of public functions and classes of the package."""
    found = set()
    for path in ROOT.glob("fused_ignore_ce/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
                found |= {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    return found


ARGUMENTS = arguments()


def is_whole(text):
    """Whether a text is all written elsewhere: by a function that is listed itself, or by whom an error came from.

    The rank on which an error came may follow.
    """
    return re.fullmatch(r"\{[^}]*\}(( \(|; it came )on rank \{\.\.\.\} of the process group\)?)?", text) is not None


def faults(kind, text):
    """What a reader of a message would miss."""
    if not text:
        return ["it has no message"]
    if is_whole(text) or kind in ("AssertionError", "argparse.ArgumentTypeError"):
        return []
    found = []
    if not text.startswith(PYTORCHS):
        named = NAMED.match(text)
        names = re.findall(r"\{[^}]*\}|\w+", named["names"]) if named else []
        if not names or any("{" not in name and name not in ARGUMENTS | OTHERS for name in names):
            found.append("it does not start with the name of an argument and a colon")
    if "expected" in text.lower() and not re.search(r"\b(got|match|differs|not a valid)\b", text):
        found.append("it does not say what came")
    if "{" not in text and not ADVICE.search(text):
        found.append("it does not say what to do")
    return found


#: Places where an error without a message is caught by the code around it, or stands for a method to be written.
SILENT = {
    ("fused_ignore_ce/core/options.py", "TypeError"),
    ("fused_ignore_ce/deferred/replaced.py", "NotImplementedError"),
}


def test_every_message_says_what_is_wrong():
    found = {
        f"{place}: {text}": wrong
        for place, kind, text in MESSAGES
        if (place.partition(":")[0], kind) not in SILENT and (wrong := faults(kind, text))
    }
    assert not found
    assert len(MESSAGES) > 100


def test_no_two_messages_say_the_same():
    """An argument's name aside. What several places say is said by one function."""
    places = defaultdict(list)
    for place, _, text in MESSAGES:
        if not is_whole(text):
            places[re.sub(r"\{[^}]*\}", "{}", re.sub(r"^(\w+|\{[^}]*\}): ", "", text))].append(place)
    assert not {text: found for text, found in places.items() if text and len(found) > 1}


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("raise ValueError", "it has no message"),
        ("raise ValueError()", "it has no message"),
        ("raise ValueError('wrong shape')", "it does not start with the name of an argument and a colon"),
        ("raise ValueError('patch_trainer: wrong')", "it does not start with the name of an argument and a colon"),
        ("raise ValueError('backend=1: wrong')", "it does not start with the name of an argument and a colon"),
        ("raise ValueError('backend=1 takes x')", "it does not start with the name of an argument and a colon"),
        ("raise ValueError('input or target: wrong')", "it does not start with the name of an argument and a colon"),
        ("raise ValueError(f'{name} is wrong')", "it does not start with the name of an argument and a colon"),
        ("raise ValueError('input: wrong')", "it does not say what to do"),
        ("raise ValueError(f'input: expected a number above {least}')", "it does not say what came"),
        ("def f(x):\n    message = 'input: wrong'\n    raise ValueError(message)", "it does not say what to do"),
        ("def f(x):\n    return ValueError('input: wrong')", "it does not say what to do"),
        ("warnings.warn('labels: strange', stacklevel=2)", "it does not say what to do"),
    ],
)
def test_a_poor_message_is_seen(source, wrong):
    [message] = of_source(source, "file.py")
    assert wrong in faults(message.kind, message.text)
