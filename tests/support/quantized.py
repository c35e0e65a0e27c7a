"""Models as llm-compressor leaves them, quantized by rounding to the nearest value, without calibration."""

from pathlib import Path
from typing import Any

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
W8A16: dict[str, Any] = {"weights": _INT8}
W8A8 = W8A16 | {"input_activations": _INT8 | {"strategy": "token", "dynamic": True}}


def w4a16(group: int | None) -> dict[str, Any]:
    """Weights of four bits, of whose inputs so many share a scale; all of them if None."""
    return {"weights": _INT8 | {"num_bits": 4, "strategy": "group" if group else "channel", "group_size": group}}


def quantize(model: Any, scheme: dict[str, Any]) -> Any:
    """Quantize the linear layers of a model but its head, with scales that are powers of two: bfloat16 holds the
    quantized weights then."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config

    groups = {"group_0": {"targets": ["Linear"], **scheme}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    most = 2 ** (scheme["weights"]["num_bits"] - 1) - 1
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            largest = module.weight.data.abs().unflatten(1, (module.weight_scale.shape[1], -1)).amax(2)
            module.weight_scale.data.copy_((largest / most).log2().ceil().exp2())
            module.weight_zero_point.data.zero_()
            module.quantization_status = QuantizationStatus.FROZEN
    return model


def save_compressed(model: Any, directory: Path) -> None:
    """Save a quantized model as compressed-tensors does, which knows of no zeros."""
    from compressed_tensors.compressors import ModelCompressor

    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))
