"""Repair of a masked layer: what the kept weights, or the adapter, can do about the pruned ones.

With S the pruned and K the kept entries of a row of U, masking leaves the calibration error U_S G_SS U_Sᵀ. The
published repair, Partial Brain Surgeon (`paper_update`), moves the adapter so that U_S shrinks, under a diagonal
objective that cannot see that one input may stand in for another. Least squares on the layer's output, under the full
Gram, does: over all kept weights (`repair_weights`) or in the adapter's subspace (`adapter_update`).

Inputs x behind pruned layers have drifted from the x' of the dense model. What is fitted may therefore be
U (x + a (x' − x)) in place of U x: the target of the system grows by a U D on the kept entries, D = E[(x' − x) xᵀ], and
nothing else changes (GPTAQ, arXiv 2504.02692, does so for quantization).

Conjugate gradients solve both for all rows at once, with matrix products alone and within the mask. In exact
arithmetic each of their steps lowers the error of every row; a row for which rounding has it otherwise is left masked.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Rows are worked on in chunks of this many numbers, or of this many rows where products need them to be fast, which
# bounds the memory beside weights and results.
CHUNK, LEAST_ROWS = 2**19, 256
# Conjugate gradients stop early once the squared residual of every row has fallen to this fraction.
TOLERANCE = 1e-7


def output_error(weight: Tensor, other: Tensor, gram: Tensor) -> Tensor:
    """E[(y_o − y'_o)²] per output when `other` replaces `weight`, fp32 [out].

    Args:
        weight, other: [out, in].
        gram: [in, in], fp32.
    """
    errors = torch.empty(len(weight), dtype=gram.dtype, device=gram.device)
    for rows in chunks(*weight.shape):
        difference = weight[rows].to(gram.dtype) - other[rows].to(gram.dtype)
        errors[rows] = torch.linalg.vecdot(difference @ gram, difference)
    return errors


def repair_weights(
    weight: Tensor,
    keep: Tensor,
    gram: Tensor,
    *,
    drift: Tensor | None = None,
    share: float = 1.0,
    steps: int = 10,
    dampening_frac: float = 0.01,
) -> Tensor:
    """Kept weights that minimise E‖U (x + a (x' − x)) − W x‖² for every row:
    W_K = U_K + [U_S G + a U D]_K (G_KK + λ I)⁻¹.

    This error of no row grows.

    Args:
        weight: effective weight U before pruning, [out, in].
        keep: mask, bool [out, in].
        gram: Gram of the layer's inputs x, fp32 [in, in].
        drift: D = E[(x' − x) xᵀ], fp32 [in, in], with the inputs x' of the dense model; None for x' = x.
        share: a, the part of the drift that is made up for.
        steps: conjugate gradient steps; ten are within noise of the exact solution.
        dampening_frac: λ as a fraction of the mean diagonal of the Gram.

    Returns:
        W, fp32 [out, in], zero wherever `keep` is False.
    """
    repaired = weight.float() * keep
    damping = dampening_frac * float(gram.diagonal().mean())
    if not damping > 0:  # the layer saw nothing but zeros: any weights do, and there is nothing to solve
        return repaired
    inverse = 1 / (gram.diagonal() + damping)
    for rows in chunks(*weight.shape):
        target = _lost_output(weight[rows], keep[rows], gram, drift, share)
        repaired[rows] += change_of_weights(target, keep[rows], gram, inverse, damping, steps)
    return repaired


def change_of_weights(
    target: Tensor, keep: Tensor, gram: Tensor, inverse: Tensor, damping: float, steps: int
) -> Tensor:
    mask = keep.float()

    def product(change: Tensor) -> Tensor:
        return torch.addmm(change, change, gram, beta=damping).mul_(mask)

    return _conjugate_gradients(target, product, lambda residual: residual * inverse, damping, steps)


def adapter_update(
    weight: Tensor,
    keep: Tensor,
    gram: Tensor,
    lora_a: Tensor,
    *,
    drift: Tensor | None = None,
    share: float = 1.0,
    steps: int = 10,
    dampening_frac: float = 0.01,
) -> Tensor:
    """The change d of B that minimises E‖U (x + a (x' − x)) − (U + d A)_K x‖²: per row
    d (A_K G_KK A_Kᵀ + λ I) = [U_S G + a U D]_K A_Kᵀ.

    The masked layer afterwards is `updated_weight(weight, keep, d, lora_a)`, and this error of no row of it exceeds
    that of the masked U.

    The system of a row is A_K G_KK A_Kᵀ with a mask of its own, and to form it takes r products with the Gram per row.
    But all of them are near q² A G Aᵀ + q (1 − q) A diag(G) Aᵀ, their mean over random masks that keep the fraction
    q. With that as preconditioner conjugate gradients need a few steps of one product each, at most r of them but for
    rounding.

    Args:
        weight: effective weight U before pruning, [out, in].
        keep: mask, bool [out, in].
        gram: Gram of the layer's inputs, fp32 [in, in].
        lora_a: A with the adapter's scaling in it, s·A, [r, in].
        drift, share: D and a, see `repair_weights`.
        steps: conjugate gradient steps at most.
        dampening_frac: λ as a fraction of the mean diagonal of the rows' mean system.

    Returns:
        d, fp32 [out, r]; zero in a row that would not improve.
    """
    lora_a = lora_a.float()
    density = float(keep.count_nonzero()) / keep.numel()
    energy = gram.diagonal()
    mean = density**2 * (lora_a @ gram @ lora_a.T) + density * (1 - density) * (lora_a * energy @ lora_a.T)
    damping = dampening_frac * float(mean.diagonal().mean())
    update = torch.zeros(len(weight), len(lora_a), device=weight.device)
    if not damping > 0:  # an adapter, or inputs, of nothing but zeros: no change of B can help
        return update
    mean.diagonal().add_(damping)
    inverse = torch.linalg.inv(mean)
    for rows in chunks(*weight.shape):
        target = _lost_output(weight[rows], keep[rows], gram, drift, share) @ lora_a.T
        update[rows] = _change_of_adapter(target, keep[rows], gram, lora_a, inverse, damping, steps)
    return update


def _change_of_adapter(
    target: Tensor, keep: Tensor, gram: Tensor, lora_a: Tensor, inverse: Tensor, damping: float, steps: int
) -> Tensor:
    mask = keep.float()

    def product(update: Tensor) -> Tensor:
        image = (update @ lora_a).mul_(mask) @ gram
        return torch.addmm(update, image.mul_(mask), lora_a.T, beta=damping)

    return _conjugate_gradients(target, product, lambda residual: residual @ inverse, damping, steps)


def updated_weight(weight: Tensor, keep: Tensor, update: Tensor, lora_a: Tensor) -> Tensor:
    """(U + d A)_K: the masked layer after an update of its adapter, fp32 [out, in].

    Args:
        weight: effective weight U before pruning, [out, in].
        keep: mask, bool [out, in].
        update: d, [out, r], of `paper_update` or `adapter_update`.
        lora_a: A with the adapter's scaling in it, s·A, [r, in].
    """
    return torch.addmm(weight.float(), update, lora_a.float()).mul_(keep)


def paper_update(
    weight: Tensor,
    keep: Tensor,
    energy: Tensor,
    lora_a: Tensor,
    *,
    kappa: float = 1.0,
    dampening_frac: float = 0.01,
) -> Tensor:
    """The published change of B (Partial Brain Surgeon, arXiv 2511.19935): with A fixed, pruned entries of U + dB A
    shrink while kept ones stay, a ridge regression in the row space of A.

        dB = −U_S D Aᵀ (κ A D Aᵀ + (1 − κ) A_S D_S A_Sᵀ + λ I)⁻¹,   D = diag(energy)

    At κ = 1 all rows share one system. Otherwise each row has its own of size r, formed and solved in float64.

    Args:
        weight: effective weight U before pruning, [out, in].
        keep: mask, bool [out, in].
        energy: E[x_i²], [in].
        lora_a: A with the adapter's scaling in it, s·A, [r, in].
        kappa: weight of what kept entries would change, between 0 and 1.
        dampening_frac: λ as a fraction of the mean diagonal of A D Aᵀ.

    Returns:
        dB, fp32 [out, r].
    """
    rank = len(lora_a)
    lora_a = lora_a.double()
    weighted = lora_a * energy
    shared = weighted @ lora_a.T
    damping = dampening_frac * shared.diagonal().mean()
    update = torch.zeros(len(weight), rank, device=weight.device)
    if not damping > 0:  # an adapter, or inputs, of nothing but zeros: no change of B changes anything
        return update
    shared = kappa * shared + damping * torch.eye(rank, dtype=shared.dtype, device=shared.device)
    if kappa == 1:
        solution = torch.linalg.solve(shared, weighted).float().T
        for rows in chunks(len(weight), weight.shape[1]):  # a masked copy that fits the cache
            torch.matmul(_pruned_part(weight[rows], keep[rows]), solution, out=update[rows])
        return update.neg_()
    # The systems of all rows at once: a product of the mask with the distinct products of two rows of A.
    first, second = torch.tril_indices(rank, rank, device=weight.device)
    pairs = (weighted[first] * lora_a[second]).T
    place = torch.empty(rank, rank, dtype=torch.long, device=weight.device)
    place[first, second] = place[second, first] = torch.arange(len(first), device=weight.device)
    for rows in chunks(len(weight), max(weight.shape[1], rank**2)):
        pruned = (~keep[rows]).double()
        own = (pruned @ pairs)[:, place]
        update[rows] = -torch.linalg.solve(shared + (1 - kappa) * own, (pruned * weight[rows]) @ weighted.T)
    return update


def _lost_output(weight: Tensor, keep: Tensor, gram: Tensor, drift: Tensor | None, share: float) -> Tensor:
    """[U_S G + a U D]_K: what the masked output lacks, times the kept inputs."""
    lost = _pruned_part(weight, keep) @ gram
    if drift is not None:
        lost.addmm_(weight.float(), drift, alpha=share)
    return lost.mul_(keep)


def _pruned_part(weight: Tensor, keep: Tensor) -> Tensor:
    """U_S in fp32."""
    return weight.float() * ~keep


def _conjugate_gradients(
    target: Tensor,
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    damping: float,
    steps: int,
) -> Tensor:
    """x per row with x (M + λ I) = target, from x = 0; zero where the error x M xᵀ − 2 x targetᵀ does not fall.

    Args:
        target: [rows, n].
        product: x ↦ x (M + λ I), with an M of each row's own.
        precondition: x ↦ x P, P near the inverse.
        damping: λ.
        steps: at most.
    """
    solution = torch.zeros_like(target)
    residual = target.clone()
    scaled = precondition(residual)
    direction = scaled.clone()
    first = norm = torch.linalg.vecdot(residual, scaled).unsqueeze(1)
    for _ in range(steps):
        image = product(direction)
        length = _quotient(norm, torch.linalg.vecdot(direction, image).unsqueeze(1))
        solution.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        scaled = precondition(residual)
        previous, norm = norm, torch.linalg.vecdot(residual, scaled).unsqueeze(1)
        if (norm <= TOLERANCE * first).all():
            break
        direction.mul_(_quotient(norm, previous)).add_(scaled)
    # x M xᵀ = x (target − residual) − λ x xᵀ, so what the error falls by needs no further product.
    gain = torch.linalg.vecdot(solution, target + residual) + damping * torch.linalg.vecdot(solution, solution)
    return solution.where((gain > 0).unsqueeze(1), 0)


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is not positive: such a row has converged."""
    return (numerator / denominator).where(denominator > 0, 0)


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows of `width` numbers each."""
    size = max(CHUNK // width, LEAST_ROWS)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
