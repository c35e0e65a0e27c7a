"""What cannot be served ends in one sentence, for whoever starts vLLM on it."""

import json

import pytest

from efx_plugin.errors import EfxError
from integration.serving_models import PROMPTS, engine, rewrite, save_tiny, serve_once

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "Llama") / "sparse-bitmask"


def refuse(directory):
    with pytest.raises(EfxError) as refused, engine(directory):
        pass
    return str(refused.value)


def test_a_corrupt_checkpoint(sparse, tmp_path):
    name = "model.layers.1.mlp.down_proj"
    corrupt = rewrite(sparse, tmp_path / "corrupt", lambda tensors: tensors[f"{name}.row_offsets"].add_(1))
    result, served = serve_once(corrupt, PROMPTS)
    assert result.returncode == 1 and served is None
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith(f"error: {name}.row_offsets") and "download or export it again" in error


def test_a_missing_tensor(sparse, tmp_path):
    name = "model.layers.0.self_attn.v_proj"
    missing = rewrite(sparse, tmp_path / "missing", lambda tensors: tensors.pop(f"{name}.bitmask"))
    assert f"{name} is sparse according to config.json, but the checkpoint lacks its bitmask" in refuse(missing)


def test_a_fused_layer_that_is_sparse_in_part(sparse, tmp_path):
    half = rewrite(sparse, tmp_path / "half", lambda tensors: None)
    config = json.loads((half / "config.json").read_text())
    config["quantization_config"]["sparsity_config"]["ignore"].append("model.layers.1.self_attn.k_proj")
    (half / "config.json").write_text(json.dumps(config))
    assert "needs all of them sparse or none: export the model again" in refuse(half)


def test_a_sparse_head(sparse, tmp_path):
    def use_the_parts_of_another_layer(tensors):
        del tensors["lm_head.weight"]
        for part in ("compressed", "bitmask", "shape", "row_offsets"):
            tensors[f"lm_head.{part}"] = tensors[f"model.layers.0.self_attn.o_proj.{part}"].clone()

    head = rewrite(sparse, tmp_path / "head", use_the_parts_of_another_layer)
    assert "lm_head is stored sparse" in refuse(head)


def test_new_weights_in_place(sparse):
    expected = "is sparse, and weights cannot be loaded in place into sparse layers: start vLLM anew with the new"
    with engine(sparse) as llm, pytest.raises(EfxError, match=expected):
        llm.collective_rpc("reload_weights")


def test_without_the_plugin_vllm_refuses_the_checkpoint(sparse):
    result, served = serve_once(sparse, PROMPTS, VLLM_PLUGINS="")
    assert result.returncode == 1 and served is None
    assert "Sparsity support has been removed" in result.stderr
