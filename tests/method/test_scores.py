"""Scores and sensitivities against brute force over every weight, token and head."""

import math

import pytest
import torch

from efx_plugin.method import sensitivity
from efx_plugin.method.masks import row_mask
from efx_plugin.method.scores import foresight_scores, update_average, wanda_saliency


def test_foresight_score_of_every_weight():
    torch.manual_seed(0)
    weight, inputs, consumer = torch.randn(3, 4), torch.randn(11, 4), torch.randn(5, 3)
    energy = inputs.square().mean(dim=0)
    c = consumer.square().sum(dim=0)
    scores = foresight_scores(wanda_saliency(weight, energy), c)
    for o in range(3):
        for i in range(4):
            e_i = sum(float(x[i]) ** 2 for x in inputs) / len(inputs)
            c_o = sum(float(consumer[k, o]) ** 2 for k in range(5))
            assert math.isclose(float(scores[o, i]), float(weight[o, i]) ** 2 * e_i * c_o, rel_tol=1e-4)


def test_the_score_is_what_pruning_the_weight_costs_behind_the_consumer():
    torch.manual_seed(1)
    weight, consumer = torch.randn(3, 4), torch.randn(5, 3)
    inputs = torch.randn(13, 4)
    saliency = wanda_saliency(weight, inputs.square().mean(dim=0))
    scores = foresight_scores(saliency, consumer.square().sum(dim=0))
    for o in range(3):
        for i in range(4):
            pruned = weight.clone()
            pruned[o, i] = 0
            cost = (inputs @ (weight - pruned).T @ consumer.T).square().sum(dim=1).mean()
            torch.testing.assert_close(scores[o, i], cost, rtol=1e-4, atol=1e-6)


def test_propagation_cannot_reorder_a_row():
    torch.manual_seed(2)
    saliency, c = torch.rand(6, 9), torch.rand(6) + 0.1
    scores = foresight_scores(saliency, c)
    assert torch.equal(scores.argsort(dim=1), saliency.argsort(dim=1))


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_by_row_the_norm_of_the_consumer_gives_wandas_mask(sparsity):
    torch.manual_seed(5)
    weight, inputs, consumer = torch.randn(12, 40), torch.randn(90, 40), torch.randn(7, 12)
    scores = foresight_scores(wanda_saliency(weight, inputs.square().mean(dim=0)), consumer.square().sum(dim=0))
    wanda = weight.abs() * inputs.norm(dim=0)
    kept = wanda.argsort(dim=1, descending=True)[:, : 40 - round(sparsity * 40)]
    assert torch.equal(row_mask(scores, sparsity), torch.zeros(12, 40, dtype=torch.bool).scatter_(1, kept, True))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_the_average_moves_towards_new_scores_in_place(momentum):
    torch.manual_seed(6)
    old, new = torch.rand(3, 8), torch.rand(3, 8)
    average = torch.full((8, 3), torch.nan) if momentum == 1 else old.T.contiguous()
    update_average(average.T, new, momentum)
    expected = new if momentum == 1 else momentum * new + (1 - momentum) * old
    torch.testing.assert_close(average.T, expected)


def test_gated_sensitivities_token_by_token():
    torch.manual_seed(3)
    gate, up, down = torch.randn(7, 5), torch.randn(7, 5), torch.randn(4, 5)
    for_up, for_gate = sensitivity.gated_moments(gate, up)
    c_up = sensitivity.gated_sensitivity(for_up / 7, down)
    c_gate = sensitivity.gated_sensitivity(for_gate / 7, down)
    for o in range(5):
        column = sum(float(down[k, o]) ** 2 for k in range(4))
        gate_o = gate[:, o].clone().requires_grad_()
        silu = torch.nn.functional.silu(gate_o)
        (slope,) = torch.autograd.grad(silu.sum(), gate_o)
        torch.testing.assert_close(c_up[o], silu.detach().square().mean() * column)
        torch.testing.assert_close(c_gate[o], (up[:, o] * slope).square().mean() * column)


def test_a_kv_head_answers_to_the_query_heads_of_its_group():
    heads, kv_heads, d, hidden = 6, 2, 4, 5
    torch.manual_seed(4)
    output = torch.randn(hidden, heads * d)
    query_energy, key_energy = torch.rand(heads * d), torch.rand(kv_heads * d)
    c_value = sensitivity.value_sensitivity(output, heads, kv_heads)
    c_key = sensitivity.key_sensitivity(query_energy, heads, kv_heads)
    c_query = sensitivity.query_sensitivity(key_energy, heads, kv_heads)
    for kv in range(kv_heads):
        group = [h for h in range(heads) if h // (heads // kv_heads) == kv]
        for j in range(d):
            pair = [j, (j + d // 2) % d]
            value = sum(float(output[:, h * d + j].square().sum()) for h in group)
            key = sum(float(query_energy[h * d + p]) for h in group for p in pair) / 2
            assert math.isclose(float(c_value[kv * d + j]), value, rel_tol=1e-5)
            assert math.isclose(float(c_key[kv * d + j]), key, rel_tol=1e-5)
            for h in group:
                query = sum(float(key_energy[kv * d + p]) for p in pair) / 2
                assert math.isclose(float(c_query[h * d + j]), query, rel_tol=1e-5)
