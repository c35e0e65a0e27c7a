"""What became of the pruned layers, for logs, reports and metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrunedLayer:
    """What became of one linear layer.

    Attributes:
        name: its name.
        size: number of weights.
        zeros: number of weights that were pruned.
        relative_error: calibration error of its output relative to the energy of the output, over rows spread evenly;
            None where only input energies were kept.
        gain: fraction of the masked layer's error that the repair took away, None where nothing was repaired or
            only input energies were kept.
    """

    name: str
    size: int
    zeros: int
    relative_error: float | None
    gain: float | None

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size


def pruned_layer(name: str, keep: Tensor, errors: Tensor) -> PrunedLayer:
    """The report of one layer.

    Args:
        keep: mask, bool [out, in].
        errors: of the output with no weight at all, masked, and repaired, fp32 [3]; NaN where they are not known.
    """
    energy, masked, repaired = errors.tolist()
    relative = gain = None
    if not torch.isnan(errors).any():
        relative = repaired / energy if energy > 0 else 0.0
        gain = 1 - repaired / masked if masked > 0 else 0.0
    return PrunedLayer(name, keep.numel(), keep.numel() - int(keep.sum()), relative, gain)


def measures(results: Sequence[PrunedLayer]) -> dict[str, float]:
    """Over all layers: `sparsity`, and, where known, the means `output_error` and `repair_gain`."""
    measured = {"sparsity": sum(result.zeros for result in results) / sum(result.size for result in results)}
    if errors := [result.relative_error for result in results if result.relative_error is not None]:
        measured["output_error"] = sum(errors) / len(errors)
    if gains := [result.gain for result in results if result.gain is not None]:
        measured["repair_gain"] = sum(gains) / len(gains)
    return measured


def summary(results: Sequence[PrunedLayer]) -> str:
    """What `measures` gives, as a phrase for the log."""
    size, zeros = sum(result.size for result in results), sum(result.zeros for result in results)
    measured = measures(results)
    text = f"sparsity {measured['sparsity']:.4f} ({zeros:,} of {size:,} weights)"
    return f"{text}, output error {measured['output_error']:.1%}" if "output_error" in measured else text
