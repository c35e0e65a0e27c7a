"""The tensors of a sparse layer are collected in any order, and what is wrong with them is named, without vLLM."""

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from efx_plugin.checkpoint import find_format, format_names
from efx_plugin.errors import SparseCheckpointError
from efx_plugin.serving.shards import ShardCollector

NAMES = {"q": "model.q_proj", "k": "model.k_proj", "v": "model.v_proj"}
ROWS = {"q": 8, "k": 4, "v": 4}
COLUMNS = 12


def collector(scheme=None, format_name="sparse-bitmask", names=None) -> ShardCollector:
    return ShardCollector(
        "model.qkv_proj",
        "QKVParallelLinear",
        ROWS,
        COLUMNS,
        names or list(NAMES.values()),
        format_name=format_name,
        scheme=scheme,
        dtype=torch.bfloat16,
    )


def sparse_weight(rows: int, columns: int = COLUMNS, dtype=torch.bfloat16) -> torch.Tensor:
    mask = torch.tensor([1, 0, 0, 1]).repeat(rows, columns // 4)
    return (torch.randint(1, 100, (rows, columns)) * mask).to(dtype)


def tensors(weight: torch.Tensor, shard, format_name="sparse-bitmask") -> list[tuple]:
    """The arguments of `add` for a weight; with a scale if it is int8."""
    parts = dict(find_format(format_name).compress(weight))
    if weight.dtype == torch.int8:
        parts["weight_scale"] = torch.rand(weight.shape[0], 1)
    return [(part, tensor, shard) for part, tensor in parts.items()]


def add_all(shards: ShardCollector, arguments) -> None:
    for part, tensor, shard in arguments:
        shards.add(part, tensor, shard)


@pytest.mark.parametrize("format_name", format_names())
@pytest.mark.parametrize("scheme", [None, "W8A8", "W8A16"])
def test_shards_come_out_as_they_were_whatever_the_order(format_name, scheme):
    dtype = torch.bfloat16 if scheme is None else torch.int8
    weights = {shard: sparse_weight(rows, dtype=dtype) for shard, rows in ROWS.items()}
    shards = collector(scheme, format_name)
    arguments = [one for shard, weight in weights.items() for one in tensors(weight, shard, format_name)]
    scales = {shard: tensor for part, tensor, shard in arguments if part == "weight_scale"}
    random.Random(0).shuffle(arguments)
    assert {part for part, _, _ in arguments} == set(shards.parts)
    for number, one in enumerate(arguments):
        assert not shards.is_complete, number
        shards.add(*one)
    assert shards.is_complete and len(shards) == 3
    while shards:
        shard, weight, scale = shards.pop()
        assert torch.equal(weight, weights.pop(shard))
        assert scale is scales.get(shard)
    assert not weights


def test_tensors_that_come_on_a_gpu_are_set_aside_on_the_cpu():
    shards = collector()
    with FakeTensorMode():
        shards.add("compressed", torch.empty(5, dtype=torch.bfloat16, device="cuda:0"), "q")
        shard = shards._collected["q"]
        assert shard["compressed"].device == torch.device("cpu")


@pytest.mark.parametrize("shard", [None, ("q", "k", "v"), ["q", "k", "v"]])
def test_a_weight_that_is_fused_on_disk_counts_for_all_its_shards(shard):
    weight, shards = sparse_weight(16), collector()
    add_all(shards, tensors(weight, shard))
    assert shards.is_complete
    found, expanded, _ = shards.pop()
    assert found == (None if shard is None else ("q", "k", "v"))
    assert torch.equal(expanded, weight)


@pytest.mark.parametrize("missing", ["compressed", "bitmask", "row_offsets", "shape", "weight_scale"])
def test_a_missing_tensor_is_named(missing):
    shards = collector("W8A16")
    for shard, rows in ROWS.items():
        parts = tensors(sparse_weight(rows, dtype=torch.int8), shard)
        add_all(shards, [one for one in parts if shard == "q" or one[0] != missing])
    assert not shards.is_complete
    assert str(shards.missing()).startswith(
        f"model.k_proj is sparse according to config.json, but the checkpoint lacks its {missing}: download"
    )


@pytest.mark.parametrize("again", ["q", None, ("q", "k")])
def test_a_tensor_that_comes_twice_is_refused(again):
    shards = collector()
    add_all(shards, tensors(sparse_weight(8), "q"))
    with pytest.raises(SparseCheckpointError, match=r"\.compressed is in the checkpoint twice: export it again"):
        add_all(shards, tensors(sparse_weight(8), again))


def test_a_shard_that_the_layer_does_not_know_is_refused():
    with pytest.raises(SparseCheckpointError, match=r"model.qkv_proj has a shard 'z'.*of type QKVParallelLinear"):
        add_all(collector(), tensors(sparse_weight(8), "z"))


@pytest.mark.parametrize(
    ("scheme", "weight", "message"),
    [
        (None, sparse_weight(8, 16), r"model.q_proj.shape declares \[8, 16\], but by config.json .*\[8, 12\]"),
        (None, sparse_weight(4), r"model.q_proj.shape declares \[4, 12\]"),
        (None, sparse_weight(8, dtype=torch.int8), r"holds quantized values \(torch.int8\)"),
        (None, sparse_weight(8).to(torch.float8_e4m3fn), r"holds quantized values \(torch.float8_e4m3fn\)"),
        ("W8A8", sparse_weight(8), r"model.q_proj is of torch.bfloat16, but config.json makes it int8 \(W8A8\)"),
    ],
)
def test_a_weight_that_is_not_what_config_json_says_is_refused(scheme, weight, message):
    shards = collector(scheme)
    parts = [one for one in tensors(weight, "q") if one[0] in shards.parts]
    if scheme is not None:
        parts.append(("weight_scale", torch.ones(8, 1), "q"))
    add_all(shards, parts)
    with pytest.raises(SparseCheckpointError, match=message):
        shards.pop()


@pytest.mark.parametrize("scale", [torch.ones(4, 1), torch.ones(8), torch.full((8, 1), torch.nan)])
def test_a_scale_that_is_no_finite_number_per_row_is_refused(scale):
    shards = collector("W8A8")
    add_all(shards, tensors(sparse_weight(8, dtype=torch.int8), "q")[:-1])
    shards.add("weight_scale", scale, "q")
    with pytest.raises(SparseCheckpointError, match=r"model.q_proj.weight_scale is not \[8, 1\] finite numbers"):
        shards.pop()


def test_without_the_names_of_shards_the_layer_is_named():
    shards = collector(names=["model.qkv_proj"])
    assert (shards.name("q"), shards.name(None)) == ("model.qkv_proj", "model.qkv_proj")
    assert collector().name("k") == "model.k_proj"


def test_a_format_that_there_is_not_is_refused():
    with pytest.raises(SparseCheckpointError, match=r"config.json asks for the format 'sparse-8'"):
        collector(format_name="sparse-8")
