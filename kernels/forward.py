"""Cross entropy, forward: one read of every kept row, none of an ignored one.

A row's result is kept relative to a shift `c`, its largest used logit, so that nothing is lost to rounding
where logits are large. With q the target distribution over classes (class weights multiplied in):

    s = sum exp(x - c)        r = sum q (x - c)        mass = sum q
    log_s = log s             lse = c + log_s          loss = mass * log_s - r + z_loss * lse^2

The logarithm of the sum is saved as the pair (c, log_s): `x - lse` would round at the size of `lse`,
`(x - c) - log_s` does not. Programs that see only a part of the row leave (max, s, r, mass, d, argmax) of that
part; `merge_kernel` puts the parts together. Parts are splits of a launch, or blocks of the vocabulary whose logits
exist one after the other (`first_class`), or both.
"""

import triton
import triton.language as tl

from .device_math import finite_or_zero, soft_target, used_logits, weighted


@triton.jit
def store_row(
    loss_ptr, lse_ptr, mass_ptr, correct_ptr, entropy_ptr, row, in_n, keep, N, target,
    c, s, r, mass, d, argmax, z_loss,
    HAS_STATS: tl.constexpr,
):  # fmt: skip
    """The row's outputs from its sums; zeros where the row is ignored."""
    s = tl.where(keep, s, 1.0)
    log_s = tl.log(s)
    lse = c + log_s
    loss = mass * log_s - r + z_loss * lse * lse
    tl.store(loss_ptr + row, tl.where(keep, loss, 0.0), mask=in_n)
    tl.store(lse_ptr + row, tl.where(keep, c, 0.0), mask=in_n)
    tl.store(lse_ptr + N + row, tl.where(keep, log_s, 0.0), mask=in_n)
    tl.store(mass_ptr + row, tl.where(keep, mass, 0.0), mask=in_n)
    if HAS_STATS:
        tl.store(correct_ptr + row, keep & (argmax == target), mask=in_n)
        tl.store(entropy_ptr + row, tl.where(keep, log_s - d / s, 0.0), mask=in_n)


@triton.jit(do_not_specialize=["B", "T", "first_part", "parts", "first_class", "classes", "ignore_index"])
def forward_kernel(
    x_ptr,  # (B, T, V)
    target_ptr,  # (B * T,) int64
    weight_ptr,  # (V,) or None
    probs_ptr,  # (B, T, V) or None
    loss_ptr,  # (B * T,)
    lse_ptr,  # (2, B * T): c, log_s
    mass_ptr,  # (B * T,)
    correct_ptr,  # (B * T,) bool
    entropy_ptr,  # (B * T,)
    partial_ptr,  # (5, parts, B * T): max, s, r, mass, d
    argmax_ptr,  # (parts, B * T) int32
    B: tl.int64,
    T,
    V,
    splits,
    split_v,
    first_part,
    parts,
    first_class,
    classes,
    stride_xb,
    stride_xt,
    stride_xv,
    stride_pb,
    stride_pt,
    stride_pv,
    ignore_index: tl.int64,
    smoothing: tl.float64,
    pre_scale: tl.float64,
    softcap: tl.float64,
    z_loss: tl.float64,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    IS_PART: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STATS: tl.constexpr,
):
    smoothing = tl.full((), smoothing, ACC)
    pre_scale = tl.full((), pre_scale, ACC)
    softcap = tl.full((), softcap, ACC)
    z_loss = tl.full((), z_loss, ACC)

    pid = tl.program_id(0).to(tl.int64)
    pid_v = pid % splits
    pid_n = pid // splits
    blocks_t = tl.cdiv(T, BLOCK_N)
    b = pid_n // blocks_t
    offs_t = (pid_n % blocks_t) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_t < T
    N = B * T
    row = b * T + offs_t
    target = tl.load(target_ptr + row, mask=in_n, other=ignore_index)
    keep = in_n & (target != ignore_index)
    in_range = (target >= 0) & (target < classes)
    local = target - first_class  # among the V classes at hand, which are first_class and those that follow
    uniform = smoothing / classes

    v_start = (pid_v * split_v).to(tl.int32)
    v_end = tl.minimum(v_start + split_v, V)
    # A tile without a kept row runs no iteration: not one of its logits is read.
    v_stop = tl.where(tl.max(keep.to(tl.int32), 0) > 0, v_end, v_start)

    x_row = x_ptr + b * stride_xb + offs_t * stride_xt
    if HAS_PROBS:
        probs_row = probs_ptr + b * stride_pb + offs_t * stride_pt
    else:
        # Only the target's logit; asked for first, so that it arrives while the row streams by.
        own = keep & in_range & (local >= v_start) & (local < v_end)
        x_target = tl.load(x_row + local * stride_xv, mask=own, other=0.0).to(ACC)
        x_target = used_logits(x_target, pre_scale, softcap, HAS_SCALE, HAS_SOFTCAP)[0]
        w_target = tl.where(own, 1.0 - smoothing, 0.0)
        if HAS_WEIGHT:
            w_target *= tl.load(weight_ptr + local, mask=own, other=0.0).to(ACC)

    m = tl.full((BLOCK_N,), float("-inf"), ACC)
    c = tl.zeros((BLOCK_N,), ACC)
    s = tl.zeros((BLOCK_N,), ACC)
    r = tl.zeros((BLOCK_N,), ACC)
    mass = tl.zeros((BLOCK_N,), ACC)
    d = tl.zeros((BLOCK_N,), ACC)
    argmax = tl.zeros((BLOCK_N,), tl.int32)
    for v in range(v_start, v_stop, BLOCK_V):
        offs_v = v + tl.arange(0, BLOCK_V)
        mask_v = offs_v < v_end
        mask = keep[:, None] & mask_v[None, :]
        offs_xv = offs_v.to(tl.int64)[None, :] * stride_xv
        x = tl.load(x_row[:, None] + offs_xv, mask=mask, other=float("-inf")).to(ACC)
        x = used_logits(x, pre_scale, softcap, HAS_SCALE, HAS_SOFTCAP)[0]
        if HAS_SCALE or HAS_SOFTCAP:
            x = tl.where(mask, x, float("-inf"))

        m_block = tl.max(x, 1)
        m_new = tl.maximum(m, m_block)
        c_new = finite_or_zero(m_new)
        z = x - c_new[:, None]
        e = tl.exp(z)
        alpha = tl.exp(m - c_new)
        if HAS_PROBS or HAS_SMOOTHING:
            q_ptrs = probs_row[:, None] + offs_v.to(tl.int64)[None, :] * stride_pv if HAS_PROBS else None
            w_ptrs = weight_ptr + offs_v if HAS_WEIGHT else None
            q = soft_target(q_ptrs, w_ptrs, mask, mask_v, smoothing, uniform, ACC, HAS_PROBS, HAS_WEIGHT)
            r += mass * (c - c_new) + tl.sum(weighted(q, z), 1)
            mass += tl.sum(q, 1)
        if HAS_STATS:
            d = alpha * (d + s * (c - c_new)) + tl.sum(weighted(e, z), 1)
            at_max = tl.min(tl.where(x == m_block[:, None], offs_v[None, :], 2147483647), 1)
            argmax = tl.where(m_block > m, at_max + first_class, argmax)
        s = s * alpha + tl.sum(e, 1)
        m = m_new
        c = c_new

    if not HAS_PROBS:
        r += weighted(w_target, x_target - c)
        mass += w_target
    if IS_PART:
        part = row + (first_part + pid_v) * N
        field = parts * N
        tl.store(partial_ptr + part, m, mask=keep)
        tl.store(partial_ptr + part + field, s, mask=keep)
        tl.store(partial_ptr + part + 2 * field, r, mask=keep)
        tl.store(partial_ptr + part + 3 * field, mass, mask=keep)
        if HAS_STATS:
            tl.store(partial_ptr + part + 4 * field, d, mask=keep)
            tl.store(argmax_ptr + part, argmax, mask=keep)
    else:
        store_row(
            loss_ptr, lse_ptr, mass_ptr, correct_ptr, entropy_ptr, row, in_n, keep, N, target,
            c, s, r, mass, d, argmax, z_loss, HAS_STATS,
        )  # fmt: skip
    # Last, when nothing else is held: a call in the middle of the kernel makes it spill. Nothing was accessed by a
    # bad target, whose `own` is false.
    tl.device_assert(in_range | (keep == 0), "fused_ignore_ce: target out of range [0, number of classes)")


@triton.jit(do_not_specialize=["N", "parts", "ignore_index"])
def merge_kernel(
    target_ptr,  # (N,) int64
    loss_ptr,  # (N,)
    lse_ptr,  # (2, N)
    mass_ptr,  # (N,)
    correct_ptr,  # (N,) bool
    entropy_ptr,  # (N,)
    partial_ptr,  # (5, parts, N)
    argmax_ptr,  # (parts, N) int32
    N: tl.int64,
    parts,
    ignore_index: tl.int64,
    z_loss: tl.float64,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_STATS: tl.constexpr,
):
    z_loss = tl.full((), z_loss, ACC)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = row < N
    target = tl.load(target_ptr + row, mask=in_n, other=ignore_index)
    keep = in_n & (target != ignore_index)
    field = parts * N

    m = tl.full((BLOCK_N,), float("-inf"), ACC)
    c = tl.zeros((BLOCK_N,), ACC)
    s = tl.zeros((BLOCK_N,), ACC)
    r = tl.zeros((BLOCK_N,), ACC)
    mass = tl.zeros((BLOCK_N,), ACC)
    d = tl.zeros((BLOCK_N,), ACC)
    argmax = tl.zeros((BLOCK_N,), tl.int32)
    for i in range(0, parts):
        part = row + i * N
        m_part = tl.load(partial_ptr + part, mask=keep, other=float("-inf"))
        s_part = tl.load(partial_ptr + part + field, mask=keep, other=0.0)
        r_part = tl.load(partial_ptr + part + 2 * field, mask=keep, other=0.0)
        mass_part = tl.load(partial_ptr + part + 3 * field, mask=keep, other=0.0)
        c_part = finite_or_zero(m_part)
        m_new = tl.maximum(m, m_part)
        c_new = finite_or_zero(m_new)
        alpha = tl.exp(m - c_new)
        beta = tl.exp(m_part - c_new)
        r += mass * (c - c_new) + r_part + mass_part * (c_part - c_new)
        mass += mass_part
        if HAS_STATS:
            d_part = tl.load(partial_ptr + part + 4 * field, mask=keep, other=0.0)
            d = alpha * (d + s * (c - c_new)) + beta * (d_part + s_part * (c_part - c_new))
            argmax_part = tl.load(argmax_ptr + part, mask=keep, other=0)
            argmax = tl.where(m_part > m, argmax_part, argmax)
        s = s * alpha + s_part * beta
        m = m_new
        c = c_new
    store_row(
        loss_ptr, lse_ptr, mass_ptr, correct_ptr, entropy_ptr, row, in_n, keep, N, target,
        c, s, r, mass, d, argmax, z_loss, HAS_STATS,
    )  # fmt: skip
