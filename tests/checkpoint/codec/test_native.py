"""The compiled codec computes what the numpy one does, in either instruction set, and survives what no caller does."""

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efx_plugin.checkpoint import decompress, find_format, format_names
from efx_plugin.checkpoint.codec import bits, native, numpy_codec
from efx_plugin.checkpoint.storage.prefetch import map_ahead
from efx_plugin.errors import SparseCheckpointError

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "efx_plugin" / "checkpoint" / "codec" / "native"
CXX = shutil.which("g++")
IS_X86 = platform.machine() in ("x86_64", "AMD64")
INSTRUCTION_SETS = ["portable", "avx512_vbmi2"]

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++")


def compile_codec(output: Path, *options: str, with_avx512: bool) -> None:
    """Compile the codec, and what else `options` name, into one program or library."""
    common = [CXX, "-std=c++17", "-g", f"-I{SOURCES}"]
    avx512 = output.with_suffix(".avx512.o")
    if with_avx512:
        flags = [option for option in options if option.startswith(("-f", "-O"))]
        instructions = ["-mavx512f", "-mavx512bw", "-mavx512vbmi2"]
        subprocess.run([*common, *flags, *instructions, "-c", SOURCES / "avx512.cpp", "-o", avx512], check=True)
        options = (*options, str(avx512), "-DEFX_WITH_X86")
    subprocess.run([*common, *options, SOURCES / "entry.cpp", SOURCES / "portable.cpp", "-o", output], check=True)


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def library(request, tmp_path_factory):
    """The codec in one instruction set, in the place of the installed one."""
    if request.param == "portable":
        path = tmp_path_factory.mktemp("native") / "portable.so"
        compile_codec(path, "-shared", "-fPIC", "-O1", with_avx512=False)
        loaded = native.declare(ctypes.CDLL(str(path)))
    else:
        loaded = native.library()
        assert loaded is not None, "g++ is there, so `pip install --editable .` should have built the codec"
    if loaded.efx_instruction_set().decode() != request.param:
        pytest.skip(f"this processor has no {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: loaded)
        yield loaded


@st.composite
def weights(draw, two_of_four=False):
    """Integers of any bit pattern [rows, columns] and a magnitude; rows of all densities, and words cut off."""
    dtype = np.dtype(draw(st.sampled_from([np.int8, np.int16, np.int32])))
    magnitude = np.iinfo(dtype).max if draw(st.booleans()) else -1
    rows = draw(st.integers(1, 7))
    columns = 4 * draw(st.integers(1, 60)) if two_of_four else draw(st.integers(1, 240))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.integers(0, 256, (rows, columns * dtype.itemsize), dtype=np.uint8).view(dtype)
    density = np.array(draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=rows, max_size=rows)))
    keep = rng.random((rows, columns)) < density[:, None]
    if two_of_four:
        order = rng.random((rows, columns // 4, 4)).argsort(-1).argsort(-1)
        keep &= (order < draw(st.sampled_from([2, 2, 2, 3]))).reshape(rows, columns)
    values[~keep] = draw(st.sampled_from([0, np.iinfo(dtype).min]))  # 0.0 or, where the sign does not count, -0.0
    return values, magnitude


def assert_equal(ours: tuple[np.ndarray, ...] | None, theirs: tuple[np.ndarray, ...] | None) -> None:
    assert (ours is None) == (theirs is None)
    for one, other in zip(ours or (), theirs or (), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@given(weights())
def test_packs_and_unpacks_like_numpy(library, weight):
    values, magnitude = weight
    mask, counts, packed = native.pack(values, magnitude)
    assert_equal((mask, counts, packed), numpy_codec.pack(values, magnitude))
    assert_equal((native.nonzero_mask(values, magnitude),), (mask,))
    assert_equal((native.row_counts(mask),), (counts,))
    columns = values.shape[1]
    assert_equal((native.unpack(packed, mask, columns),), (numpy_codec.unpack(packed, mask, columns),))


@given(weights(two_of_four=True))
def test_packs_and_unpacks_two_of_four_like_numpy(library, weight):
    values, magnitude = weight
    columns = values.shape[1]
    ours = native.pack_24(values, magnitude)
    assert_equal(ours, numpy_codec.pack_24(values, magnitude))
    mask = numpy_codec.nonzero_mask(values, magnitude)
    assert native.fours(mask, columns) == numpy_codec.fours(mask, columns)
    if ours is not None:
        mask, packed = ours
        assert native.fours(mask, columns) == numpy_codec.fours(mask, columns) == 2
        assert_equal((native.unpack(packed, mask, columns),), (numpy_codec.unpack(packed, mask, columns),))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_a_weight_large_enough_for_huge_pages(library, dtype):
    columns = 4097
    rows = (1 << 25) // (columns * np.dtype(dtype).itemsize) + 1
    values = np.zeros((rows, columns), dtype)
    values.reshape(-1)[::3] = np.arange(1, 1 + -(-values.size // 3)).astype(dtype)
    mask, _, packed = native.pack(values, -1)
    restored = native.unpack(packed, mask, columns)
    assert restored.nbytes > 1 << 25
    assert restored.flags.c_contiguous
    np.testing.assert_array_equal(restored, values)


def test_strided_and_misaligned_arrays(library):
    values = np.frombuffer(bytes(range(201)), np.int16, 100, offset=1).reshape(10, 10)
    assert_equal(native.pack(values, -1), numpy_codec.pack(values.copy(), -1))
    mask, _, packed = native.pack(values.T, -1)
    np.testing.assert_array_equal(native.unpack(packed, np.asfortranarray(mask), 10), values.T)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_weights_without_elements(library, shape):
    values = np.empty(shape, np.int16)
    mask, counts, packed = native.pack(values, -1)
    assert_equal((mask, counts, packed), numpy_codec.pack(values, -1))
    assert native.unpack(packed, mask, shape[1]).shape == shape


def test_unpack_refuses_what_does_not_fit(library):
    mask, packed = np.array([[0b1011], [0b0110]], np.uint8), np.arange(5, dtype=np.int16)
    assert native.unpack(packed, mask, 4).tolist() == [[0, 1, 0, 2], [0, 3, 4, 0]]
    with pytest.raises(ValueError, match="more bits in the mask than values"):
        native.unpack(packed[:4], mask, 4)
    with pytest.raises(ValueError, match="more values than bits"):
        native.unpack(np.arange(6, dtype=np.int16), mask, 4)
    with pytest.raises(ValueError, match="beyond the last column"):
        native.unpack(packed, mask, 3)
    with pytest.raises(ValueError, match="sizes of the arrays disagree"):
        native.unpack(packed, mask, 9)
    with pytest.raises(ValueError, match="no integers of that width"):
        native.unpack(packed.astype(np.int64), mask, 4)


# The same sentence from both for the same corrupt parts.


def outcome_of(name: str, parts: dict[str, torch.Tensor]) -> str | list:
    try:
        weight = decompress(name, parts, where="shard: layer")
    except SparseCheckpointError as error:
        return str(error)
    return weight.view(bits.BITS[weight.dtype].integer).tolist()


@settings(max_examples=300)
@given(st.data(), st.sampled_from(format_names()), st.sampled_from(list(bits.BITS)), st.sampled_from([20, 64, 132]))
def test_corrupt_parts_get_the_same_answer_from_both(library, data, name, dtype, columns):
    weight = torch.arange(1, 5 * columns + 1).reshape(5, columns).remainder(100).add(1).to(dtype)
    weight.view(bits.BITS[dtype].integer)[:, 1::2] = 0
    parts = find_format(name).compress(weight)
    part = data.draw(st.sampled_from(sorted(parts)))
    raw = parts[part].reshape(-1).view(torch.uint8)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        parts["compressed"] = parts["compressed"].reshape(-1)[: data.draw(st.integers(0, parts["compressed"].numel()))]
    found = outcome_of(name, parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "codec", lambda: numpy_codec)
        assert outcome_of(name, parts) == found


# Calls that no caller makes, on buffers that are exactly as large as they are said to be.

FIELDS = ("function", "width", "rows", "columns", "magnitude", "fours", "input", "mask", "counts", "output")
PACK, UNPACK, COUNT, FOURS = range(4)
HOSTILE = [-(2**63), -(2**32), -1, 0, 1, 2**31, 2**32 + 6, 2**61, 2**62, 2**63 - 1]


def make_call(rng: np.random.Generator) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """A call that is right, then broken in one way or none; its input values and its mask."""
    width = int(rng.choice([1, 2, 4]))
    rows, columns = int(rng.integers(1, 6)), int(rng.integers(1, 60)) * int(rng.choice([1, 4]))
    values = rng.integers(0, 256, (rows, columns * width), dtype=np.uint8).view(f"i{width}")
    values[rng.random(values.shape) >= rng.choice([0, 0.1, 0.5, 1])] = 0
    is_24 = columns % 4 == 0 and rng.random() < 0.5
    if is_24:
        values.reshape(-1, 4)[:, rng.permutation(4)[:2]] = 0
    mask, _, packed = numpy_codec.pack(values, -1)
    if is_24:
        mask, packed = numpy_codec.pack_24(values, -1)
    call = {"function": int(rng.integers(4)), "width": width, "rows": rows, "columns": columns}
    inputs = {PACK: values.reshape(-1), UNPACK: packed}.get(call["function"], packed[:0])
    call |= {"magnitude": 2 ** (8 * width - 1) - 1, "fours": int(is_24), "counts": rows}
    call["output"] = {PACK: len(packed), UNPACK: values.size}.get(call["function"], 0)
    mask = mask.reshape(-1).copy()
    kind = rng.integers(10)
    if kind == 0:
        for _ in range(rng.integers(1, 4)):
            mask[rng.integers(len(mask))] ^= 1 << rng.integers(8)
    elif kind == 1:
        inputs = inputs[: rng.integers(len(inputs) + 1)]
    elif kind == 2:
        mask = rng.integers(0, 256, int(rng.integers(len(mask) + 20)), dtype=np.uint8)
    elif kind == 3:
        call[str(rng.choice(["rows", "columns"]))] = int(rng.choice(HOSTILE))
    elif kind == 4:
        call["rows"], call["columns"] = (int(extent) for extent in rng.choice(HOSTILE, 2))
    elif kind == 5:
        call[str(rng.choice(["counts", "output"]))] = int(rng.integers(200))
    elif kind == 6:
        call["columns"] += int(rng.integers(-7, 8))
    elif kind == 7:
        call["fours"] = 1
    return call | {"input": len(inputs), "mask": len(mask)}, inputs, mask


def call_in_process(library: ctypes.CDLL, call: dict[str, int], inputs: np.ndarray, mask: np.ndarray) -> str:
    """What the replaying program prints for the call: its result and an FNV-1a hash of what it wrote."""
    mask = np.full(call["mask"], 0xA5, np.uint8) if call["function"] == PACK else mask.copy()
    counts = np.full(8 * call["counts"], 0xA5, np.uint8).view(np.int64)
    output = np.full(call["width"] * call["output"], 0xA5, np.uint8).view(inputs.dtype)
    (a, m, c, o), (width, rows, columns) = (
        [(x.ctypes.data, x.size) for x in (inputs, mask, counts, output)],
        [call[name] for name in ("width", "rows", "columns")],
    )
    if call["function"] == PACK:
        result = library.efx_pack(width, *a, rows, columns, call["magnitude"], call["fours"], *m, *c, *o)
        written = [mask, counts, output[: max(0, result)]]
    elif call["function"] == UNPACK:
        result, written = library.efx_unpack(width, *a, *m, rows, columns, *o), [output]
    elif call["function"] == COUNT:
        result, written = library.efx_count(*m, rows, columns, *c), [counts]
    else:
        result, written = library.efx_fours(*m, rows, columns), []
    digest = 0xCBF29CE484222325
    for byte in b"".join(array.tobytes() for array in written) if result >= 0 else b"":
        digest = (digest ^ byte) * 0x100000001B3 % 2**64
    return f"{result} {digest:016x}"


@pytest.mark.skipif(platform.system() != "Linux", reason="needs the sanitizers of g++ on Linux")
def test_no_call_makes_the_sanitizers_report(library, tmp_path):
    """Five calls for each example that the profile asks for; on the heap, and beside pages that cannot be touched."""
    rng = np.random.default_rng(0)
    calls = [make_call(rng) for _ in range(5 * settings().max_examples)]
    with open(tmp_path / "calls", "wb") as file:
        for call, inputs, mask in calls:
            file.write(np.array([call[name] for name in FIELDS], np.int64).tobytes() + inputs.tobytes())
            file.write(b"" if call["function"] == PACK else mask.tobytes())
    with_avx512 = library.efx_instruction_set() != b"portable"
    sanitizers = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compile_codec(
        tmp_path / "replay", *sanitizers, str(Path(__file__).with_name("native_replay.cpp")), with_avx512=with_avx512
    )
    replayed = subprocess.run([tmp_path / "replay", tmp_path / "calls"], capture_output=True, text=True)
    assert (replayed.returncode, replayed.stderr) == (0, "")
    found = replayed.stdout.splitlines()
    assert found == [call_in_process(library, *call) for call in calls]
    results = [int(line.split()[0]) for line in found]
    assert {-1, -3, -4, -5, -6} <= set(results)  # every way to be refused, but for a width that cannot be
    assert sum(result >= 0 for result in results) > len(calls) / 10


# Without a compiler.


def test_without_the_library_numpy_does_the_work_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(native, "library", lambda: None)
    bits._choose.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert set(map_ahead(lambda _: bits.codec(), range(50))) == {numpy_codec}
            weight = torch.eye(12, dtype=torch.bfloat16)
            for name in ("sparse-bitmask", "sparse-24-bitmask"):
                assert torch.equal(decompress(name, find_format(name).compress(weight), where="w"), weight)
    finally:
        bits._choose.cache_clear()
    (message,) = caplog.messages
    assert "install g++ and run `pip install" in message


def test_the_package_builds_without_a_compiler(tmp_path):
    environment = os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--force",
        "--build-lib",
        tmp_path / "lib",
        "--build-temp",
        tmp_path,
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "_bits" in result.stderr
    assert not list(tmp_path.rglob("*.so"))
