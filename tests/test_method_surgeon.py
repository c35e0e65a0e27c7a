import torch
from hypothesis import given
from hypothesis import strategies as st

from efx_plugin.method.surgeon import output_error, repair_weights


def _layer(rows, columns, tokens, density, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    keep = torch.rand(rows, columns, generator=generator) < density
    return weight, inputs, keep, inputs.T @ inputs / tokens


@given(st.integers(1, 6), st.integers(1, 16), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31))
def test_repair_keeps_the_mask_and_never_raises_the_error_of_a_row(rows, columns, tokens, density, seed):
    weight, inputs, keep, gram = _layer(rows, columns, tokens, density, seed)
    repaired = repair_weights(weight, keep, gram)
    assert (repaired[~keep] == 0).all() and repaired.isfinite().all()
    before = (inputs @ (weight - weight * keep).T).square().mean(dim=0)
    after = (inputs @ (weight - repaired).T).square().mean(dim=0)
    assert (after <= before * (1 + 1e-3) + 1e-5).all()


def test_enough_steps_reach_the_least_squares_solution_of_every_row():
    weight, inputs, keep, gram = _layer(5, 12, 200, 0.5, 7)
    repaired = repair_weights(weight, keep, gram, steps=50, dampening_frac=1e-6)
    for row in range(5):
        kept = keep[row]
        solution = torch.linalg.lstsq(inputs[:, kept].double(), (inputs @ weight[row]).double().unsqueeze(1)).solution
        torch.testing.assert_close(repaired[row, kept].double(), solution.squeeze(1), rtol=1e-2, atol=1e-3)


def test_ten_steps_come_within_two_percent_of_the_exact_error():
    weight, _, keep, gram = _layer(32, 64, 2000, 0.5, 3)
    error = output_error(weight, repair_weights(weight, keep, gram), gram).sum()
    exact = output_error(weight, repair_weights(weight, keep, gram, steps=500), gram).sum()
    masked = output_error(weight, weight * keep, gram).sum()
    assert error < 0.8 * masked
    assert error - exact < 0.02 * masked


def test_an_input_that_is_never_active_and_a_row_without_weights():
    weight, _, keep, gram = _layer(3, 6, 30, 0.5, 11)
    gram[2], gram[:, 2] = 0, 0
    keep[1] = False
    assert repair_weights(weight, keep, gram).isfinite().all()
    assert torch.equal(repair_weights(weight, keep, torch.zeros(6, 6)), weight * keep)
