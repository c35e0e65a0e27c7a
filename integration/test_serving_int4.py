"""Pruned weights of four bits are served sparse, like vLLM serves the same checkpoint dense."""

import pytest
import torch

from efx_plugin.checkpoint import save_sparse
from efx_plugin.kernels import pruned_int4
from integration.served import difference
from integration.serving_models import (
    PROMPTS,
    answers,
    assert_same,
    engine,
    kernel,
    quantized_model,
    rewrite,
    save_adapter,
    serve,
    serve_once,
)
from tests.support.quantized import save_compressed, w4a16
from tests.support.tiny_llama import tiny_tokenizer

pytestmark = pytest.mark.serving

# Multiples of 32 everywhere, which vLLM's own kernel for four bits asks for; two ranks get 96 inputs each.
SIZES = {"intermediate_size": 192}


def save(directory, scheme):
    model = quantized_model(directory / "tiny", scheme, "Llama", **SIZES)
    save_sparse(model, directory / "int4", progress=False)
    return directory / "int4"


@pytest.fixture(scope="module", autouse=True)
def activations_stay():
    """With AMX vLLM quantizes activations too, and then refuses some shapes; without, it never does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_INT4_W4A8", "0")
        yield


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    """Llama in groups of 32, half of its weights zero, as stock vLLM reads it."""
    return save(tmp_path_factory.mktemp("int4"), w4a16(32))


def dense(directory, **options):
    """What vLLM's own kernel gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruned_int4, "LEAST_ZEROS", 1.1)
        return serve(directory, **options)


@pytest.fixture(scope="module")
def by_vllm(int4):
    return dense(int4)


def test_groups_are_served_as_vllm_serves_them(int4, by_vllm):
    assert_same(by_vllm, serve(int4), kernel("W4A16"))


def test_whole_rows_are_served_as_vllm_serves_them_compiled(tmp_path):
    directory = save(tmp_path, w4a16(None))
    compiled = {"enforce_eager": False}
    assert_same(dense(directory, **compiled), serve(directory, **compiled), kernel("W4A16"))


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM quantizes activations with AMX alone")
def test_activations_are_quantized_where_vllm_quantizes_them(int4, by_vllm, caplog):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_INT4_W4A8", "1")
        quantized = serve(int4)
        assert_same(dense(int4), quantized, kernel("W4A16"))
    assert "(W4A8: " in caplog.text
    assert quantized != by_vllm


def test_a_fault_is_more_than_rounding(int4, by_vllm, tmp_path):
    def swap_words(tensors):
        words = tensors["model.layers.0.self_attn.o_proj.weight_packed"]
        words[[0, 1]] = words[[1, 0]]

    assert "log-probabilities" in str(difference(by_vllm, serve(rewrite(int4, tmp_path / "planted", swap_words))))


def test_two_ranks_serve_their_shares_and_name_bits_and_kernel(int4, by_vllm):
    tiny_tokenizer(320).save_pretrained(int4)
    prompts = [" ".join(f"t{token}" for token in prompt) for prompt in PROMPTS]
    served = {}
    for ranks in (1, 2):
        result, served[ranks] = serve_once(int4, prompts, "--tp", str(ranks), VLLM_CPU_INT4_W4A8="0")
        assert result.returncode == 0, result.stderr[-3000:]
        line = f"sparse layers run on the {kernel('W4A16')} kernel (W4A16: "
        assert (result.stdout + result.stderr).count(line) == ranks  # once per process
    assert difference(*served.values()) is None


def test_adapters_run_on_sparse_layers_of_four_bits(int4, tmp_path):
    from vllm.lora.request import LoRARequest

    adapter = save_adapter(tmp_path / "adapter", int4.parent / "tiny" / "dense")
    request = LoRARequest("adapter", 1, str(adapter))
    options = {"enable_lora": True, "max_lora_rank": 8}
    served = {}
    for least in (1.1, pruned_int4.LEAST_ZEROS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pruned_int4, "LEAST_ZEROS", least)
            with engine(int4, **options) as llm:
                served[least] = answers(llm, int4, lora_request=request), answers(llm, int4)
    (adapted, plain), (sparse_adapted, sparse_plain) = served.values()
    assert_same(adapted, sparse_adapted, kernel("W4A16"))
    assert_same(plain, sparse_plain, kernel("W4A16"))
    assert "log-probabilities" in str(difference(plain, adapted))


def test_nothing_of_vllms_copy_stays(int4):
    def left(model):
        return [
            (type(parameter).__name__, parameter.numel())
            for module in model.modules()
            if hasattr(module, "packed_weight")
            for parameter in module.parameters(recurse=False)
        ]

    with engine(int4) as llm:
        (found,) = llm.apply_model(left)
    assert found == [("Parameter", 0)] * 8  # for the device of an adapter, in each of the four layers of two blocks


def heard(monkeypatch) -> list[str]:
    """What is logged from here on, each line as often as it is said."""
    said: list[str] = []

    def info_once(line: str, *values: str, scope: str) -> None:
        said.append(line % values)

    monkeypatch.setattr("efx_plugin.serving.pruned_int4.logger.info_once", info_once)
    return said


def test_what_is_not_packed_is_named_with_the_reason(int4, by_vllm, monkeypatch):
    monkeypatch.setattr(pruned_int4, "LEAST_ZEROS", 0.6)
    said = heard(monkeypatch)
    assert_same(by_vllm, serve(int4), "dense")
    layers = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    reason = "fewer than a third of their weights are zeros"
    assert said == [f"efx-plugin: model.layers.*.{layer} are served dense: {reason}." for layer in layers * 2]


def test_groups_that_no_sparse_kernel_takes_stay_with_vllm(tmp_path):
    assert serve(save(tmp_path, w4a16(16)))["operator"] == "dense"


def test_without_a_sparse_kernel_vllm_keeps_its_own(int4, by_vllm, monkeypatch):
    from efx_plugin.kernels import registry

    monkeypatch.setattr(registry, "KERNELS", registry.KERNELS[-1:])
    said = heard(monkeypatch)
    assert_same(by_vllm, serve(int4), "dense")
    assert len(said) == 8 and all(
        "no sparse kernel takes them, since there is no sparse kernel" in line for line in said
    )


def test_an_unpruned_checkpoint_is_left_to_vllm(tmp_path):
    model = quantized_model(tmp_path / "tiny", w4a16(32), "Llama", **SIZES)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight.data.copy_(torch.randn_like(module.weight) * module.weight_scale.repeat_interleave(32, 1) * 3)
    save_compressed(model, tmp_path / "unpruned")
    assert serve(tmp_path / "unpruned")["operator"] == "dense"
