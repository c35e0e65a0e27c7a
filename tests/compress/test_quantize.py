"""Quantizing a sparse model: pruned weights stay zero, kept ones come onto a grid and make up for each other."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from efx_plugin.checkpoint import load_sparse
from efx_plugin.checkpoint.reader import read_config, sizes
from efx_plugin.compress import quantize
from efx_plugin.compress.quantize import quantize_to_checkpoint
from efx_plugin.compress.recipe import find_recipe, quantizing_recipe
from efx_plugin.compress.request import QuantizeRequest
from efx_plugin.errors import EfxError, UsageError
from efx_plugin.modifier import EfficientXpertModifier
from tests.compress.test_heal import save_expert
from tests.support.tiny_llama import save_tiny_llama, tiny_tokenizer

BITS = {"W8A8": 8, "W8A16": 8, "W4A16": 4}


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 128, (40, 40), generator=generator).tolist()
    (folder / "domain.txt").write_text("\n".join(" ".join(f"t{word}" for word in line) for line in words))
    return save_expert(folder / "expert")


def request_for(expert, output, quantization):
    data = str(expert.with_name("domain.txt"))
    recipe = quantizing_recipe(quantization)
    return QuantizeRequest(expert, output, recipe, data, samples=8, length=32, progress=False)


def load(scheme, directory):
    if BITS[scheme] == 8:
        return load_sparse(directory)
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=CompressedTensorsConfig(dequantize=True), dtype="auto"
    )


@pytest.fixture(scope="module", params=BITS)
def quantized(request, expert, tmp_path_factory):
    output = tmp_path_factory.mktemp(request.param) / "small"
    return request.param, output, quantize_to_checkpoint(request_for(expert, output, request.param))


def test_zeros_stay_and_the_rest_is_near_what_it_was(expert, quantized):
    scheme, output, report = quantized
    before, after = load_sparse(expert).state_dict(), load(scheme, output).state_dict()
    pruned = {name: weight == 0 for name, weight in before.items() if "proj" in name}
    assert sum(map(torch.Tensor.any, pruned.values())) == 13
    for name, zeros in pruned.items():
        weight, found = before[name].float(), after[name].float()
        assert not found[zeros].any() and not torch.equal(found, weight)
        assert (found - weight).norm() < {8: 0.02, 4: 0.25}[BITS[scheme]] * weight.norm()
    others = before.keys() - pruned.keys()
    assert others and all(torch.equal(before[name], after[name]) for name in others)
    assert report["sparsity"] == pytest.approx(
        sum(int(zeros.sum()) for zeros in pruned.values()) / sum(zeros.numel() for zeros in pruned.values()), abs=0.05
    )
    assert {layer["name"] + ".weight" for layer in report["layers"]} == pruned.keys()


def test_the_checkpoint_names_its_scheme_and_where_it_comes_from(quantized):
    scheme, output, _ = quantized
    groups = read_config(output)["quantization_config"]["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {BITS[scheme]}
    assert all((group["input_activations"] is not None) == (scheme == "W8A8") for group in groups)
    assert (output / "tokenizer.json").is_file()
    assert (
        json.loads((output / "provenance.json").read_text())["calibration"]
        == "8 sequences of 32 tokens from domain.txt"
    )


def test_kept_weights_make_up_for_the_rounding_of_earlier_blocks(expert, tmp_path):
    """The recipe's `dense_targets` bring the outputs of the last block nearer to those before quantization."""
    ids = torch.tensor([tiny_tokenizer()(line).input_ids[:32] for line in lines(expert)[:8]])
    wanted, errors = last_hidden_states(load_sparse(expert), ids), []
    for share in ("0.5", "0"):
        request = request_for(expert, tmp_path / share, "W4A16")
        text = request.recipe.text.replace("dense_targets: 0.5", f"dense_targets: {share}")
        (tmp_path / f"{share}.yaml").write_text(text)
        quantize_to_checkpoint(replace(request, recipe=find_recipe(str(tmp_path / f"{share}.yaml"))))
        errors.append(float((last_hidden_states(load("W4A16", request.output), ids) - wanted).norm()))
    assert errors[0] < errors[1]


@torch.no_grad()
def last_hidden_states(model, ids):
    return model.model(ids).last_hidden_state.float()


def lines(expert):
    return expert.with_name("domain.txt").read_text().splitlines()


def test_what_cannot_be_quantized_is_refused(expert, quantized, tmp_path):
    with pytest.raises(UsageError, match="--quantization W2 is none of W8A8, W8A16, W4A16"):
        quantizing_recipe("W2")
    _, small, _ = quantized
    again = replace(request_for(expert, tmp_path / "again", "W8A16"), model=small)
    with pytest.raises(EfxError, match="is quantized already: quantize the checkpoint that it was made of"):
        quantize_to_checkpoint(again)
    assert not again.output.exists()


def test_the_disk_is_checked_before_a_weight_is_loaded(expert, tmp_path, monkeypatch):
    request = request_for(expert, tmp_path / "small", "W4A16")
    report = sizes(expert)
    others = report["bytes_on_disk"] - report["linear_bytes_sparse"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(others)))
    monkeypatch.setattr(quantize, "load_sparse", lambda directory: pytest.fail("loaded"))
    with pytest.raises(EfxError, match="make room or write elsewhere"):
        quantize_to_checkpoint(request)
    assert not request.output.exists()


def test_the_modifier_wants_a_sparse_model_and_something_to_do(tmp_path):
    with pytest.raises(EfxError, match="nothing is quantized: set quantization, or leave preserve_sparsity_mask out"):
        EfficientXpertModifier(preserve_sparsity_mask=True)
    with pytest.raises(EfxError, match="keeps the masks as they are and swap_rounds would change them: leave one"):
        EfficientXpertModifier(preserve_sparsity_mask=True, quantization="W8A16", swap_rounds=2)
    data = Dataset.from_dict({"input_ids": [[3, 4, 5]], "attention_mask": [[1, 1, 1]]})
    modifier = EfficientXpertModifier(preserve_sparsity_mask=True, quantization="W8A16", ignore=["lm_head"])
    with pytest.raises(EfxError, match="this one has none in its targets: prune it first"):
        oneshot(model=str(save_tiny_llama(tmp_path)), processor=tiny_tokenizer(), recipe=[modifier], dataset=data)
