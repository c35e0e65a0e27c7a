"""Several processes that calibrate on their own share of the data and prune as one would on all of it.

Sums are added over the processes; each decision is made once, by one of them, and broadcast. Collectives are called
by every process in the same order, and do nothing where there is a single one.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from efx_plugin.method.statistics import InputStatistics

Anything = TypeVar("Anything")


def world() -> tuple[int, int]:
    """This process's rank and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes; a new tensor where there are several."""
    if world()[1] == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_reduce_statistics(statistics: InputStatistics) -> None:
    """Add what every other process has seen, in place."""
    if world()[1] > 1:
        count = torch.tensor(statistics.count, device=statistics.sum.device)
        dist.all_reduce(statistics.sum)
        if statistics.drift_sum is not None:
            dist.all_reduce(statistics.drift_sum)
        dist.all_reduce(count)
        statistics.count = int(count)


def broadcast(tensor: Tensor, source: int) -> None:
    """Overwrite `tensor` with that of the process `source`."""
    if world()[1] > 1:
        # gloo knows no bool.
        dist.broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, source)


def gather_objects(value: Anything) -> list[Anything]:
    """The small Python objects of all processes, in the order of their ranks."""
    count = world()[1]
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value)
    return values
