"""safetensors files and indexes, good and bad."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from efx_plugin.checkpoint.storage.safetensors_file import nbytes, parse_json, read_index, read_tensor, write_file
from efx_plugin.errors import SparseCheckpointError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.bitmask": torch.arange(10, dtype=torch.uint8).reshape(5, 2),
    "c.shape": torch.tensor([3, 4]),
    "d.scalar": torch.tensor(7, dtype=torch.int64),
    "e.empty": torch.zeros(0, 3, dtype=torch.bfloat16),
    "f.fp8": torch.arange(6, dtype=torch.uint8).view(torch.float8_e4m3fn),
}


def write(path, tensors) -> None:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_file(path, layout, tensors.items(), lambda size: None)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape, as_bytes(found)) == (expected.dtype, expected.shape, as_bytes(expected))


def test_the_library_reads_what_is_written(tmp_path):
    write(tmp_path / "model.safetensors", TENSORS)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(TENSORS)
        assert file.metadata() == {"format": "pt"}
        for name, tensor in TENSORS.items():
            assert_equal(file.get_tensor(name), tensor)


def test_what_the_library_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    index = read_index(tmp_path)
    assert set(index) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert (index[name].dtype, index[name].shape, index[name].nbytes) == (tensor.dtype, tensor.shape, tensor.nbytes)
        assert_equal(read_tensor(tmp_path, index[name]), tensor)


def test_every_tensor_written_is_reported_with_its_bytes(tmp_path):
    sizes = []
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    write_file(tmp_path / "model.safetensors", layout, TENSORS.items(), sizes.append)
    assert sizes == [nbytes(*described) for described in layout.values()]


def test_tensors_out_of_order_are_a_bug_and_not_a_file(tmp_path):
    layout = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with pytest.raises(RuntimeError, match="where a"):
        write_file(
            tmp_path / "x.safetensors", layout, [("b", torch.zeros(2)), ("a", torch.zeros(2))], lambda size: None
        )


def raw_file(header: object, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "declares a header of 0 bytes in a file of 0"),
        (b"\x00\x00", "truncated"),
        (struct.pack("<Q", 2**63) + b"{}", "declares a header of 9,223,372,036,854,775,808 bytes"),
        (raw_file(b"{nonsense"), "is not the JSON"),
        (raw_file(b"\xff\xfe{}"), "is not the JSON"),
        (raw_file(b"[" * 200_000), "is not the JSON"),
        (raw_file(b"[]"), "does not hold a JSON object"),
        (raw_file(b'{"w": {}, "w": {}}'), "'w' occurs twice"),
        (raw_file({"w": 3}), "w is not described"),
        (raw_file({"w": entry() | {"more": 1}}, bytes(8)), "w is not described"),
        (raw_file({"w": entry(dtype="F99")}, bytes(8)), "w has the dtype 'F99'"),
        (raw_file({"w": entry(dtype=["F32"])}, bytes(8)), "w has the dtype"),
        (raw_file({"w": entry(shape=[-2])}, bytes(8)), "w has a shape that is none"),
        (raw_file({"w": entry(shape=[2.0])}, bytes(8)), "w has a shape that is none"),
        (raw_file({"w": entry(shape=[True, 2])}, bytes(8)), "w has a shape that is none"),
        (raw_file({"w": entry(shape=[1] * 1000 + [2])}, bytes(8)), "w has a shape that is none"),
        (raw_file({"w": entry(shape=[2**62, 2**62])}, bytes(8)), "w has the shape .* larger than any file"),
        (raw_file({"w": entry(shape=[0, 2**63], offsets=[0, 0])}), "w has the shape .* larger than any file"),
        (raw_file({"w": entry(shape=[2**40])}, bytes(8)), "w has a shape that takes 4,398,046,511,104 bytes"),
        (raw_file({"w": entry(shape=[3])}, bytes(8)), "w has a shape that takes 12 bytes, but 8 are stored"),
        (raw_file({"w": entry(offsets=[8, 0])}, bytes(8)), "w lies at bytes 8 to 0"),
        (raw_file({"w": entry(offsets=[0, 2**70])}, bytes(8)), "w lies at bytes 0 to"),
        (raw_file({"w": entry(offsets=[0, 8, 8])}, bytes(8)), "w has data_offsets that are none"),
        (raw_file({"w": entry()}, bytes(4)), "w lies at bytes 0 to 8 of 4"),
        (raw_file({"w": entry()}, bytes(9)), "bytes, but its tensors end at byte"),
        (raw_file({"v": entry(), "w": entry()}, bytes(8)), "w does not begin where the tensor before it ends"),
        (raw_file({"w": entry(offsets=[4, 12])}, bytes(12)), "w does not begin where"),
    ],
)
def test_headers_that_contradict_themselves(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SparseCheckpointError, match=message) as caught:
        read_index(tmp_path)
    assert str(caught.value).startswith("model.safetensors")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    save_file(TENSORS, directory / "model.safetensors")
    return directory, (directory / "model.safetensors").read_bytes()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, 10_000))
@example(length=7)
@example(length=8)
def test_a_truncated_file(good, tmp_path, length):
    content = good[1]
    (tmp_path / "model.safetensors").write_bytes(content[: length % len(content)])
    with pytest.raises(SparseCheckpointError, match=r"model\.safetensors"):
        read_index(tmp_path)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_any_byte_of_a_header_changed(good, tmp_path, position, value):
    """Either the file still describes its own bytes, or it is refused; and what is described can be read."""
    content = bytearray(good[1])
    header = 8 + int.from_bytes(content[:8], "little")
    content[position % header] = value
    (tmp_path / "model.safetensors").write_bytes(content)
    try:
        index = read_index(tmp_path)
    except SparseCheckpointError as error:
        assert "model.safetensors" in str(error)
    else:
        assert sum(read_tensor(tmp_path, stored).nbytes for stored in index.values()) == len(content) - header


def test_a_file_truncated_after_its_header_was_read(good, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(good[1])
    index = read_index(tmp_path)
    last = max(index.values(), key=lambda stored: stored.begin)
    path.write_bytes(good[1][:-1])
    with pytest.raises(SparseCheckpointError, match=r"model\.safetensors ends early"):
        read_tensor(tmp_path, last)


def make_shards(directory, weight_map=None) -> None:
    write(directory / "one.safetensors", {"a": torch.ones(2), "b": torch.ones(3)})
    write(directory / "two.safetensors", {"c": torch.ones(4)})
    listed = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    content = {"weight_map": listed | (weight_map or {})}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


def test_shards_are_read_through_their_index(tmp_path):
    make_shards(tmp_path)
    index = read_index(tmp_path)
    assert {name: stored.file for name, stored in index.items()} == {
        "a": "one.safetensors",
        "b": "one.safetensors",
        "c": "two.safetensors",
    }
    assert torch.equal(read_tensor(tmp_path, index["b"]), torch.ones(3))


@pytest.mark.parametrize(
    "file", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", "", 3, None, ["one.safetensors"], "one"]
)
def test_an_index_that_points_outside_of_the_directory(tmp_path, file):
    (tmp_path / "sub").mkdir()
    make_shards(tmp_path / "sub")
    make_shards(tmp_path, {"d": file})
    with pytest.raises(SparseCheckpointError, match="lists d in"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"d": "three.safetensors"}, "three.safetensors, which .* lists for d, is missing"),
        ({"d": "two.safetensors"}, "two.safetensors: d is listed in .* but missing"),
        ({"a": "two.safetensors"}, "one.safetensors: a is not where"),
    ],
)
def test_an_index_that_disagrees_with_its_shards(tmp_path, weight_map, message):
    make_shards(tmp_path, weight_map)
    with pytest.raises(SparseCheckpointError, match=message):
        read_index(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    make_shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    write(tmp_path / "two.safetensors", {"c": torch.ones(4), "a": torch.zeros(2)})
    with pytest.raises(SparseCheckpointError, match=r"two\.safetensors: a is also stored in one\.safetensors"):
        read_index(tmp_path)


def test_a_tensor_that_the_index_does_not_list(tmp_path):
    make_shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    write(tmp_path / "two.safetensors", {"c": torch.ones(4), "z": torch.zeros(2)})
    with pytest.raises(SparseCheckpointError, match=r"two\.safetensors: z is not where"):
        read_index(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"a": 1, "a": 2}'])
def test_an_index_that_is_none(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(SparseCheckpointError, match=r"model\.safetensors\.index\.json"):
        read_index(tmp_path)


def test_no_weights_at_all_and_weights_in_two_ways(tmp_path):
    with pytest.raises(SparseCheckpointError, match="holds neither"):
        read_index(tmp_path)
    make_shards(tmp_path)
    write(tmp_path / "model.safetensors", {"a": torch.ones(2)})
    with pytest.raises(SparseCheckpointError, match="holds both"):
        read_index(tmp_path)


def test_numbers_too_long_for_python_are_refused(tmp_path):
    with pytest.raises(SparseCheckpointError, match="is not the JSON"):
        parse_json(tmp_path / "x.json", b'{"a": ' + b"9" * 100_000 + b"}")
