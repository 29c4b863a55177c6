"""TRL's trainers, patched and stock: the same losses, metrics and parameters, and the log-probabilities are ours."""

import subprocess
import sys
import warnings

import pytest
import torch
import transformers

from fused_ignore_ce.hf import IgnoreTokens, fusion_report, patch_model, unpatch_model
from fused_ignore_ce.trl import patch_trainer, unpatch_trainer
from fused_ignore_ce.trl import patching as ours

from ..helpers.hf_worker import V
from ..helpers.trl_patches import unpatch_trainers
from ..helpers.trl_runs import assert_same_runs, mixtral, one_layer, trainer_of, trl

ChunkedLogProbFunction = pytest.importorskip("trl.kernels").ChunkedLogProbFunction
utils = pytest.importorskip("trl.trainer.utils")

pytestmark = [
    pytest.mark.skipif(not hasattr(utils, "_use_triton"), reason="this TRL has another fused head than 1.16"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),  # TRL uses names that it has deprecated
]

STEPS = 20
SUMMED, EACH = "summed log_probs of TRL", "log_probs of TRL"
#: (trainer, its settings, kinds of loss in the report); "make" and "lora" say which model.
CASES = {
    "SFT": ("SFT", {"evaluated": True}, SUMMED),
    "SFT, accumulation": ("SFT", {"gradient_accumulation_steps": 4}, SUMMED),
    "SFT, LoRA, packing": ("SFT", {"lora": True, "packing": True, "max_length": 16, "learning_rate": 0.3}, SUMMED),
    "SFT, mixture of experts": ("SFT", {"make": mixtral, "gradient_accumulation_steps": 4}, SUMMED),
    "SFT, DFT": ("SFT", {"loss_type": "dft"}, EACH),
    "SFT, bfloat16": ("SFT", {"bf16": True}, SUMMED),
    "DPO, accumulation": ("DPO", {"gradient_accumulation_steps": 4}, EACH),
    "DPO, LoRA, mixture": ("DPO", {"lora": True, "make": mixtral, "learning_rate": 0.3}, EACH),
    "DPO, WPO": ("DPO", {"use_weighting": True}, EACH),
    "DPO, bfloat16": ("DPO", {"bf16": True}, EACH),
    "KTO": ("KTO", {}, EACH),
    "KTO, LoRA, accumulation": ("KTO", {"lora": True, "gradient_accumulation_steps": 4, "learning_rate": 0.3}, EACH),
    "GRPO, accumulation": ("GRPO", {"gradient_accumulation_steps": 4, "temperature": 0.8}, EACH),
    "GRPO, LoRA, entropy": ("GRPO", {"lora": True, "beta": 0.1, "entropy_coef": 0.05, "learning_rate": 0.3}, EACH),
    "RLOO": ("RLOO", {}, EACH),
    "RLOO, LoRA, accumulation": ("RLOO", {"lora": True, "beta": 0.1, "gradient_accumulation_steps": 4}, EACH),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """The matrices are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _unpatched():
    """Every test begins and ends with TRL as it is."""
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction, "a test did not unpatch its trainer"
    yield
    unpatch_trainers()


@pytest.fixture
def no_head_of_trl(monkeypatch):
    """A function that makes every later call of TRL's own function an error."""

    def unexpected(*_):
        raise AssertionError("TRL's own function ran")

    return lambda: monkeypatch.setattr(ChunkedLogProbFunction, "forward", staticmethod(unexpected))


def prepared(name, folder, **settings):
    """A trainer, with a copy of its parameters before it trains."""
    trainer = trainer_of(name, folder, **{"max_steps": STEPS, **settings})
    trainer.initial = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_same_as_stock(case, tmp_path, no_head_of_trl):
    name, settings, kind = CASES[case]
    stock = prepared(name, tmp_path, **settings)
    stock.train()
    trainer = patch_trainer(prepared(name, tmp_path, **settings))
    no_head_of_trl()
    trainer.train()
    half = settings.get("bf16", False)
    assert_same_runs(trainer, stock, half)

    report = fusion_report(trainer.model)
    calls = STEPS * settings.get("gradient_accumulation_steps", 1)
    assert set(report.fused) == {kind}
    fused = report.fused[kind]
    assert fused.calls >= calls
    assert (0 < fused.ignored < fused.tokens) or settings.get("packing")
    assert report.bytes_not_allocated == fused.tokens * V * (2 if half else 4)
    assert not report.reads
    if getattr(trainer, "ref_model", None) is not None:
        assert fusion_report(trainer.ref_model).fused[EACH].calls >= calls


@pytest.mark.parametrize("given", ["label_smoothing_factor", "compute_loss_func"])
def test_losses_that_sft_takes_of_logits(given, tmp_path, no_head_of_trl):
    def loss_func(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].reshape(-1, V).float()
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / 10

    def run():
        trainer = prepared("SFT", tmp_path, **({given: 0.1} if given == "label_smoothing_factor" else {}))
        if given == "compute_loss_func":
            trainer.compute_loss_func = loss_func
        return trainer

    stock, trainer = run(), patch_trainer(run())
    stock.train()
    no_head_of_trl()
    trainer.train()
    assert_same_runs(trainer, stock)
    report = fusion_report(trainer.model)
    assert report.fused[SUMMED].calls == STEPS  # for the metrics
    assert len(report.fused) > 1
    assert not report.reads
    unpatch_trainer(trainer)
    assert "_fused_ignore_ce" not in trainer.model.__dict__


def test_unpatching_restores_everything(tmp_path):
    trainer = trainer_of("SFT", tmp_path, max_steps=1)
    forward, cls, keys = trainer.model.forward, type(trainer.model), set(trainer.model.__dict__)
    triton = utils._use_triton
    for _ in range(2):
        assert patch_trainer(trainer) is trainer
    assert utils._use_triton is not triton
    for _ in range(2):
        assert unpatch_trainer(trainer) is trainer
    assert trainer.model.forward == forward
    assert type(trainer.model) is cls
    assert set(trainer.model.__dict__) == keys
    assert utils._use_triton is triton
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_other_models_keep_trls_function(tmp_path, monkeypatch):
    """So does the same model after unpatching, although accelerate has wrapped its forward."""
    calls = []
    original = ChunkedLogProbFunction.forward
    monkeypatch.setattr(
        ChunkedLogProbFunction, "forward", staticmethod(lambda *args: calls.append(1) or original(*args))
    )
    patched, other = (trainer_of("SFT", tmp_path, max_steps=2, bf16=True) for _ in range(2))
    patch_trainer(patched).train()
    assert not calls
    other.train()
    assert len(calls) == 2
    unpatch_trainer(patched).train()
    assert len(calls) == 4
    assert fusion_report(patched.model).fused[SUMMED].calls == 2


@pytest.mark.parametrize("order", ["model first", "trainer first"])
def test_together_with_patch_model(order, tmp_path, no_head_of_trl):
    """Both patches share one report, and no warning says that other code took the model's loss."""
    trainer = trainer_of("SFT", tmp_path, max_steps=2)
    forward = trainer.model.forward
    for patch in (patch_model, patch_trainer)[:: 1 if order == "model first" else -1]:
        patch(trainer.model if patch is patch_model else trainer)
    no_head_of_trl()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is patched by fused_ignore_ce")
        trainer.train()
    unpatch_trainer(trainer)
    assert hasattr(type(trainer.model), "_fused_ignore_ce_of")  # the caller called patch_model, so it stays
    unpatch_model(trainer.model)
    assert trainer.model.forward == forward


def test_options_of_patch_model_that_trls_loss_does_not_have(tmp_path):
    trainer = patch_trainer(trainer_of("SFT", tmp_path, max_steps=1))
    patch_model(trainer.model, ignore_index=5)
    with pytest.raises(RuntimeError, match="ignore_index: given to patch_model"):
        trainer.train()


def test_more_ids_to_ignore(tmp_path, no_head_of_trl):
    trainers = [prepared("SFT", tmp_path, max_steps=3) for _ in range(3)]
    for trainer in trainers[1:]:
        trainer.data_collator = IgnoreTokens(trainer.data_collator, range(1, 20))
    trainers[1].train()
    patch_trainer(trainers[0])
    patch_trainer(trainers[2])
    no_head_of_trl()
    trainers[0].train()
    trainers[2].train()
    assert_same_runs(trainers[2], trainers[1])
    fewer, more = (fusion_report(trainers[i].model).fused[SUMMED].ignored for i in (0, 2))
    assert more > fewer


def test_a_batch_without_a_token_that_counts(tmp_path):
    trainer = patch_trainer(trainer_of("SFT", tmp_path, max_steps=1))
    ids = torch.tensor([[3, 4, 5]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in trainer.model.parameters())


def test_a_loss_of_ones_own_gets_gradients_of_entropies(tmp_path):
    """A subclass may do anything with what TRL's head returns: nothing is assumed of its loss."""

    class WithEntropy(trl.SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs, fused_lm_head=True)
            return -(outputs.log_probs.square().sum() + outputs.entropy.sum()) / 100

    stock, trainer = (trainer_of("SFT", tmp_path, cls=WithEntropy, max_steps=5) for _ in range(2))
    stock.initial = {n: p.detach().clone() for n, p in stock.model.named_parameters()}
    stock.train()
    patch_trainer(trainer).train()
    assert_same_runs(trainer, stock)


def test_compiled(tmp_path, no_head_of_trl):
    trainer = patch_trainer(trainer_of("SFT", tmp_path, max_steps=1))
    no_head_of_trl()
    ids = torch.randint(3, V, (2, 9))
    labels = ids.masked_fill(ids % 3 == 0, -100)
    model = trainer.model.train()
    expected = model(input_ids=ids, labels=labels, fused_lm_head=True)
    found = torch.compile(model, backend="eager")(input_ids=ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    gradients = [torch.autograd.grad(each.loss, model.parameters()) for each in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_an_unknown_version_is_an_error(tmp_path, monkeypatch):
    trainer = trainer_of("SFT", tmp_path, max_steps=1)
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    with pytest.raises(RuntimeError, match=r"trl: expected a release of 1\.16, .* got 1\.99\.0"):
        patch_trainer(trainer)
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_a_trainer_without_the_head_is_an_error(tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    for trainer in (transformers.Trainer(one_layer(), arguments), None, one_layer()):
        with pytest.raises(TypeError, match=f"trainer: expected a trainer of TRL .* got {type(trainer).__name__}"):
            patch_trainer(trainer)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"backend": "cuda"}, ValueError),
        ({"memory_budget": "1 acre"}, TypeError),
        ({"z_loss": 1e-4}, TypeError),
        ({"logits_dtype": torch.float16}, ValueError),
    ],
    ids=str,
)
def test_wrong_options(given, error, tmp_path):
    trainer = trainer_of("SFT", tmp_path, max_steps=1)
    with pytest.raises(error, match=next(iter(given))):
        patch_trainer(trainer, **given)
    assert not ours._patches


def test_a_head_that_deepspeed_partitions_is_an_error(tmp_path):
    trainer = patch_trainer(trainer_of("SFT", tmp_path, max_steps=1))
    trainer.model.lm_head.weight.ds_id = 0
    with pytest.raises(RuntimeError, match="trainer: expected a model whose head .* DeepSpeed ZeRO-3 partitions"):
        trainer.train()
    assert ours._running.call is None


def test_importing_does_not_import_trl():
    code = "import fused_ignore_ce.trl, sys; print({'trl', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
