"""Groups of inputs that share a scale, in weights of four bits."""

from torch import Tensor

from efx_plugin.errors import EfxError

SIZES = (32, 64, 128)  # inputs, where a group is not the whole row


def group_size(in_features: int, scales: Tensor) -> int:
    """How many adjacent inputs share each of the scales [out, groups]; the last group may be shorter.

    Where there are several groups, only one of the sizes makes so many.

    Raises:
        EfxError: none of the sizes makes so many groups.
    """
    groups = scales.shape[1]
    if groups == 1:
        return in_features
    for size in SIZES:
        if -(-in_features // size) == groups:
            return size
    raise EfxError(
        f"{in_features} inputs in {groups} groups are no groups of {', '.join(map(str, SIZES))} or all: quantize with "
        "one of these group sizes"
    )
