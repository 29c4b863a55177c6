"""Prepares the launches of distillation, as `prepare.py` does all others."""

from .arguments import Form, aligned, flags_of, scalars_of, strides_of
from .distillation_kernels import distillation_backward_kernel, distillation_kernel
from .distillation_structs import Mix, PairStrides
from .launch import backward_launch, distillation_launch, part_launch
from .prepare import ASSERTS, Prepared, remembered
from .structs import Place
from .top_k_kernels import others_backward_kernel, others_kernel
from .variant import MAX_REGISTERS, distilled_variant


def _distilled(x, teacher, dx, stride_scale, options, with_stats):
    """(the strides, the options as the kernels of distillation take them) of logits (N, V)."""
    *_, V = x.shape
    (_, x_n, x_v), (_, teacher_n, teacher_v), (_, dx_n, dx_v) = x.strides, teacher.strides, strides_of(dx)
    strides = PairStrides(x_n, x_v, teacher_n, teacher_v, dx_n, dx_v, stride_scale)
    T, mine = options.temperature, options.options
    theirs = mine._replace(softcap=options.teacher_softcap, logit_scale=options.teacher_logit_scale)
    _, scale, cap = scalars_of(mine)
    _, teacher_scale, teacher_cap = scalars_of(theirs)
    mixed = options.alpha < 1.0
    mix = Mix(options.divergence, mixed, (mixed or with_stats) and T != 1.0, V == 1)
    return strides, (
        mine.ignore_index, scale, cap, cap / T, teacher_scale, teacher_cap / T, options.beta, options.share,
        1.0 - options.alpha,
    ), (flags_of(mine, None, with_stats), flags_of(theirs), mix)  # fmt: skip


@remembered
def distillation(x, teacher, dx, stride_scale, options, with_stats, chip):
    """The kernel of a distillation's rows, called with (PairLogits, Gradients, target, PairRows, scale)."""
    x, teacher, dx = map(Form.of, (x, teacher, dx))
    _, N, V = x.shape
    strides, scalars, flags = _distilled(x, teacher, dx, stride_scale, options, with_stats)
    again = dx is not None or options.divergence == "jsd"
    whole = aligned(None, x, teacher, dx)
    wide = whole and all(form is None or form.contiguous for form in (x, teacher, dx))
    variant = distilled_variant(wide, max(x.itemsize, teacher.itemsize), again, flags, chip.is_nvidia)
    launch = distillation_launch(N, V, x.itemsize, teacher.itemsize, whole, again, variant, chip)
    return Prepared(
        distillation_kernel, launch.programs, N, V, strides, *scalars, launch.TILE, *flags,
        num_warps=launch.num_warps, **ASSERTS, **chip.options(variant.registers),
    )  # fmt: skip


@remembered
def distillation_backward(x, teacher, dx, stride_scale, options, chip):
    """The backward kernel of distillation, called with (PairLogits, Gradients, target, saved, scale)."""
    x, teacher, dx = map(Form.of, (x, teacher, dx))
    _, N, V = x.shape
    strides, scalars, flags = _distilled(x, teacher, dx, stride_scale, options, False)
    launch = backward_launch(N, 1, V, max(x.itemsize, teacher.itemsize), True, aligned(None, x, teacher, dx), chip)
    return Prepared(
        distillation_backward_kernel, N * launch.splits, N, V, Place(launch.splits, launch.split_tiles, 0, V), strides,
        *scalars, launch.TILE, *flags, num_warps=launch.num_warps, **chip.options(MAX_REGISTERS),
    )  # fmt: skip


def _others(options, temperatures, with_stats):
    """(the options as the kernels of the other classes take them, what they are compiled for)."""
    _, scale, cap = scalars_of(options)
    first, *_, last = (*temperatures, *temperatures)  # one temperature is both
    return (options.ignore_index, scale, cap / first, cap / last), (
        flags_of(options, None, with_stats), len(temperatures) > 1,
    )  # fmt: skip


@remembered
def others(x, options, temperatures, with_stats, chip):
    """The kernel of the sums over other classes, called with (Logits, target, OtherRows)."""
    x = Form.of(x)
    _, N, V = x.shape
    scalars, flags = _others(options, temperatures, with_stats)
    launch = part_launch(1, V, x.itemsize, True, aligned(x), chip)
    return Prepared(
        others_kernel, N, N, V, x.strides.t, x.strides.v, *scalars, launch.TILE, *flags,
        num_warps=launch.num_warps, **chip.options(MAX_REGISTERS),
    )  # fmt: skip


@remembered
def others_backward(x, dx, options, temperatures, chip):
    """The kernel of the gradient of other classes, called with (Logits, Gradients, target, saved, factors)."""
    x, dx = map(Form.of, (x, dx))
    _, N, V = x.shape
    scalars, flags = _others(options, temperatures, False)
    launch = backward_launch(N, 1, V, x.itemsize, True, aligned(x, dx), chip)
    return Prepared(
        others_backward_kernel, N * launch.splits, N, V, Place(launch.splits, launch.split_tiles, 0, V),
        x.strides.t, x.strides.v, dx.strides.t, dx.strides.v, *scalars, launch.TILE, *flags,
        num_warps=launch.num_warps, **chip.options(MAX_REGISTERS),
    )  # fmt: skip
