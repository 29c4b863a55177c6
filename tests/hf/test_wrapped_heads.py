"""Heads in other modules, with hooks, parametrized or compiled: losses and gradients are the unpatched model's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fused_ignore_ce.deferred import affine
from fused_ignore_ce.hf import fusion_report, patch_model

from ..helpers.hf_tiny import D, V, assert_same_step, batch, llama, step

accelerate = pytest.importorskip("accelerate")


class CastOutputToFloat(nn.Sequential):
    """What PEFT's examples put around a head."""

    def forward(self, hidden):
        return super().forward(hidden).to(torch.float32)


class FloatHead(nn.Module):
    """A head of float32 in a model of another dtype."""

    def __init__(self, head):
        super().__init__()
        self.head = head.float()

    def forward(self, hidden):
        return self.head(hidden.float())


class CastingHead(nn.Linear):
    """Its weight has the model's dtype, its product is one of float32, under autocast as well."""

    def forward(self, hidden):
        with torch.autocast("cpu", enabled=False):
            return F.linear(hidden.float(), self.weight.float())


def cast_by_trl(head):
    """`cast_lm_head_to_fp32` of TRL's GRPO."""
    head = head.float()
    head.forward = lambda hidden: F.linear(hidden.to(torch.float32), head.weight.to(torch.float32), None)
    return head


def casting(head):
    made = CastingHead(D, V, bias=False)
    made.weight = head.weight
    return made


#: name -> (what is put around a head, the dtype of its product in a bfloat16 model and under autocast)
AROUND = {
    "Sequential": (nn.Sequential, torch.bfloat16, torch.bfloat16),
    "norm before it": (
        lambda head: nn.Sequential(nn.LayerNorm(D, dtype=head.weight.dtype), head),
        *[torch.bfloat16] * 2,
    ),
    "CastOutputToFloat": (CastOutputToFloat, torch.bfloat16, torch.bfloat16),
    "float32 head": (FloatHead, torch.float32, torch.bfloat16),
    "casting head": (casting, torch.float32, torch.float32),
    "TRL": (cast_by_trl, torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("patched", ["before", "after"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", AROUND)
def test_a_head_in_another_module(name, precision, patched, took, monkeypatch):
    around, *dtypes = AROUND[name]
    dtypes = dict(zip(("bfloat16", "autocast"), dtypes, strict=True))

    def built(patch):
        model = llama().to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
        if patch == "before":
            patch_model(model)
        model.lm_head = around(model.lm_head)
        return patch_model(model) if patch == "after" else model

    def stepped(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            outputs = model(**batch())
        (outputs.loss * 0.5).backward()
        return outputs, {name: p.grad for name, p in model.named_parameters()}

    products = []
    right = affine.fused_linear_cross_entropy

    def spied(hidden, *args, **kwargs):
        products.append(torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden.dtype)
        return right(hidden, *args, **kwargs)

    monkeypatch.setattr(affine, "fused_linear_cross_entropy", spied)
    plain, ours = stepped(built(None)), stepped(built(patched))
    assert took == ["linear"]
    assert products == [dtypes.get(precision, torch.float32)]
    assert not ours[0].logits.is_materialized
    assert ours[0].logits.dtype == plain[0].logits.dtype
    if products == [torch.float32]:
        assert torch.equal(ours[0].logits.detach().materialize(), plain[0].logits)
        assert_same_step(ours, plain) if precision == "float32" else assert_close(ours, plain, 1e-5)
    else:  # the fused loss does not round its logits
        assert_close(ours, plain, 3e-2)


def assert_close(ours, plain, rel):
    torch.testing.assert_close(ours[0].loss, plain[0].loss, rtol=rel, atol=0)
    for name, expected in plain[1].items():
        size = expected.abs().max().item()
        assert size > 0, name
        assert (ours[1][name] - expected).abs().max().item() <= max(rel, 1e-2) * size, name  # bfloat16 below the head


class Random(nn.Module):
    def forward(self, weight):
        return weight * (torch.rand_like(weight) > 0.2)


def _hooked(register, hook):
    return lambda head, seen: getattr(head, register)(lambda *args: hook(seen, *args))


#: name -> what is done to a head, given a list for what its hooks see.
HOOKS = {
    "reads": _hooked("register_forward_hook", lambda seen, head, args, out: seen.append(out.detach().sum())),
    "reads the shape": _hooked("register_forward_hook", lambda seen, head, args, out: seen.append(out.shape.numel())),
    "scales": _hooked("register_forward_hook", lambda seen, head, args, out: out * 2),
    "computes": _hooked("register_forward_hook", lambda seen, head, args, out: out.sinh()),
    "scales hidden states": _hooked("register_forward_pre_hook", lambda seen, head, args: (args[0] * 1.5,)),
    "backward": _hooked(
        "register_full_backward_hook", lambda seen, head, given, grad: seen.extend([given[0].norm(), grad[0].norm()])
    ),
    "backward, replaces": _hooked("register_full_backward_hook", lambda seen, head, given, grad: (given[0] * 0.5,)),
    "backward, before": _hooked("register_full_backward_pre_hook", lambda seen, head, grad: (grad[0] * 0.5,)),
    "weight norm": lambda head, seen: parametrizations.weight_norm(head),
    "weight norm by a hook": lambda head, seen: torch.nn.utils.weight_norm(head),
    "spectral norm": lambda head, seen: parametrizations.spectral_norm(head),
    "orthogonal": lambda head, seen: parametrizations.orthogonal(head),
    "random": lambda head, seen: parametrize.register_parametrization(head, "weight", Random()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("outside", [False, True], ids=["in the forward", "after it"])
@pytest.mark.parametrize("patched", ["before", "after"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_and_parametrizations(name, patched, outside):
    def trained(patch):
        model, seen = llama(), []
        if patch == "before":
            patch_model(model)
        torch.manual_seed(1)
        HOOKS[name](model.lm_head, seen)
        if patch == "after":
            patch_model(model)
        torch.manual_seed(2)
        losses = []
        for _ in range(2):  # a second time, because the first may advance what the second begins with
            inputs = batch()
            labels = inputs.pop("labels")
            outputs = model(**inputs) if outside else model(**inputs, labels=labels)
            if outside:
                outputs.loss = F.cross_entropy(outputs.logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
            (outputs.loss * 0.5).backward()
            losses.append(outputs.loss.detach())
        return model, seen, losses, {name: p.grad for name, p in model.named_parameters()}

    (plain, expected, true, grads), (model, seen, losses, found) = trained(None), trained(patched)
    torch.testing.assert_close(losses, true)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, grads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))
    if name != "computes":
        assert fusion_report(model).fused["cross_entropy"].calls == 2


def test_a_hook_that_changes_a_loss_in_a_call_of_the_head_is_an_error():
    """The head's weights come and go, so that the loss is taken in a call, and the hook takes it for the logits."""
    model = patch_model(llama())
    head, whole, empty = model.lm_head, model.lm_head.weight.data, torch.empty(0)
    head.register_forward_pre_hook(lambda *_: setattr(head.weight, "data", whole))
    head.register_forward_hook(lambda *_: setattr(head.weight, "data", empty))
    model(**batch())
    hook = head.register_forward_hook(lambda head, args, out: out * 1)
    model(**batch())
    hook.remove()
    head.register_forward_hook(lambda head, args, out: out * 2)
    with pytest.raises(
        RuntimeError, match="head: expected forward hooks that leave a loss as it is, got one that changed it"
    ):
        model(**batch())


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("outside", [False, True], ids=["in the forward", "after it"])
@pytest.mark.parametrize("patched", ["before", "after"])
def test_compiled_heads(patched, outside, how):
    torch._dynamo.reset()
    model, inputs = llama(), batch()
    labels = inputs.pop("labels")
    plain = step(model, **inputs, labels=labels)

    def compiled():
        if how == "in place":
            model.lm_head.compile(backend="aot_eager")
        else:
            model.lm_head = torch.compile(model.lm_head, backend="aot_eager")

    for work in (lambda: patch_model(model), compiled)[:: 1 if patched == "before" else -1]:
        work()
    model.zero_grad()
    outputs = model(**inputs) if outside else model(**inputs, labels=labels)
    if outside:
        outputs.loss = F.cross_entropy(outputs.logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    (outputs.loss * 0.5).backward()
    torch.testing.assert_close(outputs.loss, plain[0].loss)
    found = {name.replace("_orig_mod.", ""): p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(found, plain[1])
    assert fusion_report(model).fused["cross_entropy"].calls == 1
    assert fusion_report(model).fused.keys() == {"cross_entropy"}


#: name -> what accelerate does to a model, given a folder.
OFFLOADS = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(
        model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True
    ),
    "dispatch_model, head on disk": lambda model, folder: accelerate.dispatch_model(
        model, {"model": "cpu", "lm_head": "disk"}, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}


@pytest.mark.parametrize("outside", [False, True], ids=["in the forward", "after it"])
@pytest.mark.parametrize("patched", ["before", "after"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_offloaded_models(name, tied, patched, outside, tmp_path):
    """Offloaded weights take no gradients in accelerate, so those of hidden states are compared."""

    def stepped(patch):
        model, hidden = llama(tie_word_embeddings=tied), []
        if patch == "before":
            patch_model(model)
        OFFLOADS[name](model, str(tmp_path / str(patch)))
        if patch == "after":
            patch_model(model)
        model.model.norm.register_forward_hook(lambda norm, args, out: hidden.append(out))
        inputs = batch()
        labels = inputs.pop("labels")
        inputs["inputs_embeds"] = F.embedding(inputs.pop("input_ids"), torch.linspace(-1, 1, V * D).view(V, D))
        outputs = model(**inputs) if outside else model(**inputs, labels=labels)
        if outside:
            outputs.loss = F.cross_entropy(outputs.logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
        (gradient,) = torch.autograd.grad(outputs.loss * 0.5, hidden)
        return model, outputs.loss.detach(), gradient

    (_, *expected), (model, *found) = stepped(None), stepped(patched)
    torch.testing.assert_close(found, expected)
    assert fusion_report(model).fused["cross_entropy"].calls == 1
