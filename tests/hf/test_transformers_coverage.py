"""The comparison of transformers' classes is right about known classes, and it detects what is broken."""

import functools
import re

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from fused_ignore_ce.deferred import affine, product

from ..helpers.paths import ROOT
from ..transformers_coverage import __main__ as sweep
from ..transformers_coverage import compare, isolation
from ..transformers_coverage.compare import APPLIED, FAILED, LINEAR, LOGITS, UNTOUCHED, Outcome

CLASSES = [
    ("CAUSAL_LM", "LlamaForCausalLM", LINEAR),
    ("CAUSAL_LM", "Gemma2ForCausalLM", LINEAR),
    ("CAUSAL_LM", "GraniteForCausalLM", LINEAR),
    ("CAUSAL_LM", "BltForCausalLM", LINEAR),  # a model inside has as many classes
    ("SEQ_TO_SEQ_CAUSAL_LM", "FSMTForConditionalGeneration", LINEAR),  # multiplies with a layer that it does not name
    ("IMAGE_TEXT_TO_TEXT", "LlavaForConditionalGeneration", LINEAR),
    ("IMAGE_TEXT_TO_TEXT", "Gemma3ForConditionalGeneration", LINEAR),  # hands its labels to the model inside
    ("SEQ_TO_SEQ_CAUSAL_LM", "Qwen2AudioForConditionalGeneration", LINEAR),  # so does this
    ("IMAGE_TEXT_TO_TEXT", "ChameleonForConditionalGeneration", LOGITS),  # writes into its logits
    ("SEQ_TO_SEQ_CAUSAL_LM", "BartForConditionalGeneration", LINEAR),
    ("SEQ_TO_SEQ_CAUSAL_LM", "ProphetNetForConditionalGeneration", LINEAR),
    ("SPEECH_SEQ_2_SEQ", "WhisperForConditionalGeneration", LINEAR),
    ("MASKED_LM", "BertForMaskedLM", LINEAR),
    ("SEQUENCE_CLASSIFICATION", "DistilBertForSequenceClassification", LOGITS),
    ("QUESTION_ANSWERING", "DistilBertForQuestionAnswering", LOGITS),
]


@pytest.fixture(autouse=True)
def _settings():
    """Settings like those of a fresh process. What `compare` changes is put back."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.use_deterministic_algorithms(False)
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.parametrize(("mapping", "name", "how"), CLASSES, ids=[name for _, name, _ in CLASSES])
def test_known_classes(mapping, name, how):
    outcome = compare.compare(mapping, name)
    assert (outcome.how, outcome.difference) == (how, "")
    assert outcome.outside == ("equal, fused" if mapping == "CAUSAL_LM" else "")
    assert outcome.option == APPLIED


def test_a_wrong_loss_outside_is_a_difference(monkeypatch):
    right = affine.fused_linear_cross_entropy
    reductions = []

    def wrong_without_labels(hidden, head, target, **options):
        reductions.append(len(hidden))
        return right(hidden, head, target, **options) * (1.0 if len(reductions) == 1 else 1.001)

    monkeypatch.setattr(affine, "fused_linear_cross_entropy", wrong_without_labels)
    outcome = compare.compare("CAUSAL_LM", "LlamaForCausalLM")
    assert outcome.outside == "no"
    assert outcome.difference.startswith("with its loss outside: loss ")


def test_a_loss_without_the_option_is_a_difference(monkeypatch):
    right = affine.fused_linear_cross_entropy

    def without(hidden, head, target, **options):
        return right(hidden, head, target, **options | {"label_smoothing": 0.0})

    monkeypatch.setattr(affine, "fused_linear_cross_entropy", without)
    outcome = compare.compare("CAUSAL_LM", "LlamaForCausalLM")
    assert outcome.option == "no"
    assert outcome.difference.startswith("with label_smoothing: loss ")


def test_an_option_that_is_refused_is_no_difference(monkeypatch):
    monkeypatch.setattr(compare, "SMOOTHING", 2.0)
    outcome = compare.compare("CAUSAL_LM", "LlamaForCausalLM")
    assert outcome.option.startswith("RuntimeError: ")
    assert not outcome.difference


def test_a_wrong_loss_is_a_difference(monkeypatch):
    right = affine.fused_linear_cross_entropy
    monkeypatch.setattr(affine, "fused_linear_cross_entropy", lambda *args, **kwargs: 1.001 * right(*args, **kwargs))
    assert compare.compare("CAUSAL_LM", "LlamaForCausalLM").difference.startswith("loss ")


def test_a_wrong_gradient_is_a_difference(monkeypatch):
    right = affine.fused_linear_cross_entropy

    def detached(hidden, head, *args, **kwargs):
        return right(hidden, head, *args, **kwargs) + 0.01 * (head[3] - head[3].detach()).sum()

    monkeypatch.setattr(affine, "fused_linear_cross_entropy", detached)
    assert compare.compare("CAUSAL_LM", "LlamaForCausalLM").difference.startswith("gradient of ")


def test_a_class_that_raises_when_patched_is_a_difference(monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("broken")

    monkeypatch.setattr(affine, "fused_linear_cross_entropy", broken)
    outcome = compare.compare("CAUSAL_LM", "LlamaForCausalLM")
    assert outcome.how == UNTOUCHED
    assert outcome.difference == "raises when patched: ValueError: broken"


def test_logits_that_are_read_are_no_linear_way(monkeypatch):
    right = affine.fused_linear_cross_entropy
    read = []

    def reading(hidden, head, *args, **kwargs):
        read.append(product.Product(hidden, head, None, hidden.dtype).logits())
        return right(hidden, head, *args, **kwargs)

    monkeypatch.setattr(affine, "fused_linear_cross_entropy", reading)
    assert compare.compare("CAUSAL_LM", "LlamaForCausalLM").how == LOGITS
    assert read


def test_a_process_that_dies_or_hangs_is_a_row(monkeypatch):
    died = isolation.isolated({}, {}, functools.partial(exec, "import os; os._exit(7)"))
    assert (died.how, died.why) == (FAILED, "its process ended with 7")
    monkeypatch.setattr(isolation, "TIMEOUT", 0.2)
    hung = isolation.isolated({}, {}, functools.partial(exec, "import time; time.sleep(60)"))
    assert (hung.how, hung.why) == (FAILED, "no result after 0 s")


def test_what_fails_a_sweep():
    linear = [Outcome("CAUSAL_LM", f"Good{i}", LINEAR, "") for i in range(19)]
    assert sweep.failures([*linear, Outcome("CAUSAL_LM", "Read", LOGITS, "")]) == []
    assert sweep.failures([*linear, Outcome("CAUSAL_LM", "Unbuilt", FAILED, "")]) == []
    (share,) = sweep.failures([*linear[1:], Outcome("CAUSAL_LM", "Read", LOGITS, "")])
    assert "18 of 19" in share
    (differs,) = sweep.failures([*linear, Outcome("MASKED_LM", "Bad", LINEAR, "", "loss 1, should be 2")])
    assert differs == "Bad (MASKED_LM) differs: loss 1, should be 2"
    (empty,) = sweep.failures([Outcome("CAUSAL_LM", "Unbuilt", FAILED, "")])
    assert "no class" in empty


def test_the_page_is_what_a_sweep_with_its_rows_writes():
    """All but the line with the versions. If this fails, change the text in `sweep.document` and in the page alike."""
    page = (ROOT / "docs" / "transformers-coverage.md").read_text()
    outcomes = []
    for mapping, rows in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL):
        for name, equal, *others in re.findall(
            r"^\| (\w+) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", rows, re.M
        ):
            if name != "class":
                how, why, outside, option = (text.strip() for text in others)
                difference = equal.removeprefix("no: ") if equal.startswith("no: ") else ""
                outcomes.append(Outcome(mapping, name, how, why, difference, outside=outside, option=option))
    assert len(outcomes) > 700

    def without_versions(text):
        return re.sub(r"^(Written by `[^`]*`) .*$", r"\1", text, flags=re.MULTILINE)

    assert without_versions(sweep.document(outcomes, 0)) == without_versions(page)
