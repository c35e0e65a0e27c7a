"""vLLM without the plugin refuses a sparse checkpoint; it never serves projections that were not in the file."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from efx_plugin.checkpoint import save_sparse

pytestmark = pytest.mark.serving


@pytest.mark.parametrize("structure", ["sparse-bitmask", "sparse-24-bitmask"])
def test_the_stock_configuration_refuses(tmp_path, structure):
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    ).to(torch.bfloat16)
    for name, weight in model.named_parameters():
        if "_proj" in name:
            weight.data[:, ::2] = 0
    save_sparse(model, tmp_path / "sparse", structure=structure)
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())["quantization_config"]
    assert config["sparsity_config"]["format"] == structure
    with pytest.raises(DeprecationWarning, match="Sparsity support has been removed"):
        CompressedTensorsConfig.from_config(config)
