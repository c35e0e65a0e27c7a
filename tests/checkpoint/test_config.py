"""What config.json says of sparsity is read in one place."""

import subprocess
import sys

import pytest

from efx_plugin.checkpoint.config import quantizes, sparsity_of

SPARSE = {"format": "sparse-bitmask", "targets": ["Linear"]}


@pytest.mark.parametrize("sparsity", [None, {}, {"format": "dense"}, {"format": None}, {"format": ""}, {"targets": []}])
def test_a_sparsity_config_that_says_nothing_is_none(sparsity):
    assert sparsity_of({"quantization_config": {"sparsity_config": sparsity}}) is None
    assert sparsity_of({"quantization_config": {"sparsity_config": sparsity, "config_groups": {"a": {}}}}) is None


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": []}])
def test_a_config_without_quantization_is_dense(config):
    assert sparsity_of(config) is None


def test_a_sparsity_config_is_found():
    assert sparsity_of({"quantization_config": {"sparsity_config": SPARSE}}) == SPARSE


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (None, False),
        ({}, False),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}, False),
        ({"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}, False),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}, True),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}, True),
        ({"quant_method": "gptq"}, True),
        ({"bits": 4}, True),
    ],
)
def test_what_quantizes_and_what_does_not(quantization, expected):
    assert quantizes(quantization) == expected


def test_asking_imports_neither_torch_nor_numpy():
    script = (
        "import sys; from efx_plugin.checkpoint.config import sparsity_of; sparsity_of({});"
        "assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
