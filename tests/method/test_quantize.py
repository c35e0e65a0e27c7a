import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efx_plugin.method import quantize
from efx_plugin.method.quantize import Grid, clipped_scales, quantize_kept, round_to_nearest

rows, groups, tokens = st.integers(1, 5), st.integers(1, 4), st.integers(1, 40)
densities, sizes, seeds = st.floats(0, 1), st.floats(1e-6, 1e3), st.integers(0, 2**31)
grids = st.sampled_from(
    [Grid(4, 8), Grid(4), Grid(8), Grid(4, 8, torch.float16), Grid(8, None, torch.float32), Grid(4, 24)]
)


def _layer(rows, columns, tokens, density, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    keep = torch.rand(rows, columns, generator=generator) < density
    return weight, keep, inputs.T @ inputs / tokens


def _errors(weight, quantized, gram):
    difference = weight.double() - quantized.weight.double()
    return torch.linalg.vecdot(difference @ gram.double(), difference)


def _on_grid(quantized, grid, columns):
    """Every weight is exactly an integer of the range times a scale that can be stored."""
    integers, scales = quantized.integers, quantized.scales
    assert integers.dtype == torch.int8 and grid.lowest <= integers.min() and integers.max() <= grid.highest
    assert scales.shape == (len(integers), columns // (grid.group or columns))
    assert (scales > 0).all() and torch.equal(scales, scales.to(grid.scale_dtype).float())
    for column in range(columns):
        exact = integers[:, column].double() * scales[:, column * scales.shape[1] // columns].double()
        assert torch.equal(quantized.weight[:, column], exact.float())


@given(grids, rows, groups, tokens, densities, sizes, seeds)
def test_zeros_stay_and_no_row_is_worse_than_rounded_to_nearest(grid, rows, groups, tokens, density, size, seed):
    columns = groups * (grid.group or 8)
    weight, keep, gram = _layer(rows, columns, tokens, density, seed)
    weight = weight * size * keep
    quantized = quantize_kept(weight, keep, gram, grid)
    assert (quantized.integers[~keep] == 0).all() and (quantized.weight[~keep] == 0).all()
    _on_grid(quantized, grid, columns)
    nearest = round_to_nearest(weight, keep, quantized.scales, grid)
    scale = weight.double().square().sum(dim=1) * gram.double().diagonal().sum()
    assert (_errors(weight, quantized, gram) <= _errors(weight, nearest, gram) + 1e-6 * scale).all()


def test_rows_without_weights_or_with_one_come_out_on_the_grid():
    weight, keep, gram = _layer(4, 16, 60, 0.5, 0)
    keep[0], keep[1] = False, False
    keep[1, 3] = True  # all that the floor of a row may leave
    quantized = quantize_kept(weight * keep, keep, gram, Grid(4, 8))
    assert (quantized.weight[0] == 0).all()
    assert (quantized.integers[1] != 0).nonzero().flatten().tolist() == [3]
    assert abs(quantized.weight[1, 3] / weight[1, 3] - 1) < 2**-8  # nothing but the rounding of its scale
    _on_grid(quantized, Grid(4, 8), 16)


def test_inputs_that_are_never_active_and_a_gram_of_zeros_leave_rounding_to_nearest():
    weight, keep, gram = _layer(4, 16, 60, 0.5, 0)
    weight, grid = weight * keep, Grid(4, 8)
    for dead in (slice(2, 5), slice(None)):
        silent = gram.clone()
        silent[dead] = silent[:, dead] = 0
        quantized = quantize_kept(weight, keep, silent, grid)
        nearest = round_to_nearest(weight, keep, quantized.scales, grid)
        assert torch.equal(quantized.integers[:, dead], nearest.integers[:, dead])


@pytest.mark.parametrize("bits", [4, 8])
def test_kept_weights_make_up_for_each_other(bits):
    """Correlated inputs, as hidden states are: a few directions carry most of their energy."""
    weight, keep, _ = _layer(32, 128, 1, 0.5, 1)
    mixing = torch.randn(128, 128, generator=torch.Generator().manual_seed(2)) / torch.arange(1, 129).unsqueeze(1)
    weight, gram, grid = weight * keep, mixing.T @ mixing, Grid(bits, 64)
    quantized = quantize_kept(weight, keep, gram, grid)
    nearest = round_to_nearest(weight, keep, clipped_scales(weight, keep, gram, grid), grid)
    assert _errors(weight, quantized, gram).sum() < 0.6 * _errors(weight, nearest, gram).sum()


def test_each_integer_is_the_best_given_all_others():
    """Where the descent has come to rest, no kept weight gains by another point of its grid."""
    weight, keep, gram = _layer(6, 24, 100, 0.6, 2)
    weight, grid = weight * keep, Grid(4, 8)
    damping = 0.01
    damped = (gram + damping * gram.diagonal().mean() * torch.eye(24)).double()
    descent = quantize._Descent(weight, keep, clipped_scales(weight, keep, gram, grid), damped.float(), 8, grid)
    for _ in range(50):
        descent.choose_integers()
    found = descent.result()
    error = _errors(weight, found, damped)
    for column in range(24):
        for step in (-1, 1):
            moved = found.integers.clone()
            moved[:, column] += step
            allowed = keep[:, column] & (moved[:, column] >= grid.lowest) & (moved[:, column] <= grid.highest)
            other = _errors(weight, quantize.QuantizedWeight(moved, found.scales), damped)
            assert (other[allowed] >= error[allowed] * (1 - 1e-5)).all()


def test_a_scale_that_clips_is_taken_where_it_loses_less():
    """One weight whose input hardly matters must not make the grid of the others coarse."""
    weight = torch.tensor([[0.41, 0.6, -0.53, 2.0]])
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-6]))
    keep = torch.ones(1, 4, dtype=torch.bool)
    assert clipped_scales(weight, keep, gram, Grid(4)) < 0.6 * clipped_scales(weight, keep, torch.eye(4), Grid(4))
    keep[0, 3] = False  # nor must a weight that is pruned
    assert clipped_scales(weight, keep, torch.eye(4), Grid(4)) < 0.61 / 7.5


def test_chunks_of_rows_give_what_all_rows_give(monkeypatch):
    weight, keep, gram = _layer(20, 40, 90, 0.5, 3)
    whole = quantize_kept(weight * keep, keep, gram, Grid(4, 8))
    monkeypatch.setattr(quantize, "CHUNK", 1)
    monkeypatch.setattr(quantize, "LEAST_ROWS", 7)
    parts = quantize_kept(weight * keep, keep, gram, Grid(4, 8))
    assert (_errors(weight * keep, parts, gram) - _errors(weight * keep, whole, gram)).abs().max() < 1e-3
    monkeypatch.setattr(quantize, "BLOCK", 8)
    monkeypatch.setattr(quantize, "PART", 3)
    blocks = quantize_kept(weight * keep, keep, gram, Grid(4, 8))
    assert torch.allclose(_errors(weight * keep, blocks, gram), _errors(weight * keep, whole, gram), rtol=0.05)


def test_groups_that_do_not_divide_the_inputs_are_refused():
    weight, keep, gram = _layer(2, 20, 30, 0.5, 0)
    with pytest.raises(ValueError, match="groups of 8 weights do not divide rows of 20"):
        quantize_kept(weight, keep, gram, Grid(4, 8))
