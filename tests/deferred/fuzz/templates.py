"""The statements that programs are made of, as lines of Python with placeholders.

A line without indentation starts a kind: its name, the weight by which each of its lines is drawn, and flags:

- moded: may stand in a grad mode.
- backward: runs a backward pass, after whose failure gradients are undefined.
- quiet: computes no logits. fusible: only of heads whose losses are fused.
- not_beside: writes to what a thread beside uses, or listens to it.
- not_held: not where it is checked what losses hold.
- rare, slow: drawn less often than its weight says.

Placeholders are variables of a program that fit:

- {x}: of logits' form, floating point with classes last. {like}: the same shape. {full}: with all V classes.
  {tokens}: three axes. {rows}: two. {second}: classes second.
- {small}: {x} that may be exponentiated. {sharp}: {x} without ties, zeros or ones, for operations with an edge there.
- {hidden}: hidden states. {any}: any floating-point tensor.
- {scalar}: a scalar. {solid}: one that may be divided by. {loss}, {loss2}: one that requires a gradient.
- {grad}, {grad2}: requires a gradient. {node}: and is no leaf.

One placeholder is one variable throughout a line. {new}, {new_loss}, {new_second}, {new_hidden} and {new_value} are
variables that the line makes, each another one; {new!} is the last of them. {hook} is a new name for a hook.

What is left out, because PyTorch is at odds with itself:

- Views made under `no_grad` or in inference mode of a tensor that requires a gradient: they say that they require one,
  get none, and crash on a hook. So views are not moded.
- Writes through `.data` or through what `copy.copy` returns, and to CPU tensors that `save_on_cpu` saved, as it neither
  copies nor checks them: saved tensors change and nobody notices, so that PyTorch's own gradients are wrong.
- A hook on a view whose base was written since: PyTorch crashes, unless somebody asks for `grad_fn` first. So hooks do.
  And until somebody asks, what hooks and `retain_grad` of such a view see is what they saw before. So all are asked.
- Calls of a hook with None: PyTorch's node of several results calls the hooks of those that get no gradient. Hooks of
  programs take no notice.
- What follows a backward pass that failed: which gradients it has accumulated by then depends on the order of nodes.
- The order in which hooks of different tensors are called in one backward, which is that in which nodes were made.

Errors of one model alone that are right, by design of this library (see `Program.refusals` and `comparison.py`):

- Logits are read after the head's weights or the hidden states were changed in place: they cannot be computed any more.
- PyTorch refuses a backward because a tensor that it saved was written to, or detached in place; or it refuses to save
  a tensor of inference mode. Deferred logits may give the gradient of the values at the time of the operation.
- The head's weights were changed in place between a loss of several terms, or one that a checkpoint computes again, and
  its backward, where PyTorch needs them no more because nothing below the logits is differentiated. Our backward
  computes tiles of logits again.
- A second backward through a freed graph, where the nodes that both go through had saved nothing in PyTorch: a product
  under `no_grad` with a trainable bias, and what lies between a loss and the inputs that `backward` or `autograd.grad`
  was told, such as a slice. Our nodes save how logits are computed, and a backward frees that.
- A write to logits that a head computed (one that cannot be deferred, and any on the meta device), between the loss in
  the model's forward and its backward: our loss saves these logits, PyTorch's saves log-probabilities.
- A second backward of what `autograd.grad` for another part of a split has freed in PyTorch, where the parts are
  results of one node. Here each part has its own.
- A second backward of a loss whose first one named inputs, such as `loss.backward(inputs=[loss])`: which nodes that
  frees depends on how the loss is made of them.
- An option of a patched model is refused, where the loss that is taken cannot use it.
- One of several views (of split, unbind or chunk) may not be used once its base was written to, and no view of a tensor
  that was detached in place may be written to. Deferred logits that nobody has computed by then may be.
- Logits that cannot be computed any more are shown without values.
"""

from __future__ import annotations

from typing import NamedTuple


class Template(NamedTuple):
    kind: str
    weight: int
    text: str
    flags: frozenset[str]


def _parsed(table: str) -> list[Template]:
    templates, kind, weight, flags = [], "", 0, frozenset[str]()
    for line in filter(None, table.splitlines()):
        if line.startswith(" "):
            templates.append(Template(kind, weight, line.strip(), flags))
        else:
            kind, drawn, *rest = line.split(", ")
            weight, flags = int(drawn.removeprefix("weight ")), frozenset(" ".join(rest).split())
    return templates


TEMPLATES = _parsed("""
forward, weight 12
    {new} = model(ids).logits

forward, weight 4
    out = model(ids, labels=labels); {new_loss} = out.loss; {new} = out.logits; del out

other model, weight 3
    {new} = other(ids).logits

forward under a mode, weight 3
    with torch.no_grad(): {new} = model(ids).logits
    with torch.no_grad(): out = other(ids, labels=labels); {new} = out.logits; del out
    with torch.no_grad(): out = model(ids, labels=labels); {new} = out.logits; {new_value} = out.loss; del out
    with torch.inference_mode(): {new} = model(ids).logits
    with torch.no_grad(), torch.enable_grad(): {new} = model(ids).logits

by hand, weight 3
    {new_hidden} = model.model(ids)[0]
    {new_hidden} = model.model(ids)[0].detach().requires_grad_()
    {new} = model.lm_head({hidden})
    {new} = model.lm_head({hidden})
    {new} = model.lm_head({hidden}.flatten(0, 1))
    {new} = torch.func.functional_call(model, dict(model.named_parameters()), (ids,)).logits

checkpoint, weight 2
    {new} = checkpoint(lambda i: model(i).logits, ids, use_reentrant=False)
    {new} = checkpoint(lambda h: model.lm_head(h), {hidden}, use_reentrant=True)

cast, weight 2, moded
    {new} = {x}.float()
    {new} = {x}.double()
    {new} = {x}.to(torch.float64)
    {new} = {x}.type_as({like})
    {new} = {x}.to(ids.device)
    {new} = {x}.contiguous()
    {new} = {x}.clone()

view, weight 3, view
    {new} = {x}.view(-1, {x}.shape[-1])
    {new} = {tokens}.flatten(0, 1)
    {new} = {tokens}[:, 1:]
    {new} = {tokens}[..., :-1, :]
    {new} = {tokens}[0]
    {new} = {tokens}[:, -1]
    {new} = {x}.unsqueeze(0)
    {new} = {x}.reshape(-1, {x}.shape[-1])
    {new} = {tokens}.transpose(0, 1)
    {new} = {tokens}.narrow(1, 0, 2)
    {new} = {x}.view_as({like})
    {new} = {tokens}.split(2, dim=1)[0]
    {new} = {tokens}.unbind(0)[1]
    {new}, {new} = {tokens}.split([1, 2], dim=1)
    {new} = {x}[None].squeeze(0)
    {new} = {x}.expand(2, *{x}.shape)

slice of classes, weight 2, view
    {new} = {x}[..., :7]
    {new} = {x}[..., 2:]
    {new} = {x}.narrow(-1, 1, 6)

rows picked, weight 2, moded
    {new} = {tokens}[mask[:{tokens}.shape[0], :{tokens}.shape[1]]]
    {new} = {tokens}[torch.tensor([0, 0], device=ids.device), torch.tensor([1, 0], device=ids.device)]
    {new} = {tokens}.index_select(1, torch.tensor([1, 0], device=ids.device))
    {new} = {rows}[[1, 0]]

constant, weight 3, moded
    {new} = {x} / 2
    {new} = {x} * 0.5
    {new} = -{x}
    {new} = {full} + shift
    {new} = torch.tanh({x} / 5) * 5
    {new} = {x} - {x}.detach().max()
    {new} = 1.5 * {x} + 0.1

trainable operand, weight 3, moded
    {new} = {full} + bias
    {new} = bias + {full}
    {new} = {x} / temperature
    {new} = {x} * temperature
    {new} = temperature * {x}
    {new} = {tokens} * scales[-{tokens}.shape[1]:]
    {new} = {full} - bias
    {new} = {full} @ matrix
    {new} = {x} * {x}.new_full((1,), 2.0).requires_grad_()

two tensors, weight 3, moded
    {new} = {x} + {like}
    {new} = {x} - {like}
    {new} = {x} * {like}.softmax(-1)
    {new} = 0.3 * {x} + 0.7 * {like}

softmax, weight 3, moded
    {new} = {x}.softmax(-1)
    {new} = {x}.log_softmax(-1)
    {new} = F.softmax({x}, dim=-1)
    {new} = F.log_softmax({x} / 2, dim=-1)
    {new} = torch.log_softmax({x}, -1)
    {new} = F.logsigmoid({x})

elementwise, weight 1, moded
    {new} = {small}.exp()
    {new} = {x}.square()
    {new} = {x}.sigmoid()
    {new} = {sharp}.relu()
    {new} = {sharp}.abs()
    {new} = {sharp}.clamp(-1, 1)
    {new} = {x}.sin()
    {new} = F.gelu({x})
    {new} = {x}.tanh()

not recorded, weight 2, moded
    {new} = torch.where({sharp} > 0, {sharp}, {sharp} * 0.5)
    {new} = {x}.masked_fill(like({x}) > 0.5, -3.0)
    {new} = torch.cat([{x}, {like}], 0)
    {new} = torch.stack([{x}, {like}])
    {new} = F.softsign({x})
    {new} = F.layer_norm({sharp}, {sharp}.shape[-1:])
    {new} = torch.logaddexp({x}, {like})
    {new} = {sharp}.sort(-1).values
    {new} = {x}.roll(1, 0)
    {new} = Doubled.apply({x})
    {new} = torch.vmap(lambda z: z * 2)({x})

handed on, weight 1
    {new} = HandedOn.apply({x})
    {new} = Tripled.apply({x})

cross entropy, weight 4, moded
    {new_loss} = ce({x})
    {new_loss} = ce({x})
    {new_loss} = F.cross_entropy({rows}, labels_of({rows}))
    {new_loss} = F.cross_entropy({x}.view(-1, {x}.shape[-1]), labels_of({x}).view(-1), reduction='sum') / 3
    {new_loss} = ce({x}, label_smoothing=0.1)
    {new_loss} = ce({x}, weight=class_weight({x}))
    {new_loss} = F.cross_entropy({x}.flatten(0, -2), labels_of({x}).clamp(min=3).flatten(), ignore_index=3)
    {new_loss} = (ce({x}, reduction='none') * 0.3).sum()
    {new_loss} = F.nll_loss({rows}.log_softmax(-1), labels_of({rows}))
    {new_loss} = F.cross_entropy({rows}, probabilities({rows}))
    {new_loss} = torch.nn.CrossEntropyLoss()({x}.flatten(0, -2), labels_of({x}).flatten())
    {new_loss} = ce({full} + bias)
    {new_loss} = ce({x} / temperature)

classes second, weight 1, view
    {new_second} = {tokens}.transpose(1, 2)
    {new_second} = {tokens}.permute(0, 2, 1)

classes second, weight 3, moded
    {new_loss} = F.cross_entropy({second}, labels_of({second}.transpose(1, 2)), label_smoothing=0.1)
    {new_loss} = F.cross_entropy({second}, labels_of({second}.transpose(1, 2)))
    {new_value} = {second}.log_softmax(1).transpose(1, 2).logsumexp(-1)
    {new_loss} = F.cross_entropy({tokens}.transpose(1, 2), labels_of({tokens}))
    {new_loss} = F.cross_entropy({tokens}.transpose(1, 2), labels_of({tokens}), label_smoothing=0.1)
    {new_loss} = F.cross_entropy({tokens}.movedim(-1, 1), labels_of({tokens}), weight=class_weight({tokens}))
    {new_loss} = F.cross_entropy({tokens}.transpose(1, 2), probabilities({tokens}).transpose(1, 2))

other loss, weight 3, moded
    {new_loss} = entropy({x})
    {new_loss} = z_loss({x})
    {new_loss} = picked({x}).mean()
    {new_loss} = -picked({x}).sum()
    {new_loss} = (picked({x}) - picked({like})).sigmoid().mean()
    {new_loss} = F.mse_loss({x}, {like})
    {new_loss} = F.kl_div({x}.log_softmax(-1), {like}.log_softmax(-1), log_target=True, reduction='batchmean')
    {new_loss} = F.kl_div({x}.log_softmax(-1), {like}.softmax(-1), reduction='batchmean')
    {new_loss} = F.kl_div({like}.detach().log_softmax(-1), {x}.log_softmax(-1), log_target=True, reduction='sum')
    {new_loss} = F.kl_div(({x} / 2).log_softmax(-1), ({like}.detach() / 2).softmax(-1), reduction='none').sum(-1).mean()
    {new_loss} = F.kl_div({x}.log_softmax(-1), ({x} * 2).detach().softmax(-1), reduction='batchmean')
    {new_loss} = ({like}.softmax(-1).detach() * ({like}.log_softmax(-1).detach() - {x}.log_softmax(-1))).sum(-1).mean()
    {new_loss} = ({x}.softmax(-1) * ({x}.log_softmax(-1) - {like}.detach().log_softmax(-1))).sum(-1, True).sum()
    {new_loss} = (picked({x}) - picked({x}).detach()).exp().mean()
    {new_loss} = -({x}.softmax(-1) * {like}.log_softmax(-1)).sum(-1).mean()
    {new_loss} = F.multi_margin_loss({sharp}.flatten(0, -2), index_of({sharp}).flatten())
    {new_loss} = F.binary_cross_entropy_with_logits({x}, like({x}).sigmoid())
    {new_loss} = -({x}.log_softmax(-1) * {like}).sum(-1).mean()
    {new_loss} = ce({x}) + 0.1 * entropy({x})

reduction, weight 2, moded
    {new_loss} = {any}.sum()
    {new_loss} = {x}.mean()
    {new_value} = {x}.sum(-1)
    {new_value} = {x}.mean(-1)
    {new_value} = {x}.logsumexp(-1)
    {new_value} = {sharp}.amax(-1)
    {new_value} = F.kl_div(({x} / temperature).log_softmax(-1), {like}.detach().softmax(-1), reduction='none').sum(-1)
    {new_value} = {x}.gather(-1, index_of({x}))
    {new_value} = {sharp}.max(-1).values
    {new_loss} = {x}.logsumexp(-1).mean()
    {new_loss} = {sharp}.std()
    {new_loss} = {sharp}.norm()
    {new_loss} = {any}.square().sum()
    {new_value} = {any}.float().sum(-1)
    {new_loss} = ({any} * like({any}, 1)).sum()
    {new_value} = {sharp}.min(-1).values
    {new_value} = {sharp}.var(-1)

arithmetic of losses, weight 2, moded
    {new_loss} = {loss} + {scalar}
    {new_loss} = {loss} * 0.3
    {new_loss} = {loss} * temperature
    {new_loss} = {loss} / {solid}.detach()

metric, weight 2, moded
    {new_value} = {sharp}.argmax(-1)
    {new_value} = {x}.detach().max()
    {new_value} = float({sharp}.max())
    {new_value} = {x}.flatten()[0].item()
    {new_value} = {x}.isfinite().all()
    {new_value} = {sharp}.topk(2, -1).values.detach()
    {new_value} = torch.equal({x}, {x}.clone())
    {new_value} = float({x}.detach().cpu().numpy().sum())
    {new_value} = {x}.tolist()
    {new_value} = {any}.detach().clone()
    {new_value} = float({x}.numpy().sum())
    {new_value} = {sharp}.max()
    {new_value} = str({x})[:7] in ("tensor(", "Deferre")

metric, weight 1
    {new_value} = {tokens}.transpose(1, 2).is_contiguous(), {tokens}.transpose(0, 1).is_contiguous()
    {new_value} = {x}.transpose(-1, -2).stride()

one logit twice, weight 2, moded
    {new_value} = ({sharp} > {sharp}.gather(-1, index_of({sharp}))).sum(-1)
    {new_value} = ({sharp}.gather(-1, {sharp}.argmax(-1, keepdim=True)).squeeze(-1) >= {sharp}.amax(-1)).sum()
    {new_value} = ({sharp}.amax(-1) - {sharp}.gather(-1, {sharp}.argmax(-1, keepdim=True)).squeeze(-1)).sqrt()
    {new_value} = (({sharp} * 100).log_softmax(-1).amax(-1) > 0).sum()
    {new_value} = {rows}.gather(-1, index_of({rows}))[0, 0] == {rows}[0, index_of({rows})[0, 0]]
    {new_value} = ({sharp}.max(-1).values == {sharp}.amax(-1)).all()
    {new_value} = ({sharp}.log_softmax(-1).gather(-1, index_of({sharp})) > {sharp}.log_softmax(-1)).sum(-1)

question, weight 1, quiet
    {new_value} = {any}.new_zeros(2)
    {new_value} = {any}.new_tensor([1.0])
    {new_value} = torch.zeros_like({any})
    {new_value} = torch.empty_like({any}).shape
    {new_value} = {any}.stride()
    {new_value} = {any}.type()
    {new_value} = {any}.is_contiguous()
    {new_value} = tuple({any}.shape)
    {new_value} = {any}.numel()
    {new_value} = torch.ones_like({any})
    {new_value} = {any}.dim(), {any}.element_size(), len({any}.shape)
    {new_value} = str(torch.result_type({any}, 1.0))
    {new_value} = {any}.new_full((2,), 3.0)
    {new_value} = {any}.storage_offset()
    {new_value} = str({any}.device), str({any}.dtype), {any}.is_floating_point()
    {new_value} = {x}.size(-1), {x}.stride(-1)
    {new_value} = {any}.requires_grad, {any}.is_leaf, {any}.retains_grad, {any}.is_sparse

fused, weight 2, fusible quiet
    {new_loss} = F.cross_entropy(model(ids).logits.transpose(1, 2), labels)
    {new_loss} = F.cross_entropy(model(ids).logits.transpose(1, 2), labels, label_smoothing=0.1)
    {new_loss} = F.cross_entropy(model(ids).logits.transpose(1, 2), labels, weight=bias.detach())
    {new_loss} = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
    {new_loss} = F.cross_entropy(model(ids).logits.transpose(1, 2) / 2, labels)
    {new_loss} = F.nll_loss(model(ids).logits.transpose(1, 2).log_softmax(1), labels, weight=bias.detach())
    {new_loss} = F.cross_entropy(model(ids).logits.transpose(1, 2), soft_labels.transpose(1, 2))

detached leaf, weight 3
    {new} = {x}.detach().requires_grad_()
    {new} = {x}.detach(); {new!}.requires_grad = True
    {new} = {x}.data.clone().requires_grad_()
    {new} = torch.nn.Parameter({x}.detach())
    {new} = {x}.detach().clone().requires_grad_()
    {new_value} = {any}.requires_grad_()

detach, weight 2
    {new} = {x}.detach()
    {new_value} = {node}.detach_()

hook, weight 4
    {grad}.grad_fn; {grad}.register_hook(see('{hook}'))
    {grad}.grad_fn; {grad}.register_hook(scale('{hook}', 3))
    {grad}.grad_fn; {grad}.register_hook(look('{hook}'))
    {grad}.grad_fn; {grad}.register_hook(see('{hook}')).remove()
    {grad}.grad_fn; {grad}.register_hook(scale('{hook}', -0.5))
    {any}.grad_fn; {any}.register_hook(see('{hook}'))

retain_grad, weight 3
    {node}.retain_grad()
    {node}.retain_grad()
    {any}.retain_grad()

hook on a leaf, weight 1, not_beside
    model.lm_head.weight.register_hook(see('{hook}'))
    bias.register_hook(scale('{hook}', 2))
    next(model.parameters()).register_hook(see('{hook}'))
    temperature.register_post_accumulate_grad_hook(leaf('{hook}'))

backward, weight 4, backward
    {loss}.backward()
    {loss}.backward()
    torch.autograd.backward([{loss}, {loss2}])
    ({loss} + {loss2}).backward()

backward twice, weight 3, backward
    {loss}.backward(retain_graph=True)
    {loss}.backward(retain_graph=True); {loss}.backward()

backward of a tensor, weight 1, backward
    {grad}.backward(like({grad}))
    {node}.backward(torch.ones_like({node}), retain_graph=True)

backward to inputs, weight 1, backward not_held
    {loss}.backward(inputs=[{grad}])
    {loss}.backward(inputs=[bias, {grad}], retain_graph=True)

autograd.grad, weight 3, backward
    {new_value} = torch.autograd.grad({loss}, [{grad}], allow_unused=True)
    {new_value} = torch.autograd.grad({loss}, [{grad}, {grad2}], allow_unused=True, retain_graph=True)
    {new_value} = torch.autograd.grad({loss}, [{grad}], retain_graph=True)
    {new_value} = torch.autograd.grad({loss}, [model.lm_head.weight], allow_unused=True, retain_graph=True)
    {new_value} = torch.autograd.grad({node}, [{grad}], like({node}), allow_unused=True, retain_graph=True)

double backward, weight 1, backward
    {new_loss} = torch.autograd.grad({loss}, [{grad}], create_graph=True)[0].square().sum()
    {new_loss} = torch.autograd.grad({loss}, [{node}], create_graph=True)[0].square().sum()

checkpoint, weight 3
    {new_loss} = checkpoint(lambda z: ce(z) + entropy(z), {x}, use_reentrant=True)
    {new_loss} = checkpoint(lambda z: ce(z) + entropy(z), {x}, use_reentrant=False)
    {new_loss} = checkpoint(ce, {x}, use_reentrant=True)
    {new_loss} = checkpoint(z_loss, {x}, use_reentrant=False)
    {new_loss} = checkpoint(lambda z: ce(z + bias), {full}, use_reentrant=True)
    {new} = checkpoint(lambda z: z / temperature, {x}, use_reentrant=True)
    {new} = checkpoint(lambda z: z.softmax(-1), {x}, use_reentrant=False)

saved tensors, weight 1
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t): {new_loss} = ce({x}) + z_loss({x})
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t): {new} = {x} / temperature

in place, weight 3, moded
    {x}.div_(2)
    {full}.add_(bias)
    {x}.mul_(temperature)
    {x}[..., 3] = -5.0
    {tokens}[:, 0] = 0.5
    {x}.masked_fill_(like({x}) > 0.6, -2.0)
    {full} += bias
    {x} *= 2
    {x}[..., 2:4] *= 3
    F.relu({sharp}, inplace=True)
    {x}.copy_({like})
    {x}.add_({like})
    {x}.float().div_(2)
    {x}.view(-1, {x}.shape[-1])[0] = 1.0
    {tokens}[:, 1:].mul_(2)
    {x}.detach().mul_(2)
    {x}.softmax(-1).mul_(2)
    {x}.tanh_()
    torch.add({x}, 1, out={like})
    {x}.zero_()
    {new} = {x}.clone().add_(1)
    {x}.unbind(0)[0].mul_(2)

write to an operand, weight 2, not_beside
    shift.zero_()
    shift.mul_(2)
    with torch.no_grad(): bias.mul_(2)
    with torch.no_grad(): temperature.add_(1)
    {hidden}.mul_(2)
    with torch.no_grad(): {hidden}.zero_()
    {scalar}.mul_(2)

step, weight 2, not_beside
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    with torch.no_grad(): model.lm_head.weight.mul_(0.5)

zero_grad, weight 1
    model.zero_grad()
    bias.grad = None

copy, weight 1
    {new} = copy.deepcopy({x})
    {new} = copy.deepcopy({x}.detach())
    {new} = saved_and_loaded({x}.detach())
    {new} = torch_saved({x}.detach())
    {new} = copy.deepcopy(model)(ids).logits
    {new} = saved_and_loaded({x})
    {new_loss}, {new_value} = trained(copy.deepcopy(model), ids, labels)
    twin = saved_and_loaded(model); {new} = twin(ids).logits

thread, weight 2
    {new_loss} = in_thread(lambda: ce({x}) + entropy({x}))
    {new} = in_thread(lambda: {x}.log_softmax(-1))
    {new} = in_thread(lambda: model(ids).logits)
    {new_value} = in_thread(lambda: {any}.detach().clone())
    {new}, {new} = in_threads(lambda: model(ids).logits, lambda: model(ids).logits)
    {new_loss}, {new_loss} = in_threads(lambda: model(ids, labels=labels).loss, lambda: ce(model(ids).logits))
    with torch.no_grad(): {new_loss} = in_thread(lambda: ce({x}))

thread, weight 1, backward
    in_thread(lambda: {loss}.backward())

replica, weight 1
    {new} = replica_of(model)(ids).logits
    {new_loss} = replica_of(model)(ids, labels=labels).loss
    {new_loss}, {new_loss} = in_replicas(model, lambda m: m(ids, labels=labels).loss)

flops, weight 1, backward rare
    {new_value} = head_flops(model, ids)

compile, weight 1, rare slow
    {new_loss} = compiled_loss(model, ids, labels)
""")

#: What programs with options consist of: an option reaches the cross entropies of the model's logits, or raises.
WITH_OPTIONS = _parsed("""
forward, weight 8
    {new} = model(ids).logits
    out = model(ids, labels=labels); {new_loss} = out.loss; {new} = out.logits; del out

by hand, weight 3
    {new_hidden} = model.model(ids)[0]
    {new} = model.lm_head({hidden})

cast, weight 2
    {new} = {full}.clone()
    {new} = {full}.contiguous()

view, weight 3
    {new} = {full}.view(-1, V)
    {new} = {tokens}[:, 1:]
    {new} = {tokens}[0]

constant, weight 3
    {new} = {full} / 2
    {new} = {full} + shift
    {new} = torch.tanh({full} / 5) * 5

trainable operand, weight 2
    {new} = {full} + bias
    {new} = {full} / temperature

not recorded, weight 3
    {new} = torch.where({sharp} > 0, {sharp}, {sharp} * 0.5)
    {new} = torch.cat([{full}, {full}], 0)
    {new} = F.softsign({full})
    {new} = {tokens}.index_select(1, torch.tensor([1, 0]))
    {new} = F.layer_norm({sharp}, (V,))
    {new} = torch.logaddexp({full}, {full})
    {new} = {full}.sin()
    {new} = {full}.roll(1, 0)
    {new} = Doubled.apply({full})

cross entropy, weight 8
    {new_loss} = F.cross_entropy({full}.flatten(0, -2), labels_of({full}).flatten())
    {new_loss} = F.cross_entropy({full}.flatten(0, -2), labels_of({full}).flatten())
    {new_loss} = F.cross_entropy({rows}, labels_of({rows}), reduction='sum')
    {new_loss} = F.cross_entropy({tokens}.transpose(1, 2), labels_of({tokens}))

metric, weight 1
    {new_value} = {full}.detach().argmax(-1)
    {new_value} = float({full}.detach().max())

question, weight 1, quiet
    {new_value} = tuple({full}.shape)
    {new_value} = {full}.stride()

backward, weight 3, backward
    {loss}.backward()
    {loss}.backward(retain_graph=True)
""")
