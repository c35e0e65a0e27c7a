import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from efx_plugin.engine.zeros import pack_mask, restore_zeros, unpack_mask


def drawn(rows, columns, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), seed=st.integers(0, 100))
def test_masks_survive_as_bits(rows, columns, seed):
    keep = drawn(rows, columns, seed) < 0.5
    bits = pack_mask(keep)
    assert bits.numel() == -(-rows * columns // 8)
    assert torch.equal(unpack_mask(bits, keep.shape), keep)


def test_what_was_filled_is_zero_again_and_counted_and_nothing_else_changes():
    layers = {name: nn.Linear(5, 7) for name in ("filled", "whole", "other")}
    keep = drawn(7, 5) < 0.5
    keep[0, :2] = False
    for layer in layers.values():
        layer.weight.data = drawn(7, 5, seed=1) + 1
    layers["filled"].weight.data *= keep
    layers["whole"].weight.data *= keep
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    kept = {name: pack_mask(layers[name].weight != 0) for name in ("filled", "whole")}
    layers["filled"].weight.data[0, :2] = 3.0
    assert restore_zeros(layers, kept) == (2, 2 * int((~keep).sum()))
    for name, layer in layers.items():
        assert torch.equal(layer.weight, before[name])
