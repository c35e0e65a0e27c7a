"""The ForeSight score: what pruning a weight costs behind the next layer."""

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
