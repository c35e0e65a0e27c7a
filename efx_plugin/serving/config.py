"""vLLM's compressed-tensors configuration, with the sparsity that vLLM has dropped."""

import re
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import GateLinear, RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.layers.quantization.compressed_tensors.utils import find_matched_target, should_ignore_layer
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from efx_plugin.checkpoint.config import sparsity_in
from efx_plugin.checkpoint.formats.registry import format_names, part_names
from efx_plugin.errors import EfxError
from efx_plugin.serving.linear_method import SparseLinearMethod
from efx_plugin.serving.pruned_int4 import sparse_if_pruned
from efx_plugin.serving.quantized import int8_scheme, readable_by_vllm, refuse_unpacked, restore_formats
from efx_plugin.serving.weight_loader import refuse_expert_parts, refuse_parts

logger = init_logger("vllm.efx_plugin")


class SparseCompressedTensorsConfig(CompressedTensorsConfig):
    """`quantization_config` of config.json. Layers under `sparsity_config` are ours, all else is the parent's.

    Attributes:
        sparsity_format: "sparse-bitmask" or "sparse-24-bitmask"; None where nothing is stored sparse.
        sparse_targets, sparse_ignore: module names, class names, or regular expressions after "re:".
    """

    sparsity_format: str | None = None
    sparse_targets: tuple[str, ...] = ()
    sparse_ignore: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SparseCompressedTensorsConfig":
        """Build from the `quantization_config` dictionary.

        Raises:
            EfxError: the sparsity is of a kind that cannot be served.
        """
        sparsity = sparsity_in(config)
        if sparsity is None:  # vLLM decides, which stumbles over what is there but says nothing
            said = {key: value for key, value in config.items() if key != "sparsity_config" and value is not None}
            theirs: SparseCompressedTensorsConfig = super().from_config(said)
            return theirs
        _check_servable(config)
        self: SparseCompressedTensorsConfig = super().from_config(readable_by_vllm(config))
        restore_formats(self.target_scheme_map, config)
        self.sparsity_format = sparsity["format"]
        self.sparse_targets = tuple(sparsity["targets"])
        self.sparse_ignore = tuple(sparsity.get("ignore") or ())
        return self

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename layer paths in targets and ignore as vLLM renames the model's modules."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.sparse_targets = _map_paths(self.sparse_targets, hf_to_vllm_mapper)
        self.sparse_ignore = _map_paths(self.sparse_ignore, hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for a sparse linear layer, quantized or not; the parent's for everything else.

        Raises:
            EfxError: a fused layer is sparse in part, or a layer is quantized in a way that is not served.
        """
        if self.sparsity_format is None or not isinstance(layer, LinearBase | VocabParallelEmbedding | RoutedExperts):
            return super().get_quant_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            # The same words for every layer, so that each process logs them once.
            logger.info_once(
                "efx-plugin: %s are dense: efx-plugin has no sparse kernel for fused experts.",
                re.sub(r"\.\d+\.", ".*.", prefix),
                scope="process",
            )
            refuse_expert_parts(layer, prefix, self.sparsity_format)
            return super().get_quant_method(layer, prefix)
        shards = self._shard_names(prefix)
        scheme = self.get_scheme_dict(layer, prefix)
        if (
            isinstance(layer, LinearBase)
            and not isinstance(layer, GateLinear)
            and self._is_sparse(layer, prefix, shards)
        ):
            return SparseLinearMethod(self.sparsity_format, shards, int8_scheme(scheme, prefix) if scheme else None)
        if scheme:
            refuse_unpacked(scheme, prefix)
        refuse_parts(layer, prefix, self.sparsity_format)
        return super().get_quant_method(layer, prefix)

    def get_scheme(self, layer: torch.nn.Module, layer_name: str | None = None) -> CompressedTensorsScheme | None:
        """Ours for weights of four bits, which may turn out to be sparse; the parent's for everything else."""
        scheme: CompressedTensorsScheme | None = super().get_scheme(layer, layer_name)
        return sparse_if_pruned(scheme) if isinstance(layer, LinearBase) else scheme

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """compressed-tensors up to 0.8 named its tensors `weight.compressed`, later releases `compressed`."""
        old_names = {f".weight.{part}": f".{part}" for part in part_names()}
        return CompressedTensorsConfig.get_checkpoint_weight_mapper() | WeightsMapper(orig_to_new_suffix=old_names)

    def _shard_names(self, prefix: str) -> list[str]:
        """The checkpoint's modules behind one of vLLM's, in order: q_proj, k_proj and v_proj for a qkv_proj."""
        parent, dot, name = prefix.rpartition(".")
        return [f"{parent}{dot}{shard}" for shard in self.packed_modules_mapping.get(name, [name])]

    def _is_sparse(self, layer: LinearBase, prefix: str, shards: list[str]) -> bool:
        # Only the checkpoint's own names count: "re:.*v_proj" matches qkv_proj too, and does not mean q and k.
        sparse = [
            name
            for name in shards
            if find_matched_target(name, layer, self.sparse_targets) is not None
            and not should_ignore_layer(name, self.sparse_ignore)
        ]
        if sparse and len(sparse) < len(shards):
            dense = ", ".join(name for name in shards if name not in sparse)
            raise EfxError(
                f"{prefix} fuses {', '.join(shards)}, of which {dense} is dense by sparsity_config in config.json, and "
                "vLLM needs all of them sparse or none: export the model again with all or none of them in `ignore`"
            )
        return bool(sparse)


def _check_servable(config: dict[str, Any]) -> None:
    sparsity = config["sparsity_config"]
    if sparsity["format"] not in format_names():
        raise EfxError(
            f"sparsity_config.format is {sparsity['format']!r}, but efx-plugin serves {' and '.join(format_names())} "
            "only: export the model again in one of these"
        )
    for key in ("targets", "ignore"):
        names = sparsity.get(key) or []
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise EfxError(f"sparsity_config.{key} in config.json must be a list of strings, not {names!r}")
    if not sparsity.get("targets"):
        raise EfxError(
            "sparsity_config.targets in config.json is empty, so that it does not say which layers are sparse: convert "
            "the checkpoint with efx_plugin.load_sparse and save_sparse"
        )
    if config.get("transform_config"):
        raise EfxError(
            "the checkpoint has both a sparsity_config and a transform_config, and efx-plugin cannot apply transforms "
            "to sparse layers: export the model again without one of the two"
        )


def _map_paths(names: tuple[str, ...], mapper: WeightsMapper) -> tuple[str, ...]:
    """Rename layer paths; leave class names ("Linear") and regular expressions as they are."""
    mapped: list[str] = []
    for name in names:
        is_path = "." in name and not name.startswith("re:")
        mapped += mapper.apply_list([name]) if is_path else [name]
    return tuple(mapped)
