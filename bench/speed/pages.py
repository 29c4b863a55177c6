"""Figures of a run of `bench.run` as blocks of the pages that `bench.figures` writes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pandas import DataFrame

from ..reading import Results, Row, code, embedded, link, size, table, where, written
from .memory import WAYS
from .providers import PROVIDERS
from .scaling import VARIED, losses
from .workload import MODELS

#: This package's losses, of logits and from hidden states.
OURS = [providers[-1].name for providers in PROVIDERS.values()]

#: The share of ignored tokens in the README's table of time and memory.
SHARE = 0.75


def machine(results: Results) -> str:
    name, result = results.newest("run", "rows")
    header = result["header"]
    return (
        f"Times and peak memory come from one run of `{header['command']}`, where no other file is named: "
        f"{where(header)} ({header['simd']}). Its result file has every figure with its spread, the machine's own roof "
        f"and a list of what was left out: {link(name)}."
    )


def headline(results: Results) -> str:
    """The README's table of time and memory."""
    name, result = results.newest("run", "rows")
    base = _base(result).query("dtype == 'bfloat16' and ignored == @SHARE").set_index(["kind", "provider"])
    lines = {}
    for kind, what in (("logits", "loss from logits"), ("linear", "loss from hidden states")):
        first, *others, last = PROVIDERS[kind]
        shown = (first, *(provider for provider in others if provider.compiled), last)
        own = base.reindex([(kind, provider.name) for provider in shown])
        lines[f"{what}: time"] = [*written(own["ms.p50"], "{:.0f} ms".format)]
        lines[f"{what}: peak memory"] = [*written(own["bytes"], size)]
    steps = results.newest("run", "training step")[1]["training step"]
    held = DataFrame(steps).query("ignored == @SHARE").set_index("way")["bytes"].reindex(WAYS)
    plain, fused = written(held, size)
    lines["training step of a model: peak memory"] = [plain, "not measured", fused]
    N, V, D = base[["N", "V", "D"]].max()
    text = (
        f"{SHARE:.0%} of the tokens are ignored. The losses were measured forward and backward, with N={N} tokens, "
        f"V={V} classes, D={D} features, in bfloat16. Plain is `F.cross_entropy(logits.float(), labels)`. The training "
        f"step is that of {_model(steps[0])}, in float32; its time was not measured. Memory does not include inputs, "
        "parameters and their gradients. So 0 MiB means that a loss writes almost nothing but the gradient of its "
        f"input. Measured on {where(result['header'])}: {link(name)}."
    )
    cells = DataFrame.from_dict(lines, orient="index")
    return f"{table(cells, ['plain', 'torch.compile of it', 'this package'])}\n\n{text}"


def gain(results: Results) -> str:
    """The README's picture."""
    _, result = results.newest("run", "rows")
    drawn = embedded("gain", "Time and peak memory of the loss from hidden states against the share of ignored tokens")
    trl = result["header"]["versions"]["trl"]
    text = f"On a CPU, TRL {trl} computes its head by other code than on a GPU, where it has Triton kernels. "
    return f"{drawn}\n\n{text}Liger's losses and CCE need a GPU."


def ignored(results: Results) -> str:
    return embedded("ignored", "Time and peak memory of the losses against the share of ignored tokens")


def _model(step: Row) -> str:
    return f"a Llama of {step['layers']} layers, {step['T']} tokens, V={step['V']}, D={step['D']}"


def _base(result: Row) -> DataFrame:
    """Forward and backward at the base shape."""
    return losses(result["rows"], result["memory"]).query("shape == 'base' and direction == 'both'")


def _ratios(result: Row, kind: str, dtypes: Sequence[str], shares: Sequence[float]) -> str:
    """Ratios at the base shape, a column per dtype and share; the last column is peak memory for the first of them."""
    rows = _base(result).query("kind == @kind")
    sizes = [f"{name}={rows[name].iloc[0]}" for name in "NVD" if rows[name].any()]
    columns = [*itertools.product(dtypes, shares)]
    found = rows.pivot(index="provider", columns=["dtype", "ignored"], values=["ratio", "bytes"])
    found = found.reindex(columns=[*(("ratio", *column) for column in columns), ("bytes", *columns[0])])
    found = found.reindex([provider.name for provider in PROVIDERS[kind]]).dropna(how="all").rename(code)
    cells = written(found[["ratio"]], "{:.2f}".format).join(written(found[["bytes"]], size))
    several = len(dtypes) > 1
    names = [f"{dtype} {ignored:.0%} ignored" if several else f"{ignored:.0%} ignored" for dtype, ignored in columns]
    text = f"{', '.join(sizes if several else [*sizes, *dtypes])}, ratios of medians to the first:"
    return f"{text}\n\n{table(cells, [*names, f'peak memory, {dtypes[0]}, {shares[0]:.0%}'])}"


def logits(results: Results) -> str:
    return _ratios(results.newest("run", "rows")[1], "logits", ["bfloat16"], [0.0, 0.5, 0.75, 0.95])


def linear(results: Results) -> str:
    _, result = results.newest("run", "rows")
    slow = [gate for gate in result["gates"] if gate["status"] == "slow"]
    notes = "".join(f"\n\n{code(g['provider'])} in {g['dtype']} was not measured: {g['reason']}." for g in slow)
    return _ratios(result, "linear", ["bfloat16", "float32"], [0.0, 0.75]) + notes


def models(results: Results) -> str:
    """Ratios of this package's losses at the sizes of models. Models of equal vocabulary share the loss of logits."""
    rows = losses(results.newest("run", "rows")[1]["rows"]).query("direction == 'both' and shape in @MODELS")
    rows = rows[rows["provider"].isin(OURS)].set_index(["kind", "V", "D", "ignored"])
    lines = {}
    for name, (V, D) in MODELS.items():
        own = rows.reindex((kind, V, D * (kind == "linear"), share) for kind in PROVIDERS for share in (0.0, 0.75))
        tokens = " / ".join(written(own["N"], "{:.0f}".format)[::2])
        lines[f"{name}, {V} x {D}"] = [tokens, *written(own["ratio"], "{:.2f}".format)]
    head = ("tokens, logits / linear", "logits, 0% ignored", "75%", "linear, 0% ignored", "75%")
    return table(DataFrame.from_dict(lines, orient="index"), head)


def scaling(results: Results) -> str:
    """The exponents of the newest run that had time to vary all sizes; if none had, those of the newest run."""
    complete = (run for run in results.files["run"].items() if {fit["varied"] for fit in run[1]["fits"]} >= {*VARIED})
    name, result = next(complete, None) or results.newest("run", "fits")
    exponents = DataFrame(result["fits"]).pivot(index=["kind", "provider"], columns="varied", values="exponent")
    shown = [(kind, provider.name) for kind, own in PROVIDERS.items() for provider in (own[0], own[-1])]
    cells = written(exponents.reindex(index=shown, columns=VARIED).droplevel("kind"), "{:.2f}".format)
    drawn = table(cells.rename(code), ["tokens", "vocabulary", "features", "kept tokens of a batch"])
    return f"{drawn}\n\n{where(result['header'])}: {link(name)}."


def growth(results: Results) -> str:
    return (
        f"{embedded('tokens', 'Time and peak memory of the losses against the number of tokens')}\n"
        f"{embedded('bandwidth', 'Bandwidth of the loss of logits against the vocabulary')}"
    )


def training_step(results: Results) -> str:
    rows = results.newest("run", "training step")[1]["training step"]
    text = (
        f"{_model(rows[0])}, float32, forward and backward; peak memory above the model and its gradients. Time was "
        f"not measured. The logits alone would be {size(4 * rows[0]['T'] * rows[0]['V'])}."
    )
    held = DataFrame(rows).pivot(index="way", columns="ignored", values="bytes").reindex(WAYS)
    cells = written(held, size).set_axis(["transformers", "`patch_model(model)`"])
    drawn = embedded("training-step", "Peak memory of a training step, plain and patched")
    return f"{text}\n\n{table(cells, [f'{share:.0%} ignored' for share in held.columns])}\n\n{drawn}"
