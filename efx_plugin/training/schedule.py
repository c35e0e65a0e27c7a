"""When a training run is pruned."""

from efx_plugin.errors import EfxError


def pruning_steps(max_steps: int, warmup_fraction: float, refreshes: int, final_fraction: float) -> list[int]:
    """After which optimizer steps the model is pruned, from the end of the warm-up to the start of the final phase.

    Raises:
        EfxError: training is too short for them.
    """
    first, last = max(1, round(max_steps * warmup_fraction)), max_steps - round(max_steps * final_fraction)
    if refreshes == 1:
        return [first]
    if last - first < refreshes - 1:
        raise EfxError(
            f"{refreshes} pruning points do not fit into {max_steps} training steps, of which {first} warm up and "
            f"{max_steps - last} train under the final mask: lower refreshes or train longer"
        )
    return [first + round(index * (last - first) / (refreshes - 1)) for index in range(refreshes)]
