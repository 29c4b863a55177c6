"""Cross entropy, backward: one read and one write of every kept row; an ignored one is written, not read.

With p = softmax of the used logits, recomputed from the saved logarithm of the sum, and q the target
distribution: dx = dloss * (mass p - q + 2 z_loss lse p) * slope, subtracted in float32 and rounded once.
"""

import triton
import triton.language as tl

from .device_math import soft_target, used_logits


@triton.jit(do_not_specialize=["B", "T", "first_class", "classes", "stride_g", "ignore_index"])
def backward_kernel(
    dloss_ptr,  # (B * T,)
    x_ptr,  # (B, T, V)
    target_ptr,  # (B * T,) int64
    weight_ptr,  # (V,) or None
    probs_ptr,  # (B, T, V) or None
    lse_ptr,  # (2, B * T): c, log_s
    mass_ptr,  # (B * T,)
    dx_ptr,  # (B, T, V), may be x itself
    dprobs_ptr,  # (B, T, V) or None
    B: tl.int64,
    T,
    V,
    first_class,
    classes,
    stride_g,
    stride_xb,
    stride_xt,
    stride_xv,
    stride_pb,
    stride_pt,
    stride_pv,
    stride_dxb,
    stride_dxt,
    stride_dxv,
    stride_dpb,
    stride_dpt,
    stride_dpv,
    ignore_index: tl.int64,
    smoothing: tl.float64,
    pre_scale: tl.float64,
    softcap: tl.float64,
    z_loss: tl.float64,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_DPROBS: tl.constexpr,
):
    smoothing = tl.full((), smoothing, ACC)
    pre_scale = tl.full((), pre_scale, ACC)
    softcap = tl.full((), softcap, ACC)
    z_loss = tl.full((), z_loss, ACC)

    pid = tl.program_id(0).to(tl.int64)
    blocks_v = tl.cdiv(V, BLOCK_V)
    blocks_t = tl.cdiv(T, BLOCK_N)
    pid_n = pid // blocks_v
    b = pid_n // blocks_t
    offs_t = (pid_n % blocks_t) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_t < T
    row = b * T + offs_t
    N = B * T
    target = tl.load(target_ptr + row, mask=in_n, other=ignore_index)
    keep = in_n & (target != ignore_index)
    local = target - first_class
    uniform = smoothing / classes
    g = tl.load(dloss_ptr + row * stride_g, mask=keep, other=0.0).to(ACC)
    c = tl.load(lse_ptr + row, mask=keep, other=0.0)
    log_s = tl.load(lse_ptr + N + row, mask=keep, other=0.0)
    mass = tl.load(mass_ptr + row, mask=keep, other=0.0)

    offs_v = (pid % blocks_v).to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    mask = keep[:, None] & mask_v[None, :]
    written = in_n[:, None] & mask_v[None, :]
    offs_wide = offs_v.to(tl.int64)[None, :]
    x_ptrs = x_ptr + b * stride_xb + (offs_t * stride_xt)[:, None] + offs_wide * stride_xv
    x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(ACC)
    x, slope = used_logits(x, pre_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    z = x - c[:, None]

    if HAS_DX:
        p = tl.exp(z - log_s[:, None])
        grad = p * mass[:, None]
        if HAS_PROBS or HAS_SMOOTHING:
            q_ptrs = None
            if HAS_PROBS:
                q_ptrs = probs_ptr + b * stride_pb + (offs_t * stride_pt)[:, None] + offs_wide * stride_pv
            w_ptrs = weight_ptr + offs_v if HAS_WEIGHT else None
            grad -= soft_target(q_ptrs, w_ptrs, mask, mask_v, smoothing, uniform, ACC, HAS_PROBS, HAS_WEIGHT)
        if not HAS_PROBS:
            w_target = tl.zeros((BLOCK_N,), ACC) + (1.0 - smoothing)
            if HAS_WEIGHT:
                here = (local >= 0) & (local < V)
                w_target *= tl.load(weight_ptr + local, mask=keep & here, other=0.0).to(ACC)
            grad = tl.where(offs_wide == local[:, None], grad - w_target[:, None], grad)
        # Added last: where p is near 1, p * mass - q is exact, and must not be rounded at the size of p.
        grad += p * (2.0 * z_loss * (c + log_s))[:, None]
        grad *= g[:, None]
        if HAS_SCALE or HAS_SOFTCAP:
            grad *= slope
        # Selected, not multiplied by 0: an ignored row and a masked class get 0 under any upstream gradient.
        grad = tl.where(mask & (x != float("-inf")), grad, 0.0)
        dx_ptrs = dx_ptr + b * stride_dxb + (offs_t * stride_dxt)[:, None] + offs_wide * stride_dxv
        tl.store(dx_ptrs, grad.to(dx_ptr.dtype.element_ty), mask=written)

    if HAS_DPROBS:
        dprobs = g[:, None] * (1.0 - smoothing) * (log_s[:, None] - z)
        if HAS_WEIGHT:
            dprobs *= tl.load(weight_ptr + offs_v, mask=mask_v, other=0.0).to(ACC)[None, :]
        dprobs = tl.where(mask, dprobs, 0.0)
        dprobs_ptrs = dprobs_ptr + b * stride_dpb + (offs_t * stride_dpt)[:, None] + offs_wide * stride_dpv
        tl.store(dprobs_ptrs, dprobs.to(dprobs_ptr.dtype.element_ty), mask=written)
