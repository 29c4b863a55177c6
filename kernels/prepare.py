"""Prepares launches: the kernel, the grid, and all arguments but tensors, which calls of the same form share.

A call's form is all that its launch depends on: sizes, strides and dtypes of tensors, and options. What follows from
it is computed once and cached, so that among training steps of the same shapes only the first pays for it.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from .arguments import Form, aligned, aligned_alike, flags_of, scalars_of, strides_of
from .backward import backward_kernel
from .forward import forward_kernel
from .launch import (
    MERGE_ROWS,
    REDUCE_BLOCK,
    REDUCE_PROGRAMS,
    REDUCE_ROWS,
    REDUCE_THREADS,
    backward_launch,
    ceil_div,
    forward_launch,
    on_chip_launch,
    one_pass_launch,
    part_launch,
    scale_launch,
)
from .merge import merge_kernel
from .one_pass import one_pass_kernel
from .reduce import reduce_kernel, total_kernel
from .scale import scale_kernel
from .structs import (
    BackwardStrides,
    ForwardStrides,
    OnePassStrides,
    OnePassUpstream,
    Place,
    ProductStrides,
    Reduction,
    Tile,
    Upstream,
)
from .variant import (
    FEW_REGISTERS,
    MAX_REGISTERS,
    PART_REGISTERS,
    is_simple,
    on_chip_variants,
    one_pass_registers,
    one_pass_variant,
)

try:
    from .on_chip import on_chip_kernel
except ImportError:  # this Triton has no Gluon
    on_chip_kernel = None

# `debug` enables device_assert. `sanitize_overflow=False` keeps it from also checking every integer addition.
ASSERTS = {"debug": True, "sanitize_overflow": False}

# Kernels count on products and sums being fused. Triton 3.9 announces that 3.10 will fuse only when told to.
FUSE = {"enable_fp_fusion": True}

remembered = lru_cache(maxsize=4096)


class Prepared:
    """A launch of a kernel whose last arguments are fixed; it is called with the device and the first ones.

    At every launch, Triton looks at each argument to find the compiled kernel. That takes ten microseconds for thirty
    arguments. Here the kernel is found by its first arguments alone.
    """

    def __init__(self, kernel, programs, *fixed, splits=1, **options):
        self.kernel, self.grid, self.fixed, self.options = kernel, (programs, 1, 1), fixed, options | FUSE
        self.splits = splits  # parts that each row is split into
        self.interpreted = not isinstance(kernel, triton.JITFunction)
        self.compiled = {}

    def __call__(self, device, *first):
        if self.interpreted:
            self._run(first)
            return
        active = driver.active
        current = active.get_current_device()
        if device.index not in (current, None):  # a CPU tensor's device has no index
            with torch.cuda.device(device):
                self(device, *first)
            return
        key = current, kinds(first)
        found = self.compiled.get(key)
        if found is None:
            compiled = self._run(first)
            # For AMD, the kernel also depends on the size of a tensor's storage, so Triton looks it up at every launch.
            if compiled is not None and compiled.metadata.target.backend == "cuda":
                self.compiled[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata
            return
        # As `compiled[grid](...)` does, but metadata for a profiler's hooks are prepared only if there are any.
        compiled, run, function, packed = found
        stream, metadata = active.get_current_stream(current), None
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if enter is not None and enter.calls:
            metadata = compiled.launch_metadata(self.grid, stream, *first, *self.fixed)
        run(*self.grid, stream, function, packed, metadata, enter, leave, *first, *self.fixed)

    def _run(self, first):
        """Launches the kernel by Triton's own launcher; returns the compiled kernel, or None if it is not to be kept.

        A kernel sees memory, which does not hold the values of a lazily negated or zero tensor. It gets a copy of such
        a tensor, and what it writes there is copied back.
        """
        copies = []
        first = tuple(
            type(argument)(*(_in_memory(*each, copies) for each in zip(argument._fields, argument, strict=True)))
            if isinstance(argument, tuple)
            else _in_memory("", argument, copies)
            for argument in first
        )
        compiled = self.kernel[self.grid](*first, *self.fixed, **self.options)
        for field, given, copy in copies:
            if field in WRITTEN:
                given.copy_(copy)
        return None if copies else compiled


#: The fields of arguments in which a kernel may write to a tensor of the caller.
WRITTEN = ("dx", "dprobs", "out")


def _in_memory(field, value, copies):
    """The value of a field; a copy with the same strides if its memory does not hold it, which `copies` is told."""
    lazy = isinstance(value, torch.Tensor) and (value.is_neg() or value._is_zerotensor())
    if not lazy or value.numel() == 0:
        return value
    # The gaps between elements are copied too, so that elements which share memory still do.
    span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    memory = torch.empty(span, dtype=value.dtype, device=value.device)
    copy = memory.copy_(value.as_strided((span,), (1,))).as_strided(value.shape, value.stride())
    copies.append((field, value, copy))
    return copy


def kinds(arguments):
    """What a compiled kernel depends on: dtypes of tensors, whether their addresses are aligned, values of integers.

    Also whether a tensor's values are in its memory: no kernel is kept for others, see `Prepared._run`.
    """
    found = []
    add = found.append
    for argument in arguments:
        for value in argument if isinstance(argument, tuple) else (argument,):
            if value is None:
                add(None)
            elif isinstance(value, torch.Tensor):
                add(value.dtype)
                address = value.data_ptr()
                add(address % 16 == 0 if address else None)
                add(value.is_neg())
            else:
                add(float if isinstance(value, float) else value)
    return tuple(found)


@remembered
def forward(x, probs, weight, options, with_stats, block, launch, chip):
    """The forward kernel, called with (Logits, Targets, Rows, Part).

    `block` is None where x has the whole vocabulary. It is (first class, classes) where x is one block of it.
    """
    x, probs, weight = map(Form.of, (x, probs, weight))
    B, T, V = x.shape
    flags = flags_of(options, probs, with_stats)
    if launch is None:
        of_x = (x.itemsize, x.contiguous, aligned(weight, x, probs), chip)
        launch = part_launch(T, V, *of_x) if block else forward_launch(B, T, V, *of_x)
    into_rows = block is None and launch.splits == 1
    simple = is_simple(launch, weight, probs, flags) and not any(flags)
    few = FEW_REGISTERS if into_rows else PART_REGISTERS
    return Prepared(
        forward_kernel, B * ceil_div(T, launch.BLOCK_N) * launch.splits,
        B * T, T, V, Place(launch.splits, launch.split_tiles, *(block or (0, V))),
        ForwardStrides(x.strides, strides_of(probs)), options.ignore_index, *scalars_of(options), launch.TILE, flags,
        splits=launch.splits, num_warps=launch.num_warps, **ASSERTS,
        **chip.options(few if simple else MAX_REGISTERS),
    )  # fmt: skip


@remembered
def merge(N, options, with_stats, chip):
    """The kernel that merges parts, called with (target, Rows, Parts)."""
    return Prepared(
        merge_kernel, ceil_div(N, MERGE_ROWS), N, options.ignore_index, scalars_of(options).cap, MERGE_ROWS, with_stats,
        num_warps=MERGE_ROWS // chip.warp_size,
    )  # fmt: skip


@remembered
def backward(forms, row_strides, has_dentropy, options, block, launch, chip):
    """The backward kernel, called with (Logits, Gradients, Targets, Saved, Upstream).

    `forms` are those of x, probs, dx, dprobs and weight.
    """
    x, probs, dx, dprobs, weight = map(Form.of, forms)
    B, T, V = x.shape
    launch = launch or backward_launch(
        B, T, V, x.itemsize, x.contiguous, aligned(weight, x, probs, dx, dprobs), chip
    )  # fmt: skip
    _, classes = block or (0, V)
    flags = flags_of(options, probs)._replace(ONE_CLASS=classes == 1)
    simple = is_simple(launch, weight, probs, flags) and not has_dentropy and not flags.HAS_SOFTCAP
    strides = BackwardStrides(
        x.strides, strides_of(probs), strides_of(dx), strides_of(dprobs), Upstream(*row_strides)
    )  # fmt: skip
    return Prepared(
        backward_kernel, B * ceil_div(T, launch.BLOCK_N) * launch.splits,
        B * T, T, V, Place(launch.splits, launch.split_tiles, *(block or (0, V))), strides,
        options.ignore_index, *scalars_of(options), launch.TILE, flags,
        num_warps=launch.num_warps, **chip.options(FEW_REGISTERS if simple else MAX_REGISTERS),
    )  # fmt: skip


@remembered
def one_pass(x, dx, weight, row_strides, options, with_stats, launch, chip):
    """The one-pass kernel, called with (Logits, Gradients, Targets, Rows, OnePassUpstream)."""
    x, dx, weight = map(Form.of, (x, dx, weight))
    B, T, V = x.shape
    flags = flags_of(options, None, with_stats)
    variant = one_pass_variant(V, weight, x.dtype == torch.float64, flags)
    flags = flags._replace(ONE_CLASS=V == 1)
    strides = OnePassStrides(x.strides, dx.strides, OnePassUpstream(*row_strides))
    numbers = (*scalars_of(options), options.z_loss)
    if stays_on_chip(x, dx, chip) and (launch is None or launch.held is not None):
        launch = launch or on_chip_launch(
            B * T, V, x.itemsize, aligned(x, dx), on_chip_variants(weight, flags), chip
        )  # fmt: skip
        return Prepared(
            on_chip_kernel, launch.programs, B * T, T, V, strides, options.ignore_index, *numbers,
            launch.TILE, launch.piece, Tile(1, 1, launch.LANES, launch.WIDTH, launch.LANES * launch.WIDTH),
            Tile(1, 1, launch.LANES, 1, launch.LANES), launch.held, flags,
            num_warps=launch.num_warps, **ASSERTS, **chip.options(launch.registers),
        )  # fmt: skip
    launch = launch or one_pass_launch(B * T, V, x.itemsize, aligned(weight, x, dx), variant, chip)
    registers = one_pass_registers(variant, launch.CHUNKS * launch.WIDTH)
    return Prepared(
        one_pass_kernel, launch.programs, B * T, T, V, strides, options.ignore_index, *numbers, launch.TILE, flags,
        num_warps=launch.num_warps, **ASSERTS, **chip.options(registers),
    )  # fmt: skip


def stays_on_chip(x, dx, chip):
    """Whether the one pass keeps its rows on the chip; else it reads them a second time from the L2 cache."""
    return on_chip_kernel is not None and chip.shared_bytes > 0 and x.dtype != torch.float64 and aligned_alike(x, dx)


def reduce_programs(N):
    return 1 if N <= REDUCE_ROWS else min(REDUCE_PROGRAMS, ceil_div(N, REDUCE_BLOCK))


@remembered
def reduce(N, classes, stride_tw, divided, options, chip):
    """The kernel that reduces rows, called with (Shares, number, Rows, Parts, ProgramSums, Totals).

    `divided` are the fields of a `Reduction`.
    """
    programs, block = reduce_programs(N), min(REDUCE_BLOCK, max(128, triton.next_power_of_2(N)))
    return Prepared(
        reduce_kernel, programs, N, ceil_div(N, programs), classes, stride_tw, options.ignore_index,
        scalars_of(options).cap, block, Reduction(*divided), num_warps=min(block, REDUCE_THREADS) // chip.warp_size,
    )  # fmt: skip


@remembered
def total(programs, divided):
    """The kernel that adds the sums of several programs, called with (ProgramSums, normalizer, number, Totals)."""
    return Prepared(total_kernel, 1, programs, REDUCE_PROGRAMS, Reduction(*divided), num_warps=4)


@remembered
def scale(x, out, inplace, chip):
    """The kernel that multiplies a gradient, called with a Product."""
    x, out = map(Form.of, (x, out))
    B, T, V = x.shape
    launch = scale_launch(T, V, x.itemsize, x.contiguous, aligned(None, x, out), chip)
    blocks = B * ceil_div(T, launch.BLOCK_N)
    return Prepared(
        scale_kernel, min(blocks, launch.programs), blocks, T, V, ProductStrides(x.strides, out.strides),
        launch.TILE, inplace, tl.float64 if x.dtype == torch.float64 else tl.float32, num_warps=launch.num_warps,
    )  # fmt: skip
