"""Weights that are quantized as well: one byte each, int8 or float8_e4m3fn, with scales beside them.

Those of fewer bits are stored as compressed-tensors packs them: see `packed`.

compressed-tensors 0.9 to 0.14 compressed twice, one after the other: `q_proj.weight` [rows, columns] was quantized, and
what a sparse format stored was the quantized weight. `q_proj.weight_scale` and the like lie beside `q_proj.compressed`
under the names that they have without sparsity, and the quantization_config of config.json describes both: the groups
of quantized layers, and the `sparsity_config`.

The arithmetic is compressed-tensors' own. It is imported only where something is quantized.
"""

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from efx_plugin.checkpoint import storage_plan
from efx_plugin.checkpoint.formats import pack_quantized
from efx_plugin.errors import EfxError, SparseCheckpointError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from transformers import PreTrainedModel

    # The state of one quantized module, by last names, as it is stored; its scheme; its name.
    _Store = Callable[[dict[str, torch.Tensor], QuantizationScheme, str], dict[str, torch.Tensor]]

# The formats that keep a byte per weight under the weight's own name; they differ in name only.
BYTE_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")

_WEIGHT = ("weight", "weight_scale", "weight_zero_point")

# What quantization adds to a module besides its weight, by last name.
_PARAMETERS = frozenset(
    f"{what}_{kind}"
    for what, kind in itertools.product(
        ("weight", "input", "output", "q", "k", "v"), ("scale", "zero_point", "global_scale")
    )
) | {"weight_shape"}


def of_config(config: Mapping[str, Any], where: object) -> "QuantizationConfig | None":
    """What a config.json says of quantization; None where it quantizes nothing.

    Args:
        config: the content of config.json.
        where: the directory, for messages.

    Raises:
        EfxError: the model was quantized by another method, or is rotated as well; compressed-tensors is missing or
            does not understand the description.
    """
    described = config.get("quantization_config")
    if not isinstance(described, dict) or not described.get("config_groups"):
        return None
    if described.get("transform_config"):
        raise EfxError(f"{where} carries a transform_config, and rotated weights are not sparse: save it without one")
    try:
        from compressed_tensors.quantization import QuantizationConfig
    except ImportError as error:
        raise EfxError(f"{where} is quantized: pip install compressed-tensors, which knows how to read it") from error
    try:
        return QuantizationConfig.model_validate({**described, "quant_method": "compressed-tensors"})
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise SparseCheckpointError(
            f"{where} is sparse and quantized, but compressed-tensors does not understand the config_groups of its "
            f"config.json ({' '.join(str(error).split())[:200]}): export it again"
        ) from error


def of_model(model: "PreTrainedModel") -> "QuantizationConfig | None":
    """How llm-compressor has quantized a model in memory; None if it has not.

    Raises:
        EfxError: the scales were never calibrated, or the model is rotated as well.
    """
    if not any(_is_quantized(module) for module in model.modules()):
        return None
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    if getattr(model, "transform_config", None) is not None:
        raise EfxError("the model is rotated (transform_config), and rotated weights are not sparse: prune without")
    for name, module in model.named_modules():
        if _is_quantized(module) and module.quantization_status < QuantizationStatus.FROZEN:
            raise EfxError(f"{name} is to be quantized, but its scales were never calibrated: run oneshot to its end")
    return with_formats(QuantizationConfig.from_pretrained(model))


def with_formats(config: "QuantizationConfig") -> "QuantizationConfig":
    """The same config, in which every scheme says how compressed-tensors would store its weights."""
    from compressed_tensors.compressors.format import infer_module_format

    config = copy.deepcopy(config)
    for scheme in config.config_groups.values():
        scheme.format = scheme.format or infer_module_format(torch.nn.Linear, scheme)
    return config


def stored_config(config: "QuantizationConfig", where: object) -> dict[str, Any]:
    """The quantization_config that describes the same layers with a byte per weight.

    Raises:
        EfxError: the weights have another width, or zeros are not stored as zeros.
    """
    described = config.model_copy(deep=True)
    for scheme in described.config_groups.values():
        if scheme.weights is not None:
            scheme.format = _byte_format(scheme, config, where)
            # It only says in which order GPTQ went through the columns, and 0.13.0 refuses it outside of groups.
            scheme.weights.actorder = None
    return _dump(described)


def is_narrow(config: "QuantizationConfig") -> bool:
    """Whether weights have fewer than eight bits, which no sparse format stores."""
    return any(scheme.weights is not None and scheme.weights.num_bits < 8 for scheme in config.config_groups.values())


def refuse_unpacked(config: "QuantizationConfig", where: object) -> None:
    """Refuse narrow weights that `packed_state` cannot store with their zeros.

    Raises:
        EfxError: not all quantized weights are symmetric, pack-quantized and of the same width.
    """
    widths = {scheme.weights.num_bits for scheme in config.config_groups.values() if scheme.weights is not None}
    if len(widths) > 1:
        raise EfxError(
            f"{where} is quantized to {' and '.join(map(str, sorted(widths)))} bits: weights of fewer than 8 bits are "
            "stored where all have the same number"
        )
    for scheme in config.config_groups.values():
        if scheme.weights is None:
            continue
        _refuse_asymmetric(scheme, where)
        if _format(scheme, config) != pack_quantized.NAME:
            raise EfxError(
                f"{where} is quantized to {scheme.weights.num_bits} bits as {_format(scheme, config)}: weights of "
                f"fewer than 8 bits are stored as {pack_quantized.NAME} alone, quantize no activations beside them"
            )


def packed_config(config: "QuantizationConfig") -> dict[str, Any]:
    """The quantization_config of the plain checkpoint: as stored, but pack-quantized where vLLM wants it."""
    described = config.model_copy(deep=True)
    for scheme in described.config_groups.values():
        if is_weight_only(scheme):
            scheme.format = pack_quantized.NAME
    return _dump(described)


def is_weight_only(scheme: "QuantizationScheme") -> bool:
    """Whether integer weights meet activations that are not quantized (W8A16)."""
    return scheme.weights is not None and scheme.weights.type == "int" and scheme.input_activations is None


def state_of(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """The state of a quantized model, a byte per quantized weight; the model is left as it is.

    Raises:
        EfxError: a weight holds NaN or infinity.
    """
    return _state_of(model, _quantize)


def packed_state(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """The state of a quantized model, its quantized weights packed into int32; the model is left as it is.

    Raises:
        EfxError: a weight holds NaN or infinity.
    """
    return _state_of(model, _pack)


def _state_of(model: "PreTrainedModel", store: "_Store") -> dict[str, torch.Tensor]:
    modules = dict(model.named_modules())
    states: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in model.state_dict().items():
        prefix, _, own = name.rpartition(".")
        states[prefix][own] = tensor.detach()
    return {
        f"{prefix}.{own}" if prefix else own: tensor
        for prefix, state in states.items()
        for own, tensor in (
            store(state, modules[prefix].quantization_scheme, prefix) if _is_quantized(modules[prefix]) else state
        ).items()
    }


def unpack(source: storage_plan.Source) -> storage_plan.Source:
    """The same weights with those packed into int32 as int8."""
    layout, sources = {}, {}
    for name, described in source.layout.items():
        prefix, _, own = name.rpartition(".")
        if own == "weight_packed" and f"{prefix}.weight_shape" in source.layout:
            sources[f"{prefix}.weight"] = prefix
            layout[f"{prefix}.weight"] = (torch.int8, tuple(source.read(f"{prefix}.weight_shape").flatten().tolist()))
        elif own != "weight_shape" or f"{prefix}.weight_packed" not in source.layout:
            layout[name] = described

    def read(name: str) -> torch.Tensor:
        if name not in sources:
            return source.read(name)
        prefix = sources[name]
        return pack_quantized.decompress(
            {part: source.read(f"{prefix}.{part}") for part in pack_quantized.layout(0, 0)}, prefix
        )

    return storage_plan.Source(layout, read)


def is_parameter(name: str) -> bool:
    """Whether a tensor of that name is there for quantization alone, such as a scale."""
    return name.rpartition(".")[2] in _PARAMETERS


def schemes_of(
    config: "QuantizationConfig", model: "PreTrainedModel", names: Iterable[str], where: object
) -> dict[str, "QuantizationScheme"]:
    """The scheme of each of the quantized modules.

    Args:
        config: what config.json says.
        model: the model, with or without weights.
        names: the modules, by their name on disk.

    Raises:
        SparseCheckpointError: a module is in no group of config.json.
    """
    from compressed_tensors.utils import is_match

    found = {}
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError:  # it has another name on disk, as experts have
            module = torch.nn.Linear(0, 0, device="meta")
        scheme = next(
            (
                scheme
                for scheme in config.config_groups.values()
                if scheme.weights is not None and is_match(name, module, scheme.targets, config.ignore or [])
            ),
            None,
        )
        if scheme is None:
            raise SparseCheckpointError(
                f"{where} holds {name}.weight_scale, but no config group of its config.json quantizes {name}: "
                "export it again"
            )
        found[name] = scheme
    return found


def dequantize(
    tensors: Mapping[str, torch.Tensor], config: "QuantizationConfig", model: "PreTrainedModel", where: object
) -> dict[str, torch.Tensor]:
    """Weights as a plain model has them: what was a byte times its scale, in the dtype of the scale.

    Args:
        tensors: the dense tensors of a checkpoint, quantized weights and scales among them.
        config: what its config.json says.
        model: the model, with or without weights.
        where: the directory, for messages.

    Returns:
        The tensors without those that only quantization needs; quantized activations have no place in a plain model.

    Raises:
        SparseCheckpointError: a scale is missing, damaged or of the wrong shape, or config.json does not fit.
    """
    scaled = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    schemes = schemes_of(config, model, scaled, where)
    plain = {}
    for name, tensor in tensors.items():
        prefix, _, own = name.rpartition(".")
        if is_parameter(name):
            continue
        if own == "weight" and prefix in schemes:
            state = {key: tensors[f"{prefix}.{key}"] for key in _WEIGHT if f"{prefix}.{key}" in tensors}
            plain[name] = _dequantize(state, schemes[prefix], config, f"{where}: {prefix}")
        elif tensor.dtype.itemsize == 1:
            raise SparseCheckpointError(f"{where}: {prefix}.weight_scale is missing: download or export it again")
        else:
            plain[name] = tensor
    return plain


def _is_quantized(module: torch.nn.Module) -> bool:
    return getattr(getattr(module, "quantization_scheme", None), "weights", None) is not None


def _format(scheme: "QuantizationScheme", config: "QuantizationConfig") -> str:
    return str(getattr(scheme.format, "value", scheme.format) or getattr(config.format, "value", config.format))


def _refuse_asymmetric(scheme: "QuantizationScheme", where: object) -> None:
    if not scheme.weights.symmetric:
        raise EfxError(
            f"{where} is quantized asymmetrically, so that its zeros are stored as the zero point: "
            "quantize the weights with symmetric: true"
        )


def _byte_format(scheme: "QuantizationScheme", config: "QuantizationConfig", where: object) -> str:
    name, weights = _format(scheme, config), scheme.weights
    _refuse_asymmetric(scheme, where)
    if name in BYTE_FORMATS:
        return name
    if name == pack_quantized.NAME and weights.num_bits == 8:
        return "int-quantized"
    if name == "dense":
        raise EfxError(f"{where} holds its weights as they were before quantization: save it with save_compressed=True")
    raise EfxError(
        f"{where} is quantized to {weights.num_bits} bits as {name}, which leaves a sparse format nothing to gain: "
        "quantize to 8 bits (W8A8, W8A16 or FP8), or keep the checkpoint as it is"
    )


def _dump(config: "QuantizationConfig") -> dict[str, Any]:
    formats = {_format(scheme, config) for scheme in config.config_groups.values() if scheme.weights is not None}
    described: dict[str, Any] = config.model_dump(mode="json")
    described["format"] = formats.pop() if len(formats) == 1 else "mixed-precision"
    described["quantization_status"] = "compressed"
    return described


def _quantize(state: dict[str, torch.Tensor], scheme: "QuantizationScheme", prefix: str) -> dict[str, torch.Tensor]:
    if "weight_packed" in state:
        parts = {part: state.pop(part) for part in pack_quantized.layout(0, 0)}
        return {"weight": pack_quantized.decompress(parts, prefix), **state}
    if state["weight"].dtype.itemsize == 1:
        return state
    from compressed_tensors.compressors import NaiveQuantizationCompressor

    storage_plan.check_finite(f"{prefix}.weight", state["weight"])
    if "weight_zero_point" not in state:
        # llm-compressor gives every layer a zero point. EfficientXpertModifier does not, and leaves weights on their
        # grid: in float32 their own integers are found, where in 16 bits the quotient may be rounded to a neighbour.
        wide = state | {"weight": state["weight"].float(), "weight_scale": state["weight_scale"].float()}
        found: dict[str, torch.Tensor] = NaiveQuantizationCompressor.compress(wide, scheme)
        return found | {"weight_scale": state["weight_scale"]}
    compressed: dict[str, torch.Tensor] = NaiveQuantizationCompressor.compress(state, scheme)
    return compressed


def _pack(state: dict[str, torch.Tensor], scheme: "QuantizationScheme", prefix: str) -> dict[str, torch.Tensor]:
    if "weight_packed" in state:
        return state
    from compressed_tensors.compressors import PackedQuantizationCompressor

    storage_plan.check_finite(f"{prefix}.weight", state["weight"])
    packed: dict[str, torch.Tensor] = PackedQuantizationCompressor.compress(state, scheme)
    return packed


def _dequantize(
    state: dict[str, torch.Tensor], scheme: "QuantizationScheme", config: "QuantizationConfig", where: str
) -> torch.Tensor:
    from compressed_tensors.compressors import NaiveQuantizationCompressor

    weight, scale, arguments = state["weight"], state["weight_scale"], scheme.weights
    if _format(scheme, config) not in BYTE_FORMATS:
        raise SparseCheckpointError(
            f"{where}.weight is {_format(scheme, config)} by config.json, but these are stored sparsely: "
            f"{', '.join(BYTE_FORMATS)}"
        )
    if weight.dtype != arguments.pytorch_dtype():
        raise SparseCheckpointError(
            f"{where}.weight is {weight.dtype}, but config.json makes it {arguments.pytorch_dtype()}: export it again"
        )
    # Scales are multiplied as they come, and one of another shape would be stretched to something else, however large.
    shapes = _scale_shapes(tuple(weight.shape), arguments)
    for name in ("weight_scale", "weight_zero_point"):
        if name in state and tuple(state[name].shape) not in shapes:
            raise SparseCheckpointError(
                f"{where}.{name} is {list(state[name].shape)}, but quantization per {_strategy(arguments)} of "
                f"{list(weight.shape)} takes {list(shapes[0])}: download or export it again"
            )
    if not scale.is_floating_point() or not storage_plan.is_finite(scale):
        raise SparseCheckpointError(f"{where}.weight_scale holds no finite numbers: download or export it again")
    if not arguments.symmetric and "weight_zero_point" not in state:
        raise SparseCheckpointError(f"{where}.weight_zero_point is missing: download or export it again")
    dense: torch.Tensor = NaiveQuantizationCompressor.decompress(state, scheme)["weight"]
    return dense


def _strategy(arguments: "QuantizationArgs") -> str:
    return str(getattr(arguments.strategy, "value", arguments.strategy))


def _scale_shapes(shape: tuple[int, ...], arguments: "QuantizationArgs") -> list[tuple[int, ...]]:
    """The shapes that the scale of a weight may have, the usual one first."""
    rows, columns = shape if len(shape) == 2 else (0, 0)
    match _strategy(arguments):
        case "tensor":
            return [(1,), ()]
        case "channel":
            return [(rows, 1)]
        case "group":
            return [(rows, math.ceil(columns / arguments.group_size))]
        case "block":
            height, width = arguments.block_structure
            return [(math.ceil(rows / height), math.ceil(columns / width))]
    return [(0,)]
