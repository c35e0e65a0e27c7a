"""Recipes that prune and then quantize, under the real llm-compressor, and the old reader on what they leave."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import loguru
import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import efx_plugin
from efx_plugin.checkpoint import export_checkpoint, linear_bytes, load_sparse, save_sparse
from efx_plugin.errors import EfxError
from integration.old_releases import install
from integration.test_checkpoint_readers import REMEDY, outcomes
from tests.support.tiny_llama import save_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

W8A16 = """
      config_groups:
        group_0:
          targets: ["Linear"]
          weights: {num_bits: 8, type: int, symmetric: true, strategy: STRATEGY}"""
QUANTIZATIONS = {
    "W8A8": ("QuantizationModifier", "scheme: W8A8"),
    "W8A8 GPTQ": ("GPTQModifier", "scheme: W8A8"),
    "W8A16": ("QuantizationModifier", W8A16.replace("STRATEGY", "channel")),
    "W8A16 GPTQ": ("GPTQModifier", W8A16.replace("STRATEGY", "group, group_size: 32")),
    "FP8": ("QuantizationModifier", "scheme: FP8_DYNAMIC"),
    "FP8 static": ("QuantizationModifier", "scheme: FP8"),
}
STRUCTURES = {"0:0": "sparse-bitmask", "2:4": "sparse-24-bitmask"}


PRUNE = """
prune_stage:
  pruning_modifiers:
    EfficientXpertModifier:
      sparsity: 0.5
      mask_structure: "STRUCTURE"
      ignore: ["lm_head"]
"""
QUANTIZE = """
quantize_stage:
  quantization_modifiers:
    MODIFIER:
      ignore: ["lm_head"]
      ARGUMENTS
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    directory = save_tiny_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(directory)
    # A row without weights has no scale of its own, and correlated inputs are what makes GPTQ fill zeros.
    model.model.layers[1].mlp.up_proj.weight.data[3] = 0
    model.model.embed_tokens.weight.data[:, 1:] += model.model.embed_tokens.weight.data[:, :-1]
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def run_recipe(model, recipe: str, source: Path, **options):
    ids = torch.randint(3, 128, (8, 48), generator=torch.Generator().manual_seed(0)).tolist()
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(source),
        recipe=recipe,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 48] * 8}),
        num_calibration_samples=8,
        max_seq_length=48,
        shuffle_calibration_samples=False,
        **options,
    )
    return model


def quantize(modifier: str, arguments: str) -> str:
    return QUANTIZE.replace("MODIFIER", modifier).replace("ARGUMENTS", arguments.strip())


def prune_and_quantize(source: Path, structure: str, modifier: str, arguments: str, **options):
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    recipe = PRUNE.replace("STRUCTURE", structure) + quantize(modifier, arguments)
    return run_recipe(model, recipe, source, **options)


@pytest.fixture(scope="module")
def cases(source, tmp_path_factory) -> dict[str, Path]:
    """For every quantization and structure a folder with `saved`, from memory, and `quantized`, by llm-compressor."""
    root = tmp_path_factory.mktemp("cases")
    for name, (modifier, arguments) in QUANTIZATIONS.items():
        for structure in STRUCTURES:
            model = prune_and_quantize(source, structure, modifier, arguments)
            case = root / f"{name} {structure.replace(':', '')}"
            case.mkdir()
            save_sparse(model, case / "saved", progress=False)
            model.save_pretrained(case / "quantized")
    return {path.name: path for path in sorted(root.iterdir())}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_same(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Equal bit for bit: torch compares no float8, and NaN would differ from itself."""
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (tensor.dtype, tensor.shape) == (found[name].dtype, found[name].shape), name
        assert torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (tensor, found[name]))), name


def dequantized(case: Path) -> dict[str, torch.Tensor]:
    """What the current stack makes of llm-compressor's own checkpoint."""
    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(case / "quantized", quantization_config=config)
    weights = (".weight", ".bias")  # without what belongs to quantization
    return {name: parameter.detach() for name, parameter in model.named_parameters() if name.endswith(weights)}


def test_zeros_survive_quantization_and_the_weights_are_those_of_llm_compressor(cases):
    for name, case in cases.items():
        loaded = load_sparse(case / "saved")
        assert_same(dequantized(case), dict(loaded.named_parameters()))
        for weight in (weight for key, weight in loaded.named_parameters() if "_proj" in key):
            if name.endswith("24"):
                assert ((weight.reshape(-1, 4) == 0).sum(dim=1) >= 2).all(), name
        projections = torch.cat([weight.flatten() for key, weight in loaded.named_parameters() if "_proj" in key])
        assert (projections == 0).float().mean() > 0.498, name
        assert (loaded.model.layers[1].mlp.up_proj.weight[3] == 0).all()  # a row without weights and without a scale
        sizes = linear_bytes(case / "saved")
        assert sizes["dense"] == projections.numel()
        assert sizes["sparse"] < 0.75 * sizes["dense"]


@pytest.mark.parametrize("pipeline", ["sequential", "independent"])
def test_what_gptq_fills_is_taken_back(source, pipeline, monkeypatch):
    pruned = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    run_recipe(pruned, PRUNE.replace("STRUCTURE", "0:0"), source)
    zeros = {name: module.weight == 0 for name, module in pruned.named_modules() if name.endswith("_proj")}

    run_recipe(pruned, quantize(*QUANTIZATIONS["W8A8 GPTQ"]), source)
    assert sum(int((pruned.get_submodule(name).weight[zero] != 0).sum()) for name, zero in zeros.items()) > 0

    told: list[str] = []
    monkeypatch.setattr(loguru.logger, "warning", told.append)
    model = prune_and_quantize(source, "0:0", *QUANTIZATIONS["W8A8 GPTQ"], pipeline=pipeline)
    assert any(
        re.search(r"quantization had filled [\d,]+ of .* pruned weights .* they are zero again", text) for text in told
    )
    for name, zero in zeros.items():
        weight = model.get_submodule(name).weight
        if "layers.0" in name:  # the same mask in both, because nothing before it is quantized
            assert (weight[zero] == 0).all(), name
    assert sum(int((model.get_submodule(name).weight == 0).sum()) for name in zeros) >= sum(
        map(torch.sum, zeros.values())
    )


def test_exported_from_disk_is_what_is_saved_from_memory(cases, tmp_path):
    for name, case in cases.items():
        export_checkpoint(case / "quantized", tmp_path / name, progress=False)
        assert_same(tensors_of(case / "saved"), tensors_of(tmp_path / name))
        configs = [json.loads((folder / "config.json").read_text()) for folder in (case / "saved", tmp_path / name)]
        assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
        assert (
            configs[0]["quantization_config"]["sparsity_config"]["format"]
            == (STRUCTURES["2:4" if name.endswith("24") else "0:0"])
        )


def test_without_the_sparse_compression_it_is_the_checkpoint_of_llm_compressor_again(cases, tmp_path, caplog):
    for name, case in cases.items():
        export_checkpoint(case / "saved", tmp_path / name, structure="dense", progress=False)
        assert f"{tmp_path / name} holds {case / 'saved'} with its zeros written out" in caplog.text
        assert_same(tensors_of(case / "quantized"), tensors_of(tmp_path / name))
        theirs, ours = (
            json.loads((folder / "config.json").read_text())["quantization_config"]
            for folder in (case / "quantized", tmp_path / name)
        )
        assert ours["format"] == theirs["format"] == ("pack-quantized" if "W8A16" in name else ours["format"])
        assert ours["ignore"] == theirs["ignore"]
        assert not ours.get("sparsity_config")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name).config.quantization_config is not None


READ = """
import sys
from pathlib import Path
import compressed_tensors, torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import apply_quantization_config
from transformers import AutoConfig, LlamaForCausalLM

assert compressed_tensors.__version__ == "0.13.0"
for case in sorted(Path(sys.argv[1]).iterdir()):
    source = str(case / sys.argv[2])
    compressor = ModelCompressor.from_pretrained(source)
    tensors = dict(compressor.sparsity_compressor.decompress(source))
    config = AutoConfig.from_pretrained(source)
    del config.quantization_config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    apply_quantization_config(model, compressor.quantization_config)
    schemes = {name: m.quantization_scheme for name, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    [quantization] = compressor.quantization_compressor.values()
    weights = {f"{name}.weight": w["weight"] for name, w in quantization.decompress(tensors, names_to_scheme=schemes)}
    torch.save((tensors, tensors | weights), case / "read.pt")
"""


def run(script: str, reader: Path, *arguments: object) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(reader)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def reader_013() -> Path:
    return install("0.13.0")


def test_013_takes_both_compressions_off(cases, reader_013):
    run(READ, reader_013, next(iter(cases.values())).parent, "saved")
    for name, case in cases.items():
        tensors, state = torch.load(case / "read.pt")
        if "W8A16" not in name:  # llm-compressor stores these packed
            assert_same(tensors_of(case / "quantized"), tensors)
        loaded = dict(load_sparse(case / "saved").named_parameters())
        assert_same(loaded, {key: weight for key, weight in state.items() if key in loaded})


WRITE = """
import sys
from pathlib import Path
import compressed_tensors, torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

assert compressed_tensors.__version__ == "0.13.0"
KINDS = {"int-quantized": "int", "float-quantized": "float"}
for case in sorted(Path(sys.argv[1]).iterdir()):
    model = LlamaForCausalLM.from_pretrained(case / "dense", dtype="auto")
    structure, kind = case.name.split()
    weights = {"num_bits": 8, "type": KINDS[kind], "symmetric": True, "strategy": "channel"}
    activations = {"num_bits": 8, "type": KINDS[kind], "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    scheme = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"], quantization_status="frozen")
    apply_quantization_config(model, scheme)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            largest = 127 if KINDS[kind] == "int" else 448
            module.weight_scale.data = module.weight.data.abs().amax(1, keepdim=True).clamp(min=1e-6) / largest
            module.weight_zero_point.data.zero_()
    sparsity = (Sparse24BitMaskConfig if structure == "24" else BitmaskConfig)(targets=["Linear"], ignore=["lm_head"])
    compressor = ModelCompressor.from_pretrained_model(model, sparsity, kind)
    state = compressor.compress(model)
    assert "model.layers.0.mlp.up_proj.weight_scale" in state and "model.layers.0.mlp.up_proj.compressed" in state
    model.config.save_pretrained(case / "old")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, case / "old" / "model.safetensors")
    compressor.update_config(str(case / "old"))
"""


def test_what_013_wrote_is_read(source, reader_013, tmp_path):
    for structure in ("00", "24"):
        for kind in ("int-quantized", "float-quantized"):
            model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
            for name, weight in model.named_parameters():
                if "_proj" in name:
                    fours = weight.data.view(-1, 4)
                    fours.scatter_(1, fours.abs().float().topk(2, dim=1, largest=False).indices, 0)
            model.save_pretrained(tmp_path / f"{structure} {kind}" / "dense")
    run(WRITE, reader_013, tmp_path)
    run(READ, reader_013, tmp_path, "old")
    for case in tmp_path.iterdir():
        loaded = dict(load_sparse(case / "old").named_parameters())
        _, state = torch.load(case / "read.pt")
        assert_same(loaded, {key: weight for key, weight in state.items() if key in loaded})


def test_from_pretrained_names_the_way_that_works(cases, tmp_path):
    """With the plugin imported and without it; nothing loads projections that were not in the file."""
    for name, case in cases.items():
        shutil.copytree(case / "saved", tmp_path / name)
    for outcome in outcomes(tmp_path, "with").values():
        assert re.search(r"sparse and quantized, .* use efx_plugin\.load_sparse", outcome)
    for outcome in outcomes(tmp_path, "without").values():
        assert REMEDY in outcome and "use efx_plugin.load_sparse" in outcome


def test_four_bits_are_stored_as_llm_compressor_does_it(source, tmp_path):
    arguments = W8A16.replace("num_bits: 8", "num_bits: 4").replace("STRATEGY", "group, group_size: 32")
    model = prune_and_quantize(source, "0:0", "QuantizationModifier", arguments)
    save_sparse(model, tmp_path / "saved", progress=False)
    model.save_pretrained(tmp_path / "quantized")
    assert_same(tensors_of(tmp_path / "quantized"), tensors_of(tmp_path / "saved"))
    ours, theirs = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("saved", "quantized")
    )
    assert {key: value for key, value in ours.items() if key != "version"} == {
        key: value for key, value in theirs.items() if key not in ("version", "sparsity_config", "transform_config")
    }
    assert "% are zero; they are stored like any other value" in (tmp_path / "saved" / "README.md").read_text()
    with pytest.raises(EfxError, match="quantized to 4 bits as pack-quantized, which leaves a sparse format nothing"):
        export_checkpoint(tmp_path / "quantized", tmp_path / "sparse")
    with pytest.raises(EfxError, match="sparse-bitmask stores weights of eight bits or more"):
        save_sparse(model, tmp_path / "sparse", "sparse-bitmask")
    assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize("quantization", ["W8A8", "W8A16", "W4A16"])
def test_quantized_as_it_is_pruned(source, tmp_path, quantization):
    """In one pass, with an adapter: zeros and integers are those of the checkpoint, and no modifier fills a zero."""
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(source, dtype="auto"),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    recipe = PRUNE.replace("STRUCTURE", "0:0") + f"      quantization: {quantization}\n"
    run_recipe(adapted.base_model.model, recipe, source)
    model = efx_plugin.merge_adapters(adapted)
    weights = {name: weight.clone() for name, weight in model.named_parameters() if name.endswith("_proj.weight")}
    assert abs(float((torch.cat([weight.flatten() for weight in weights.values()]) == 0).float().mean()) - 0.5) < 0.02
    save_sparse(model, tmp_path / "saved", progress=False)
    if quantization == "W4A16":
        options = CompressedTensorsConfig(dequantize=True)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=options)
    else:
        loaded = load_sparse(tmp_path / "saved")
    assert_same(weights, {name: weight for name, weight in loaded.named_parameters() if name in weights})


def test_one_modifier_quantizes(source):
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    recipe = PRUNE.replace("STRUCTURE", "0:0") + "      quantization: W8A16\n" + quantize(*QUANTIZATIONS["W8A8 GPTQ"])
    with pytest.raises(EfxError, match="by EfficientXpertModifier and by another modifier of the recipe"):
        run_recipe(model, recipe, source)


def test_the_public_name_saves_a_quantized_model_too(source, tmp_path):
    model = prune_and_quantize(source, "0:0", *QUANTIZATIONS["FP8"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    efx_plugin.save_sparse(model, tmp_path / "sparse", progress=False)
    assert_same(before, model.state_dict())  # it is the caller's, and is left alone
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert "They are quantized (8-bit float, `float-quantized`)" in card
    assert "--structure dense" in card and "from_pretrained" not in card
