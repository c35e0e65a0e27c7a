"""What is sparse and quantized is not served yet: vLLM says what to do instead, and what that leaves it serves."""

from pathlib import Path

import pytest

from efx_plugin.checkpoint import export_checkpoint, save_sparse
from efx_plugin.errors import EfxError
from integration.serving_models import engine, greedy, save_tiny

pytestmark = pytest.mark.serving

INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
SCHEMES = {
    "W8A8": {"weights": INT8, "input_activations": INT8 | {"strategy": "token", "dynamic": True}},
    "W8A16": {"weights": INT8},
}


def quantized_model(directory: Path, scheme: str):
    """As llm-compressor leaves it."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_tiny(directory, "Llama") / "dense", dtype="auto")
    groups = {"group_0": {"targets": ["Linear"], **SCHEMES[scheme]}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.data.abs().amax(1, keepdim=True) / 127)
            module.weight_zero_point.data.zero_()
            module.quantization_status = QuantizationStatus.FROZEN
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_refusal_names_the_remedy(tmp_path, scheme):
    save_sparse(quantized_model(tmp_path / "tiny", scheme), tmp_path / "sparse", progress=False)
    with (
        pytest.raises(EfxError, match=r"both sparse and quantized, .*export_checkpoint\(.*structure=\"dense\"\)"),
        engine(tmp_path / "sparse"),
    ):
        pass


def test_the_remedy_is_served(tmp_path):
    """With the tokens of the checkpoint that was never sparse."""
    from compressed_tensors.compressors import ModelCompressor

    model = quantized_model(tmp_path / "tiny", "W8A8")
    save_sparse(model, tmp_path / "sparse", progress=False)
    export_checkpoint(tmp_path / "sparse", tmp_path / "dense", structure="dense", progress=False)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "quantized")
    compressor.update_config(str(tmp_path / "quantized"))
    tokens = []
    for name in ("dense", "quantized"):
        with engine(tmp_path / name) as llm:
            tokens.append(greedy(llm))
    assert tokens[0] == tokens[1]
    assert [len(one) for one in tokens[0]] == [16] * len(tokens[0])
