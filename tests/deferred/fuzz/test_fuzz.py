"""Programs that are drawn at random do on the patched model what they do on the plain one, and the fuzzer sees what differs."""

import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from . import interpreter
from .comparison import WRONG
from .grammar import TEMPLATES, draw
from .models import MODELS, Tiny
from .programs import Program, Setting, Statement
from .search import Failure, drawn, smallest, verdict_of

#: Compiling takes seconds; `python -m tests.deferred.fuzz` draws it.
SLOW = ("compile",)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@st.composite
def programs(draw_from):
    return draw(lambda choices: draw_from(st.sampled_from(choices)), SLOW)


@settings(
    derandomize=True,
    database=None,
    max_examples=300,
    deadline=None,
    phases=[Phase.generate],  # `smallest` leaves out statements, which hypothesis cannot
    suppress_health_check=list(HealthCheck),
)
@given(programs())
def test_programs_do_what_they_do_on_the_plain_model(drawing):
    program, plain = drawing
    verdict = verdict_of(program, plain=plain)
    if not verdict.right:
        pytest.fail(str(smallest(Failure(program, verdict))), pytrace=False)
