"""The memory of a process while a model is trained, as the system counts it."""

import gc
import re
from pathlib import Path

import torch

from fused_ignore_ce.tools.measure import PeakMemory

#: Losses of `memory_of_heads.py`, whether the head is frozen, and how many gradients of it are held for the backward
#: that are not without this package: a cross entropy computes the gradient in its forward.
CASES = [("cross_entropy", True, 0), ("cross_entropy", False, 1), ("log_probs", True, 0), ("log_probs", False, 0)]

STEPS = 3

#: In heads. Two ranks hold half a head each, which communication may let go of a moment later.
TOLERANCE = 0.6


def measured(forward, backward, unit):
    """What a step holds when its forward is over, and at most in its forward and in its backward.

    In multiples of `unit` bytes, above what was there before the first step. The figures are the least of several
    steps, as threads that communicate let go of a tensor a moment sooner or later.
    """
    gc.collect()
    gc.freeze()  # or collecting takes a second with all that was imported
    with PeakMemory(torch.device("cpu")):  # gives memory that was freed back to the system
        steps, base = [], _resident()
    for _ in range(STEPS):
        gc.collect()
        base = min(base, _resident())  # what was built may hold memory until the first step
        before = _resident() - base
        with PeakMemory(torch.device("cpu")) as in_forward:
            loss = forward()
        held = _resident() - base
        with PeakMemory(torch.device("cpu")) as in_backward:
            backward(loss)
        del loss
        steps.append((held, before + in_forward.bytes, held + in_backward.bytes))
    names = ("held", "in the forward", "in the backward")
    return {name: min(figures) / unit for name, figures in zip(names, zip(*steps[1:], strict=True), strict=True)}


def _resident():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmRSS:\s*(\d+) kB$", status, re.MULTILINE)[1]) * 1024


def assert_gathered_no_longer(ours, plain, gradients, gathers=0, in_backward=0):
    """A head's whole weight is in memory no longer than without this package.

    When the forward is over, `gradients` of it may be held more. In the forward, `gathers` of its memory may be there
    as well, and in the backward `in_backward` heads more.
    """
    for mine, theirs in zip(ours, plain, strict=True):
        for when, heads in mine.items():
            more = {"held": gradients, "in the forward": gradients + gathers, "in the backward": in_backward}[when]
            assert heads <= theirs[when] + more + TOLERANCE, f"{when}: {mine}, without this package {theirs}"
