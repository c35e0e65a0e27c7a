import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efx_plugin.method import repair
from efx_plugin.method.repair import adapter_update, output_error, paper_update, repair_weights, updated_weight

rows, columns, ranks = st.integers(1, 6), st.integers(1, 16), st.integers(1, 10)
tokens, densities, seeds = st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31)
dampings, shares = st.floats(1e-4, 1), st.floats(0, 1)


def _layer(rows, columns, tokens, density, seed, rank=4):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    keep = torch.rand(rows, columns, generator=generator) < density
    lora_a = torch.randn(rank, columns, generator=generator)
    return weight, inputs, keep, inputs.T @ inputs / tokens, lora_a


def _drifted(inputs, seed, amount=1.0):
    """Inputs of the same tokens in another model, and their drift from `inputs`."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs.shape[1], inputs.shape[1], generator=generator) / inputs.shape[1] ** 0.5
    others = inputs + amount * inputs @ mixed + amount * torch.randn(inputs.shape, generator=generator)
    return others, (others - inputs).T @ inputs / len(inputs)


def _never_worse(weight, repaired, keep, inputs, wanted=None):
    """No row's calibration error exceeds that of plain masking, up to the rounding of the energies it is made of.

    `wanted` are the inputs of the unpruned weights; None takes those of the pruned ones.
    """
    weight, repaired, inputs = weight.double(), repaired.double(), inputs.double()
    wanted = inputs if wanted is None else wanted.double()
    before = (wanted @ weight.T - inputs @ (weight * keep).T).square().mean(dim=0)
    after = (wanted @ weight.T - inputs @ repaired.T).square().mean(dim=0)
    energy = torch.maximum(inputs.square().mean(dim=0).sum(), wanted.square().mean(dim=0).sum())
    return (after <= before + 1e-6 * weight.square().sum(dim=1) * energy).all()


@given(rows, columns, tokens, densities, dampings, seeds)
def test_repair_keeps_the_mask_and_never_raises_the_error_of_a_row(rows, columns, tokens, density, damping, seed):
    weight, inputs, keep, gram, _ = _layer(rows, columns, tokens, density, seed)
    repaired = repair_weights(weight, keep, gram, dampening_frac=damping)
    assert (repaired[~keep] == 0).all() and repaired.isfinite().all()
    assert _never_worse(weight, repaired, keep, inputs)


@given(rows, columns, ranks, tokens, densities, dampings, seeds)
def test_an_adapter_update_never_raises_the_error_of_a_row(rows, columns, rank, tokens, density, damping, seed):
    weight, inputs, keep, gram, lora_a = _layer(rows, columns, tokens, density, seed, rank)
    update = adapter_update(weight, keep, gram, lora_a, dampening_frac=damping)
    repaired = updated_weight(weight, keep, update, lora_a)
    assert update.shape == (rows, rank) and repaired.isfinite().all()
    assert (repaired[~keep] == 0).all()
    assert _never_worse(weight, repaired, keep, inputs)


@given(rows, columns, ranks, tokens, densities, shares, dampings, seeds)
def test_no_row_ends_further_from_what_the_dense_model_gives(
    rows, columns, rank, tokens, density, share, damping, seed
):
    weight, inputs, keep, gram, lora_a = _layer(rows, columns, tokens, density, seed, rank)
    others, drift = _drifted(inputs, seed)
    wanted = inputs + share * (others - inputs)
    options = {"drift": drift, "share": share, "dampening_frac": damping}
    of_weights = repair_weights(weight, keep, gram, **options)
    update = adapter_update(weight, keep, gram, lora_a, **options)
    for repaired in (of_weights, updated_weight(weight, keep, update, lora_a)):
        assert (repaired[~keep] == 0).all() and repaired.isfinite().all()
        assert _never_worse(weight, repaired, keep, inputs, wanted)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_targets_of_the_dense_model_enter_the_normal_equations(share):
    weight, inputs, keep, gram, lora_a = _layer(9, 24, 400, 0.5, 13, rank=6)
    _, drift = _drifted(inputs, 13, 0.3)
    options = {"drift": drift, "share": share, "steps": 200, "dampening_frac": 1e-3}
    repaired = repair_weights(weight, keep, gram, **options)
    update = adapter_update(weight, keep, gram, lora_a, **options)
    u, g, d, a = weight.double(), gram.double(), drift.double(), lora_a.double()
    damping = 1e-3 * g.diagonal().mean()
    density = keep.double().mean()
    expected_system = density**2 * (a @ g @ a.T) + density * (1 - density) * (a * g.diagonal() @ a.T)
    ridge = 1e-3 * expected_system.diagonal().mean() * torch.eye(6, dtype=a.dtype)
    for row in range(9):
        kept = keep[row]
        target = ((u[row] * ~kept) @ g + share * u[row] @ d)[kept]
        system = g[kept][:, kept]
        change = torch.linalg.solve(system + damping * torch.eye(len(system), dtype=g.dtype), target)
        torch.testing.assert_close(repaired[row, kept].double(), u[row, kept] + change, rtol=2e-3, atol=2e-3)
        a_kept = a[:, kept]
        expected = torch.linalg.solve(a_kept @ system @ a_kept.T + ridge, a_kept @ target)
        torch.testing.assert_close(update[row].double(), expected, rtol=2e-3, atol=2e-3)


def test_without_a_share_of_the_drift_the_repair_is_the_same_to_the_bit():
    weight, inputs, keep, gram, lora_a = _layer(16, 40, 300, 0.5, 2, rank=8)
    _, drift = _drifted(inputs, 2)
    assert torch.equal(repair_weights(weight, keep, gram, drift=drift, share=0), repair_weights(weight, keep, gram))
    without = adapter_update(weight, keep, gram, lora_a)
    assert torch.equal(adapter_update(weight, keep, gram, lora_a, drift=drift, share=0), without)


@pytest.mark.parametrize("repair", ["weights", "adapter"])
def test_no_row_is_worse_off_where_a_few_inputs_dwarf_the_others(repair):
    weight, inputs, keep, _, lora_a = _layer(64, 96, 300, 0.5, 5, rank=8)
    inputs[:, :3] *= 1e4
    inputs[:, 3] = inputs[:, 0]
    gram = inputs.T @ inputs / len(inputs)
    if repair == "weights":
        repaired = repair_weights(weight, keep, gram)
    else:
        repaired = updated_weight(weight, keep, adapter_update(weight, keep, gram, lora_a), lora_a)
    assert _never_worse(weight, repaired, keep, inputs)


def test_enough_steps_reach_the_least_squares_solution_of_every_row():
    weight, inputs, keep, gram, _ = _layer(5, 12, 200, 0.5, 7)
    repaired = repair_weights(weight, keep, gram, steps=50, dampening_frac=1e-6)
    for row in range(5):
        kept = keep[row]
        solution = torch.linalg.lstsq(inputs[:, kept].double(), (inputs @ weight[row]).double().unsqueeze(1)).solution
        torch.testing.assert_close(repaired[row, kept].double(), solution.squeeze(1), rtol=1e-2, atol=1e-3)


def test_ten_steps_come_within_two_percent_of_the_exact_error():
    weight, _, keep, gram, _ = _layer(32, 64, 2000, 0.5, 3)
    error = output_error(weight, repair_weights(weight, keep, gram), gram).sum()
    exact = output_error(weight, repair_weights(weight, keep, gram, steps=500), gram).sum()
    masked = output_error(weight, weight * keep, gram).sum()
    assert error < 0.8 * masked
    assert error - exact < 0.02 * masked


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_an_adapter_update_is_the_least_squares_solution_of_every_row(rank):
    weight, inputs, keep, gram, lora_a = _layer(20, 64, 300, 0.5, rank, rank)
    update = adapter_update(weight, keep, gram, lora_a, steps=rank, dampening_frac=1e-6)
    for row in range(20):
        kept, lost = keep[row], ~keep[row]
        target = (inputs[:, lost] @ weight[row, lost]).double()
        basis = (inputs[:, kept] @ lora_a[:, kept].T).double()
        solution = torch.linalg.lstsq(basis, target.unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(update[row].double(), solution, rtol=1e-2, atol=1e-3 * float(solution.abs().max()))


@pytest.mark.parametrize("kind", ["weights", "adapter", "paper", "paper by row", "error"])
def test_chunks_of_rows_change_nothing(kind, monkeypatch):
    weight, inputs, keep, gram, lora_a = _layer(11, 12, 50, 0.5, 1)
    _, drift = _drifted(inputs, 1, 0.1)
    run = {
        "weights": lambda: repair_weights(weight, keep, gram, drift=drift),
        "adapter": lambda: adapter_update(weight, keep, gram, lora_a, drift=drift),
        "paper": lambda: paper_update(weight, keep, gram.diagonal(), lora_a),
        "paper by row": lambda: paper_update(weight, keep, gram.diagonal(), lora_a, kappa=0.5),
        "error": lambda: output_error(weight, weight * keep, gram),
    }[kind]
    whole = run()
    monkeypatch.setattr(repair, "CHUNK", 4 * 12)
    monkeypatch.setattr(repair, "LEAST_ROWS", 1)
    torch.testing.assert_close(run(), whole, rtol=1e-4, atol=1e-5)


@given(rows, columns, ranks, densities, st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)), dampings, seeds)
def test_the_published_update_equals_a_loop_over_rows(rows, columns, rank, density, kappa, damping, seed):
    weight, _, keep, gram, lora_a = _layer(rows, columns, 30, density, seed, rank)
    energy = gram.diagonal()
    update = paper_update(weight, keep, energy, lora_a, kappa=kappa, dampening_frac=damping)
    a, d = lora_a.double(), torch.diag(energy.double())
    ridge = damping * (a @ d @ a.T).trace() / rank * torch.eye(rank, dtype=a.dtype)
    for row in range(rows):
        lost = ~keep[row]
        own = a[:, lost] @ d[lost][:, lost] @ a[:, lost].T
        system = kappa * a @ d @ a.T + (1 - kappa) * own + ridge
        expected = -torch.linalg.inv(system) @ (a[:, lost] @ d[lost][:, lost] @ weight[row, lost].double())
        torch.testing.assert_close(update[row].double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_published_update_shrinks_what_is_pruned_and_lowers_its_objective():
    weight, _, keep, gram, lora_a = _layer(16, 40, 300, 0.5, 2, rank=8)
    energy = gram.diagonal()
    change = paper_update(weight, keep, energy, lora_a) @ lora_a
    pruned = weight * ~keep
    before = (pruned.square() * energy).sum(dim=1)
    after = ((pruned + change).square() * energy).sum(dim=1)
    assert (after < before).all()
    assert (((pruned + change * ~keep).square() * energy).sum(dim=1) < before).all()


@given(rows, columns, ranks, seeds)
def test_nothing_to_repair_and_nothing_to_repair_with(rows, columns, rank, seed):
    weight, _, keep, gram, lora_a = _layer(rows, columns, 10, 0.5, seed, rank)
    masked, none = weight * keep, torch.zeros(rows, rank)
    everything = torch.ones_like(keep)
    assert torch.equal(repair_weights(weight, everything, gram), weight)
    assert torch.equal(repair_weights(weight, keep, torch.zeros_like(gram)), masked)
    assert torch.equal(adapter_update(weight, everything, gram, lora_a), none)
    assert torch.equal(adapter_update(weight, keep, torch.zeros_like(gram), lora_a), none)
    assert torch.equal(adapter_update(weight, keep, gram, torch.zeros_like(lora_a)), none)
    for kappa in (1.0, 0.3):
        assert torch.equal(paper_update(weight, everything, gram.diagonal(), lora_a, kappa=kappa), none)
        assert torch.equal(paper_update(weight, keep, torch.zeros(columns), lora_a, kappa=kappa), none)
        assert torch.equal(paper_update(weight, keep, gram.diagonal(), torch.zeros_like(lora_a), kappa=kappa), none)


def test_an_input_that_is_never_active_and_a_row_without_weights():
    weight, _, keep, gram, lora_a = _layer(3, 6, 30, 0.5, 11)
    gram[2], gram[:, 2] = 0, 0
    keep[1] = False
    assert repair_weights(weight, keep, gram).isfinite().all()
    assert adapter_update(weight, keep, gram, lora_a).isfinite().all()
    for kappa in (1.0, 0.0):
        assert paper_update(weight, keep, gram.diagonal(), lora_a, kappa=kappa).isfinite().all()


def test_ten_steps_of_an_adapter_update_come_within_a_percent_of_the_exact_error_at_a_high_rank():
    weight, inputs, keep, _, lora_a = _layer(48, 128, 600, 0.5, 9, rank=64)
    inputs[:, :4] *= 30
    gram = inputs.T @ inputs / len(inputs)

    def error(steps):
        update = adapter_update(weight, keep, gram, lora_a, steps=steps)
        return output_error(weight, updated_weight(weight, keep, update, lora_a), gram).sum()

    masked = output_error(weight, weight * keep, gram).sum()
    assert error(64) < 0.9 * masked
    assert error(10) - error(64) < 0.01 * masked
