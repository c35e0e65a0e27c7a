"""The old readers of these formats open what is written here, and what they wrote is read here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import efx_plugin
from efx_plugin.checkpoint import export_checkpoint, load_sparse, read_sparsity_config, save_sparse
from efx_plugin.errors import EfxError
from integration.old_releases import install

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def reader_013() -> Path:
    return install("0.13.0")


@pytest.fixture(scope="module")
def reader_08() -> Path:
    return install("0.8.1")


def run(script: str, *arguments: object, reader: Path | None = None) -> str:
    """Starting the stack takes seconds, so one process does many cases."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(reader)} if reader else {})
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def make_model(
    structure: str, tied: bool = False, dtype: torch.dtype = torch.bfloat16, mlp_bias: bool = False
) -> LlamaForCausalLM:
    """Grouped queries and, unless 2:4, widths that are no multiple of 8."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48 if structure == "2:4" else 54,
        intermediate_size=100 if structure == "2:4" else 102,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=bool(tied),
        mlp_bias=mlp_bias,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for name, weight in model.named_parameters():
        if "_proj" in name and structure == "2:4":
            fours = weight.data.view(-1, 4)
            fours.scatter_(1, fours.abs().topk(2, dim=1, largest=False).indices, 0)
        elif name.endswith(".bias"):
            weight.data.normal_()
        elif "_proj" in name:
            weight.data[torch.rand(weight.shape) < 0.5] = 0
    return model


def assert_same(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert weight.dtype == found[name].dtype
        assert torch.equal(weight, found[name]), name


READ = """
import sys
from pathlib import Path
import compressed_tensors, torch
from compressed_tensors.compressors import ModelCompressor
from transformers import AutoConfig, LlamaForCausalLM

assert compressed_tensors.__version__ == "0.13.0"
for case in sorted(Path(sys.argv[1]).iterdir()):
    source = str(case / "sparse")
    compressor = ModelCompressor.from_pretrained(source)
    # Tensor by tensor ...
    tensors = {name: tensor for name, tensor in compressor.sparsity_compressor.decompress(source)}
    # ... and into a model.
    config = AutoConfig.from_pretrained(source)
    del config.quantization_config
    model = LlamaForCausalLM(config).to(next(iter(tensors.values())).dtype)
    compressor.decompress(source, model)
    torch.save((tensors, model.state_dict()), case / "read.pt")
"""


def test_013_decompresses_ours_bit_for_bit(tmp_path, reader_013):
    models = {
        (structure, dtype, shard, tied): make_model(structure, tied, dtype)
        for structure in ("unstructured", "2:4")
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for shard in ("5GB", "20KB")
        for tied in (False, True)
    }
    for case, ((_, _, shard, tied), model) in enumerate(models.items()):
        (tmp_path / "cases" / str(case)).mkdir(parents=True)
        if tied:  # the two ways of writing give the same files
            model.save_pretrained(tmp_path / f"dense{case}")
            export_checkpoint(
                tmp_path / f"dense{case}", tmp_path / "cases" / str(case) / "sparse", max_shard_size=shard
            )
        else:
            save_sparse(model, tmp_path / "cases" / str(case) / "sparse", max_shard_size=shard)
    run(READ, tmp_path / "cases", reader=reader_013)
    for case, ((_, _, _, tied), model) in enumerate(models.items()):
        tensors, state = torch.load(tmp_path / "cases" / str(case) / "read.pt")
        expected = model.state_dict()
        if tied:
            expected.pop("lm_head.weight")
            state.pop("lm_head.weight")  # 0.13.0 puts a new parameter in the embeddings' place, which unties them
        assert_same(expected, tensors)
        assert_same(expected, state)


WRITE = """
import sys
from pathlib import Path
import compressed_tensors
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

assert compressed_tensors.__version__ == "0.13.0"
for case in sorted(Path(sys.argv[1]).iterdir()):
    model = LlamaForCausalLM.from_pretrained(case / "dense", dtype="auto")
    arguments = {} if case.name == "every weight" else {"targets": ["Linear"], "ignore": ["lm_head"]}
    config = (Sparse24BitMaskConfig if case.name == "2:4" else BitmaskConfig)(**arguments)
    compressor = ModelCompressor(sparsity_config=config)
    if case.name == "every weight":  # what it does without targets
        state = compressor.sparsity_compressor.compress(model.state_dict())
        assert "model.norm.compressed" in state
    else:
        state = compressor.compress(model)
    model.config.save_pretrained(case / "old")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, case / "old" / "model.safetensors")
    compressor.update_config(str(case / "old"))
"""


def test_ours_reads_what_013_wrote(tmp_path, reader_013):
    models = {name: make_model(name) for name in ("unstructured", "every weight", "2:4")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name / "dense")
    run(WRITE, tmp_path, reader=reader_013)
    for name, model in models.items():
        old = tmp_path / name / "old"
        assert read_sparsity_config(old)["format"] == ("sparse-24-bitmask" if name == "2:4" else "sparse-bitmask")
        assert_same(model.state_dict(), load_sparse(old).state_dict())


WRITE_08 = """
import sys
import compressed_tensors
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskCompressor
from compressed_tensors.config import BitmaskConfig
from safetensors.torch import load_file, save_file

assert compressed_tensors.__version__ == "0.8.1"
state = BitmaskCompressor(config=BitmaskConfig()).compress(load_file(sys.argv[1]))
assert "model.layers.0.mlp.up_proj.weight.compressed" in state and "model.layers.0.mlp.up_proj.bias.compressed" in state
assert "model.norm.weight.compressed" in state
save_file(state, sys.argv[2])
"""


LOAD_WITH = """
import sys
import efx_plugin
assert "transformers" not in sys.modules and "torch" not in sys.modules
import torch
from pathlib import Path
from transformers import AutoModel, AutoModelForCausalLM
for case in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(case / "sparse")
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(case / "plain")
    body = AutoModel.from_pretrained(case / "sparse")
    wide = AutoModelForCausalLM.from_pretrained(case / "sparse", dtype=torch.float32)
    torch.save((model.state_dict(), body.state_dict(), wide.state_dict()), case / "read.pt")
"""


def test_ours_reads_what_08_wrote(tmp_path, reader_08):
    """Every parameter compressed, vectors and biases included, under `WEIGHT.compressed`."""
    model = make_model("unstructured", mlp_bias=True)
    model.save_pretrained(tmp_path / "dense")
    old = tmp_path / "cases" / "old" / "sparse"
    old.mkdir(parents=True)
    run(WRITE_08, tmp_path / "dense" / "model.safetensors", old / "model.safetensors", reader=reader_08)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config["quantization_config"] = {
        "version": "0.8.1",
        "quant_method": "compressed-tensors",
        "sparsity_config": {"format": "sparse-bitmask", "global_sparsity": 0.5, "sparsity_structure": "unstructured"},
    }
    (old / "config.json").write_text(json.dumps(config))
    assert_same(model.state_dict(), load_sparse(old).state_dict())
    run(LOAD_WITH, tmp_path / "cases")
    assert_same(model.state_dict(), torch.load(old.parent / "read.pt")[0])


def test_from_pretrained_expands_once_efx_plugin_is_imported(tmp_path):
    models = {
        f"{structure} {tied}": make_model(structure, tied) for structure in ("unstructured", "2:4") for tied in (0, 1)
    }
    for name, model in models.items():
        (tmp_path / name).mkdir()
        save_sparse(model, tmp_path / name / "sparse", max_shard_size="20KB")
    run(LOAD_WITH, tmp_path)
    for name, model in models.items():
        state, body, wide = torch.load(tmp_path / name / "read.pt")
        assert_same(model.state_dict(), state)
        assert_same(model.model.state_dict(), body)
        assert_same({key: weight.float() for key, weight in model.state_dict().items()}, wide)
        plain = LlamaForCausalLM.from_pretrained(tmp_path / name / "plain")
        assert_same(model.state_dict(), plain.state_dict())


LOAD_ANYHOW = """
import sys
from pathlib import Path
if sys.argv[2] == "with":
    import efx_plugin
from transformers import AutoModelForCausalLM
for case in sorted(Path(sys.argv[1]).iterdir()):
    try:
        AutoModelForCausalLM.from_pretrained(case)
    except Exception as error:
        print(case.name, "->", type(error).__name__, " ".join(str(error).split()))
    else:
        print(case.name, "-> loaded")
assert (sys.argv[2] == "with") == any(name.partition(".")[0] == "efx_plugin" for name in sys.modules)
"""


REMEDY = (
    "This checkpoint is not damaged: it is sparse, and transformers reads it with the help of efx-plugin. "
    "Run `pip install efx-plugin`, then `import efx_plugin` before from_pretrained"
)


def outcomes(directory: Path, how: str) -> dict[str, str]:
    lines = [line.split(" -> ", 1) for line in run(LOAD_ANYHOW, directory, how).splitlines() if " -> " in line]
    assert sorted(name for name, _ in lines) == sorted(os.listdir(directory))
    return dict(lines)


def test_transformers_alone_refuses_and_says_what_to_install(tmp_path):
    """Also if somebody takes out the quantization_config, with which transformers would make the projections up."""
    for structure in ("unstructured", "2:4"):
        save_sparse(make_model(structure), tmp_path / structure)
        shutil.copytree(tmp_path / structure, tmp_path / f"{structure} without")
        config = json.loads((tmp_path / structure / "config.json").read_text())
        del config["quantization_config"]
        (tmp_path / f"{structure} without" / "config.json").write_text(json.dumps(config))
    for outcome in outcomes(tmp_path, "without").values():
        assert REMEDY in outcome


LOAD_FROM_HUB = """
import os, sys
os.environ |= {"HF_HUB_CACHE": sys.argv[1], "HF_HUB_OFFLINE": "1"}
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained("some/expert")
except Exception as error:
    print(" ".join(str(error).split()))
"""


def test_transformers_alone_says_so_of_a_checkpoint_on_the_hub_too(tmp_path):
    repository = tmp_path / "models--some--expert"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("1234")
    (repository / "snapshots").mkdir()
    save_sparse(make_model("unstructured"), repository / "snapshots" / "1234")
    assert REMEDY in run(LOAD_FROM_HUB, tmp_path)


def test_from_pretrained_refuses_what_is_corrupt(tmp_path):
    up = "model.layers.0.mlp.up_proj"
    cases = {
        "bitmask": (f"{up}.bitmask", lambda t: t.bitwise_xor_(1), f"SparseCheckpointError {up}.compressed has"),
        "offsets": (f"{up}.row_offsets", lambda t: t.add_(1), f"SparseCheckpointError {up}.row_offsets does not"),
        "shape": (f"{up}.shape", lambda t: t.add_(1), f"SparseCheckpointError model.safetensors: {up}.shape declares"),
        "part": (f"{up}.compressed", None, f"SparseCheckpointError model.safetensors: {up}.compressed is missing"),
        "norm": ("model.norm.weight", None, "has no model.norm.weight"),
    }
    for name, (tensor, change, _) in cases.items():
        save_sparse(make_model("unstructured"), tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        if change is None:
            del tensors[tensor]
        else:
            change(tensors[tensor])
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    found = outcomes(tmp_path, "with")
    for name, (_, _, expected) in cases.items():
        assert expected in found[name]


def test_dense_and_quantized_checkpoints_are_left_to_transformers(tmp_path):
    """The entry that this package replaces in the registry stays what it was for everything else."""
    make_model("unstructured").save_pretrained(tmp_path / "cases" / "dense")
    shutil.copytree(tmp_path / "cases" / "dense", tmp_path / "cases" / "quantized")
    path = tmp_path / "cases" / "quantized" / "config.json"
    scheme = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    }
    quantization = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {"group_0": scheme}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    assert outcomes(tmp_path / "cases", "with") == outcomes(tmp_path / "cases", "without")
    assert outcomes(tmp_path / "cases", "with")["dense"] == "loaded"


def test_a_model_with_an_adapter_is_refused_until_it_is_merged(tmp_path):
    model = make_model("unstructured")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for refused in (adapted, adapted.base_model.model):
        with pytest.raises(EfxError, match=r"efx_plugin\.merge_adapters\(model\)"):
            save_sparse(refused, tmp_path / "sparse")
    merged = efx_plugin.merge_adapters(adapted)
    save_sparse(merged, tmp_path / "sparse")
    assert_same(merged.state_dict(), load_sparse(tmp_path / "sparse").state_dict())
