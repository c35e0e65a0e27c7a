"""`from_pretrained` on sparse checkpoints, through transformers' registry of quantizers.

transformers finds a quantizer by the `quant_method` of config.json, which is "compressed-tensors" here as in any
checkpoint of that family. Checkpoints that are quantized and not sparse are left to its own quantizer.
"""

from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from efx_plugin.checkpoint.config import GUARD_KEY, quantizes, sparsity_in
from efx_plugin.checkpoint.fit import check_body, check_fit
from efx_plugin.checkpoint.formats.protocol import Layout
from efx_plugin.checkpoint.formats.registry import decompress, find_format, part_dtypes
from efx_plugin.checkpoint.model_weights import model_class, read_model_config, skeleton
from efx_plugin.checkpoint.reader import read_dense_layout
from efx_plugin.checkpoint.storage.safetensors_file import read_index
from efx_plugin.errors import EfxError, SparseCheckpointError

_SPARSE, _DENSE = "sparse-compressed-tensors", "dense-compressed-tensors"


def register() -> None:
    """Let `from_pretrained` expand sparse checkpoints. `import efx_plugin` calls this; again, it does nothing."""
    if _SPARSE in auto.AUTO_QUANTIZER_MAPPING:
        return
    for method, config, quantizer in (
        (_SPARSE, SparseConfig, SparseHfQuantizer),
        (_DENSE, DenseConfig, DenseHfQuantizer),
    ):
        auto.register_quantization_config(method)(config)
        auto.register_quantizer(method)(quantizer)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = _CompressedTensorsConfig


class DenseConfig(QuantizationConfigMixin):
    """A quantization_config that does nothing, such as compressed-tensors left in checkpoints stored dense."""

    quant_method: Any  # transformers' own are an enumeration
    dequantize = True  # transformers forgets the config of such a model: what is loaded is a plain one

    def __init__(self, **_kwargs: Any) -> None:
        self.quant_method = _DENSE


class SparseConfig(DenseConfig):
    """The quantization_config of a sparse checkpoint."""

    def __init__(self, sparsity_config: dict[str, Any], **_kwargs: Any) -> None:
        self.quant_method = _SPARSE
        self.sparsity_config = sparsity_config


class _CompressedTensorsConfig(CompressedTensorsConfig):
    """transformers' own configuration, except where weights are stored sparsely, or nothing is compressed at all."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        kwargs["return_unused_kwargs"] = return_unused_kwargs
        sparsity = sparsity_in(config_dict)
        if sparsity is None and not quantizes(config_dict):
            return DenseConfig.from_dict(config_dict, **kwargs)
        if sparsity is None:
            said = {key: value for key, value in config_dict.items() if key != "sparsity_config"}
            return CompressedTensorsConfig.from_dict(said, **kwargs)
        if config_dict.get("config_groups"):
            raise EfxError(
                "the checkpoint is sparse and quantized, which from_pretrained does not expand: "
                "use efx_plugin.load_sparse, which returns the same plain model"
            )
        find_format(sparsity["format"], "config.json")
        return SparseConfig.from_dict(config_dict, **kwargs)


class DenseHfQuantizer(HfQuantizer):
    """Loads a plain model, and refuses a checkpoint that does not fit it."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        checkpoint_files: list[str] | None = kwargs["checkpoint_files"]
        # With a quantizer, transformers compares no shapes, and it makes up weights that are missing.
        if not checkpoint_files or not checkpoint_files[0].endswith(".safetensors"):
            return
        directory = Path(checkpoint_files[0]).parent
        layout = self._layout(directory)
        config = read_model_config(directory)
        same = (config.architectures or [])[:1] == [type(model).__name__]
        check_fit(skeleton(config, type(model) if same else model_class(config)), layout, directory)
        check_body(model, layout, directory)

    def _layout(self, directory: Path) -> Layout:
        return {name: (stored.dtype, stored.shape) for name, stored in read_index(directory).items()}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class SparseHfQuantizer(DenseHfQuantizer):
    """Expands compressed weights while they are loaded."""

    def __init__(self, quantization_config: SparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._expand = _Expand(quantization_config.sparsity_config["format"])

    def update_tp_plan(self, config: Any) -> Any:
        # transformers calls this after it has read the config, and before it looks for the files that the guard names.
        if hasattr(config, GUARD_KEY):
            delattr(config, GUARD_KEY)
        return config

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [
            WeightConverter(list(self._expand.patterns[parameter]), f".{parameter}", [self._expand])
            for parameter in ("bias", "weight")
        ]

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> None:
        if self._expand.error is not None:
            raise self._expand.error
        # Saving would run the conversions backwards; the weights are plain ones now.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if self._expand not in getattr(conversion, "operations", ())
        ]

    def _layout(self, directory: Path) -> Layout:
        return read_dense_layout(directory)


class _Expand(ConversionOps):
    """Makes one weight of its parts.

    transformers reports what a conversion raises without its message. So the first error is kept, and the quantizer
    raises it.
    """

    def __init__(self, format_name: str) -> None:
        self.format_name = format_name
        self.error: SparseCheckpointError | None = None
        names = part_dtypes(find_format(format_name, "config.json"), torch.float32)
        # Pattern of a tensor's name -> part, by what the dense parameter is called.
        self.patterns = {
            "bias": {rf"\.bias\.{part}$": part for part in names},
            "weight": {rf"(?:\.weight)?\.{part}$": part for part in names},
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Expand":
        return self  # transformers copies a conversion for every weight

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        full_layer_name: str = kwargs["full_layer_name"]
        pattern_to_part = self.patterns["bias"] | self.patterns["weight"]
        parts = {pattern_to_part[pattern]: tensors[0] for pattern, tensors in input_dict.items()}
        parameter = kwargs["model"].get_parameter(full_layer_name)
        device = next(iter(parts.values())).device
        try:
            weight = decompress(self.format_name, parts, where=full_layer_name.removesuffix(".weight"))
        except SparseCheckpointError as error:
            self.error = self.error or error
            weight = torch.zeros(parameter.shape)
        return {target_patterns[0]: weight.to(device=device, dtype=parameter.dtype)}
