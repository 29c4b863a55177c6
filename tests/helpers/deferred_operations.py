"""Operations on logits (B, T, V), by name: those that are recorded, and those that read or write the logits."""

import torch
import torch.nn.functional as F

from fused_ignore_ce.deferred import defer

B, T, D, V = 2, 5, 8, 13
MASK = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
VECTOR = torch.linspace(-1, 1, V)


#: name -> operation that stays deferred, on logits (B, T, V)
RECORDED = {
    "float": lambda x: x.float(),
    "to": lambda x: x.to(x.device, x.dtype).to(dtype=x.dtype).to(VECTOR.to(x.dtype)),
    "type_as": lambda x: x.type_as(VECTOR.to(x.dtype)),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "scale": lambda x: x * 3.0,
    "scale-left": lambda x: 0.5 * x,
    "scale-torch": lambda x: torch.mul(torch.div(x, 3.0), 2),
    "scale-tensor": lambda x: x * torch.tensor(2.5) / torch.tensor([[2.0]]),
    "softcap": lambda x: torch.tanh(x / 5.0) * 5.0,
    "scaled-softcap": lambda x: (0.25 * (x * 2.0 / 5.0).tanh()) * 5.0,
    "bias": lambda x: x + VECTOR,
    "bias-2d": lambda x: (x * 2.0 + VECTOR.view(1, V)) * 0.5 - VECTOR,
    "bias-left": lambda x: VECTOR + x,
    "shift": lambda x: x[..., :-1, :],
    "shift-2": lambda x: x[:, 1:].contiguous(),
    "first-row": lambda x: x[0],
    "last-token": lambda x: x[:, -1],
    "new-axis": lambda x: x[:, None, 1:, :].squeeze(1),
    "row-mask": lambda x: x[MASK],
    "row-indices": lambda x: x[torch.tensor([0, 1, 1]), torch.tensor([4, 0, 2])],
    "padded-vocabulary": lambda x: x[..., : V - 3],
    "padded-vocabulary-after-bias": lambda x: (x + VECTOR)[:, :-1, : V - 3],
    "narrow-vocabulary": lambda x: x.narrow(-1, 2, V - 4),
    "narrow-rows": lambda x: x.narrow(1, 1, 3),
    "view": lambda x: x.view(-1, V),
    "view-infer-last": lambda x: x.view(B * T, -1),
    "reshape-tuple": lambda x: x.reshape((T, B, V)),
    "flatten": lambda x: x.flatten(0, 1),
    "flatten-torch": lambda x: torch.flatten(x, end_dim=-2),
    "unsqueeze": lambda x: x.unsqueeze(0).squeeze(0).unsqueeze(-2).squeeze(2),
    "transpose-rows": lambda x: x.transpose(0, 1),
    "permute-rows": lambda x: x.permute(1, 0, 2),
    "classes-second": lambda x: x.transpose(1, 2),
    "classes-second-movedim": lambda x: x.movedim(-1, 1).float().contiguous(),
    "classes-second-permute": lambda x: x.permute(0, 2, 1),
    "classes-second-scaled": lambda x: (x / 2).transpose(1, 2) / 3.0,
    "classes-second-softcap": lambda x: (x.transpose(1, 2) / 5.0).tanh() * 5.0,
    "classes-second-bias": lambda x: x.transpose(1, 2) + VECTOR[:, None],
    "classes-second-and-back": lambda x: (x.movedim(-1, 1) * 2).transpose(-1, 1),
    "split": lambda x: x.split(2, dim=1)[0],
    "chunk": lambda x: torch.chunk(x, 2)[1],
    "unbind": lambda x: x.unbind(0)[1],
    "select": lambda x: torch.select(x, 1, 2),
    "index-select": lambda x: x.index_select(1, torch.tensor([3, 0])),
    "rows-of-elements": lambda x: (x * 2 + VECTOR).tanh()[:, 1:].flatten(0, 1)[..., : V - 2] * 4,
    "scaled-sum": lambda x: 0.3 * x + 0.7 * x,
    "two-heads": lambda x: x + defer(torch.full((B, T, 3), 0.5), torch.ones(V, 3).tril()) * 0.25,
}

#: name -> log-probabilities, which stay deferred
LOG_PROBS = {
    "rows": lambda x: x.view(-1, V).log_softmax(-1),
    "functional": lambda x: F.log_softmax((x / 2).view(-1, V), dim=1, dtype=torch.float32),
    "rows-taken-later": lambda x: torch.log_softmax(x, -1)[:, 1:].reshape(-1, V),
    "classes-second": lambda x: x.transpose(1, 2).log_softmax(1),
}

#: name -> operation that reads or writes the logits
OTHERS = {
    "double": lambda x: x.double(),
    "sum": lambda x: x.sum(-1),
    "log_softmax": lambda x: x.log_softmax(-1).mean(),
    "log_softmax-of-rows": lambda x: x.log_softmax(1),
    "log_softmax-sliced": lambda x: x.log_softmax(-1)[..., 2:5],
    "log_softmax-scaled": lambda x: x.log_softmax(-1) * 2,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(VECTOR > 0, -1.0),
    "transposed-product": lambda x: x.transpose(1, 2) @ x,
    "view-of-all": lambda x: x.view(-1),
    "index-one-class": lambda x: x[..., 3],
    "index-classes": lambda x: x[:, :, torch.tensor([1, 2])],
    "boolean-of-all": lambda x: x[x > 0],
    "list-index": lambda x: x[[0]],
    "cat": lambda x: torch.cat([x[:, :2], x], 1),
    "stack": lambda x: torch.stack([x, x]),
    "add-scalar": lambda x: x + 1.0,
    "add-itself": lambda x: x + x.sin(),
    "row-scale": lambda x: x * torch.arange(1.0, T + 1).unsqueeze(-1),
    "divide-by-vector": lambda x: x / (VECTOR + 2),
    "negate": lambda x: -x,
    "second-cap": lambda x: x.tanh().tanh() * 2,
    "write-slice": lambda x: _written(x, (slice(None), slice(None), slice(2, 4)), -5.0),
    "write-part": lambda x: _part_written(x),
    "add-in-place": lambda x: _in_place(x, "add_", 2.0),
    "iadd": lambda x: x.__iadd__(1.0),
    "relu-in-place": lambda x: F.relu(x.clone(), inplace=True),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy().copy()) + x,
    "autograd-function": lambda x: Doubled.apply(x),
    "autograd-function-on-part": lambda x: Doubled.apply(x[:, 1:].float()).tanh(),
    "autograd-function-clone": lambda x: Cloned.apply(x).sin(),
    "hidden-in-a-dict": lambda x: torch.utils._pytree.tree_map(lambda t: t * 2 + 1, {"x": x})["x"],
}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dx):
        return dx * 2


class Cloned(torch.autograd.Function):
    """Does what DDP does to a model's outputs."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx


def _written(x, index, value):
    x[index] = value
    return x


def _part_written(x):
    part = x[:, 1:]
    part[..., 0] = 7.0
    return x + part.sum()


def _in_place(x, name, value):
    x = x * 1.0
    getattr(x, name)(value)
    return x
