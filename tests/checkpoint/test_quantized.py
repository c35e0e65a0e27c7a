"""Checkpoints that are sparse and quantized: saved from memory, exported from disk, loaded, expanded again."""

import json
import logging
import os
import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from efx_plugin.checkpoint import export_checkpoint, linear_bytes, load_sparse, save_sparse
from efx_plugin.checkpoint.formats import pack_quantized
from efx_plugin.errors import EfxError, SparseCheckpointError

INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
PER_TOKEN = {"strategy": "token", "dynamic": True}
SCHEMES = {
    "W8A8": {"weights": INT8, "input_activations": INT8 | PER_TOKEN},
    "W8A16": {"weights": INT8},
    "W8A16 groups": {"weights": INT8 | {"strategy": "group", "group_size": 24}},
    "FP8": {"weights": FP8, "input_activations": FP8 | PER_TOKEN},
    "FP8 weights": {"weights": FP8 | {"strategy": "tensor"}},
}
FORMATS = {
    "W8A8": "int-quantized",
    "W8A16": "int-quantized",
    "W8A16 groups": "int-quantized",
    "FP8": "float-quantized",
    "FP8 weights": "naive-quantized",
}
STRUCTURES = ("sparse-bitmask", "sparse-24-bitmask")
UP = "model.layers.0.mlp.up_proj"


def make_model(structure="sparse-bitmask", dtype=torch.bfloat16) -> LlamaForCausalLM:
    """Half of every projection zero, and one row of one projection."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            fours = weight.data.view(-1, 4)
            fours.scatter_(1, fours.abs().float().topk(2, dim=1, largest=False).indices, 0)
            if structure == "sparse-bitmask":  # the same zeros at other places
                weight.data.copy_(weight.data[:, torch.randperm(weight.shape[1])])
    model.get_submodule(UP).weight.data[3] = 0
    return model


def quantize(model: LlamaForCausalLM, scheme: dict, ignore=("lm_head",)) -> LlamaForCausalLM:
    """As llm-compressor's QuantizationModifier leaves a model."""
    groups = {"group_0": {"targets": ["Linear"], **scheme}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=list(ignore)))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            arguments = module.quantization_scheme.weights
            # A scale per tensor, per row, or per group of a row: as many values lie behind each.
            values = module.weight.data.float().abs().reshape(*module.weight_scale.shape, -1).amax(-1).clamp(min=1e-3)
            module.weight_scale.data.copy_(values / (127 if arguments.type == "int" else 448))
            module.weight_zero_point.data.zero_()
            module.quantization_status = QuantizationStatus.FROZEN
    return model


def expected(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The parameters of the plain model: quantized by division, rounding and multiplication."""
    plain = {}
    for name, weight in LlamaForCausalLM(model.config).to(model.dtype).named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        weight = module.get_parameter(name.rpartition(".")[2]).detach()
        if name.endswith(".weight") and hasattr(module, "weight_scale"):
            scale = module.weight_scale.detach()
            if (arguments := module.quantization_scheme.weights).strategy == "group":
                scale = scale.repeat_interleave(arguments.group_size, dim=1)
            steps = weight / scale
            if arguments.type == "int":
                weight = steps.round().clamp(-128, 127) * scale
            else:
                weight = steps.clamp(-448, 448).to(torch.float8_e4m3fn).to(scale.dtype) * scale
        plain[name] = weight
    return plain


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        # Negative zeros come back as zeros.
        if tensor.dtype.itemsize == 1:
            tensor, found = tensor.float(), other[name].float()
        else:
            found = other[name]
        assert torch.equal(tensor, found), name


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def quantization_config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def save_quantized(model: LlamaForCausalLM, directory: Path) -> None:
    """As llm-compressor saves it; the model is compressed in place."""
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory, max_shard_size="30KB")
    compressor.update_config(str(directory))


@pytest.fixture(scope="module", params=[(scheme, structure) for scheme in SCHEMES for structure in STRUCTURES], ids=str)
def case(request, tmp_path_factory):
    """Scheme, structure, the plain weights to expect, and a folder with `sparse` and `quantized`; not to be changed."""
    scheme, structure = request.param
    folder = tmp_path_factory.mktemp("case")
    model = quantize(make_model(structure), SCHEMES[scheme])
    plain = expected(model)
    save_sparse(model, folder / "sparse", progress=False)
    save_quantized(model, folder / "quantized")
    return scheme, structure, plain, folder


@pytest.fixture
def saved(tmp_path):
    """A sparse W8A8 checkpoint, to be damaged."""
    save_sparse(quantize(make_model(), SCHEMES["W8A8"]), tmp_path / "saved", progress=False)
    return tmp_path / "saved"


def change(directory: Path, update) -> None:
    tensors = load_file(directory / "model.safetensors")
    update(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory: Path, update) -> None:
    config = json.loads((directory / "config.json").read_text())
    update(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


# What is written, and read again


def test_loaded_is_the_dequantized_model_with_its_zeros(case):
    _, structure, plain, folder = case
    loaded = load_sparse(folder / "sparse")
    assert_same(plain, dict(loaded.named_parameters()))
    assert getattr(loaded.config, "quantization_config", None) is None
    for name, weight in loaded.named_parameters():
        if name.endswith("_proj.weight"):
            assert (weight == 0).float().mean() >= 0.5
            if structure == "sparse-24-bitmask":
                assert ((weight.reshape(-1, 4) == 0).sum(dim=1) >= 2).all()
    assert (loaded.get_submodule(UP).weight[3] == 0).all()


def test_both_compressions_are_described_and_stored_one_over_the_other(case):
    scheme, structure, _, folder = case
    described = quantization_config(folder / "sparse")
    assert described["sparsity_config"]["format"] == structure
    assert described["sparsity_config"]["ignore"] == described["ignore"] == ["lm_head"]
    assert described["format"] == described["config_groups"]["group_0"]["format"] == FORMATS[scheme]
    assert described["quantization_status"] == "compressed"
    tensors = tensors_of(folder / "sparse")
    own = {name.removeprefix(f"{UP}."): tensor for name, tensor in tensors.items() if name.startswith(f"{UP}.")}
    offsets = {"row_offsets"} if structure == "sparse-bitmask" else set()
    assert own.keys() == {"compressed", "bitmask", "shape", "weight_scale"} | offsets
    assert own["compressed"].dtype == (torch.float8_e4m3fn if "FP8" in scheme else torch.int8)
    assert own["shape"].flatten().tolist() == [96, 48]
    assert tensors["lm_head.weight"].dtype == torch.bfloat16


def test_exported_from_disk_is_what_is_saved_from_memory(case, tmp_path):
    _, _, _, folder = case
    export_checkpoint(folder / "quantized", tmp_path / "exported", max_shard_size="20KB", progress=False)
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 1
    assert_same(tensors_of(folder / "sparse"), tensors_of(tmp_path / "exported"))
    assert quantization_config(folder / "sparse") == quantization_config(tmp_path / "exported")


def test_saved_after_it_was_compressed_in_memory_is_the_same(case, tmp_path):
    scheme, structure, _, folder = case
    model = quantize(make_model(structure), SCHEMES[scheme])
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    save_sparse(model, tmp_path / "sparse", progress=False)
    assert_same(tensors_of(folder / "sparse"), tensors_of(tmp_path / "sparse"))


def test_a_model_is_left_as_it_was(tmp_path):
    model = quantize(make_model(), SCHEMES["W8A16"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_sparse(model, tmp_path / "sparse", progress=False)
    assert_same(before, model.state_dict())
    assert {module.quantization_scheme.format for module in model.modules() if hasattr(module, "weight_scale")} == {
        None
    }


def test_bytes_and_card(case):
    scheme, _, _, folder = case
    sizes = linear_bytes(folder / "sparse")
    weights = 48 * (48 + 16 + 16 + 48 + 3 * 96)
    assert sizes["dense"] == weights  # a byte each
    parts = [
        t
        for name, t in tensors_of(folder / "sparse").items()
        if re.search(r"\.(compressed|bitmask|row_.*|shape)$", name)
    ]
    assert sizes["sparse"] == sum(part.nbytes for part in parts)
    card = (folder / "sparse" / "README.md").read_text()
    assert f"| all | 7 | {1 - nonzeros(folder / 'sparse') / weights:.1%} | {weights:,} | {sizes['sparse']:,} |" in card
    assert f"They are quantized (8-bit {'float' if 'FP8' in scheme else 'int'}, `{FORMATS[scheme]}`)" in card
    assert "load_sparse('./sparse')" in card and "--structure dense" in card


def nonzeros(directory: Path) -> int:
    return sum(int((t.float() != 0).sum()) for name, t in tensors_of(directory).items() if name.endswith(".compressed"))


def test_layers_that_only_one_of_the_two_concerns(tmp_path):
    model = make_model()
    down, gate = (model.model.layers[0].mlp.get_submodule(name) for name in ("down_proj", "gate_proj"))
    torch.nn.init.normal_(down.weight)  # dense and quantized
    quantize(model, SCHEMES["W8A8"], ignore=["lm_head", "re:.*gate_proj"])  # gate: sparse and not quantized
    plain = expected(model)
    save_sparse(model, tmp_path / "sparse", progress=False)
    tensors = tensors_of(tmp_path / "sparse")
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == torch.int8
    assert tensors["model.layers.0.mlp.gate_proj.compressed"].dtype == gate.weight.dtype
    assert quantization_config(tmp_path / "sparse")["sparsity_config"]["ignore"] == [
        "lm_head",
        "model.layers.0.mlp.down_proj",
    ]
    assert_same(plain, dict(load_sparse(tmp_path / "sparse").named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(tmp_path, dtype):
    model = quantize(make_model(dtype=dtype), SCHEMES["W8A8"])
    save_sparse(model, tmp_path / "sparse", progress=False)
    assert_same(expected(model), dict(load_sparse(tmp_path / "sparse").named_parameters()))


def test_scales_of_activations_and_of_the_cache_are_kept_and_not_loaded(saved, tmp_path):
    def add(tensors):
        tensors[f"{UP}.input_scale"] = torch.ones(1)
        tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)

    change(saved, add)
    plain = dict(load_sparse(saved).named_parameters())
    assert not any(name.endswith("scale") for name in plain)
    export_checkpoint(saved, tmp_path / "dense", structure="dense", progress=False)
    assert {f"{UP}.input_scale", "model.layers.0.self_attn.k_scale"} <= tensors_of(tmp_path / "dense").keys()


def test_zero_points_that_another_writer_stored_are_subtracted(saved):
    """Nothing here writes them, because zeros do not stay zeros; old releases did."""
    before = dict(load_sparse(saved).named_parameters())
    scales = {name: tensor for name, tensor in tensors_of(saved).items() if name.endswith(".weight_scale")}

    def add(tensors):
        for name, scale in scales.items():
            tensors[name.replace("_scale", "_zero_point")] = torch.full(scale.shape, 3, dtype=torch.int8)

    change(saved, add)
    change_config(saved, lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=False))
    after = dict(load_sparse(saved).named_parameters())
    for name, scale in scales.items():
        weight = name.removesuffix("_scale")
        steps = (before[weight].float() / scale.float()).round() - 3
        assert torch.equal(after[weight], steps.to(scale.dtype) * scale)


# The sparse compression taken off


def test_what_is_left_is_the_quantized_checkpoint(case, tmp_path, caplog):
    _, _, plain, folder = case
    with caplog.at_level(logging.WARNING):
        export_checkpoint(folder / "sparse", tmp_path / "dense", "dense", max_shard_size="20KB", progress=False)
    assert f"{tmp_path / 'dense'} holds {folder / 'sparse'} with its zeros written out" in caplog.text
    assert_same(tensors_of(folder / "quantized"), tensors_of(tmp_path / "dense"))
    theirs, ours = quantization_config(folder / "quantized"), quantization_config(tmp_path / "dense")
    for key in ("format", "ignore", "config_groups", "quantization_status"):
        assert ours[key] == theirs[key]
    assert "sparsity_config" not in ours
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")  # by transformers alone
    loaded(torch.tensor([[1, 2, 3]]))  # which dequantizes now
    assert torch.equal(loaded.get_submodule(UP).weight, plain[f"{UP}.weight"])
    assert "sparse compression taken off" in (tmp_path / "dense" / "README.md").read_text()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_checkpoint_that_is_not_quantized_becomes_a_plain_one(tmp_path, structure, caplog):
    model = make_model(structure)
    save_sparse(model, tmp_path / "sparse", progress=False)
    export_checkpoint(tmp_path / "sparse", tmp_path / "dense", structure="dense", progress=False)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    assert_same(dict(model.named_parameters()), dict(loaded.named_parameters()))
    assert (
        not {"quantization_config", "transformers_weights"}
        & json.loads((tmp_path / "dense/config.json").read_text()).keys()
    )
    assert "served dense and no faster for being sparse" in caplog.text


def test_what_cannot_be_taken_off_is_refused(saved, tmp_path):
    make_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(EfxError, match="plain is dense already"):
        export_checkpoint(tmp_path / "plain", tmp_path / "dense", structure="dense")
    with pytest.raises(EfxError, match="exists already"):
        export_checkpoint(saved, tmp_path / "plain", structure="dense")
    with pytest.raises(EfxError, match='stored sparsely already: structure="dense" takes the sparse compression off'):
        export_checkpoint(saved, tmp_path / "dense")
    change(saved, lambda tensors: tensors[f"{UP}.bitmask"].bitwise_xor_(1))
    with pytest.raises(SparseCheckpointError, match=rf"{UP}\.compressed"):
        export_checkpoint(saved, tmp_path / "dense", structure="dense")
    assert sorted(os.listdir(tmp_path)) == ["plain", "saved"]


# Weights packed into int32


@settings(max_examples=30)
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), seed=st.integers(0, 99))
def test_packed_and_unpacked_is_the_same(rows, columns, seed):
    weight = torch.randint(-128, 128, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    parts = pack_quantized.compress(weight)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in parts.items()} == pack_quantized.layout(rows, columns)
    as_bytes = parts["weight_packed"].view(torch.uint8)[:, :columns]
    assert torch.equal(as_bytes.int() - 128, weight.int())
    assert torch.equal(pack_quantized.decompress(parts, "here"), weight)


def test_a_packed_shape_that_lies_is_refused(tmp_path):
    model = quantize(make_model(), SCHEMES["W8A16"])
    save_quantized(model, tmp_path / "quantized")
    shard = next(
        path for path in (tmp_path / "quantized").glob("*.safetensors") if f"{UP}.weight_shape" in load_file(path)
    )
    tensors = load_file(shard)
    for lie in ([96, 52], [95, 48], [2**40, 2**40], [96], [-96, 48]):
        save_file(tensors | {f"{UP}.weight_shape": torch.tensor(lie)}, shard, metadata={"format": "pt"})
        with pytest.raises(SparseCheckpointError, match=rf"{UP}\.weight(_shape declares| as)"):
            export_checkpoint(tmp_path / "quantized", tmp_path / "sparse")


# What is refused


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda t: t[f"{UP}.weight_scale"].fill_(float("nan")), "weight_scale holds no finite numbers"),
        (lambda t: t[f"{UP}.weight_scale"].fill_(float("inf")), "weight_scale holds no finite numbers"),
        (lambda t: t.update({f"{UP}.weight_scale": torch.ones(96, 1).int()}), "weight_scale holds no finite numbers"),
        (lambda t: t.pop(f"{UP}.weight_scale"), "weight_scale is missing"),
        (lambda t: t.pop(f"{UP}.compressed"), "compressed is missing"),
        (
            lambda t: t.update({"model.norm.weight_scale": torch.ones(1)}),
            "holds model.norm.weight_scale, but no config group",
        ),
        (
            lambda t: t.update({f"{UP}.compressed": t[f"{UP}.compressed"].view(torch.float8_e4m3fn)}),
            "is torch.float8_e4m3fn, but config.json makes it torch.int8",
        ),
    ],
)
def test_damaged_tensors_are_named(saved, update, message):
    change(saved, update)
    with pytest.raises(SparseCheckpointError, match=message):
        load_sparse(saved)


def test_damaged_scales_are_not_passed_on(saved, tmp_path):
    change(saved, lambda tensors: tensors[f"{UP}.weight_scale"].fill_(float("nan")))
    with pytest.raises(EfxError, match=rf"{UP}\.weight_scale holds NaN or infinity"):
        export_checkpoint(saved, tmp_path / "dense", structure="dense")
    assert os.listdir(tmp_path) == ["saved"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.sampled_from([1, 2, 47, 48, 95, 96, 192]), max_size=3).filter(lambda shape: shape != [96, 1]))
def test_a_scale_of_another_shape_is_refused(saved, shape):
    """It would be stretched over the weight to something else."""
    change(saved, lambda tensors: tensors.update({f"{UP}.weight_scale": torch.ones(shape, dtype=torch.bfloat16)}))
    with pytest.raises(SparseCheckpointError, match=rf"{UP}.weight_scale is .* takes \[96, 1\]"):
        load_sparse(saved)


@pytest.mark.parametrize(
    ("update", "error", "message"),
    [
        (lambda q: q.update(config_groups={"g": {}}), SparseCheckpointError, "does not understand the config_groups"),
        (lambda q: q["config_groups"]["group_0"].update(targets=["re:.*no"]), SparseCheckpointError, "no config group"),
        (
            lambda q: q["config_groups"]["group_0"].update(format="pack-quantized"),
            SparseCheckpointError,
            "by config.json",
        ),
        (lambda q: q.update(transform_config={"config_groups": {}}), EfxError, "rotated weights are not sparse"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=False), EfxError, "zero_point is missing"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved, update, error, message):
    change_config(saved, update)
    with pytest.raises(error, match=message):
        load_sparse(saved)


def test_models_that_cannot_be_stored_are_refused(tmp_path):
    def refuse(message, model):
        with pytest.raises(EfxError, match=message):
            save_sparse(model, tmp_path / "sparse", progress=False)
        assert os.listdir(tmp_path) == []

    model = quantize(make_model(), SCHEMES["W8A8"])
    model.get_submodule(UP).weight_scale.data[5] = float("nan")
    refuse(rf"{UP}\.weight_scale holds NaN or infinity", model)
    model = quantize(make_model(), SCHEMES["W8A8"])
    model.get_submodule(UP).weight.data[5, 5] = float("nan")  # which would become some integer
    refuse(rf"{UP}\.weight holds NaN or infinity", model)
    model = quantize(make_model(), SCHEMES["W8A8"])
    model.get_submodule(UP).quantization_status = QuantizationStatus.CALIBRATION
    refuse(rf"{UP} is to be quantized, but its scales were never calibrated", model)
    asymmetric = {"weights": INT8 | {"symmetric": False}}
    refuse("asymmetrically, so that its zeros are stored as the zero point", quantize(make_model(), asymmetric))
    four = {"weights": INT8 | {"num_bits": 4}, "input_activations": INT8 | PER_TOKEN}
    refuse("quantized to 4 bits as int-quantized: .* quantize no activations beside", quantize(make_model(), four))
    four = {"weights": INT8 | {"num_bits": 4, "symmetric": False}}
    refuse("asymmetrically, so that its zeros are stored as the zero point", quantize(make_model(), four))
    dense = make_model()
    for module in dense.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.uniform_(module.weight, 1, 2)
    refuse("no Linear weight has enough zeros", quantize(dense, SCHEMES["W8A8"]))


def test_a_source_that_was_not_compressed_is_refused(tmp_path):
    model = quantize(make_model(), SCHEMES["W8A8"])
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="dense")
    model.save_pretrained(tmp_path / "quantized")
    compressor.update_config(str(tmp_path / "quantized"))
    with pytest.raises(EfxError, match="weights as they were before quantization: save it with save_compressed=True"):
        export_checkpoint(tmp_path / "quantized", tmp_path / "sparse")
