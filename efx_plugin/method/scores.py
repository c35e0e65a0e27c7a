"""The ForeSight score: what pruning a weight costs behind the next layer.

A score is a saliency, what the weight is worth to the output of its own layer, times the sensitivity of what follows
to that output. The saliencies here look at each weight by itself; the one that lets other weights make up for it,
"obs", depends on what was pruned before and lives in `efx_plugin.method.obs`.
"""

from torch import Tensor


def wanda_saliency(weight: Tensor, energy: Tensor) -> Tensor:
    """U_oi² e_i, the energy that pruning one weight takes from its layer's output.

    It ranks as Wanda's |U_oi| ‖x_i‖ does; the square gives it the unit of an output error, so that scores of
    different matrices can be compared once each row has its sensitivity.

    Args:
        weight: [out, in].
        energy: E[x_i²], [in].

    Returns:
        fp32 [out, in].
    """
    return weight.float().square() * energy


def magnitude_saliency(weight: Tensor) -> Tensor:
    """U_oi², blind to the data; fp32 [out, in]."""
    return weight.float().square()


def foresight_scores(saliency: Tensor, sensitivity: Tensor | None) -> Tensor:
    """S_oi = saliency_oi · c_o (paper, eq. 2); c = 1 where `sensitivity` is None.

    The factor is constant within a row: it cannot change a mask that prunes the same fraction of every row, and
    matters only where entries of different rows compete.

    Args:
        saliency: [out, in].
        sensitivity: c, [out], or None.
    """
    return saliency if sensitivity is None else saliency * sensitivity.unsqueeze(1)


def update_average(average: Tensor, scores: Tensor, momentum: float) -> Tensor:
    """S ← momentum · S_new + (1 − momentum) · S in place, over the refreshes of a mask during training (paper, eta).

    Scores of different refreshes compare only after division by a common scale, such as their mean; that is the
    caller's to do, who knows which scores are compared.

    Args:
        average: S of the earlier refreshes, fp32 of any shape.
        scores: S_new, the same shape.
        momentum: 1 overwrites the average whatever it holds, as the first refresh must.

    Returns:
        `average`.
    """
    return average.copy_(scores) if momentum == 1 else average.lerp_(scores, momentum)
