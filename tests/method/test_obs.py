"""The sweep against SparseGPT's algorithm as its paper states it, weight by weight, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efx_plugin.method.masks import n_of_m_mask, row_mask
from efx_plugin.method.obs import obs_mask
from efx_plugin.method.repair import repair_weights

shapes = st.tuples(st.integers(1, 7), st.integers(1, 10))
sparsities = st.floats(0.05, 0.95)
floors = st.none() | st.floats(1, 2)
seeds = st.integers(0, 2**31)


def _layer(rows, columns, seed, dead=()):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs[:, list(dead)] = 0
    sensitivity = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1
    return weight, inputs.T @ inputs / len(inputs), sensitivity


def _reference(weight, gram, sparsity, *, sensitivity=None, group="matrix", floor=None, n_of_m=None, block_size):
    """Algorithm 1 of SparseGPT: one column at a time, the inverse formed, every column to the right updated."""
    rows, columns = weight.shape
    weight = weight.clone()
    weight[:, gram.diagonal() == 0] = 0
    factor = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype))
    factor = torch.linalg.cholesky(factor, upper=True)
    pruned = torch.zeros(rows, columns, dtype=torch.bool)
    c = torch.ones(rows, dtype=weight.dtype) if sensitivity is None else sensitivity
    for i in range(columns):
        chosen = slice(i, min(i + (block_size if n_of_m is None else n_of_m[1]), columns))
        scores = (weight[:, chosen] / factor.diagonal()[chosen]) ** 2 * c.unsqueeze(1)
        if n_of_m is not None and i % n_of_m[1] == 0:
            pruned[:, chosen].scatter_(1, scores.argsort(dim=1)[:, : n_of_m[0]], True)
        elif n_of_m is None and i % block_size == 0 and group == "row":
            count = round(sparsity * chosen.stop) - round(sparsity * i)
            pruned[:, chosen].scatter_(1, scores.argsort(dim=1)[:, :count], True)
        elif n_of_m is None and i % block_size == 0:
            count = round(sparsity * (rows * chosen.stop)) - round(sparsity * (rows * i))
            most = columns if floor is None else _most(sparsity, floor, chosen.stop - i, count, rows)
            scores[scores.argsort(dim=1).argsort(dim=1) >= most] = torch.inf
            part = torch.zeros(scores.numel(), dtype=torch.bool)
            part[scores.flatten().argsort()[:count]] = True
            pruned[:, chosen] = part.view_as(scores)
        for o in range(rows):
            if pruned[o, i]:
                weight[o, i:] -= weight[o, i] / factor[i, i] * factor[i, i:]
    return ~pruned


def _most(sparsity, floor, width, count, rows):
    """What a row may lose of `width` columns that lose `count` weights in all."""
    fraction = min(floor * sparsity, 1 - (2 - floor) * (1 - sparsity))
    return max(math.ceil(fraction * width), math.ceil(count / rows))


@given(shapes, st.integers(1, 6), sparsities, st.sampled_from(["matrix", "row"]), floors, st.booleans(), seeds)
def test_the_mask_is_that_of_sparsegpt(shape, blocks, sparsity, group, floor, sensitive, seed):
    weight, gram, c = _layer(shape[0], shape[1] * blocks, seed)
    arguments = {"sensitivity": c if sensitive else None, "group": group, "floor": floor, "block_size": shape[1]}
    expected = _reference(weight, gram, sparsity, **arguments)
    assert torch.equal(obs_mask(weight, gram, sparsity, **arguments), expected)


@pytest.mark.parametrize("group", ["matrix", "row"])
def test_the_mask_is_that_of_sparsegpt_over_parts_and_blocks(group):
    weight, gram, c = _layer(24, 300, 5)
    arguments = {"sensitivity": c, "group": group, "block_size": 128}
    assert torch.equal(obs_mask(weight, gram, 0.6, **arguments), _reference(weight, gram, 0.6, **arguments))


@given(st.integers(1, 6), st.integers(1, 8), st.sampled_from([(1, 4), (2, 4), (4, 8), (3, 5)]), st.data(), seeds)
def test_n_of_m_is_that_of_sparsegpt_whatever_the_sensitivity(rows, groups, structure, data, seed):
    weight, gram, c = _layer(rows, groups * structure[1], seed)
    block_size = data.draw(st.integers(1, 20))
    mask = obs_mask(weight, gram, 0.5, n_of_m=structure, sensitivity=c, block_size=block_size)
    assert torch.equal(mask, _reference(weight, gram, 0.5, n_of_m=structure, block_size=block_size))
    assert ((~mask).reshape(-1, structure[1]).sum(dim=1) == structure[0]).all()


@given(shapes, st.integers(1, 12), sparsities, floors, seeds)
def test_counts_are_exact_to_one_weight(shape, block_size, sparsity, floor, seed):
    weight, gram, _ = _layer(*shape, seed)
    weight, gram = weight.bfloat16(), gram.float()
    matrix = obs_mask(weight, gram, sparsity, block_size=block_size, floor=floor)
    row = obs_mask(weight, gram, sparsity, block_size=block_size, group="row")
    assert int((~matrix).sum()) == round(sparsity * weight.numel())
    assert ((~row).sum(dim=1) == round(sparsity * shape[1])).all()


@given(st.integers(2, 7), st.integers(1, 30), st.integers(1, 12), sparsities, st.floats(1, 2), seeds)
def test_a_row_that_counts_for_nothing_keeps_what_the_floor_leaves_it(rows, columns, block_size, sparsity, floor, seed):
    weight, gram, c = _layer(rows, columns, seed)
    c[: rows // 2] = 0
    pruned = ~obs_mask(weight, gram, sparsity, sensitivity=c, floor=floor, block_size=block_size)
    for block in pruned.split(block_size, dim=1):
        assert block.sum(dim=1).max() <= _most(sparsity, floor, block.shape[1], int(block.sum()), rows)


@settings(max_examples=20)
@given(seeds)
def test_a_saturated_head_still_attends_to_its_sink(seed):
    """Where a head looks at one token whatever the text, the loss has no gradient in its queries: they look as if
    they could all go, and without them the head looks everywhere."""
    generator = torch.Generator().manual_seed(seed)
    tokens, hidden, dim = 256, 64, 8

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = randn(tokens, hidden) + 4 * randn(hidden)
    weight = randn(2 * dim, hidden) / hidden**0.5
    keys, values = 0.2 * randn(2, tokens, dim), randn(2, tokens, dim)
    usual = (inputs @ weight[:dim].T).mean(dim=0)
    keys[0, 0] = 60 * usual / usual.square().sum()  # logits of the sink are about 60, those of other tokens a few

    def attention(queries):
        return (queries.unflatten(1, (2, dim)).transpose(0, 1) @ keys.mT).softmax(dim=-1)

    queries = (inputs @ weight.T).requires_grad_()
    dense = attention(queries)
    ((dense @ values) * randn(2, tokens, dim)).sum().backward()
    sensitivity, gram = queries.grad.square().mean(dim=0), inputs.T @ inputs / tokens
    keep = obs_mask(weight, gram, 0.5, sensitivity=sensitivity, floor=1.4)
    sink = attention(inputs @ repair_weights(weight, keep, gram).T)[0, :, 0]
    assert sensitivity[:dim].max() < sensitivity[dim:].min()
    assert sink.mean() > 0.9 * dense[0, :, 0].mean()


@given(shapes, sparsities, st.floats(1e-3, 1e3), seeds)
def test_a_sensitivity_that_is_one_for_the_matrix_changes_nothing(shape, sparsity, factor, seed):
    weight, gram, c = _layer(*shape, seed)
    plain = obs_mask(weight, gram, sparsity, block_size=4)
    assert torch.equal(obs_mask(weight, gram, sparsity, block_size=4, sensitivity=torch.full_like(c, factor)), plain)


def test_uncorrelated_inputs_of_one_energy_give_the_magnitude_mask():
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(obs_mask(weight, torch.eye(32), 0.5, group="row"), row_mask(weight.square(), 0.5))
    assert torch.equal(obs_mask(weight, torch.eye(32), 0.5, n_of_m=(2, 4)), n_of_m_mask(weight.square(), 2, 4))


@given(st.integers(1, 6), st.integers(2, 12), seeds)
def test_weights_of_inputs_that_are_never_active_go_first(rows, columns, seed):
    weight, gram, _ = _layer(rows, columns, seed, dead=(columns // 2,))
    mask = obs_mask(weight, gram, 1 / columns, group="matrix")
    assert not mask[:, columns // 2].any()


def test_the_arguments_are_left_as_they_are():
    weight, gram, c = _layer(5, 40, 3)
    # The transposed weight lies in memory as the sweep works on it.
    weight = weight.T.contiguous().T
    copies = weight.clone(), gram.clone(), c.clone()
    obs_mask(weight, gram, 0.5, sensitivity=c, block_size=16)
    assert all(torch.equal(*pair) for pair in zip((weight, gram, c), copies, strict=True))


@pytest.mark.parametrize("arguments", [{}, {"group": "row"}, {"n_of_m": (2, 4)}])
def test_the_average_decides(arguments):
    first, gram, _ = _layer(6, 24, 11)
    second = first + 0.5 * torch.randn(6, 24, generator=torch.Generator().manual_seed(4))
    arguments["block_size"] = 8
    average = torch.full((6, 24), torch.nan, dtype=torch.float64)
    mask = obs_mask(first, gram, 0.5, average=average, momentum=1.0, **arguments)
    assert torch.equal(mask, obs_mask(first, gram, 0.5, **arguments))
    after_first = average.clone()
    # Nothing new is learned at momentum 0, so the second mask is the first one, chosen from the same scores.
    assert torch.equal(obs_mask(second, gram, 0.5, average=average, momentum=0.0, **arguments), mask)
    assert torch.equal(average, after_first)
    obs_mask(second, gram, 0.5, average=average, momentum=0.25, **arguments)
    new = torch.empty_like(average)
    obs_mask(second, gram, 0.5, average=new, momentum=1.0, **arguments)
    assert not torch.equal(new, average)
    # Before the sweep has removed anything the new scores do not depend on the mask.
    start = slice(0, 4 if "n_of_m" in arguments else 8)
    torch.testing.assert_close(average[:, start], (0.25 * new + 0.75 * after_first)[:, start])
    torch.testing.assert_close(new[:, start].mean(), torch.ones((), dtype=new.dtype))


def test_the_damping_is_raised_for_a_gram_that_needs_it():
    weight, _, _ = _layer(4, 12, 2)
    inputs = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = inputs.T @ inputs - 0.5 * torch.eye(12, dtype=torch.float64)
    expected = obs_mask(weight, gram, 0.5, dampening_frac=1.0)
    assert torch.equal(obs_mask(weight, gram, 0.5, dampening_frac=0.01), expected)


def test_what_it_cannot_use_is_refused_with_the_remedy():
    weight, gram, _ = _layer(4, 12, 2)
    with pytest.raises(ValueError, match=r"not positive definite.*raise dampening_frac"):
        obs_mask(weight, torch.eye(12) + 50 * (1 - torch.eye(12)), 0.5, dampening_frac=1e-6)
    with pytest.raises(ValueError, match="zero or not finite"):
        obs_mask(weight, torch.zeros(12, 12), 0.5)
    with pytest.raises(ValueError, match="zero or not finite"):
        obs_mask(weight, torch.full((12, 12), torch.nan), 0.5)
    with pytest.raises(ValueError, match="'matrix' or 'row'"):
        obs_mask(weight, gram, 0.5, group="block")
    with pytest.raises(ValueError, match="divisible by 5"):
        obs_mask(weight, gram, 0.5, n_of_m=(2, 5))
