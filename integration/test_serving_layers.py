"""Sparse shards become, on every rank, the weight that vLLM's dense loader makes of the same matrices."""

import subprocess
import sys
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efx_plugin.checkpoint import FORMATS
from efx_plugin.errors import EfxError, SparseCheckpointError

pytestmark = pytest.mark.serving

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}


def make_config(structure="sparse-bitmask", targets=("Linear",), ignore=(), **fields):
    from efx_plugin.serving.config import SparseCompressedTensorsConfig

    sparsity = {"format": structure, "targets": list(targets), "ignore": list(ignore)}
    config = SparseCompressedTensorsConfig.from_config({"format": "dense", "sparsity_config": sparsity} | fields)
    config.packed_modules_mapping = FUSED
    return config


@contextmanager
def ranked(rank, size):
    """As on rank `rank` of `size`, without the processes."""
    stand_ins = {
        "get_tensor_model_parallel_rank": lambda: rank,
        "get_tensor_model_parallel_world_size": lambda: size,
    }
    with (
        patch.multiple("vllm.model_executor.layers.linear", **stand_ins),
        patch.multiple("vllm.model_executor.parameter", **stand_ins),
    ):
        yield


@pytest.fixture(autouse=True, scope="module")
def one_rank():
    with ranked(0, 1):
        yield


def make(kind, name, config, *arguments, **options):
    """A vLLM layer, dense if `config` is None."""
    from vllm.model_executor.layers import linear

    options |= {"bias": False, "params_dtype": torch.bfloat16, "quant_config": config, "prefix": name}
    return getattr(linear, kind)(*arguments, **options)


def make_qkv(config, hidden=8, head_size=4, heads=2, kv_heads=1):
    return make("QKVParallelLinear", f"{ATTENTION}.qkv_proj", config, hidden, head_size, heads, kv_heads)


def make_merged(config, hidden=8, rows=(12, 12)):
    return make("MergedColumnParallelLinear", f"{MLP}.gate_up_proj", config, hidden, list(rows))


def make_plain(config, kind="ReplicatedLinear", columns=8, rows=8, **options):
    return make(kind, f"{MLP}.down_proj", config, columns, rows, **options)


def random_weight(rows, columns, seed=0):
    """Two non-zeros in every four, so that both formats take it."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns // 4, 4, generator=generator).topk(2).indices
    mask = torch.zeros(rows, columns // 4, 4).scatter_(2, kept, 1).reshape(rows, columns)
    return (torch.randn(rows, columns, generator=generator) * mask).to(torch.bfloat16)


def load(layer, tensors):
    """Give the layer (name, tensor, shard id) in turn, as vLLM's model loaders do."""
    for name, tensor, shard in tensors:
        param = getattr(layer, name)
        param.weight_loader(param, tensor, *(() if shard is None else (shard,)))


def parts_of(weight, structure="sparse-bitmask", shard=None):
    return [(name, tensor, shard) for name, tensor in FORMATS[structure].compress(weight).items()]


def finish(layer):
    layer.quant_method.process_weights_after_loading(layer)
    (weight,) = layer.packed_weight.tensors
    return weight.to_dense() if weight.is_mkldnn else weight


def assert_same_as_dense(make_layer, weights, structure, order, size):
    """`weights`: {shard id: matrix}; `order` shuffles the tensors of all shards."""
    for rank in range(size):
        with ranked(rank, size):
            dense, sparse = make_layer(None), make_layer(make_config(structure))
            load(dense, [("weight", weight, shard) for shard, weight in weights.items()])
            tensors = [part for shard, weight in weights.items() for part in parts_of(weight, structure, shard)]
            order.shuffle(tensors)
            load(sparse, tensors)
        assert torch.equal(finish(sparse), dense.weight.data)
        x = torch.randn(3, dense.weight.shape[1], dtype=torch.bfloat16)
        expected = torch.nn.functional.linear(x, dense.weight)
        torch.testing.assert_close(sparse.quant_method.apply(sparse, x), expected)


structures = st.sampled_from(sorted(FORMATS))
sizes = st.sampled_from([1, 2, 4])


@settings(max_examples=30, deadline=None)
@given(
    size=sizes,
    heads_per_rank=st.integers(1, 2),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_size=st.sampled_from([2, 3, 8]),
    hidden=st.sampled_from([4, 12, 20]),
    structure=structures,
    fused_on_disk=st.booleans(),
    order=st.randoms(),
)
def test_query_key_value(size, heads_per_rank, kv_heads, head_size, hidden, structure, fused_on_disk, order):
    heads = 4 * size * heads_per_rank  # each key-value head serves some; ranks that outnumber these replicate them
    rows = {"q": heads * head_size, "k": kv_heads * head_size, "v": kv_heads * head_size}
    weights = {shard: random_weight(n, hidden, seed) for seed, (shard, n) in enumerate(rows.items())}
    if fused_on_disk:
        weights = {None: torch.cat(list(weights.values()))}
    assert_same_as_dense(
        lambda config: make_qkv(config, hidden, head_size, heads, kv_heads), weights, structure, order, size
    )


@settings(max_examples=30, deadline=None)
@given(
    size=sizes,
    rows_per_rank=st.lists(st.integers(1, 7), min_size=2, max_size=3),
    hidden=st.sampled_from([4, 12, 20]),
    structure=structures,
    disk=st.sampled_from(["shards", "fused", "two and the rest"]),
    order=st.randoms(),
)
def test_merged_columns(size, rows_per_rank, hidden, structure, disk, order):
    rows = [n * size for n in rows_per_rank]
    weights = {shard: random_weight(n, hidden, shard) for shard, n in enumerate(rows)}
    if disk == "fused":
        weights = {None: torch.cat(list(weights.values()))}
    elif disk == "two and the rest":
        weights = {(0, 1): torch.cat([weights.pop(0), weights.pop(1)])} | weights
    assert_same_as_dense(lambda config: make_merged(config, hidden, rows), weights, structure, order, size)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["RowParallelLinear", "ColumnParallelLinear", "ReplicatedLinear"]),
    size=sizes,
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    disable_tp=st.booleans(),
    structure=structures,
    order=st.randoms(),
)
def test_single_weights(kind, size, rows, columns, disable_tp, structure, order):
    weights = {None: random_weight(4 * rows, 4 * columns)}
    assert_same_as_dense(
        lambda config: make_plain(config, kind, 4 * columns, 4 * rows, disable_tp=disable_tp),
        weights,
        structure,
        order,
        size,
    )


def test_one_dense_layer_is_staged_at_a_time():
    layer = make_merged(make_config())
    load(layer, parts_of(random_weight(12, 8), shard=0))
    assert layer.sparse_loader.staging is not None and not layer.sparse_loader.parts
    load(layer, parts_of(random_weight(12, 8), shard=1))
    assert layer.sparse_loader.staging is None
    finish(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight"] and layer.weight.numel() == 0


def test_weights_are_served_in_the_dtype_asked_for():
    weight = random_weight(8, 8)
    layer = make_plain(make_config())
    load(layer, parts_of(weight.float()))
    assert torch.equal(finish(layer), weight)


# What is sparse


def is_sparse(layer):
    return type(layer.quant_method).__name__ == "SparseLinearMethod"


@pytest.mark.parametrize(
    ("targets", "ignore", "sparse"),
    [
        (["Linear"], [], True),
        (["Linear"], ["lm_head"], True),
        (["Linear"], [f"{ATTENTION}.{name}" for name in FUSED["qkv_proj"]], False),
        (["Linear"], [r"re:.*self_attn.*"], False),
        ([r"re:.*\.[qkv]_proj"], [], True),
        ([f"{ATTENTION}.{name}" for name in FUSED["qkv_proj"]], [], True),
        ([f"{MLP}.gate_proj"], [], False),
    ],
)
def test_targets_and_ignore_decide_what_is_sparse(targets, ignore, sparse):
    assert is_sparse(make_qkv(make_config(targets=targets, ignore=ignore))) is sparse


def test_paths_are_renamed_as_vllm_renames_modules():
    from vllm.model_executor.models.utils import WeightsMapper

    config = make_config(targets=["Linear", "model.a.q_proj"], ignore=["re:model.*", "model.b.o_proj", "lm_head"])
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model.", "lm_": "x."}))
    assert config.sparse_targets == ("Linear", "language_model.model.a.q_proj")
    assert config.sparse_ignore == ("re:model.*", "language_model.model.b.o_proj", "lm_head")


def test_a_checkpoint_without_sparsity_is_left_to_vllm():
    from efx_plugin.serving.config import SparseCompressedTensorsConfig

    config = SparseCompressedTensorsConfig.from_config({"format": "dense"})
    config.packed_modules_mapping = FUSED
    layer = make_qkv(config)
    assert not is_sparse(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


# What is refused


@pytest.mark.parametrize("ignore", [[f"{ATTENTION}.k_proj"], [r"re:.*[kv]_proj"]])
def test_a_fused_layer_that_is_sparse_in_part_is_refused(ignore):
    with pytest.raises(EfxError, match=r"qkv_proj fuses .*k_proj.* is dense .*: export the model again"):
        make_qkv(make_config(ignore=ignore))


def test_a_fused_layer_that_is_targeted_in_part_is_refused():
    with pytest.raises(EfxError, match=r"of which .*q_proj, .*k_proj is dense"):
        make_qkv(make_config(targets=[r"re:.*v_proj"]))


def test_a_layer_that_is_sparse_and_quantized_is_refused():
    groups = {"group_0": {"targets": ["Linear"], "weights": INT8, "input_activations": None}}
    with pytest.raises(EfxError, match=r"both sparse and quantized.*export the model again"):
        make_qkv(make_config(config_groups=groups, format="pack-quantized"))


@pytest.mark.parametrize(
    ("sparsity", "more", "message"),
    [
        ({"format": "sparse-8"}, {}, "'sparse-8'.*sparse-bitmask and sparse-24-bitmask only"),
        ({"targets": []}, {}, "targets in config.json is empty"),
        ({"targets": "Linear"}, {}, "targets in config.json must be a list"),
        ({"ignore": [3]}, {}, "ignore in config.json must be a list"),
        ({}, {"transform_config": {"config_groups": {}}}, "cannot apply transforms"),
    ],
)
def test_configurations_that_cannot_be_served_are_refused(sparsity, more, message):
    from efx_plugin.serving.config import SparseCompressedTensorsConfig

    config = {"format": "sparse-bitmask", "targets": ["Linear"]} | sparsity
    with pytest.raises(EfxError, match=message):
        SparseCompressedTensorsConfig.from_config({"sparsity_config": config} | more)


@pytest.mark.parametrize("structure", sorted(FORMATS))
def test_missing_tensors_are_named(structure):
    for missing in FORMATS[structure].layout(0, 0, 0, torch.bfloat16):
        layer = make_merged(make_config(structure))
        load(layer, parts_of(random_weight(12, 8), structure, 0))
        load(layer, [part for part in parts_of(random_weight(12, 8), structure, 1) if part[0] != missing])
        with pytest.raises(SparseCheckpointError, match=rf"{MLP}.up_proj .* lacks its {missing}: download"):
            finish(layer)


def test_a_layer_that_is_missing_altogether_is_named():
    with pytest.raises(SparseCheckpointError, match=rf"{MLP}.gate_proj .* lacks its compressed, bitmask"):
        finish(make_merged(make_config()))


def test_a_layer_that_is_dense_in_the_checkpoint_is_named():
    layer = make_qkv(make_config())
    with pytest.raises(SparseCheckpointError, match=rf"{ATTENTION}.k_proj.weight is stored dense.*`ignore`"):
        load(layer, [("weight", random_weight(4, 8), "k")])


def test_a_layer_that_is_sparse_only_in_the_checkpoint_is_named():
    layer = make_qkv(make_config(ignore=[r"re:.*self_attn.*"]))
    with pytest.raises(SparseCheckpointError, match=rf"{ATTENTION}.qkv_proj is stored sparse .*correct its `targets`"):
        load(layer, parts_of(random_weight(8, 8), shard="q"))


def test_a_shard_that_comes_twice_is_refused():
    layer = make_qkv(make_config())
    load(layer, parts_of(random_weight(8, 8), shard="q"))
    with pytest.raises(SparseCheckpointError, match=rf"{ATTENTION}.q_proj.compressed is in the checkpoint twice"):
        load(layer, parts_of(random_weight(8, 8), shard="q"))


@pytest.mark.parametrize(("rows", "columns"), [(16, 8), (4, 8), (8, 12)])
def test_a_weight_of_another_model_is_refused(rows, columns):
    layer = make_qkv(make_config())
    with pytest.raises(SparseCheckpointError, match=rf"q_proj.shape declares \[{rows}, {columns}\]"):
        load(layer, parts_of(random_weight(rows, columns), shard="q"))


def test_quantized_values_are_refused():
    layer = make_plain(make_config())
    with pytest.raises(SparseCheckpointError, match=r"quantized values .*int8.*export the model again"):
        load(layer, parts_of((random_weight(8, 8) * 10).to(torch.int8)))


@pytest.mark.parametrize("structure", sorted(FORMATS))
def test_corrupt_tensors_are_named(structure):
    def refuse(change):
        parts = FORMATS[structure].compress(random_weight(8, 8))
        change(parts)
        layer = make_plain(make_config(structure))
        with pytest.raises(SparseCheckpointError, match=rf"{MLP}.down_proj\."):
            load(layer, [(name, tensor, None) for name, tensor in parts.items()])

    refuse(lambda parts: parts["bitmask"][0, :1].bitwise_xor_(1))
    refuse(lambda parts: parts.update(compressed=parts["compressed"][:-1]))
    refuse(lambda parts: parts.update(bitmask=parts["bitmask"].to(torch.int16)))
    refuse(lambda parts: parts.update(shape=torch.ones(8, 8, 8, dtype=torch.int64)))


# The plugin


def test_registering_is_idempotent_and_replaces_vllms_own():
    from vllm.model_executor.layers.quantization import get_quantization_config

    from efx_plugin.serving import register
    from efx_plugin.serving.config import SparseCompressedTensorsConfig

    register()
    register()
    assert get_quantization_config("compressed-tensors") is SparseCompressedTensorsConfig


def test_an_unsupported_vllm_is_named_with_the_remedy_and_not_broken(monkeypatch):
    import logging

    from efx_plugin.serving import register

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    monkeypatch.setattr(logging.getLogger("vllm.efx_plugin"), "handlers", [handler])
    monkeypatch.setitem(sys.modules, "efx_plugin.serving.config", None)  # makes its import fail
    register()
    ((level, message),) = lines
    assert level == "ERROR"
    assert "supports 0.32 and 0.33" in message and "pip install 'efx-plugin[serve]'" in message


def test_importing_the_plugin_is_cheap():
    script = "import sys, efx_plugin.serving; print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
