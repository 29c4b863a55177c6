"""`python -m tests.sharded_memory`: what a step holds where the head is sharded, plain and patched, on two processes.

It prints the table of docs/guides/sharded-heads.md. The environment of `make test-deepspeed` has what it needs.
"""

import tempfile
from pathlib import Path

from tabulate import tabulate

from .helpers.live_memory import CASES
from .helpers.ranks import Ranks

#: name -> the function of a worker that measures, and its arguments.
SHARDED = {
    "DeepSpeed ZeRO-3": ("deepspeed_worker.memory", {}),
    "FSDP2, the head alone": ("fsdp_worker.memory", {"name": "head alone"}),
    "FSDP2, the head with the final norm": ("fsdp_worker.memory", {"name": "head with the norm"}),
    "FSDP1, the head alone": ("fsdp_worker.memory", {"name": "FSDP1, head alone"}),
}


class Folders:
    """What `Ranks` asks of pytest."""

    def mktemp(self, name):
        return Path(tempfile.mkdtemp(prefix=name))


def rows(names=tuple(SHARDED), cases=CASES):
    """The largest figures of both processes, in weights of the head."""
    for name in names:
        function, arguments = SHARDED[name]
        ranks = Ranks(2, Folders())
        try:
            for loss, frozen, _ in cases:
                row = {"sharded by": name, "loss": loss, "head": "frozen" if frozen else "trained"}
                for patched in (False, True):
                    calls = [dict(rank=i, patched=patched, loss=loss, frozen=frozen, **arguments) for i in range(2)]
                    found = ranks.run(function, calls)
                    for when in found[0]:
                        figures = row.setdefault(when, [])
                        figures.append(max(each[when] for each in found))
                yield row
        finally:
            ranks.stop()


def text(value):
    return ", patched ".join(f"{figure:.2f}" for figure in value) if isinstance(value, list) else value


def main():
    texts = [{key: text(value) for key, value in row.items()} for row in rows()]
    print(tabulate(texts, headers="keys", tablefmt="github"))


if __name__ == "__main__":
    main()
