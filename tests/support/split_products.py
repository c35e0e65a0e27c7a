"""Products for many tokens on an emulated GPU, by either kernel for them, with columns split among several sums."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from efx_plugin.kernels.cuda import layout
from tests.support.emulated_gpu import EmulatedGpu
from tests.support.sparse_products import MASKS, Case, is_near, padded


@dataclass(frozen=True)
class SplitCase(Case):
    splits: int = 1


def random_split_case(
    choose: random.Random, dtype: torch.dtype, is_int8: bool, tokens: int, rows: int, columns: int, seed: int
) -> SplitCase:
    """A product of these sizes; every other one has whole tiles of columns, as many as `columns` take."""
    wide = -(-columns // layout.TILE_COLUMNS)
    return SplitCase(
        dtype,
        is_int8,
        tokens,
        rows,
        columns=choose.choice((columns, wide * layout.TILE_COLUMNS)),
        mask=choose.choice((*MASKS, "random", "random")),
        density=choose.choice((0.1, 0.4, 0.5, 0.6, 0.9)),
        biased=choose.random() < 0.5,
        at_once=choose.random() < 0.5,
        descending=choose.random() < 0.5,
        seed=seed,
        splits=choose.choice((1, choose.randint(1, wide))),
    )


def multiply(gpu: EmulatedGpu, case: SplitCase, x: Tensor, others: tuple[Tensor | None, ...]) -> Tensor:
    """x times the weight, of which with its scales and the bias `others` consists."""
    gpu.at_once, gpu.descending = case.at_once, case.descending
    weight, scales, bias = others
    return gpu.multiply_many(padded(x), (*layout.pack(weight), scales), bias, case.rows, case.splits)


def check(gpu: EmulatedGpu, case: SplitCase) -> None:
    """The product is the float64 one but for the rounding of each step of 16 columns and each split in float32, and of
    the result.
    """
    x, weight, scales, bias = case.tensors()
    y = multiply(gpu, case, x, (weight, scales, bias))
    assert is_near(y, case, (x, weight, scales, bias), additions=case.columns / 16 + case.splits + 4), case
