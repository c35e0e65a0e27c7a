"""What we assume of vLLM's private parts, read off its sources, so that a build for a GPU can be looked at too.

EFX_UPSTREAM_VLLM names a folder with another vLLM than the one that is installed.
"""

import os
from functools import cache
from pathlib import Path

import pytest

from tests.upstream.sources import Sources

pytestmark = pytest.mark.serving

LINEAR = "vllm.model_executor.layers.linear"
MOE = "vllm.model_executor.layers.fused_moe"
PARAMETER = "vllm.model_executor.parameter"
QUANTIZATION = "vllm.model_executor.layers.quantization"
COMPRESSED = f"{QUANTIZATION}.compressed_tensors"
MODELS = "vllm.model_executor.models.utils"
SERVE = "vllm.entrypoints.cli.serve"
LOADING = "vllm.model_executor.model_loader"
LORA = "vllm.lora.layers"

ROOM = "efx_plugin.serving"
KERNEL = "efx_plugin.kernels.cuda"
LOADER, METHOD, CONFIG, LAUNCH = (f"{ROOM}.{name}" for name in ("weight_loader", "linear_method", "config", "launch"))


@cache
def vllm() -> Sources:
    """The release in question."""
    folder = os.environ.get("EFX_UPSTREAM_VLLM")
    return Sources("vllm", Path(folder) if folder else None)


def holds(condition: object, change: str, user: str) -> None:
    """Fail with a sentence unless the condition is true."""
    assert condition, f"vLLM {vllm().release}: {change}, and {user} relies on it"


@pytest.mark.parametrize(
    ("module", "name", "user"),
    [
        (LINEAR, "LinearBase", LOADER),
        (LINEAR, "LinearMethodBase", METHOD),
        (LINEAR, "QKVParallelLinear", LOADER),
        (LINEAR, "QuantizeMethodBase", CONFIG),
        (LINEAR, "register_weight_loader_v2_supported_method", METHOD),
        (MOE, "GateLinear", CONFIG),
        (MOE, "RoutedExperts", CONFIG),
        (PARAMETER, "BasevLLMParameter", LOADER),
        (PARAMETER, "ChannelQuantScaleParameter", LOADER),
        (PARAMETER, "ModelWeightParameter", LOADER),
        (QUANTIZATION, "register_quantization_config", ROOM),
        (f"{COMPRESSED}.compressed_tensors", "CompressedTensorsConfig", CONFIG),
        (f"{COMPRESSED}.utils", "find_matched_target", CONFIG),
        (f"{COMPRESSED}.utils", "should_ignore_layer", CONFIG),
        ("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding", CONFIG),
        (MODELS, "WeightsMapper", CONFIG),
        (SERVE, "ServeSubcommand", LAUNCH),
        ("vllm.utils.argparse_utils", "FlexibleArgumentParser", LAUNCH),
        ("vllm.config", "get_current_vllm_config_or_none", METHOD),
        ("vllm.logger", "init_logger", METHOD),
        ("vllm", "__version__", ROOM),
    ],
)
def test_names_can_be_imported(module, name, user):
    holds(name in vllm().names(module), f"{module} has no {name}", user)


@pytest.mark.parametrize(
    ("module", "name", "parameters", "user"),
    [
        (
            LINEAR,
            "LinearMethodBase.create_weights",
            [
                "layer",
                "input_size_per_partition",
                "output_partition_sizes",
                "input_size",
                "output_size",
                "params_dtype",
            ],
            METHOD,
        ),
        (LINEAR, "LinearMethodBase.apply", ["layer", "x", "bias"], METHOD),
        (f"{QUANTIZATION}.base_config", "QuantizeMethodBase.process_weights_after_loading", ["layer"], METHOD),
        (PARAMETER, "BasevLLMParameter.__init__", ["data", "weight_loader"], LOADER),
        (PARAMETER, "_ColumnvLLMParameter.__init__", ["output_dim"], LOADER),
        (PARAMETER, "RowvLLMParameter.__init__", ["input_dim"], LOADER),
        (f"{COMPRESSED}.compressed_tensors", "CompressedTensorsConfig.from_config", ["cls", "config"], CONFIG),
        (
            f"{COMPRESSED}.compressed_tensors",
            "CompressedTensorsConfig.apply_vllm_mapper",
            ["hf_to_vllm_mapper"],
            CONFIG,
        ),
        (f"{COMPRESSED}.compressed_tensors", "CompressedTensorsConfig.get_quant_method", ["layer", "prefix"], CONFIG),
        (
            f"{COMPRESSED}.compressed_tensors",
            "CompressedTensorsConfig.get_scheme_dict",
            ["layer", "layer_name"],
            CONFIG,
        ),
        (f"{COMPRESSED}.utils", "find_matched_target", ["layer_name", "module", "targets"], CONFIG),
        (f"{COMPRESSED}.utils", "should_ignore_layer", ["layer_name", "ignore"], CONFIG),
        (MODELS, "WeightsMapper.apply_list", ["values"], CONFIG),
        (QUANTIZATION, "register_quantization_config", ["quantization"], ROOM),
        (SERVE, "ServeSubcommand.subparser_init", ["subparsers"], LAUNCH),
        (SERVE, "ServeSubcommand.validate", ["args"], LAUNCH),
        (SERVE, "ServeSubcommand.cmd", ["args"], LAUNCH),
        ("vllm.logger", "_VllmLogger.info_once", ["msg", "scope"], METHOD),
    ],
)
def test_functions_take_these_parameters(module, name, parameters, user):
    found = vllm().parameters(module, name)
    holds(found, f"{module} has no {name}", user)
    kept = [one for one in found if one in parameters]
    holds(kept == parameters, f"{module}.{name} takes {kept} of the parameters {parameters}", user)


@pytest.mark.parametrize(
    ("module", "name", "attributes", "user"),
    [
        (LINEAR, "LinearBase", {"prefix", "input_size", "output_size", "tp_rank", "tp_size", "quant_method"}, LOADER),
        (LINEAR, "QKVParallelLinear", {"total_num_heads", "total_num_kv_heads", "head_size", "v_head_size"}, LOADER),
        (LINEAR, "MergedColumnParallelLinear", {"output_sizes"}, LOADER),
        (PARAMETER, "ModelWeightParameter", {"tp_rank", "tp_size"}, LOADER),
        (f"{QUANTIZATION}.base_config", "QuantizationConfig", {"packed_modules_mapping"}, CONFIG),
        (f"{QUANTIZATION}.base_config", "QuantizationConfig", {"get_checkpoint_weight_mapper"}, CONFIG),
        (f"{COMPRESSED}.compressed_tensors", "CompressedTensorsConfig", {"target_scheme_map"}, CONFIG),
        (MODELS, "WeightsMapper", {"orig_to_new_suffix", "orig_to_new_prefix", "__or__"}, CONFIG),
        ("vllm.config.vllm", "VllmConfig", {"additional_config", "compute_hash"}, METHOD),
        (SERVE, "ServeSubcommand", {"name"}, LAUNCH),
    ],
)
def test_objects_have_these_attributes(module, name, attributes, user):
    missing = attributes - vllm().attributes(module, name)
    holds(not missing, f"a {name} of {module} has no {', '.join(sorted(missing))}", user)


@pytest.mark.parametrize(
    ("module", "name", "phrase", "user"),
    [
        # The layer hands its own loader to `create_weights`.
        (LINEAR, "ReplicatedLinear.__init__", "weight_loader=", METHOD),
        (LINEAR, "ColumnParallelLinear.__init__", "weight_loader=", METHOD),
        (LINEAR, "RowParallelLinear.__init__", "weight_loader=", METHOD),
        # A layer's tensors find their shard by these ids.
        (LINEAR, "QKVParallelLinear.weight_loader_v2", "['q', 'k', 'v']", LOADER),
        # The weights that all experts are fused into.
        (f"{MOE}.routed_experts", "", "w13_", LOADER),
        (f"{MOE}.routed_experts", "", "w2_", LOADER),
        # A model is made on the device, and so are the first parameters of our layers.
        (f"{LOADING}.base_loader", "BaseModelLoader.load_model", "with target_device", LOADER),
        (f"{LOADING}.utils", "", "quant_method.process_weights_after_loading(module)", METHOD),
        # Weights are loaded in place by loaders that have names.
        (f"{LOADING}.reload.layerwise", "_wrap_parameters_weight_loader", ".__name__", LOADER),
        # LoRA looks for the device of a layer's weight, and multiplies by the layer's own method.
        (f"{LORA}.utils", "_get_lora_device", "base_layer.weight.device", LOADER),
        (f"{LORA}.base_linear", "", ".apply(self.base_layer, x, bias)", METHOD),
        # The bias is added by the first rank alone, before ranks add their results.
        (LINEAR, "RowParallelLinear.forward", "None if self.tp_rank > 0 or self.skip_bias_add else self.bias", METHOD),
        (LINEAR, "RowParallelLinear.forward", "tensor_model_parallel_all_reduce(output_parallel)", METHOD),
        # Kept graphs are found by a hash, which the configuration is a part of; it is there while weights are loaded.
        ("vllm.compilation.caching", "aot_compile_hash_factors", "vllm_config.compute_hash()", METHOD),
        ("vllm.config.vllm", "VllmConfig.compute_hash", "self.additional_config", METHOD),
        ("vllm.v1.worker.gpu_worker", "Worker.load_model", "set_current_vllm_config(self.vllm_config)", METHOD),
        # Graphs are split at attention, so that our operator is inside of the pieces that are captured, on one stream.
        ("vllm.config.compilation", "", "self.splitting_ops = list(self._attention_ops)", KERNEL),
        ("vllm.compilation.cuda_graph", "CUDAGraphWrapper.__call__", "stream=current_stream()", KERNEL),
        # Old names of a checkpoint's tensors are mapped before they are looked up.
        (MODELS, "", "get_checkpoint_weight_mapper()", CONFIG),
        ("vllm.plugins", "", "'vllm.general_plugins'", ROOM),
        ("vllm.logger", "", "Literal['process'", METHOD),
        ("vllm.engine.arg_utils", "", "'--kv-cache-memory-bytes'", LAUNCH),
        ("vllm.engine.arg_utils", "", "'--max-model-len'", LAUNCH),
        ("vllm.engine.arg_utils", "", "'--dtype'", LAUNCH),
        ("vllm.engine.arg_utils", "", "'--enforce-eager'", LAUNCH),
        ("vllm.engine.arg_utils", "", "'--tensor-parallel-size'", LAUNCH),
        ("vllm.engine.arg_utils", "", "'auto'", LAUNCH),
        ("vllm.envs", "", "'VLLM_CPU_KVCACHE_SPACE'", LAUNCH),
        ("vllm.envs", "", "'VLLM_CPU_OMP_THREADS_BIND'", LAUNCH),
        ("vllm.envs", "", "'VLLM_TARGET_DEVICE'", LAUNCH),
        ("vllm.envs", "", "'VLLM_WORKER_MULTIPROC_METHOD'", LAUNCH),
        ("vllm.envs", "", "'VLLM_PLUGINS'", LAUNCH),
    ],
)
def test_sources_say_this(module, name, phrase, user):
    holds(phrase in vllm().text(module, name), f"{module}{name and '.'}{name} no longer says {phrase!r}", user)
