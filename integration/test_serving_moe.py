"""Mixture of experts: attention is served sparse, and the experts stay dense."""

import pytest

from efx_plugin.checkpoint import find_format
from efx_plugin.errors import SparseCheckpointError
from integration.serving_models import assert_same, engine, kernel, rewrite, save_tiny, serve

pytestmark = pytest.mark.serving


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe"])
def test_it_is_served_as_the_dense_checkpoint_and_the_log_says_what_is_dense(architecture, tmp_path, monkeypatch):
    from efx_plugin.serving.config import logger

    lines = []
    monkeypatch.setattr(logger, "handle", lambda record: lines.append(record.getMessage()))
    model = save_tiny(tmp_path, architecture)
    dense = serve(model / "dense")
    assert lines == []
    assert_same(dense, serve(model / "sparse-bitmask"), kernel())
    name = {"Mixtral": "block_sparse_moe", "Qwen3Moe": "mlp"}[architecture]
    notice = f"efx-plugin: model.layers.*.{name}.experts are dense: efx-plugin has no sparse kernel for fused experts."
    assert lines.count(notice) == 1  # for both layers


def test_experts_that_are_stored_sparse_are_refused(tmp_path):
    """As older releases of transformers and compressed-tensors, to which each expert was a module, left them."""
    name = "model.layers.1.block_sparse_moe.experts.3.w2"

    def compress(tensors):
        weight = tensors.pop(f"{name}.weight")
        for part, tensor in find_format("sparse-bitmask").compress(weight).items():
            tensors[f"{name}.{part}"] = tensor

    sparse = rewrite(save_tiny(tmp_path, "Mixtral") / "sparse-bitmask", tmp_path / "sparse", compress)
    message = r"layers\.1\.block_sparse_moe\.experts are stored sparse \(as bitmask\).* efx_plugin.save_sparse"
    with pytest.raises(SparseCheckpointError, match=message), engine(sparse):
        pass
