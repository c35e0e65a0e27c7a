"""What is reckoned is what lies on the disk and in memory, to the bit where nothing is padded."""

import math

import pytest
import torch

from efx_plugin.checkpoint import find_format, linear_bytes, save_sparse
from efx_plugin.errors import EfxError
from efx_plugin.evaluate import bits
from tests.support.quantized import W8A16, quantize, w4a16
from tests.support.tiny_llama import save_tiny_llama, tiny_llama


def pruned(dtype=torch.bfloat16, period=2, **overrides):
    model = tiny_llama(**overrides).to(dtype)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data[:, ::period] = 0
    return model


def reckon(model, value_bits: int, sparse_format: str, scales_a_row: int = 0) -> float:
    """Bits per weight on disk: values, masks, offsets, and scales of 16 bits."""
    total = weights = 0
    for rows, columns, nonzeros in bits.sizes(model):
        layout = find_format(sparse_format, "a reckoning").layout(rows, columns, nonzeros, torch.int8)
        for part, (dtype, shape) in layout.items():
            total += math.prod(shape) * (value_bits if part == "compressed" else 8 * dtype.itemsize)
        total += 16 * rows * scales_a_row
        weights += rows * columns
    return total / weights


@pytest.mark.parametrize(("sparse_format", "period"), [("sparse-bitmask", 3), ("sparse-24-bitmask", 2)])
def test_a_sparse_checkpoint_takes_on_disk_what_is_reckoned(tmp_path, sparse_format, period):
    model = pruned(period=period)
    save_sparse(model, tmp_path / "sparse", structure=sparse_format, progress=False)
    reckoned = reckon(model, 16, sparse_format)
    assert bits.stored(tmp_path / "sparse") == pytest.approx(reckoned, rel=1e-12)
    weights = sum(size.rows * size.columns for size in bits.sizes(model))
    assert reckoned * weights == 8 * linear_bytes(tmp_path / "sparse")["sparse"]


def test_a_sparse_checkpoint_is_served_from_about_as_many_bits(tmp_path):
    model = pruned(hidden_size=512, intermediate_size=512, period=2)
    save_sparse(model, tmp_path / "sparse", progress=False)
    assert 9 <= bits.served(tmp_path / "sparse") <= 16
    assert bits.stored(tmp_path / "sparse") == pytest.approx(9, abs=0.3)


def test_scales_count_where_a_checkpoint_is_quantized_as_well(tmp_path):
    model = pruned(hidden_size=512, intermediate_size=512)
    reckoned = reckon(model, 8, "sparse-24-bitmask", scales_a_row=1)
    save_sparse(
        quantize(model, W8A16),
        tmp_path / "both",
        structure="sparse-24-bitmask",
        progress=False,
    )
    assert bits.stored(tmp_path / "both") == pytest.approx(reckoned, rel=1e-3)
    assert 5 <= bits.served(tmp_path / "both") <= 16


def test_pruned_weights_of_four_bits_are_stored_with_their_zeros_and_served_without(tmp_path):
    kept = {}
    for name, period in (("pruned", 2), ("dense", 10)):
        model = quantize(pruned(hidden_size=512, intermediate_size=512, period=period), w4a16(128))
        layers = [module for module in model.modules() if hasattr(module, "weight_scale")]
        rounded = [(layer.weight / layer.weight_scale.repeat_interleave(128, 1)).round().flatten() for layer in layers]
        kept[name] = int(torch.cat(rounded).count_nonzero()) / sum(map(len, rounded))
        save_sparse(model, tmp_path / name, progress=False)
        assert bits.stored(tmp_path / name) == pytest.approx(4 + 16 / 128, abs=0.01)
    assert bits.served(tmp_path / "pruned") == pytest.approx(1 + 4 * kept["pruned"] + 16 / 128, rel=0.05)
    assert kept["dense"] > 2 / 3 and bits.served(tmp_path / "dense") == bits.stored(tmp_path / "dense")


def test_a_dense_checkpoint_has_no_bits_of_its_own(tmp_path):
    save_tiny_llama(tmp_path / "model")
    with pytest.raises(EfxError, match="is dense"):
        bits.stored(tmp_path / "model")
