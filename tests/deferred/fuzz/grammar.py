"""The statements that programs are made of, and how a program is drawn.

A template is a line of Python with placeholders. `{x}` is a variable of logits' form, floating point with classes last;
`{like}` another one of its shape; `{full}` one with all V classes; `{tokens}` one of three axes; `{rows}` one of two; `{loss}`
a scalar that requires a gradient, `{scalar}` any scalar; `{node}` a tensor that requires a gradient and is no leaf; `{grad}`
one that requires a gradient; `{any}` any tensor; `{hidden}` hidden states; `{small}` logits that may be exponentiated.
`{second}` logits with classes second; `{sharp}` logits without ties, zeros or ones, for operations with an edge there;
`{solid}` a scalar that may be divided by. One placeholder is one variable throughout a template, `{new}`, `{new_loss}`,
`{new_second}`, `{new_hidden}` and `{new_value}` are one that the statement makes, another one each, and `{new!}` the last.

What is left out, because PyTorch is at odds with itself:

- Views made under `no_grad` or in inference mode of a tensor that requires a gradient: they say that they require one,
  get none, and crash on a hook. So templates marked "view" get no mode, unless their tensor requires no gradient.
- Writes through `.data`: saved tensors change and nobody notices, so that PyTorch's own gradients are wrong.
- What follows a backward pass that failed: which gradients it has accumulated by then depends on the order of nodes.
- The order in which hooks of different tensors are called in one backward: it is the order in which nodes were made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .interpreter import Observed, Run
from .models import MODELS, D, V
from .programs import Program, Setting, Statement

#: Draws one of several; hypothesis' or random's.
Pick = Callable[[Sequence[Any]], Any]


class Template(NamedTuple):
    kind: str
    weight: int
    text: str
    #: "moded": may stand in a grad mode. "quiet": computes no logits. "fusible": only of heads whose losses are fused.
    #: "not_beside": writes to what a thread beside uses. "rare", "slow": drawn less often. "view", "backward".
    flags: frozenset[str]


def _templates(kind: str, weight: int, flags: str, *texts: str) -> list[Template]:
    return [Template(kind, weight, text, frozenset(flags.split())) for text in texts]


TEMPLATES: list[Template] = [
    # Forwards.
    *_templates("forward", 12, "", "{new} = model(ids).logits"),
    *_templates("forward", 4, "",
        "out = model(ids, labels=labels); {new_loss} = out.loss; {new} = out.logits; del out"),
    *_templates("other model", 3, "", "{new} = other(ids).logits"),
    *_templates("forward under a mode", 3, "",
        "with torch.no_grad(): {new} = model(ids).logits",
        "with torch.no_grad(): out = other(ids, labels=labels); {new} = out.logits; del out",
        "with torch.no_grad(): out = model(ids, labels=labels); {new} = out.logits; {new_value} = out.loss; del out",
        "with torch.inference_mode(): {new} = model(ids).logits",
        "with torch.no_grad(), torch.enable_grad(): {new} = model(ids).logits"),
    *_templates("by hand", 3, "",
        "{new_hidden} = model.model(ids)[0]", "{new_hidden} = model.model(ids)[0].detach().requires_grad_()",
        "{new} = model.lm_head({hidden})", "{new} = model.lm_head({hidden})", "{new} = model.lm_head({hidden}.flatten(0, 1))",
        "{new} = torch.func.functional_call(model, dict(model.named_parameters()), (ids,)).logits"),
    *_templates("checkpoint", 2, "",
        "{new} = checkpoint(lambda i: model(i).logits, ids, use_reentrant=False)",
        "{new} = checkpoint(lambda h: model.lm_head(h), {hidden}, use_reentrant=True)"),
    # Casts and views.
    *_templates("cast", 2, "moded",
        "{new} = {x}.float()", "{new} = {x}.double()", "{new} = {x}.to(torch.float64)", "{new} = {x}.type_as({like})",
        "{new} = {x}.to(ids.device)", "{new} = {x}.contiguous()", "{new} = {x}.clone()"),
    *_templates("view", 3, "view",
        "{new} = {x}.view(-1, {x}.shape[-1])", "{new} = {tokens}.flatten(0, 1)", "{new} = {tokens}[:, 1:]",
        "{new} = {tokens}[..., :-1, :]", "{new} = {tokens}[0]", "{new} = {tokens}[:, -1]", "{new} = {x}.unsqueeze(0)",
        "{new} = {x}.reshape(-1, {x}.shape[-1])", "{new} = {tokens}.transpose(0, 1)", "{new} = {tokens}.narrow(1, 0, 2)",
        "{new} = {x}.view_as({like})", "{new} = {tokens}.split(2, dim=1)[0]", "{new} = {tokens}.unbind(0)[1]",
        "{new}, {new} = {tokens}.split([1, 2], dim=1)", "{new} = {x}[None].squeeze(0)",
        "{new} = {x}.expand(2, *{x}.shape)"),
    *_templates("slice of classes", 2, "view",
        "{new} = {x}[..., :7]", "{new} = {x}[..., 2:]", "{new} = {x}.narrow(-1, 1, 6)"),
    *_templates("rows picked", 2, "moded",
        "{new} = {tokens}[mask[:{tokens}.shape[0], :{tokens}.shape[1]]]", "{new} = {tokens}[torch.tensor([0, 0], device=ids.device), torch.tensor([1, 0], device=ids.device)]",
        "{new} = {tokens}.index_select(1, torch.tensor([1, 0], device=ids.device))", "{new} = {rows}[[1, 0]]"),
    # Arithmetic with constants, with tensors that require gradients, and of two tensors.
    *_templates("constant", 3, "moded",
        "{new} = {x} / 2", "{new} = {x} * 0.5", "{new} = -{x}", "{new} = {full} + shift", "{new} = torch.tanh({x} / 5) * 5",
        "{new} = {x} - {x}.detach().max()", "{new} = 1.5 * {x} + 0.1"),
    *_templates("trainable operand", 3, "moded",
        "{new} = {full} + bias", "{new} = bias + {full}", "{new} = {x} / temperature", "{new} = {x} * temperature",
        "{new} = temperature * {x}", "{new} = {tokens} * scales[-{tokens}.shape[1]:]", "{new} = {full} - bias",
        "{new} = {full} @ matrix", "{new} = {x} * {x}.new_full((1,), 2.0).requires_grad_()"),
    *_templates("two tensors", 3, "moded",
        "{new} = {x} + {like}", "{new} = {x} - {like}", "{new} = {x} * {like}.softmax(-1)", "{new} = 0.3 * {x} + 0.7 * {like}"),
    *_templates("softmax", 3, "moded",
        "{new} = {x}.softmax(-1)", "{new} = {x}.log_softmax(-1)", "{new} = F.softmax({x}, dim=-1)",
        "{new} = F.log_softmax({x} / 2, dim=-1)", "{new} = torch.log_softmax({x}, -1)", "{new} = F.logsigmoid({x})"),
    *_templates("elementwise", 1, "moded",
        "{new} = {small}.exp()", "{new} = {x}.square()", "{new} = {x}.sigmoid()", "{new} = {sharp}.relu()", "{new} = {sharp}.abs()",
        "{new} = {sharp}.clamp(-1, 1)", "{new} = {x}.sin()", "{new} = F.gelu({x})", "{new} = {x}.tanh()"),
    *_templates("not recorded", 2, "moded",
        "{new} = torch.where({sharp} > 0, {sharp}, {sharp} * 0.5)", "{new} = {x}.masked_fill(like({x}) > 0.5, -3.0)",
        "{new} = torch.cat([{x}, {like}], 0)", "{new} = torch.stack([{x}, {like}])", "{new} = F.softsign({x})",
        "{new} = F.layer_norm({sharp}, {sharp}.shape[-1:])", "{new} = torch.logaddexp({x}, {like})", "{new} = {sharp}.sort(-1).values",
        "{new} = {x}.roll(1, 0)", "{new} = Doubled.apply({x})",
        "{new} = torch.vmap(lambda z: z * 2)({x})"),
    # Losses.
    *_templates("cross entropy", 4, "moded",
        "{new_loss} = ce({x})", "{new_loss} = ce({x})", "{new_loss} = F.cross_entropy({rows}, labels_of({rows}))",
        "{new_loss} = F.cross_entropy({x}.view(-1, {x}.shape[-1]), labels_of({x}).view(-1), reduction='sum') / 3",
        "{new_loss} = ce({x}, label_smoothing=0.1)", "{new_loss} = ce({x}, weight=class_weight({x}))",
        "{new_loss} = F.cross_entropy({x}.flatten(0, -2), labels_of({x}).clamp(min=3).flatten(), ignore_index=3)", "{new_loss} = (ce({x}, reduction='none') * 0.3).sum()",
        "{new_loss} = F.nll_loss({rows}.log_softmax(-1), labels_of({rows}))",
        "{new_loss} = F.cross_entropy({rows}, like({rows}, positive=True).softmax(-1))",
        "{new_loss} = torch.nn.CrossEntropyLoss()({x}.flatten(0, -2), labels_of({x}).flatten())",
        "{new_loss} = ce({full} + bias)", "{new_loss} = ce({x} / temperature)"),
    *_templates("classes second", 1, "view",
        "{new_second} = {tokens}.transpose(1, 2)", "{new_second} = {tokens}.permute(0, 2, 1)"),
    *_templates("classes second", 1, "moded",
        "{new_loss} = F.cross_entropy({second}, labels_of({second}.transpose(1, 2)), label_smoothing=0.1)",
        "{new_loss} = F.cross_entropy({second}, labels_of({second}.transpose(1, 2)))",
        "{new_value} = {second}.log_softmax(1).transpose(1, 2).logsumexp(-1)",
        "{new_loss} = F.cross_entropy({tokens}.transpose(1, 2), labels_of({tokens}))",
        "{new_loss} = F.cross_entropy({tokens}.transpose(1, 2), labels_of({tokens}), label_smoothing=0.1)",
        "{new_loss} = F.cross_entropy({tokens}.movedim(-1, 1), labels_of({tokens}), weight=class_weight({tokens}))",
        "{new_loss} = F.cross_entropy({tokens}.transpose(1, 2), like({tokens}, positive=True).softmax(-1).transpose(1, 2))"),
    *_templates("other loss", 3, "moded",
        "{new_loss} = entropy({x})", "{new_loss} = z_loss({x})", "{new_loss} = picked({x}).mean()", "{new_loss} = -picked({x}).sum()",
        "{new_loss} = (picked({x}) - picked({like})).sigmoid().mean()", "{new_loss} = F.mse_loss({x}, {like})",
        "{new_loss} = F.kl_div({x}.log_softmax(-1), {like}.log_softmax(-1), log_target=True, reduction='batchmean')",
        "{new_loss} = F.kl_div({x}.log_softmax(-1), {like}.softmax(-1), reduction='batchmean')",
        "{new_loss} = (picked({x}) - picked({x}).detach()).exp().mean()", "{new_loss} = -({x}.softmax(-1) * {like}.log_softmax(-1)).sum(-1).mean()",
        "{new_loss} = F.multi_margin_loss({sharp}.flatten(0, -2), index_of({sharp}).flatten())",
        "{new_loss} = F.binary_cross_entropy_with_logits({x}, like({x}).sigmoid())",
        "{new_loss} = -({x}.log_softmax(-1) * {like}).sum(-1).mean()", "{new_loss} = ce({x}) + 0.1 * entropy({x})"),
    *_templates("reduction", 2, "moded",
        "{new_loss} = {any}.sum()", "{new_loss} = {x}.mean()", "{new_value} = {x}.sum(-1)", "{new_value} = {x}.mean(-1)",
        "{new_value} = {x}.logsumexp(-1)", "{new_value} = {sharp}.amax(-1)", "{new_value} = {x}.gather(-1, index_of({x}))",
        "{new_value} = {sharp}.max(-1).values", "{new_loss} = {x}.logsumexp(-1).mean()", "{new_loss} = {sharp}.std()",
        "{new_loss} = {sharp}.norm()", "{new_loss} = {any}.square().sum()", "{new_value} = {any}.float().sum(-1)",
        "{new_loss} = ({any} * like({any}, 1)).sum()", "{new_value} = {sharp}.min(-1).values", "{new_value} = {sharp}.var(-1)"),
    *_templates("arithmetic of losses", 2, "moded",
        "{new_loss} = {loss} + {scalar}", "{new_loss} = {loss} * 0.3", "{new_loss} = {loss} * temperature", "{new_loss} = {loss} / {solid}.detach()"),
    # Metrics, which read, and questions, which do not.
    *_templates("metric", 2, "moded",
        "{new_value} = {sharp}.argmax(-1)", "{new_value} = {x}.detach().max()", "{new_value} = float({sharp}.max())",
        "{new_value} = {x}.flatten()[0].item()", "{new_value} = {x}.isfinite().all()", "{new_value} = {sharp}.topk(2, -1).values.detach()",
        "{new_value} = torch.equal({x}, {x}.clone())", "{new_value} = float({x}.detach().cpu().numpy().sum())", "{new_value} = {x}.tolist()",
        "{new_value} = {any}.detach().clone()", "{new_value} = float({x}.numpy().sum())", "{new_value} = {sharp}.max()", "{new_value} = str({x})[:7]"),
    *_templates("one logit, two values", 2, "moded",
        "{new_value} = ({sharp} > {sharp}.gather(-1, index_of({sharp}))).sum(-1)",
        "{new_value} = ({sharp}.gather(-1, {sharp}.argmax(-1, keepdim=True)).squeeze(-1) >= {sharp}.amax(-1)).sum()",
        "{new_value} = ({sharp}.amax(-1) - {sharp}.gather(-1, {sharp}.argmax(-1, keepdim=True)).squeeze(-1)).sqrt()",
        "{new_value} = (({sharp} * 100).log_softmax(-1).amax(-1) > 0).sum()",
        "{new_value} = {sharp}.gather(-1, index_of({sharp})).flatten()[0] == {sharp}.flatten(0, -2)[0, index_of({sharp}).flatten()[0]]",
        "{new_value} = ({sharp}.max(-1).values == {sharp}.amax(-1)).all()",
        "{new_value} = ({sharp}.log_softmax(-1).gather(-1, index_of({sharp})) > {sharp}.log_softmax(-1)).sum(-1)"),
    *_templates("question", 1, "quiet",
        "{new_value} = {any}.new_zeros(2)", "{new_value} = {any}.new_tensor([1.0])", "{new_value} = torch.zeros_like({any})",
        "{new_value} = torch.empty_like({any}).shape", "{new_value} = {any}.stride()", "{new_value} = {any}.type()",
        "{new_value} = {any}.is_contiguous()", "{new_value} = {tokens}.transpose(1, 2).is_contiguous()",
        "{new_value} = {tokens}.transpose(0, 1).is_contiguous()", "{new_value} = tuple({any}.shape)", "{new_value} = {any}.numel()",
        "{new_value} = torch.ones_like({any})", "{new_value} = {any}.dim(), {any}.element_size(), len({any}.shape)",
        "{new_value} = str(torch.result_type({any}, 1.0))", "{new_value} = {any}.new_full((2,), 3.0)", "{new_value} = {any}.storage_offset()",
        "{new_value} = str({any}.device), str({any}.dtype), {any}.is_floating_point()", "{new_value} = {x}.size(-1), {x}.transpose(-1, -2).stride()",
        "{new_value} = {any}.requires_grad, {any}.is_leaf, {any}.retains_grad, {any}.is_sparse"),
    *_templates("fused", 2, "quiet fusible",
        "{new_loss} = F.cross_entropy(model(ids).logits.transpose(1, 2), labels)",
        "{new_loss} = F.cross_entropy(model(ids).logits.transpose(1, 2), labels, label_smoothing=0.1)",
        "{new_loss} = F.cross_entropy(model(ids).logits.transpose(1, 2), labels, weight=bias.detach())",
        "{new_loss} = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())",
        "{new_loss} = F.cross_entropy(model(ids).logits.transpose(1, 2), matrix.detach()[:6].softmax(-1).view(2, 3, V).transpose(1, 2))"),
    # Leaves.
    *_templates("detached leaf", 3, "",
        "{new} = {x}.detach().requires_grad_()", "{new} = {x}.detach(); {new!}.requires_grad = True",
        "{new} = {x}.data.requires_grad_()", "{new} = torch.nn.Parameter({x}.detach())",
        "{new} = {x}.detach().clone().requires_grad_()", "{new_value} = {any}.requires_grad_()"),
    *_templates("detach", 2, "", "{new} = {x}.detach()", "{new} = {x}.data", "{new_value} = {node}.detach_()"),
    # Hooks and retained gradients.
    *_templates("hook", 4, "",
        "{grad}.register_hook(see('{hook}'))", "{grad}.register_hook(scale('{hook}', 3))", "{grad}.register_hook(look('{hook}'))",
        "{grad}.register_hook(see('{hook}')).remove()", "{grad}.register_hook(scale('{hook}', -0.5))",
        "{any}.register_hook(see('{hook}'))"),
    *_templates("retain_grad", 3, "", "{node}.retain_grad()", "{node}.retain_grad()", "{any}.retain_grad()"),
    *_templates("hook on a leaf", 1, "not_beside",
        "model.lm_head.weight.register_hook(see('{hook}'))", "bias.register_hook(scale('{hook}', 2))",
        "next(model.parameters()).register_hook(see('{hook}'))", "temperature.register_post_accumulate_grad_hook(leaf('{hook}'))"),
    # Backward passes.
    *_templates("backward", 4, "backward",
        "{loss}.backward()", "{loss}.backward()", "torch.autograd.backward([{loss}, {loss2}])", "({loss} + {loss2}).backward()"),
    *_templates("backward twice", 3, "backward",
        "{loss}.backward(retain_graph=True)", "{loss}.backward(retain_graph=True); {loss}.backward()"),
    *_templates("backward of a tensor", 1, "backward",
        "{grad}.backward(like({grad}))", "{node}.backward(torch.ones_like({node}), retain_graph=True)"),
    *_templates("backward to inputs", 1, "backward",
        "{loss}.backward(inputs=[{grad}])", "{loss}.backward(inputs=[bias, {grad}], retain_graph=True)"),
    *_templates("autograd.grad", 3, "backward",
        "{new_value} = torch.autograd.grad({loss}, [{grad}], allow_unused=True)",
        "{new_value} = torch.autograd.grad({loss}, [{grad}, {grad2}], allow_unused=True, retain_graph=True)",
        "{new_value} = torch.autograd.grad({loss}, [{grad}], retain_graph=True)",
        "{new_value} = torch.autograd.grad({loss}, [model.lm_head.weight], allow_unused=True, retain_graph=True)",
        "{new_value} = torch.autograd.grad({node}, [{grad}], like({node}), allow_unused=True, retain_graph=True)"),
    *_templates("double backward", 1, "backward",
        "{new_loss} = torch.autograd.grad({loss}, [{grad}], create_graph=True)[0].square().sum()",
        "{new_loss} = torch.autograd.grad({loss}, [{node}], create_graph=True)[0].square().sum()"),
    *_templates("checkpoint", 3, "",
        "{new_loss} = checkpoint(lambda z: ce(z) + entropy(z), {x}, use_reentrant=True)",
        "{new_loss} = checkpoint(lambda z: ce(z) + entropy(z), {x}, use_reentrant=False)",
        "{new_loss} = checkpoint(ce, {x}, use_reentrant=True)", "{new_loss} = checkpoint(z_loss, {x}, use_reentrant=False)",
        "{new_loss} = checkpoint(lambda z: ce(z + bias), {full}, use_reentrant=True)",
        "{new} = checkpoint(lambda z: z / temperature, {x}, use_reentrant=True)",
        "{new} = checkpoint(lambda z: z.softmax(-1), {x}, use_reentrant=False)"),
    *_templates("saved tensors", 1, "",
        "with torch.autograd.graph.save_on_cpu(): {new_loss} = ce({x}) + z_loss({x})",
        "with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t): {new} = {x} / temperature"),
    # Writes in place.
    *_templates("in place", 3, "moded",
        "{x}.div_(2)", "{full}.add_(bias)", "{x}.mul_(temperature)", "{x}[..., 3] = -5.0", "{tokens}[:, 0] = 0.5", "{x}.masked_fill_(like({x}) > 0.6, -2.0)",
        "{full} += bias", "{x} *= 2", "{x}[..., 2:4] *= 3", "F.relu({sharp}, inplace=True)", "{x}.copy_({like})", "{x}.add_({like})",
        "{x}.float().div_(2)", "{x}.view(-1, {x}.shape[-1])[0] = 1.0", "{tokens}[:, 1:].mul_(2)", "{x}.detach().mul_(2)", "{x}.softmax(-1).mul_(2)",
        "{x}.tanh_()", "torch.add({x}, 1, out={like})", "{x}.zero_()", "{new} = {x}.clone().add_(1)", "{x}.unbind(0)[0].mul_(2)"),
    *_templates("write to an operand", 2, "not_beside",
        "shift.zero_()", "shift.mul_(2)", "with torch.no_grad(): bias.mul_(2)", "with torch.no_grad(): temperature.add_(1)",
        "{hidden}.mul_(2)", "with torch.no_grad(): {hidden}.zero_()", "{scalar}.mul_(2)"),
    *_templates("step", 2, "not_beside", "torch.optim.SGD(model.parameters(), lr=0.5).step()", "with torch.no_grad(): model.lm_head.weight.mul_(0.5)"),
    *_templates("zero_grad", 1, "", "model.zero_grad()", "bias.grad = None"),
    # Copies and threads.
    *_templates("copy", 1, "",
        "{new} = copy.deepcopy({x})", "{new} = copy.deepcopy({x}.detach())", "{new} = copy.copy({x})", "{new} = saved_and_loaded({x}.detach())",
        "{new} = torch_saved({x}.detach())", "{new} = copy.deepcopy(model)(ids).logits", "{new} = saved_and_loaded({x})",
        "twin = copy.deepcopy(model); {new_loss} = twin(ids, labels=labels).loss; {new_loss!}.backward(); {new_value} = twin.lm_head.weight.grad",
        "twin = saved_and_loaded(model); {new} = twin(ids).logits"),
    *_templates("thread", 2, "",
        "{new_loss} = in_thread(lambda: ce({x}) + entropy({x}))", "{new} = in_thread(lambda: {x}.log_softmax(-1))",
        "{new} = in_thread(lambda: model(ids).logits)", "{new_value} = in_thread(lambda: {any}.detach().clone())",
        "{new}, {new} = in_threads(lambda: model(ids).logits, lambda: model(ids).logits)",
        "{new_loss}, {new_loss} = in_threads(lambda: model(ids, labels=labels).loss, lambda: ce(model(ids).logits))",
        "with torch.no_grad(): {new_loss} = in_thread(lambda: ce({x}))"),
    *_templates("thread", 1, "backward", "in_thread(lambda: {loss}.backward())"),
    *_templates("replica", 1, "",
        "{new} = replica_of(model)(ids).logits", "{new_loss} = replica_of(model)(ids, labels=labels).loss",
        "{new_loss}, {new_loss} = in_threads(*[lambda m=m: m(ids, labels=labels).loss for m in (replica_of(model), replica_of(model))])"),
    *_templates("flops", 1, "backward rare",
        "{new_value} = head_flops(lambda: torch.autograd.grad(ce(model.lm_head(torch.ones(2, 3, 8, dtype=bias.dtype, device=ids.device))), model.lm_head.weight))"),
    *_templates("compile", 1, "rare slow", "{new_loss} = compiled_loss(model, ids, labels)"),
]  # fmt: skip


#: What programs with options consist of: an option reaches the cross entropies of the model's logits, or raises.
_WITH_OPTIONS: list[Template] = [
    *_templates("forward", 8, "", "{new} = model(ids).logits"),
    *_templates("forward", 8, "", "out = model(ids, labels=labels); {new_loss} = out.loss; {new} = out.logits; del out"),
    *_templates("by hand", 3, "", "{new_hidden} = model.model(ids)[0]", "{new} = model.lm_head({hidden})"),
    *_templates("cast", 2, "", "{new} = {full}.clone()", "{new} = {full}.contiguous()"),
    *_templates("view", 3, "", "{new} = {full}.view(-1, V)", "{new} = {tokens}[:, 1:]", "{new} = {tokens}[0]"),
    *_templates("constant", 3, "", "{new} = {full} / 2", "{new} = {full} + shift", "{new} = torch.tanh({full} / 5) * 5"),
    *_templates("trainable operand", 2, "", "{new} = {full} + bias", "{new} = {full} / temperature"),
    *_templates("not recorded", 3, "",
        "{new} = torch.where({sharp} > 0, {sharp}, {sharp} * 0.5)", "{new} = torch.cat([{full}, {full}], 0)", "{new} = F.softsign({full})",
        "{new} = {tokens}.index_select(1, torch.tensor([1, 0]))", "{new} = F.layer_norm({sharp}, (V,))", "{new} = torch.logaddexp({full}, {full})",
        "{new} = {full}.sin()", "{new} = {full}.roll(1, 0)", "{new} = Doubled.apply({full})"),
    *_templates("cross entropy", 8, "",
        "{new_loss} = F.cross_entropy({full}.flatten(0, -2), labels_of({full}).flatten())",
        "{new_loss} = F.cross_entropy({full}.flatten(0, -2), labels_of({full}).flatten())",
        "{new_loss} = F.cross_entropy({rows}, labels_of({rows}), reduction='sum')",
        "{new_loss} = F.cross_entropy({tokens}.transpose(1, 2), labels_of({tokens}))"),
    *_templates("metric", 1, "", "{new_value} = {full}.detach().argmax(-1)", "{new_value} = float({full}.detach().max())"),
    *_templates("question", 1, "quiet", "{new_value} = tuple({full}.shape)", "{new_value} = {full}.stride()"),
    *_templates("backward", 3, "backward", "{loss}.backward()", "{loss}.backward(retain_graph=True)"),
]  # fmt: skip

_CLASSES = (V, 9, 7, 6)

_PLACEHOLDER = re.compile(r"\{(\w+)(!?)\}")

_PREFIX = {"new": "x", "new_loss": "s", "new_second": "c", "new_hidden": "h", "new_value": "v"}

_MODES = (
    *[""] * 14, "with torch.no_grad(): ", "with torch.no_grad(): ", "with torch.inference_mode(): ",
    "with torch.no_grad(), torch.enable_grad(): ", "with torch.enable_grad(): ",
)  # fmt: skip


def _is_logits(t: Tensor) -> bool:
    return t.is_floating_point() and t.dim() >= 2 and t.shape[-1] in _CLASSES and t.numel() > 0


def _is_sharp(t: Tensor) -> bool:
    """Whether no two logits of a row are as good as equal, and none is as good as 0 or 1 or -1."""
    if not _is_logits(t):
        return False
    if t.is_meta:
        return True
    with torch.no_grad():
        x = t.detach().double()
        marks = torch.tensor([-1.5, -1.0, 0.0, 1.0], dtype=torch.float64).expand(*x.shape[:-1], 4)
        gap = torch.cat([x, marks], -1).sort(-1).values.diff(dim=-1).min()
        return bool(x.isfinite().all() and gap > (1e-7 if t.dtype == torch.float64 else 1e-4) * x.abs().max())


_FITS: dict[str, Callable[[Tensor], bool]] = {
    "x": _is_logits,
    "full": lambda t: _is_logits(t) and t.shape[-1] == V,
    "tokens": lambda t: _is_logits(t) and t.dim() == 3 and t.shape[1] > 1,
    "rows": lambda t: _is_logits(t) and t.dim() == 2,
    "small": lambda t: _is_logits(t) and (t.is_meta or bool(t.detach().abs().max() < 20)),
    "sharp": _is_sharp,
    "second": lambda t: t.is_floating_point() and t.dim() == 3 and t.shape[1] in _CLASSES and t.shape[2] < 6,
    "hidden": lambda t: t.is_floating_point() and t.dim() == 3 and t.shape[-1] == D,
    "scalar": lambda t: t.is_floating_point() and t.dim() == 0,
    "solid": lambda t: t.is_floating_point() and t.dim() == 0 and (t.is_meta or bool(t.detach().abs() > 1e-3)),
    "loss": lambda t: t.is_floating_point() and t.dim() == 0 and t.requires_grad,
    "grad": lambda t: t.is_floating_point() and t.requires_grad,
    "node": lambda t: t.is_floating_point() and t.requires_grad and not t.is_leaf,
    "any": lambda t: t.is_floating_point(),
}
_FITS |= {"like": _is_logits, "loss2": _FITS["loss"], "grad2": _FITS["grad"]}


def _holds(fit: Callable[[Tensor], bool], t: Tensor) -> bool:
    try:
        return fit(t)
    except RuntimeError:  # a view of several that PyTorch has invalidated answers no question
        return False


class _Drawing:
    """Statements that fit what the plain run has by now."""

    def __init__(self, pick: Pick, run: Run, without: Iterable[str]) -> None:
        self.pick, self.run, self.count = pick, run, 0
        setting = run.setting
        table = _WITH_OPTIONS if setting.options else TEMPLATES
        banned = {"not_beside"} if setting.beside else set()
        banned |= {"fusible"} if setting.model in ("where", "frozen function", "frozen no_grad") else set()
        self.templates = [t for t in table if t.kind not in set(without) and not t.flags & banned]
        self.weighted = [t for t in self.templates for _ in range(1 if "rare" in t.flags else t.weight)]

    def statement(self, kinds: Sequence[str] = ()) -> Statement | None:
        """A statement of one of the kinds, or of any; None if the program has nothing that fits the template drawn."""
        choices = [t for t in self.weighted if t.kind in kinds] if kinds else self.weighted
        template = self.pick(choices)
        if "slow" in template.flags and self.pick(range(8)):
            return None
        chosen: dict[str, str] = {}
        makes: list[str] = []

        def name(match: re.Match[str]) -> str:
            what = match[1]
            if what == "hook":
                return f"hook{self._next()}"
            if what in _PREFIX:
                if not match[2]:
                    makes.append(f"{_PREFIX[what]}{self._next()}")
                return makes[-1]
            if what not in chosen:
                chosen[what] = self._variable(what, chosen)
            return chosen[what]

        try:
            text = _PLACEHOLDER.sub(name, template.text)
        except LookupError:
            return None
        if "moded" in template.flags and not self.run.setting.options:
            text = self.pick(_MODES) + text
        return Statement(template.kind, text, tuple(makes), "backward" in template.flags, "quiet" in template.flags)

    def _next(self) -> int:
        self.count += 1
        return self.count - 1

    def _variable(self, what: str, chosen: dict[str, str]) -> str:
        names, fit = self.run.names, _FITS[what]
        given = names[next(iter(chosen.values()))] if what == "like" and chosen else None
        fits = [n for n in self.run.variables if isinstance(names[n], Tensor) and _holds(fit, names[n])]
        if given is not None:
            fits = [n for n in fits if names[n].shape == given.shape]
        if what in ("grad", "grad2"):
            fits = ["bias", "temperature", *fits]
        if not fits:
            raise LookupError(what)
        return self.pick([*fits, *fits[-2:], fits[-1]])


def _setting(pick: Pick) -> Setting:
    models = ["tiny"] * 8 + ["bias"] * 2 + ["llama"] * 2 + (["gpt"] * 4 if "gpt" in MODELS else [])
    models += ["tied", "capped", "where", "frozen function", "frozen no_grad"]
    special = pick([""] * 38 + ["beside"] * 2 + ["held"] * 5 + ["options"] * 3 + ["meta"] * 2)
    model = pick(models)
    if special == "options" and model not in ("tiny", "bias", "capped", "where"):
        model = "tiny"
    dtype = pick(["float64"] * 4 + ["float32"])
    return Setting(
        model, dtype, "meta" if special == "meta" else "cpu", special == "beside", special == "held", special == "options"
    )


def draw(pick: Pick, without: Iterable[str] = ()) -> tuple[Program, Observed]:
    """A program of statements that fit, and what it shows on the plain model."""
    run = Run(_setting(pick), None)
    drawing = _Drawing(pick, run, without)
    statements: list[Statement] = []

    def add(kinds: Sequence[str] = ()) -> None:
        statement = drawing.statement(kinds)
        if statement is not None and not run.ended:
            statements.append(statement)
            run.step(statement)

    add(["forward"])
    for _ in range(pick(range(3, 15))):
        add()
    if not any("backward" in s.text for s in statements) or pick(range(3)):
        if not any(isinstance(run.names[n], Tensor) and _holds(_FITS["loss"], run.names[n]) for n in run.variables):
            add(["cross entropy"])
        add(["backward"])
    return Program(run.setting, tuple(statements)), run.finish()
