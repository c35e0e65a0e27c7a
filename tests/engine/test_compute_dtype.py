import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from loguru import logger
from peft import LoraConfig, get_peft_model
from torch import nn

from efx_plugin.engine import compute_dtype
from efx_plugin.engine.compute_dtype import (
    choose_compute_dtype,
    choose_for,
    computed_in,
    convert,
    restore,
    stored_dtype,
    warn_of_slow_dtype,
)
from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import merge_adapters
from tests.support.tiny_llama import tiny_llama

HALVES = [torch.bfloat16, torch.float16]
SEVEN_BILLION = 7_000_000_000


@pytest.fixture
def slow(monkeypatch):
    """A CPU that multiplies in float32 alone, a fifth as fast in anything else, with 64 GB free."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(compute_dtype, "cpu_multiplies_in", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(compute_dtype, "time_over_float32", lambda dtype: 5.0)
    monkeypatch.setattr(compute_dtype, "free_memory", lambda: 64 * 10**9)


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(logger, "warning", messages.append)
    return messages


@pytest.mark.parametrize("stored", HALVES)
def test_float32_where_the_processor_cannot_multiply_in_what_is_stored(slow, stored):
    chosen = choose_compute_dtype(stored, SEVEN_BILLION)
    assert chosen.dtype == torch.float32
    assert "7.00 billion parameters take 28.0 GB of memory so, 64.0 GB are free" in chosen.reason
    assert choose_compute_dtype(stored, SEVEN_BILLION, "checkpoint").dtype == stored


@pytest.mark.parametrize("stored", HALVES)
@pytest.mark.parametrize("has", ["accelerator", "instructions"])
def test_nothing_changes_elsewhere(slow, monkeypatch, stored, has):
    if has == "accelerator":
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    else:
        monkeypatch.setattr(compute_dtype, "cpu_multiplies_in", lambda dtype: True)
    assert choose_compute_dtype(stored, SEVEN_BILLION).dtype == stored
    assert choose_compute_dtype(stored, SEVEN_BILLION, "float32").dtype == torch.float32


def test_a_model_that_does_not_fit_stays_in_its_dtype_and_says_so(slow, monkeypatch):
    monkeypatch.setattr(compute_dtype, "free_memory", lambda: 30 * 10**9)
    chosen = choose_compute_dtype(torch.bfloat16, SEVEN_BILLION)
    assert chosen.dtype == torch.bfloat16
    assert "28.0 GB of memory so, 30.0 GB are free, which does not leave enough" in chosen.reason
    with pytest.raises(EfxError, match=r"does not fit into memory.*28\.0 GB.*leave --compute-dtype at auto"):
        choose_compute_dtype(torch.bfloat16, SEVEN_BILLION, "float32")


def test_a_model_in_float32_stays_so_whatever_its_size(slow):
    assert choose_compute_dtype(torch.float32, 10**12).dtype == torch.float32


def test_a_choice_that_does_not_exist():
    with pytest.raises(EfxError, match="'half' does not exist: choose one of auto, float32, checkpoint"):
        choose_compute_dtype(torch.bfloat16, 1, "half")


def test_the_dtype_of_a_model_is_that_of_most_of_its_weights(slow):
    sizes = [(torch.float32, 10), (torch.bfloat16, 90), (torch.int8, 1000)]
    assert stored_dtype(sizes) == (torch.bfloat16, 100)
    assert choose_for(tiny_llama().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("stored", HALVES)
def test_there_and_back_no_bit_changes_and_what_was_wide_stays_so(stored):
    model = tiny_llama(tie_word_embeddings=True).to(stored)
    model.model.norm.float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with computed_in(model, torch.float32):
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
        assert model.lm_head.weight is model.model.embed_tokens.weight
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8))


def test_an_adapter_keeps_its_dtype_beside_weights_of_another():
    adapted = get_peft_model(tiny_llama().bfloat16(), LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: tensor.dtype for name, tensor in adapted.state_dict().items()}
    assert set(before.values()) == {torch.bfloat16, torch.float32}
    with computed_in(adapted, torch.float32):
        assert {tensor.dtype for tensor in adapted.parameters()} == {torch.float32}
    assert {name: tensor.dtype for name, tensor in adapted.state_dict().items()} == before


def test_zeros_and_masks_are_exact_after_rounding_and_values_are_rounded_once():
    """Of every magnitude that float32 has in the range of normal numbers, however it was pruned."""
    model = tiny_llama().bfloat16()
    dtypes = convert(model, torch.float32)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape) * torch.randint(-120, 120, weight.shape).float().exp2())
        keep = torch.rand(weight.shape) < 0.5
        weight.mul_(keep)
        exact = weight.clone()
    restore(model, dtypes)
    assert torch.equal(weight != 0, keep)
    assert torch.equal(weight, exact.bfloat16())


def test_with_an_adapter_merged_in_between():
    model = tiny_llama().bfloat16()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    dtypes = convert(adapted, torch.float32)
    merged = merge_adapters(adapted)
    exact = merged.model.layers[1].self_attn.q_proj.weight.detach().clone()
    assert exact.dtype == torch.float32
    restore(merged, dtypes)
    assert {tensor.dtype for tensor in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(merged.model.layers[1].self_attn.q_proj.weight, exact.bfloat16())


def test_a_weight_that_float16_cannot_hold_is_named():
    model = tiny_llama().half()
    dtypes = convert(model, torch.float32)
    nn.init.constant_(model.model.layers[1].mlp.down_proj.weight, 1e6)
    with pytest.raises(
        EfxError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds weights.*too large for float16"
    ):
        restore(model, dtypes)


def test_the_bytes_of_a_quantized_weight_survive_the_rounding_of_its_scale():
    """Also where bfloat16 tells two neighbours apart no more: of 101 and 102 steps, say."""
    layer = nn.Linear(255, 4, bias=False)
    steps = torch.arange(-127, 128).repeat(4, 1)
    scale = torch.tensor([0.011, 0.0173, 0.37, 1.0001]).unsqueeze(1)
    layer.weight.data = steps * scale
    layer.weight_scale = nn.Parameter(scale.clone(), requires_grad=False)
    arguments = QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")
    layer.quantization_scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    restore(nn.Sequential(layer), {"0.weight": torch.bfloat16})
    assert torch.equal(layer.weight_scale, scale.bfloat16())
    compress = compute_dtype.NaiveQuantizationCompressor.compress
    state = {"weight": layer.weight.data, "weight_scale": layer.weight_scale.data}
    assert torch.equal(compress(state, layer.quantization_scheme)["weight"], steps.to(torch.int8))


def test_users_of_a_slow_dtype_are_told(slow, warnings):
    warn_of_slow_dtype(tiny_llama().bfloat16(), "do this")
    (message,) = warnings
    assert "bfloat16" in message and "5.0 times faster in float32; do this" in message


@pytest.mark.parametrize("case", ["float32", "fast", "accelerator"])
def test_others_are_not(slow, warnings, monkeypatch, case):
    model = tiny_llama()
    if case != "float32":
        model = model.bfloat16()
    if case == "fast":
        monkeypatch.setattr(compute_dtype, "time_over_float32", lambda dtype: 1.05)
    if case == "accelerator":
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    warn_of_slow_dtype(model, "do this")
    assert not warnings
