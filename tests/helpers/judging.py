"""The rule by which results are judged: they may not be worse than PyTorch's."""

import torch


def no_worse(name, ours, ref, gt, *, terms, logits=1.0, via=None, scale=0.0):
    """`|gt - ours| <= |gt - ref| + tiny`, in the largest element: ours may not be worse than PyTorch.

    `gt` is the truth, in float64, and `ref` is PyTorch in the dtype of ours. One run of PyTorch shows one draw of its
    rounding errors. Another order of summation, which another processor or another matrix product kernel may choose,
    shows another draw. `tiny` bounds how far two draws lie apart, as a sum of these parts:

    - 2 units in the last place of the result's dtype, and 2 of `via`, the dtype to which values on the way are rounded;
    - sqrt(terms) units of the dtype in which sums are computed, for sums of `terms` numbers. Rounding errors are
      independent of each other, so those of a sum grow with the root of its length. This is six standard deviations
      of numbers of one sign that are added one after the other; any other order is more accurate (Higham and Mary, "A
      new approach to probabilistic rounding error analysis", 2019);
    - `logits` such units, if logits are as large as that: the last place of a logit of 100 is worth 100 units, and the
      probability changes by as much relative to itself.

    A unit is relative to the largest value of `gt`, or to `scale` if that is larger: the size of the terms of a sum
    that may cancel, as in a gradient's p - 1. Float64 results, whose truth is itself rounded, may differ from it by
    1e-14 absolute and 1e-12 relative.
    """
    assert ours.shape == ref.shape, f"{name}: shape {tuple(ours.shape)}, PyTorch has {tuple(ref.shape)}"
    assert ours.dtype == ref.dtype, f"{name}: dtype {ours.dtype}, PyTorch has {ref.dtype}"
    relative = 2 * sum(torch.finfo(dtype).eps for dtype in (ours.dtype, via) if dtype is not None)
    relative, floor = relative + (terms**0.5 + logits) * torch.finfo(torch.float32).eps, 0.0
    if ours.dtype == torch.float64:
        relative, floor = 1e-12, 1e-14
    ours, ref, gt = ours.detach().double().cpu(), ref.detach().double().cpu(), gt.detach().double().cpu()
    odd = ~gt.isfinite()
    assert ((ours == gt) | (ours.isnan() & gt.isnan()))[odd].all(), f"{name}: NaN or inf differ"
    ours, ref, gt = ours[~odd], ref[~odd], gt[~odd]
    if gt.numel():
        tiny = relative * max(gt.abs().max(), scale) + floor
        assert (gt - ours).abs().max() <= (gt - ref).abs().max() + tiny, _worst(name, ours, ref, gt, tiny)


def _worst(name, ours, ref, gt, tiny):
    error_ours, error_ref = (gt - ours).abs(), (gt - ref).abs()
    at = int(error_ours.argmax())
    return (
        f"{name}: off by {error_ours.max():.3e} at flat position {at} (ours {ours.flatten()[at]:.9g}, true "
        f"{gt.flatten()[at]:.9g}), PyTorch is off by {error_ref.max():.3e} and {tiny:.3e} more are allowed"
    )
