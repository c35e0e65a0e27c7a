"""What is reckoned is what lies on the disk and in memory, to the bit where nothing is padded."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config

from efx_plugin.checkpoint import linear_bytes, save_sparse
from efx_plugin.errors import EfxError
from efx_plugin.evaluate import bits
from tests.support.tiny_llama import save_tiny_llama, tiny_llama


def pruned(dtype=torch.bfloat16, period=2, **overrides):
    model = tiny_llama(**overrides).to(dtype)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data[:, ::period] = 0
    return model


def test_dense_weights_take_the_bits_of_their_dtype():
    assert bits.reckon(bits.sizes(tiny_llama()), 32) == 32


@pytest.mark.parametrize(("sparse_format", "period"), [("sparse-bitmask", 3), ("sparse-24-bitmask", 2)])
def test_a_sparse_checkpoint_takes_on_disk_what_is_reckoned(tmp_path, sparse_format, period):
    model = pruned(period=period)
    save_sparse(model, tmp_path / "sparse", structure=sparse_format, progress=False)
    reckoned = bits.reckon(bits.sizes(model), 16, sparse_format=sparse_format)
    assert bits.stored(tmp_path / "sparse") == pytest.approx(reckoned, rel=1e-12)
    weights = sum(size.rows * size.columns for size in bits.sizes(model))
    assert reckoned * weights == 8 * linear_bytes(tmp_path / "sparse")["sparse"]


def test_a_sparse_checkpoint_is_served_from_about_as_many_bits(tmp_path):
    model = pruned(hidden_size=512, intermediate_size=512, period=2)
    save_sparse(model, tmp_path / "sparse", progress=False)
    assert 9 <= bits.served(tmp_path / "sparse") <= 16
    assert bits.stored(tmp_path / "sparse") == pytest.approx(9, abs=0.3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"value_bits": 4, "group": 128}, 4 + 16 / 128),
        ({"value_bits": 4, "group": 128, "zero_point_bits": 4}, 4 + 20 / 128),
        ({"value_bits": 3, "group": 32}, 3 + 16 / 32),
        ({"value_bits": 8, "group": 0}, 8 + 16 / 256),
        ({"value_bits": 8, "group": 100}, 8 + 3 * 16 / 256),
        ({"value_bits": 8, "group": 0, "sparse_format": "sparse-24-bitmask"}, 4 + 1 + (16 + 128 / 64) / 256),
    ],
)
def test_masks_and_scales_count(arguments, expected):
    assert bits.reckon([bits.Size(64, 256, 64 * 128)], **arguments) == pytest.approx(expected)


def quantized_to_int8(model):
    """As llm-compressor leaves a model: a scale for each row, which every value is within reach of."""
    int8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": int8}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.data.float().abs().amax(-1, keepdim=True) / 127)
            module.quantization_status = QuantizationStatus.FROZEN
    return model


def test_scales_count_where_a_checkpoint_is_quantized_as_well(tmp_path):
    model = pruned(hidden_size=512, intermediate_size=512)
    reckoned = bits.reckon(bits.sizes(model), 8, sparse_format="sparse-24-bitmask", group=0)
    save_sparse(quantized_to_int8(model), tmp_path / "both", structure="sparse-24-bitmask", progress=False)
    assert bits.stored(tmp_path / "both") == pytest.approx(reckoned, rel=1e-3)
    assert 5 <= bits.served(tmp_path / "both") <= 16


def test_a_dense_checkpoint_has_no_bits_of_its_own(tmp_path):
    save_tiny_llama(tmp_path / "model")
    with pytest.raises(EfxError, match="is dense"):
        bits.stored(tmp_path / "model")
