"""Repair of a masked layer: least squares on its calibration output over the weights that were kept.

Partial Brain Surgeon (the paper) moves the adapter only, under a diagonal objective that cannot see that one input
may stand in for another. Here every kept weight of a row moves, under the full Gram: the exact solution per row is
U_K = U G_:K G_KK⁻¹, and conjugate gradients reach it for all rows at once with matrix products alone.
"""

import torch
from torch import Tensor


def output_error(weight: Tensor, other: Tensor, gram: Tensor) -> Tensor:
    """E[(y_o − y'_o)²] per output when `other` replaces `weight`, fp32 [out].

    Args:
        weight, other: [out, in].
        gram: [in, in].
    """
    difference = (weight - other).float()
    return ((difference @ gram) * difference).sum(dim=1)


def repair_weights(
    weight: Tensor, keep: Tensor, gram: Tensor, *, steps: int = 10, dampening_frac: float = 0.01
) -> Tensor:
    """Kept weights that minimise E‖(U − W) x‖² for every row, by conjugate gradients within the mask.

    A row that does not improve on plain masking under the undamped Gram keeps its masked weights, so the calibration
    error of no row ever grows.

    Args:
        weight: effective weight U before pruning, [out, in].
        keep: mask, bool [out, in].
        gram: Gram of the layer's inputs, fp32 [in, in].
        steps: iterations; ten are within noise of the exact solution.
        dampening_frac: multiple of the mean diagonal of the Gram added to its diagonal.

    Returns:
        W, fp32 [out, in], zero wherever `keep` is False.
    """
    weight, mask = weight.float(), keep.float()
    masked = weight * mask
    diagonal = gram.diagonal()
    shift = dampening_frac * diagonal.mean()
    if not shift > 0:  # the layer saw nothing but zeros: any weights do, and there is nothing to solve
        return masked
    preconditioner = 1 / (diagonal + shift)
    damped = gram + torch.diag(shift.expand_as(diagonal))
    tiny = torch.finfo(torch.float32).tiny

    repaired = masked.clone()
    residual = ((weight - repaired) @ damped) * mask
    scaled = residual * preconditioner
    direction = scaled.clone()
    norm = (residual * scaled).sum(dim=1, keepdim=True)
    for _ in range(steps):
        image = (direction @ damped) * mask
        alpha = norm / (direction * image).sum(dim=1, keepdim=True).clamp_min(tiny)
        repaired.addcmul_(alpha, direction)
        residual.addcmul_(alpha, image, value=-1)
        scaled = residual * preconditioner
        previous, norm = norm, (residual * scaled).sum(dim=1, keepdim=True)
        direction = torch.addcmul(scaled, norm / previous.clamp_min(tiny), direction)

    improved = output_error(weight, repaired, gram) < output_error(weight, masked, gram)
    return torch.where(improved.unsqueeze(1), repaired, masked)
