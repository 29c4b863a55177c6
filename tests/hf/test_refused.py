"""What a patched model cannot compute as asked is an error or a warning, and never another loss in silence."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, LlamaForCausalLM, LlamaModel
from transformers import BertForSequenceClassification as Classifier

from fused_ignore_ce.deferred import DeferredLogits
from fused_ignore_ce.hf import patch_model, patch_transformers, unpatch_model

from ..helpers.hf_worker import PAD, V, batches, llama, trajectory
from ..helpers.trainer_runs import train
from ..helpers.versions import release

STEPS = 3


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_sum_that_ignores_more_than_its_caller_knows_is_an_error(reduction):
    model, batch = patch_model(llama(), ignore_index=[PAD, 7]), batches(1)[0]
    labels = batch["labels"].masked_fill(batch["labels"] == 7, 8)
    kept = F.cross_entropy(model(**batch | {"labels": labels}).logits.transpose(1, 2), labels, reduction=reduction)
    torch.testing.assert_close(
        kept, F.cross_entropy(llama()(batch["input_ids"], batch["attention_mask"]).logits.transpose(1, 2), labels,
                              reduction=reduction),
    )  # fmt: skip
    labels[0, -4] = 7
    outputs = model(**batch | {"labels": labels})  # a mean is right
    with pytest.raises(ValueError, match=f"reduction='{reduction}'"):
        F.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction=reduction)
    with pytest.raises(ValueError, match="num_items_in_batch"):
        model(**batch | {"labels": labels}, num_items_in_batch=20)
    own = F.cross_entropy(outputs.logits.transpose(1, 2), labels.clamp(min=7), ignore_index=7, reduction="sum")
    assert own.isfinite()  # the caller ignores the id explicitly


def test_a_compiled_sum_is_checked_too():
    torch._dynamo.reset()
    batch = batches(1)[0]
    model = torch.compile(patch_model(llama(num_hidden_layers=1), ignore_index=7), backend="aot_eager")
    batch["labels"].masked_fill_(batch["labels"] == 7, 8)
    assert model(**batch, num_items_in_batch=torch.tensor(9)).loss.isfinite()
    batch["labels"][0, -4] = 7
    with pytest.raises(RuntimeError, match="num_items_in_batch"):
        model(**batch, num_items_in_batch=torch.tensor(9))


class OtherLoss(torch.autograd.Function):
    """The loss of some other package's head."""

    @staticmethod
    def forward(ctx, hidden):
        ctx.shape = hidden.shape
        return hidden.sum()

    @staticmethod
    def backward(ctx, upstream):
        return upstream.expand(ctx.shape)


def other_forward(self, input_ids, attention_mask=None, labels=None):
    outputs = self.model(input_ids, attention_mask)
    outputs["loss"] = OtherLoss.apply(outputs.last_hidden_state) / 2
    return outputs


@pytest.mark.parametrize("order", ["patched first", "patched last"])
def test_a_loss_that_something_else_takes_is_a_warning_that_names_it_once(order):
    model = llama()
    if order == "patched first":
        patch_model(model)
    model.forward = other_forward.__get__(model)
    patch_model(model)
    name = r"LlamaForCausalLM.*test_refused\.other_forward \(.*test_refused\.OtherLoss\)"
    with pytest.warns(UserWarning, match=name):
        model(**batches(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batches(1)[0])


@pytest.mark.skipif(release("transformers") < (5, 0), reason="Liger 0.8.5 needs transformers 5")
@pytest.mark.parametrize("order", ["patched first", "patched last"])
def test_liger(order):
    liger = pytest.importorskip("liger_kernel.transformers")
    model = llama()
    if order == "patched first":
        patch_model(model)
    liger.apply_liger_kernel_to_llama(
        rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=True, model=model
    )
    if order == "patched last":
        patch_model(model)
    with pytest.warns(UserWarning, match="liger_kernel.*lce_forward"):
        model.train()(**batches(1)[0])


def test_a_loss_that_is_no_cross_entropy_is_named_as_such():
    config = BertConfig(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                        num_labels=1)  # fmt: skip
    model = patch_model(Classifier(config))
    with pytest.warns(UserWarning, match="modeling_bert.forward"):
        model(input_ids=batches(1)[0]["input_ids"], labels=torch.rand(3))


def test_a_model_without_a_head_is_an_error():
    config = llama().config
    for model in (LlamaModel(config), torch.nn.Sequential(LlamaModel(config))):
        with pytest.raises(ValueError, match="LlamaModel, which has no output embeddings.*ForCausalLM"):
            patch_model(model)
    assert type(model[0]) is LlamaModel
    with patch_transformers():
        assert LlamaModel(config)(batches(1)[0]["input_ids"]).last_hidden_state.isfinite().all()


def criterion(outputs, labels, **options):
    return torch.nn.CrossEntropyLoss(**options)(outputs.logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))


def test_options_reach_a_loss_after_the_forward():
    """If labels were given, a loss that the user takes has the same options as the model's own."""
    batch = batches(1)[0]
    batch["labels"][:, -5:-3] = 9
    masked = batch["labels"].masked_fill(batch["labels"] == 9, -100)
    outputs = patch_model(llama(), ignore_index=9, label_smoothing=0.1)(**batch)
    ours = criterion(outputs, batch["labels"])
    plain = llama()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    torch.testing.assert_close(ours, criterion(plain, masked, label_smoothing=0.1))
    torch.testing.assert_close(ours, outputs.loss)
    outputs.logits[0, 0, 0] = 1.0
    assert isinstance(outputs.logits, DeferredLogits)
    logits = (
        (plain.logits * 1).index_fill(2, torch.tensor([0]), 1.0).where(F.one_hot(torch.tensor(0), V) > 0, plain.logits)
    )
    logits = torch.cat([torch.cat([logits[:1, :1], plain.logits[:1, 1:]], 1), plain.logits[1:]])
    smoothed = F.cross_entropy(logits.transpose(1, 2), masked, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(outputs.logits.transpose(1, 2), batch["labels"]), smoothed)
    with pytest.raises(RuntimeError, match="ignore_index, label_smoothing: given to patch_model"):
        outputs.logits.square().mean().backward()


#: Operations that are not recorded, after which the tensor may still be logits.
UNRECORDED = {
    "where": lambda x: torch.where(x > 0, x, x * 0.5),
    "cat": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "index_select": lambda x: x.index_select(2, torch.arange(V).flip(0)),
    "layer_norm": lambda x: F.layer_norm(x, (V,)),
    "softsign": F.softsign,
    "logaddexp": lambda x: torch.logaddexp(x, x * 2),
    "a sum": lambda x: x + torch.linspace(0, 1, x.numel()).view(x.shape) * 2 + x.roll(1, -1),
}


@pytest.mark.parametrize("operation", UNRECORDED.values(), ids=UNRECORDED)
def test_options_reach_a_loss_after_operations_that_are_not_recorded(operation):
    batch = batches(1)[0]
    model = patch_model(llama(), label_smoothing=0.1)
    losses = []
    for one, options in ((model, {}), (llama(), {"label_smoothing": 0.1})):
        for logits in (one(batch["input_ids"]).logits, one.lm_head(one.model(batch["input_ids"])[0])):
            loss = F.cross_entropy(operation(logits).reshape(-1, V), batch["labels"].view(-1), **options)
            losses.append(loss)
        loss.backward()
    for loss in losses[:3]:
        torch.testing.assert_close(loss, losses[3])
    torch.testing.assert_close(model.lm_head.weight.grad, one.lm_head.weight.grad)


#: Losses of logits that are no cross entropy of class indices.
OTHERS = {
    "mean": lambda logits, labels: logits.square().mean(),
    "log_softmax": lambda logits, labels: -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).mean(),
    "multi_margin_loss": lambda logits, labels: F.multi_margin_loss(
        logits[:, 0] + torch.rand(1, V), labels[:, 1].abs()
    ),
}


@pytest.mark.parametrize("loss", OTHERS.values(), ids=OTHERS)
def test_a_loss_that_options_cannot_reach_is_an_error_in_its_backward(loss):
    batch = batches(1)[0]
    found = loss(patch_model(llama(), ignore_index=9)(**batch).logits, batch["labels"])
    with pytest.raises(RuntimeError, match="ignore_index: given to patch_model, but this loss"):
        found.backward()
    plain = patch_model(llama())
    loss(plain(**batch).logits, batch["labels"]).backward()
    assert plain.lm_head.weight.grad.isfinite().all()
    logits = patch_model(llama(), ignore_index=9)(**batch).logits
    assert logits.argmax(-1).shape == logits.shape[:2]  # logits can be read for other things than a loss


def test_options_and_a_loss_of_the_trainer_that_cannot_take_them_are_an_error(tmp_path):
    model, ids = patch_model(llama(), z_loss=0.1), torch.tensor([[1, 2]])
    with pytest.raises(RuntimeError, match=r"z_loss: given to patch_model, but this loss was taken"):
        train(model, tmp_path, {"max_steps": 1, "label_smoothing_factor": 0.2})
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()
    assert model.eval()(ids).logits.isfinite().all()
    unpatch_model(model).train()(ids)


def test_a_patched_training_run_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trajectory(patch_model(llama(), ignore_index=PAD), batches(2))


def test_what_is_no_model_is_told_what_to_pass():
    class Holder:
        model = llama()

    with pytest.raises(TypeError, match=r"got Holder; pass its \.model"):
        patch_model(Holder())
    with pytest.raises(
        TypeError, match=r"the class LlamaForCausalLM; pass an instance, or call patch_transformers\(\)"
    ):
        patch_model(LlamaForCausalLM)
    with pytest.raises(TypeError, match="PreTrainedModel.*Linear"):
        patch_model(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="PreTrainedModel.*str"):
        patch_model("meta-llama/Llama-3.1-8B")


_TRANSFORMS = {
    "grad": lambda loss, parameters: torch.func.grad(loss)(parameters),
    "vjp": lambda loss, parameters: torch.func.vjp(loss, parameters),
    "vmap": lambda loss, parameters: torch.func.vmap(loss)({n: p.expand(2, *p.shape) for n, p in parameters.items()}),
}


@pytest.mark.parametrize("outside", [False, True], ids=["in the forward", "after it"])
@pytest.mark.parametrize("transform", _TRANSFORMS.values(), ids=_TRANSFORMS)
def test_transforms_of_torch_func(transform, outside):
    model, batch = patch_model(llama()), batches(1)[0]
    labels = batch.pop("labels")

    def loss(parameters):
        if not outside:
            return torch.func.functional_call(model, parameters, kwargs=batch | {"labels": labels}).loss
        logits = torch.func.functional_call(model, parameters, kwargs=batch).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss(parameters)  # is no transform
    with pytest.raises(NotImplementedError, match=r"fused_ignore_ce.*unpatch_model\(model\)"):
        transform(loss, parameters)
    unpatch_model(model)
    transform(loss, parameters)


@pytest.mark.parametrize("use", [lambda logits: logits.sum(), lambda logits: logits.view(-1, V).logsumexp(-1)])
def test_a_tied_head_that_is_resized_before_its_loss(use):
    """It gives the parameter other data, which PyTorch does not count as a write."""
    model = patch_model(llama(tie_word_embeddings=True))
    logits = model(batches(1)[0]["input_ids"]).logits
    model.resize_token_embeddings(V - 4)
    with pytest.raises(RuntimeError, match="head's weights or the hidden states were changed in place or resized"):
        use(logits)
