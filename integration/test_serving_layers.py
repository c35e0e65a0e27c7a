"""Sparse shards become, on every rank, the weight that vLLM's dense loader makes of the same matrices."""

import gc
import subprocess
import sys
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor

from efx_plugin.checkpoint import find_format, format_names
from efx_plugin.errors import EfxError, SparseCheckpointError
from efx_plugin.kernels import sparse_linear
from tests.support.quantized import W8A8, W8A16

pytestmark = pytest.mark.serving

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
SCHEMES = {"W8A8": W8A8, "W8A16": W8A16}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def make_config(structure="sparse-bitmask", targets=("Linear",), ignore=(), scheme=None, **fields):
    from efx_plugin.serving.config import SparseCompressedTensorsConfig

    sparsity = {"format": structure, "targets": list(targets), "ignore": list(ignore)}
    described = {"format": "dense", "sparsity_config": sparsity}
    if scheme is not None:
        groups = {"group_0": {"targets": ["Linear"], **SCHEMES[scheme]}}
        described |= {"format": "int-quantized", "config_groups": groups}
    config = SparseCompressedTensorsConfig.from_config(described | fields)
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
    """Two non-zeros in every four, so that both formats take it; in each row they are int8 times a power of two, so
    that quantization loses nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns // 4, 4, generator=generator).topk(2).indices
    mask = torch.zeros(rows, columns // 4, 4).scatter_(2, kept, 1).reshape(rows, columns)
    values = torch.randint(1, 128, (rows, columns), generator=generator) * mask
    signs = torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1
    return (values * signs * torch.randint(-9, -5, (rows, 1), generator=generator).exp2()).to(torch.bfloat16)


def quantize(weight):
    """int8 [rows, columns] and a scale [rows, 1], a power of two: their product is a `random_weight`."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).log2().ceil().exp2()
    return (weight / scale).to(torch.int8), scale.to(torch.bfloat16)


def load(layer, tensors):
    """Give the layer (name, tensor, shard id) in turn, as vLLM's model loaders do."""
    for name, tensor, shard in tensors:
        param = getattr(layer, name)
        param.weight_loader(param, tensor, *(() if shard is None else (shard,)))


def parts_of(weight, structure="sparse-bitmask", shard=None, scheme=None):
    if scheme is None:
        return [(name, tensor, shard) for name, tensor in find_format(structure).compress(weight).items()]
    values, scale = quantize(weight)
    return [*parts_of(values, structure, shard), ("weight_scale", scale, shard)]


def finish(layer):
    """The weight that the layer runs on, in whatever layout. Read off the products with unit vectors, which are exact:
    one summand each, and of values that bfloat16 holds.
    """
    layer.quant_method.process_weights_after_loading(layer)
    packed = layer.packed_weight
    assert packed.dtype == torch.bfloat16
    return sparse_linear(torch.eye(packed.in_features, dtype=packed.dtype), packed).T


def assert_same_as_dense(make_layer, weights, structure, order, size, scheme=None):
    """`weights`: {shard id: matrix}; `order` shuffles the tensors of all shards."""
    for rank in range(size):
        with ranked(rank, size):
            dense, sparse = make_layer(None), make_layer(make_config(structure, scheme=scheme))
            load(dense, [("weight", weight, shard) for shard, weight in weights.items()])
            tensors = [part for shard, weight in weights.items() for part in parts_of(weight, structure, shard, scheme)]
            order.shuffle(tensors)
            load(sparse, tensors)
        assert torch.equal(finish(sparse), dense.weight.data)
        # Whole numbers, of which the largest is 127: quantizing them to int8 changes nothing.
        x = torch.randint(-127, 128, (3, dense.weight.shape[1])).to(torch.bfloat16)
        x[:, 0] = 127
        expected = torch.nn.functional.linear(x.double(), dense.weight.double())
        torch.testing.assert_close(sparse.quant_method.apply(sparse, x).double(), expected, rtol=2**-8, atol=1e-3)


structures = st.sampled_from(format_names())
schemes = st.sampled_from([None, *SCHEMES])
sizes = st.sampled_from([1, 2, 4])


@settings(max_examples=30)
@given(
    size=sizes,
    heads_per_rank=st.integers(1, 2),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_size=st.sampled_from([2, 3, 8]),
    hidden=st.sampled_from([4, 12, 20]),
    structure=structures,
    scheme=schemes,
    fused_on_disk=st.booleans(),
    order=st.randoms(),
)
def test_query_key_value(size, heads_per_rank, kv_heads, head_size, hidden, structure, scheme, fused_on_disk, order):
    heads = 4 * size * heads_per_rank  # each key-value head serves some; ranks that outnumber these replicate them
    rows = {"q": heads * head_size, "k": kv_heads * head_size, "v": kv_heads * head_size}
    weights = {shard: random_weight(n, hidden, seed) for seed, (shard, n) in enumerate(rows.items())}
    if fused_on_disk:
        weights = {None: torch.cat(list(weights.values()))}
    assert_same_as_dense(
        lambda config: make_qkv(config, hidden, head_size, heads, kv_heads), weights, structure, order, size, scheme
    )


@settings(max_examples=30)
@given(
    size=sizes,
    rows_per_rank=st.lists(st.integers(1, 7), min_size=2, max_size=3),
    hidden=st.sampled_from([4, 12, 20]),
    structure=structures,
    scheme=schemes,
    disk=st.sampled_from(["shards", "fused", "two and the rest"]),
    order=st.randoms(),
)
def test_merged_columns(size, rows_per_rank, hidden, structure, scheme, disk, order):
    rows = [n * size for n in rows_per_rank]
    weights = {shard: random_weight(n, hidden, shard) for shard, n in enumerate(rows)}
    if disk == "fused":
        weights = {None: torch.cat(list(weights.values()))}
    elif disk == "two and the rest":
        weights = {(0, 1): torch.cat([weights.pop(0), weights.pop(1)])} | weights
    assert_same_as_dense(lambda config: make_merged(config, hidden, rows), weights, structure, order, size, scheme)


@settings(max_examples=30)
@given(
    kind=st.sampled_from(["RowParallelLinear", "ColumnParallelLinear", "ReplicatedLinear"]),
    size=sizes,
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    disable_tp=st.booleans(),
    structure=structures,
    scheme=schemes,
    order=st.randoms(),
)
def test_single_weights(kind, size, rows, columns, disable_tp, structure, scheme, order):
    weights = {None: random_weight(4 * rows, 4 * columns)}
    assert_same_as_dense(
        lambda config: make_plain(config, kind, 4 * columns, 4 * rows, disable_tp=disable_tp),
        weights,
        structure,
        order,
        size,
        scheme,
    )


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_a_loaded_layer_holds_its_packed_tensors_and_nothing_else(scheme):
    config = make_config(scheme=scheme)  # with the constants of vLLM's modules
    before = live_bytes()
    layer = make_merged(config, hidden=64, rows=(64, 32))
    for shard, rows in enumerate((64, 32)):
        load(layer, parts_of(random_weight(rows, 64), shard=shard, scheme=scheme))
    layer.quant_method.process_weights_after_loading(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight"] and layer.weight.numel() == 0
    assert live_bytes() - before == sum(map(nbytes, layer.packed_weight.tensors))


def live_bytes():
    """Of all tensors of this process, those that share memory counted once; what a compiler traced has none."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.device.type == "cpu"]
    tensors = [one for one in tensors if not isinstance(one, FakeTensor)]
    memory = {id(one) if one.is_mkldnn else one.untyped_storage().data_ptr(): nbytes(one) for one in tensors}
    return sum(memory.values())


def nbytes(tensor):
    return tensor.numel() * tensor.element_size() if tensor.is_mkldnn else tensor.untyped_storage().nbytes()


def test_weights_are_served_in_the_dtype_asked_for():
    weight = random_weight(8, 8)
    layer = make_plain(make_config())
    load(layer, parts_of(weight.float()))
    assert torch.equal(finish(layer), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scales_may_be_of_any_floating_dtype(dtype):
    weight = random_weight(8, 8)
    layer = make_plain(make_config(scheme="W8A16"))
    load(
        layer,
        [
            (name, part.to(dtype) if name == "weight_scale" else part, None)
            for name, part, _ in parts_of(weight, scheme="W8A16")
        ],
    )
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


@pytest.mark.parametrize(
    "described",
    [
        {"format": "dense"},
        {"sparsity_config": {"format": "dense", "targets": ["Linear"], "ignore": ["lm_head"]}},
        {"sparsity_config": {"format": None, "targets": ["Linear"]}, "config_groups": None, "ignore": None},
        {"sparsity_config": None},
        {"sparsity_config": {}},
    ],
)
def test_a_checkpoint_without_sparsity_is_left_to_vllm(described):
    from efx_plugin.serving.config import SparseCompressedTensorsConfig

    config = SparseCompressedTensorsConfig.from_config({"quant_method": "compressed-tensors", **described})
    config.packed_modules_mapping = FUSED
    layer = make_qkv(config)
    assert not is_sparse(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_a_quantized_checkpoint_that_says_it_is_dense_is_left_to_vllm():
    config = make_config("dense", scheme="W8A8")
    assert config.sparsity_format is None
    assert config.target_scheme_map["Linear"]["weights"].num_bits == 8


# What is refused


@pytest.mark.parametrize("ignore", [[f"{ATTENTION}.k_proj"], [r"re:.*[kv]_proj"]])
def test_a_fused_layer_that_is_sparse_in_part_is_refused(ignore):
    with pytest.raises(EfxError, match=r"qkv_proj fuses .*k_proj.* is dense .*: export the model again"):
        make_qkv(make_config(ignore=ignore))


def test_a_fused_layer_that_is_targeted_in_part_is_refused():
    with pytest.raises(EfxError, match=r"of which .*q_proj, .*k_proj is dense"):
        make_qkv(make_config(targets=[r"re:.*v_proj"]))


@pytest.mark.parametrize(
    ("weights", "inputs", "found"),
    [
        ({"type": "float"}, None, r"8-bit float \(per channel\) weights and unquantized"),
        ({"type": "float"}, {"type": "float"}, r"weights and dynamic 8-bit float \(per token\) activations"),
        ({"num_bits": 4}, None, r"4-bit int \(per channel\) weights"),
        ({"strategy": "group", "group_size": 4}, None, r"8-bit int \(per group\) weights"),
        ({"strategy": "tensor"}, {}, r"8-bit int \(per tensor\) weights"),
        ({"symmetric": False}, {}, r"asymmetric 8-bit int \(per channel\) weights"),
        ({}, {"symmetric": False}, r"dynamic asymmetric 8-bit int \(per token\) activations"),
        ({}, {"strategy": "tensor", "dynamic": False}, r"and 8-bit int \(per tensor\) activations"),
        ({}, {"num_bits": 4}, r"dynamic 4-bit int \(per token\) activations"),
    ],
)
def test_other_quantizations_of_sparse_layers_are_refused(weights, inputs, found):
    scheme = W8A8
    group = {
        "targets": ["Linear"],
        "weights": scheme["weights"] | weights,
        "input_activations": None if inputs is None else scheme["input_activations"] | inputs,
    }
    with pytest.raises(
        EfxError, match=rf"qkv_proj is both sparse and quantized, with .*{found}.* export the model again"
    ):
        make_qkv(make_config(config_groups={"group_0": group}, format="naive-quantized"))


def test_weights_packed_into_words_are_not_sparse():
    with pytest.raises(EfxError, match="both sparse and quantized"):
        make_qkv(make_config(scheme="W8A16", format="pack-quantized"))


def test_what_is_quantized_alone_is_left_to_vllm():
    layer = make_qkv(make_config(scheme="W8A8", ignore=[r"re:.*self_attn.*"]))
    assert type(layer.quant_method).__name__ == "CompressedTensorsLinearMethod"
    assert layer.weight.dtype == torch.int8


def test_a_form_that_only_sparse_layers_have_is_refused_of_others():
    with pytest.raises(EfxError, match=r"qkv_proj is quantized without its activations, but not sparse, .*\(W8A8\)"):
        make_qkv(make_config(scheme="W8A16", ignore=[r"re:.*self_attn.*"]))


@pytest.mark.parametrize(
    ("sparsity", "more", "message"),
    [
        ({"format": "sparse-8"}, {}, "'sparse-8'.*sparse-24-bitmask and sparse-bitmask only"),
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


@pytest.mark.parametrize("structure", format_names())
def test_missing_tensors_are_named(structure):
    for missing in find_format(structure).layout(0, 0, 0, torch.bfloat16):
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
    shapes = {"q": (rows, columns), "k": (4, 8), "v": (4, 8)}
    with pytest.raises(SparseCheckpointError, match=rf"q_proj.shape declares \[{rows}, {columns}\]"):
        load(layer, [part for shard, shape in shapes.items() for part in parts_of(random_weight(*shape), shard=shard)])


def test_values_that_config_json_does_not_quantize_are_refused():
    values, _ = quantize(random_weight(8, 8))
    for dtype in (torch.int8, torch.float8_e4m3fn):
        layer = make_plain(make_config())
        with pytest.raises(SparseCheckpointError, match=rf"down_proj holds quantized values \({dtype}\)"):
            load(layer, parts_of(values.to(dtype)))


def test_values_that_config_json_quantizes_otherwise_are_refused():
    weight = random_weight(8, 8)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        layer = make_plain(make_config(scheme="W8A16"))
        with pytest.raises(SparseCheckpointError, match=rf"down_proj is of {dtype}, but .* int8 \(W8A16\)"):
            load(layer, [*parts_of(weight.to(dtype)), parts_of(weight, scheme="W8A16")[-1]])


@pytest.mark.parametrize("scale", [torch.ones(8), torch.ones(4, 1), torch.ones(1, 1), torch.full((8, 1), torch.nan)])
def test_a_damaged_scale_is_refused(scale):
    layer = make_plain(make_config(scheme="W8A8"))
    parts = parts_of(random_weight(8, 8), scheme="W8A8")[:-1]
    with pytest.raises(SparseCheckpointError, match=r"down_proj.weight_scale is not \[8, 1\] finite numbers"):
        load(layer, [*parts, ("weight_scale", scale, None)])


def test_a_scale_that_is_missing_is_named():
    layer = make_plain(make_config(scheme="W8A8"))
    load(layer, parts_of(random_weight(8, 8), scheme="W8A8")[:-1])
    with pytest.raises(SparseCheckpointError, match=r"down_proj is sparse .* lacks its weight_scale: download"):
        finish(layer)


@pytest.mark.parametrize("structure", format_names())
def test_corrupt_tensors_are_named(structure):
    def refuse(change):
        parts = find_format(structure).compress(random_weight(8, 8))
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

    from efx_plugin.serving import register, supported_vllm

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    monkeypatch.setattr(logging.getLogger("vllm.efx_plugin"), "handlers", [handler])
    monkeypatch.setitem(sys.modules, "efx_plugin.serving.config", None)  # makes its import fail
    register()
    ((level, message),) = lines
    assert level == "ERROR"
    assert f"supports {supported_vllm()}: install" in message and "pip install 'efx-plugin[serve]'" in message


def test_importing_the_plugin_is_cheap():
    script = "import sys, efx_plugin.serving; print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
