"""When a training run is pruned."""

import math
from dataclasses import dataclass

from efx_plugin.errors import EfxError

# A model that has hardly seen its domain yet is pruned badly, and a few steps under the mask do not make up for it:
# measured with batches of 1,024 tokens, see docs/results.md.
LEAST_WARMUP_STEPS = 20


@dataclass(frozen=True)
class Schedule:
    """A warm-up without masks, pruning points, and a final phase under the last mask.

    Attributes are as in `EfficientXpertCallback`, where None is explained.

    Raises:
        EfxError: the fractions and the number of pruning points do not fit together.
    """

    warmup_fraction: float | None = None
    refreshes: int = 1
    final_fraction: float | None = None

    def __post_init__(self) -> None:
        warmup, final = self._fractions()
        if not (0 <= warmup <= 1 and 0 <= final <= 1 and warmup + final < 1 + 1e-9):
            raise EfxError(
                f"warmup_fraction {warmup:.3g} and final_fraction {final:.3g} are no two fractions of one training: "
                "they must lie between 0 and 1 and add up to 1 at most"
            )
        if self.refreshes < 1:
            raise EfxError(f"refreshes {self.refreshes} must be 1 at least: nothing would be pruned")
        if self.refreshes == 1 and not math.isclose(warmup + final, 1):
            raise EfxError(
                f"with one pruning point the final phase starts where the warm-up ends, but warmup_fraction "
                f"{warmup:.3g} and final_fraction {final:.3g} do not add up to 1: leave one of them out, or set "
                "refreshes to 2 or more"
            )

    def steps(self, max_steps: int) -> list[int]:
        """After which optimizer steps the model is pruned.

        Raises:
            EfxError: training is too short for them.
        """
        warmup, final = self._fractions()
        first = max(1, round(max_steps * warmup))
        if self.refreshes == 1:
            if self.warmup_fraction is None and self.final_fraction is None:
                first = min(max_steps, max(first, LEAST_WARMUP_STEPS))
            return [first]
        last, gaps = max_steps - round(max_steps * final), self.refreshes - 1
        if last - first < gaps:
            raise EfxError(
                f"{self.refreshes} pruning points do not fit into {max_steps} training steps, of which {first} warm up "
                f"and {max_steps - last} train under the final mask: lower refreshes or train longer"
            )
        return [first + round(index * (last - first) / gaps) for index in range(self.refreshes)]

    def _fractions(self) -> tuple[float, float]:
        warmup, final = self.warmup_fraction, self.final_fraction
        if warmup is None:
            warmup = 1 / 3 if final is None or self.refreshes > 1 else 1 - final
        if final is None:
            final = 1 / 3 if self.refreshes > 1 else 1 - warmup
        return warmup, final
