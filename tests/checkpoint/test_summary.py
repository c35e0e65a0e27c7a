import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from efx_plugin.checkpoint import read_sparsity_config, save_sparse
from efx_plugin.checkpoint.reader import sizes
from efx_plugin.checkpoint.storage.checksums import FILE
from efx_plugin.checkpoint.summary import summarize
from efx_plugin.errors import SparseCheckpointError
from efx_plugin.evaluate import bits
from efx_plugin.plots import sparsity_heat_map
from tests.checkpoint.test_quantized import INT8, make_model, quantize
from tests.support.tiny_llama import tiny_llama


def pruned(structure):
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            if structure == "2:4":
                groups = parameter.data.view(-1, 4)
                groups.scatter_(1, groups.abs().topk(2, dim=1, largest=False).indices, 0)
            else:
                drop = 0.25 if "v_proj" in name else 0.6
                parameter.data[torch.rand(parameter.shape, generator=generator) < drop] = 0
    return model


@pytest.fixture(params=["2:4", "unstructured"])
def saved(request, tmp_path):
    model = pruned(request.param)
    save_sparse(model, tmp_path / "sparse", progress=False)
    return request.param, model, tmp_path / "sparse"


def test_the_summary_counts_what_the_model_holds(saved):
    structure, model, directory = saved
    summary = summarize(directory)
    weights = {name: p for name, p in model.named_parameters() if "_proj" in name}
    assert {weight.name for weight in summary.weights} == set(weights)
    for weight in summary.weights:
        assert (weight.size, weight.zeros) == (weights[weight.name].numel(), int((weights[weight.name] == 0).sum()))
    zeros = sum(int((p == 0).sum()) for p in weights.values())
    assert summary.sparsity == pytest.approx(zeros / sum(p.numel() for p in weights.values()))
    assert summary.parameters == sum(p.numel() for p in model.parameters())
    assert summary.bytes_dense == 4 * summary.parameters
    assert summary.bytes_on_disk < summary.bytes_dense
    assert summary.bits_per_weight == pytest.approx(bits.stored(directory))
    assert summary.two_of_four == (structure == "2:4")
    assert (summary.format, summary.dtype) == (
        "sparse-24-bitmask" if structure == "2:4" else "sparse-bitmask",
        "float32",
    )
    assert set(summary.by_layer) == {0, 1} and len(summary.by_projection) == 7
    values = [p for name, p in weights.items() if "v_proj" in name]
    expected = sum(int((p == 0).sum()) for p in values) / sum(p.numel() for p in values)
    assert summary.by_projection["self_attn.v_proj"] == pytest.approx(expected)
    assert json.loads(json.dumps(summary.as_json()))["sparsity"] == summary.sparsity


def test_a_2_of_4_pattern_is_seen_in_the_unstructured_format_too(tmp_path):
    save_sparse(pruned("2:4"), tmp_path / "sparse", structure="sparse-bitmask", progress=False)
    assert summarize(tmp_path / "sparse").two_of_four


def test_checksums_tell_a_changed_value_that_no_other_check_can_see(saved):
    _, _, directory = saved
    assert summarize(directory).checksums == "not checked"
    assert summarize(directory, verify=True).checksums == "match"
    weights = directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SparseCheckpointError, match=r"model\.safetensors is not what SHA256SUMS says"):
        summarize(directory, verify=True)


@pytest.mark.parametrize("line", ["nonsense", "0" * 64 + "  ../escape", "0" * 64 + "  missing.safetensors"])
def test_a_list_of_checksums_is_not_trusted_either(saved, line):
    _, _, directory = saved
    (directory / FILE).write_text(line + "\n")
    with pytest.raises(SparseCheckpointError, match="SHA256SUMS"):
        summarize(directory, verify=True)
    (directory / FILE).unlink()
    assert summarize(directory, verify=True).checksums == "absent"


def test_the_heat_map_is_a_picture(saved, tmp_path):
    sparsity_heat_map(summarize(saved[2]), tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("structure", ["sparse-24-bitmask", "sparse-bitmask"])
def test_zeros_that_the_format_stores_are_zeros(tmp_path, structure):
    """75 % zeros: every four has one non-zero, and in sparse-24-bitmask a zero beside it."""
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data.view(-1, 4)[:, 1:] = 0
    save_sparse(model, tmp_path / "sparse", structure=structure, progress=False)
    summary = summarize(tmp_path / "sparse")
    assert summary.sparsity == 0.75 and summary.two_of_four
    assert read_sparsity_config(tmp_path / "sparse")["global_sparsity"] == 0.75


def test_zeros_among_the_values_are_zeros(tmp_path):
    """No writer of sparse-bitmask stores them, but a weight may be set to zero in the file afterwards."""
    save_sparse(pruned("unstructured"), tmp_path / "sparse", progress=False)
    before = summarize(tmp_path / "sparse")
    tensors = load_file(tmp_path / "sparse" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.compressed"][:10] = torch.tensor([0.0, -0.0] * 5)
    save_file(tensors, tmp_path / "sparse" / "model.safetensors", metadata={"format": "pt"})
    after = summarize(tmp_path / "sparse")
    assert sum(one.zeros for one in after.weights) - sum(one.zeros for one in before.weights) == 10


@pytest.fixture
def four_bits(tmp_path):
    """A pruned model with packed weights of four bits, and its directory."""
    model = quantize(make_model(), {"weights": INT8 | {"num_bits": 4}})
    save_sparse(model, tmp_path / "packed", progress=False)
    return model, tmp_path / "packed"


def test_packed_weights_are_summarized_with_their_zeros(four_bits):
    model, directory = four_bits
    summary = summarize(directory, verify=True)
    weights = {name: p for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    assert {weight.name for weight in summary.weights} == set(weights)
    for weight in summary.weights:
        assert weight.size == weights[weight.name].numel()
        assert weight.zeros >= int((weights[weight.name] == 0).sum()) > 0  # small ones are rounded to zero
    assert (summary.format, summary.dtype, summary.checksums) == ("pack-quantized", "int4", "match")
    plain = make_model()
    assert summary.parameters == sum(p.numel() for p in plain.parameters())
    assert summary.bytes_on_disk == summary.bytes_dense
    assert summary.sparsity == pytest.approx(sizes(directory)["sparsity"])
    assert summary.bits_per_weight == pytest.approx(bits.stored(directory))


def test_a_packed_weight_that_disagrees_with_its_shape_is_refused(four_bits):
    _, directory = four_bits
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_shape"] += 8
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SparseCheckpointError, match=r"up_proj\.weight_shape declares \[104, 56\], but"):
        summarize(directory)
