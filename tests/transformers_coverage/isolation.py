"""Runs the comparison of one class in its own process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

from bench.machine import importable

from .compare import FAILED, Outcome, compare

TIMEOUT = 60.0

_CONTEXT = multiprocessing.get_context("forkserver")
# Torch, transformers and what most models import are imported once, and not by every process.
_CONTEXT.set_forkserver_preload([f"{__package__}.compare", "transformers.models.llama.modeling_llama"])


def isolated(mapping: str, name: str, work: Callable[[str, str], Outcome] = compare) -> Outcome:
    """Runs `work`. A crash or a hang becomes an outcome, too."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_send, args=(sender, work, mapping, name))
    with importable():  # the preloaded packages are not there if the server was started for something else before
        process.start()
    sender.close()
    try:
        if receiver.poll(TIMEOUT):
            return receiver.recv()
        return Outcome(mapping, name, FAILED, f"no result after {TIMEOUT:.0f} s", seconds=TIMEOUT)
    except EOFError:
        process.join()
        return Outcome(mapping, name, FAILED, f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, work: Callable[[str, str], Outcome], mapping: str, name: str) -> None:
    sender.send(work(mapping, name))
