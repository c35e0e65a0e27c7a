"""Second moments of a linear layer's inputs, accumulated batch by batch."""

import torch
from torch import Tensor

# A Gram is symmetric: its rows are summed in this many parts, each from its diagonal on, which takes 5/8 of the flops.
PARTS = 4


class InputStatistics:
    """Running Gram G = E[x xᵀ] of the inputs of a linear layer.

    Sums are kept in fp32, so statistics of several batches, processes or devices add up (`merge`). A full Gram costs
    4·in² bytes; where only the energies are needed, `full=False` keeps 4·in. The drift D = E[(x' − x) xᵀ] from the
    inputs x' that the same tokens have in another model costs as much as a Gram again.

    Attributes:
        sum: Σ x xᵀ, fp32 [in, in], not all of it below the diagonal until `finish`; or Σ x², fp32 [in].
        drift_sum: Σ (x' − x) xᵀ, fp32 [in, in]; None where no drift is kept.
        features: `in`.
        count: number of inputs seen.

    Args:
        features: number of input features, `in`.
        full: keep the whole Gram rather than its diagonal.
        drift: keep the drift as well.
        device: where the sums live.
    """

    def __init__(
        self, features: int, *, full: bool = True, drift: bool = False, device: torch.device | str | None = None
    ):
        shape = (features, features) if full else (features,)
        self.sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self.drift_sum = torch.zeros(features, features, dtype=torch.float32, device=device) if drift else None
        self.features, self.count = features, 0
        self._finished = False

    @property
    def full(self) -> bool:
        return self.sum.dim() == 2

    def update(self, inputs: Tensor) -> None:
        """Add a batch of inputs, shape [..., in], any floating dtype."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if self.full:
            for part in _parts(self.features):
                self.sum[part, part.start :].addmm_(rows[:, part].T, rows[:, part.start :])
        else:
            self.sum.add_(rows.square().sum(dim=0))
        self.count += rows.shape[0]

    def update_drift(self, inputs: Tensor, others: Tensor) -> None:
        """Add what another model has in place of a batch of inputs that `update` was given.

        Args:
            inputs: x, [..., in], any floating dtype.
            others: x' of the same tokens, of the same shape.

        Raises:
            ValueError: no drift is kept.
        """
        if self.drift_sum is None:
            raise ValueError("these statistics keep no drift: construct them with drift=True")
        rows = inputs.reshape(-1, self.features).float()
        self.drift_sum.addmm_((others.reshape(-1, self.features).float() - rows).T, rows)

    def merge(self, other: "InputStatistics") -> None:
        """Add what `other` has seen, as if its batches had been passed to `update` here."""
        self.sum.add_(other.sum.to(self.sum.device))
        if self.drift_sum is not None and other.drift_sum is not None:
            self.drift_sum.add_(other.drift_sum.to(self.sum.device))
        self.count += other.count

    def reorder(self, order: Tensor) -> None:
        """Put the inputs into another order, int64 [in]: which one comes first, second, ...; after `finish` only.

        Raises:
            ValueError: before it.
        """
        if not self._finished:
            raise ValueError("sums are reordered once they are finished")
        order = order.to(self.sum.device)
        for sums in (self.sum, self.drift_sum):
            if sums is not None:
                for dimension in range(sums.dim()):
                    sums.copy_(sums.index_select(dimension, order))

    def finish(self) -> None:
        """Make the sums means in place, so that `gram` is no second copy; nothing can be added afterwards."""
        if self.count and not self._finished:
            self._finish(self.sum)
            if self.drift_sum is not None:
                self.drift_sum.div_(self.count)
            self._finished = True

    @property
    def gram(self) -> Tensor:
        """G = E[x xᵀ], fp32 [in, in].

        Raises:
            ValueError: nothing was seen yet, or only energies were kept.
        """
        if not self.full:
            raise ValueError("these statistics keep the energies only: construct them with full=True for a Gram")
        return self._mean()

    @property
    def energy(self) -> Tensor:
        """e_i = E[x_i²], fp32 [in]; ValueError when nothing was seen yet."""
        mean = self._mean()
        return mean.diagonal() if self.full else mean

    @property
    def drift(self) -> Tensor | None:
        """D = E[(x' − x) xᵀ], fp32 [in, in]; None where it was not kept, ValueError when nothing was seen yet."""
        if self.count == 0:
            raise ValueError("no calibration input was seen")
        return self.drift_sum if self.drift_sum is None or self._finished else self.drift_sum / self.count

    def _mean(self) -> Tensor:
        if self.count == 0:
            raise ValueError("no calibration input was seen")
        return self.sum if self._finished else self._finish(self.sum.clone())

    def _finish(self, total: Tensor) -> Tensor:
        if self.full:
            for part in _parts(self.features):
                total[part.stop :, part] = total[part, part.stop :].T
        return total.div_(self.count)


def _parts(features: int) -> list[slice]:
    size = -(-features // PARTS)
    return [slice(start, min(start + size, features)) for start in range(0, features, size)]
