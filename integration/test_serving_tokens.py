"""vLLM serves a sparse checkpoint like the same weights stored dense: see `integration.served` for what that means."""

import json
import traceback
import weakref

import pytest
from safetensors.torch import load_file

from efx_plugin.checkpoint.formats.registry import part_names
from integration.served import difference
from integration.serving_models import (
    ARCHITECTURES,
    PROMPTS,
    answers,
    assert_same,
    engine,
    kernel,
    negate_one,
    plant,
    rewrite,
    save_adapter,
    save_tiny,
    serve,
    serve_once,
    swap_rows,
    use_old_names,
)
from tests.support.tiny_llama import tiny_tokenizer

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture(scope="module")
def dense(llama):
    """What vLLM gives for the dense checkpoint."""
    return serve(llama / "dense")


@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if name not in ("Llama", "Mixtral", "Qwen3Moe")]
)
def test_it_is_served_as_the_dense_checkpoint(architecture, tmp_path):
    model = save_tiny(tmp_path, architecture)
    dense = serve(model / "dense")
    assert_same(dense, serve(model / "sparse-bitmask"), kernel())
    planted = plant(swap_rows, model / "sparse-bitmask", tmp_path / "planted")
    assert "log-probabilities" in str(difference(dense, serve(planted)))


@pytest.mark.parametrize("fault", [negate_one, swap_rows])
def test_a_fault_is_more_than_rounding(llama, dense, fault, tmp_path):
    planted = plant(fault, llama / "sparse-bitmask", tmp_path / "planted")
    assert "log-probabilities" in str(difference(dense, serve(planted)))


def test_one_layer_is_staged_at_a_time(llama, dense, monkeypatch):
    from efx_plugin.serving import shards, weight_loader

    staged, expanded, peak = weakref.WeakSet(), weakref.WeakSet(), {"staged": 0, "expanded": 0}

    class Staging(weight_loader.ModelWeightParameter):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            staged.add(self)
            peak["staged"] = max(peak["staged"], len(staged))

    def decompress(*arguments, **options):
        dense = real_decompress(*arguments, **options)
        expanded.add(dense)
        peak["expanded"] = max(peak["expanded"], len(expanded))
        return dense

    real_decompress = shards.decompress
    monkeypatch.setattr(weight_loader, "ModelWeightParameter", Staging)
    monkeypatch.setattr(shards, "decompress", decompress)
    assert_same(dense, serve(llama / "sparse-bitmask"), kernel())
    assert peak == {"staged": 1, "expanded": 1}
    assert not staged and not expanded


def test_the_other_format_is_served_under_its_old_names(llama, dense, tmp_path):
    old = rewrite(llama / "sparse-24-bitmask", tmp_path / "old", use_old_names)
    assert_same(dense, serve(old), kernel())


def test_layers_in_ignore_are_dense(llama, dense, tmp_path):
    ignored = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"] + ["model.layers.0.mlp.down_proj"]
    weights = load_file(llama / "dense" / "model.safetensors")

    def store_dense(tensors):
        for name in ignored:
            tensors[f"{name}.weight"] = weights[f"{name}.weight"]
            for part in part_names():
                tensors.pop(f"{name}.{part}", None)

    mixed = rewrite(llama / "sparse-bitmask", tmp_path / "mixed", store_dense)
    config = json.loads((mixed / "config.json").read_text())
    config["quantization_config"]["sparsity_config"]["ignore"] += [*ignored[:3], r"re:.*layers\.0\.mlp\.down_proj"]
    (mixed / "config.json").write_text(json.dumps(config))
    with engine(mixed) as llm:
        assert_same(dense, answers(llm, mixed), kernel())
        layers = llm.apply_model(
            lambda model: [name for name, one in model.named_modules() if hasattr(one, "packed_weight")]
        )
    parts = [
        ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj"),
        ("self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    ]
    assert sorted(layers[0]) == sorted(
        f"model.layers.{layer}.{name}" for layer, names in enumerate(parts) for name in names
    )


def test_graphs_that_vllm_keeps_are_kept_for_the_kernel(llama):
    with engine(llama / "sparse-bitmask") as llm:
        config = llm.llm_engine.vllm_config
        assert config.additional_config["efx_plugin"]["kernels"] == [kernel()]
        kept = config.compute_hash()
        config.additional_config["efx_plugin"]["kernels"] = ["another"]
        assert config.compute_hash() != kept


def test_what_vllm_keeps_for_a_reload_does_not_keep_packed_weights(llama):
    def entrances(model):
        from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

        kept = [
            LAYERWISE_INFO[layer].restore_metadata[0] for layer in model.modules() if hasattr(layer, "packed_weight")
        ]
        loaders = [vars(tensor)["weight_loader"] for tensors in kept for tensor in tensors.values()]
        return {
            cell.cell_contents
            for loader in loaders
            for cell in loader.__closure__
            if hasattr(cell.cell_contents, "close")
        }

    with engine(llama / "sparse-bitmask") as llm:
        (found,) = llm.apply_model(entrances)
        assert len(found) == 8
        assert all(entrance._loader is None for entrance in found)


def test_it_is_served_as_the_dense_checkpoint_when_compiled(llama):
    dense = serve(llama / "dense", enforce_eager=False)
    assert_same(dense, serve(llama / "sparse-bitmask", enforce_eager=False), kernel())


def test_adapters_run_on_sparse_layers(llama, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", llama / "dense")
    plain, adapted = {}, {}
    for kind in ("dense", "sparse-bitmask"):
        with engine(llama / kind, enable_lora=True, max_lora_rank=8) as llm:
            from vllm.lora.request import LoRARequest

            plain[kind] = answers(llm, llama / kind)
            adapted[kind] = answers(llm, llama / kind, lora_request=LoRARequest("adapter", 1, str(adapter)))
    for served in (plain, adapted):
        assert_same(served["dense"], served["sparse-bitmask"], kernel())
    assert "log-probabilities" in str(difference(plain["dense"], adapted["dense"]))


def test_log_probabilities_of_prompts_end_alike_where_adapters_may_be_served(llama):
    """vLLM 0.32 fails on those of several prompts at once, in its own output layer for adapters, whatever the model."""

    def failed_in(directory):
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        with engine(directory, enable_lora=True, max_lora_rank=8) as llm:
            try:
                llm.generate(prompts, sampling, use_tqdm=False)
            except RuntimeError as error:
                return [frame.name for frame in traceback.extract_tb(error.__traceback__)]

    dense, sparse = failed_in(llama / "dense"), failed_in(llama / "sparse-bitmask")
    assert dense == sparse
    assert dense is None or "add_lora_logits" in dense


def test_it_is_served_as_the_dense_checkpoint_under_tensor_parallelism(tmp_path):
    # One key-value head for both ranks, and 38 of 76 intermediate columns each: bytes of the bitmask are split.
    model = save_tiny(tmp_path, "Llama", num_key_value_heads=1)
    prompts = [" ".join(f"t{token}" for token in prompt) for prompt in PROMPTS]
    served, log = {}, {}
    for kind in ("dense", "sparse-bitmask"):
        tiny_tokenizer(320).save_pretrained(model / kind)
        result, served[kind] = serve_once(model / kind, prompts, "--tp", "2")
        assert result.returncode == 0, result.stderr[-3000:]
        log[kind] = result.stdout + result.stderr
    dense, sparse = served.values()
    assert_same(dense, sparse, kernel())
    for output in sparse["outputs"]:
        assert len(output["token_ids"]) == 8
        assert output["text"].split() == [f"t{token}" for token in output["token_ids"] if token > 2]
    assert sparse["tokens_per_second"] > 0 and sparse["load_seconds"] > 0
    line = f"sparse layers run on the {kernel()} kernel"
    assert (log["dense"].count(line), log["sparse-bitmask"].count(line)) == (0, 2)  # once per process


def test_it_is_served_as_the_dense_checkpoint_where_ranks_share_what_is_fused_on_disk(tmp_path, monkeypatch):
    # As above: one key-value head for both ranks, 38 columns each.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = save_tiny(tmp_path, "Phi3", num_key_value_heads=1)
    dense = serve(model / "dense", tensor_parallel_size=2)
    assert_same(dense, serve(model / "sparse-bitmask", tensor_parallel_size=2), kernel())
