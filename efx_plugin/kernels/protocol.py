"""What a kernel is. A new kernel is a class with these members in a new file, and a line in `registry`."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Kernel(Protocol):
    """How a sparse weight W [out, in] is laid out in memory, and the product with it.

    A weight is floating point; or int8 with float32 scales [out]; or int8 with values from -8 to 7 and float32 scales
    [out, groups], the size of whose groups `groups.group_size` tells. The activations of int8 may be quantized too.
    """

    @property
    def name(self) -> str:
        """What EFX_KERNEL and the log call it; no two kernels share one."""

    @property
    def summary(self) -> str:
        """What it does and how fast, a phrase for the log."""

    @property
    def device(self) -> str | None:
        """The type of the devices that it runs on, "cpu" or "cuda"; None if it runs on any."""

    def obstacle(self, weight: Tensor, dtype: torch.dtype, scales: Tensor | None) -> str | None:
        """Why it cannot take the weight here, a clause without a full stop; None if it can.

        Args:
            weight: [out, in], floating point or int8, on the device where it will be used, which is of the type above.
            dtype: of activations and result.
            scales: float32 [out] or [out, groups] of an int8 weight, else None.
        """

    def pack(self, weight: Tensor, scales: Tensor | None, quantize_activations: bool) -> tuple[Tensor, ...]:
        """Copy a weight without an obstacle into the kernel's own layout: tensors of any shapes and dtypes.

        Args:
            weight: [out, in], floating point or int8.
            scales: float32 [out] or [out, groups] of an int8 weight, else None.
            quantize_activations: `linear` quantizes activations to int8 by row; for int8 weights only. A kernel that
                computes with more exact activations warns.
        """

    def linear(self, x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        """x [..., in] times the transposed weight, plus `bias` [out] if given: [..., out], contiguous, of x's dtype.

        This is called once per layer and forward pass, so that it must cost little beside the product.
        """

    def unpack(self, packed: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """What was packed, to the bit but for the sign of zeros: the dense weight [out, in], and scales as above.

        A floating-point weight may come back in a narrower dtype that holds its values.
        """
