"""Which quantized layers are served sparse: int8 weights with a scale per output channel.

Activations are either left as they are (W8A16), or quantized to int8 in every call, with a scale per token (W8A8). This
is what llm-compressor's schemes of these names make, symmetric as they are by default.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from efx_plugin.checkpoint.formats.pack_quantized import NAME as PACK_QUANTIZED
from efx_plugin.errors import EfxError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

Int8Scheme = Literal["W8A8", "W8A16"]


def readable_by_vllm(config: Mapping[str, Any]) -> dict[str, Any]:
    """A quantization_config without its sparsity_config, such that vLLM's reader takes it.

    Of integer weights whose activations are not quantized vLLM knows the form packed into int32 alone, and fails an
    assertion where config.json names the form they have under sparsity, a byte each. `restore_formats` undoes it.
    """
    groups = {
        name: {**group, "format": PACK_QUANTIZED}
        if (group.get("weights") or {}).get("type") == "int" and not group.get("input_activations")
        else dict(group)
        for name, group in (config.get("config_groups") or {}).items()
    }
    return {key: value for key, value in config.items() if key != "sparsity_config"} | {"config_groups": groups}


def restore_formats(schemes: Mapping[str, dict[str, Any]], config: Mapping[str, Any]) -> None:
    """Put the formats of config.json back into what vLLM has read, target -> scheme."""
    for group in (config.get("config_groups") or {}).values():
        for target in group["targets"]:
            if target in schemes:
                schemes[target]["format"] = group.get("format") or config.get("format")


def int8_scheme(scheme: Mapping[str, Any], prefix: str) -> Int8Scheme:
    """The name of a sparse layer's quantization.

    Args:
        scheme: what vLLM has read: `weights`, `input_activations` and `output_activations` (each compressed-tensors'
            QuantizationArgs or None), `format`.
        prefix: the layer's name.

    Raises:
        EfxError: no sparse kernel computes it.
    """
    weights, inputs = scheme["weights"], scheme.get("input_activations")
    if (
        _is_symmetric_int8(weights, "channel", dynamic=False)
        and scheme.get("format") != PACK_QUANTIZED
        and not scheme.get("output_activations")
        and (inputs is None or _is_symmetric_int8(inputs, "token", dynamic=True))
    ):
        return "W8A16" if inputs is None else "W8A8"
    raise EfxError(
        f"{prefix} is both sparse and quantized, with {_describe(weights)} weights and {_describe(inputs)} "
        "activations, but efx-plugin serves symmetric int8 weights per channel only, with activations unquantized "
        "(W8A16) or dynamic symmetric int8 per token (W8A8): export the model again without the sparse compression, "
        'efx_plugin.checkpoint.export_checkpoint(SOURCE, DESTINATION, structure="dense"), and serve that'
    )


def refuse_unpacked(scheme: Mapping[str, Any], prefix: str) -> None:
    """Refuse a layer that is not sparse and whose form is the one that only our kernels read.

    Raises:
        EfxError: its weights are integers of a byte each, and its activations are not quantized.
    """
    if scheme["weights"].type == "int" and not scheme.get("input_activations") and scheme["format"] != PACK_QUANTIZED:
        raise EfxError(
            f"{prefix} is quantized without its activations, but not sparse, and vLLM does not read such weights as "
            "they are stored here: quantize its activations as well (W8A8), or leave it out of the quantization "
            "(`ignore` in the recipe)"
        )


def _is_symmetric_int8(args: "QuantizationArgs", strategy: str, *, dynamic: bool) -> bool:
    return (
        (args.type, args.num_bits, args.strategy) == ("int", 8, strategy)
        and bool(args.symmetric)
        and args.dynamic is dynamic
    )


def _describe(args: "QuantizationArgs | None") -> str:
    if args is None:
        return "unquantized"
    symmetry = "" if args.symmetric else "asymmetric "
    when = "dynamic " if args.dynamic else ""
    return f"{when}{symmetry}{args.num_bits}-bit {args.type} (per {args.strategy})"
