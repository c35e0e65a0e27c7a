"""Corrupt checkpoints by the hundred (by the ten thousand in `make test-long`): each is refused by one sentence.

Every input is a small, sound checkpoint with one thing changed that a reader can know to be wrong. Nothing may crash,
load, or take memory that the files do not account for.
"""

import json
import os
import random
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from efx_plugin.checkpoint import save_sparse
from efx_plugin.checkpoint.summary import summarize
from efx_plugin.errors import SparseCheckpointError
from tests.support.tiny_llama import tiny_llama

INPUTS = int(os.environ.get("EFX_CORRUPT_INPUTS", "500"))
MEMORY = 256 * 2**20  # bytes; the checkpoints have 0.2 MB
PARTS = ("compressed", "bitmask", "row_offsets", "shape")


@pytest.fixture(scope="module", params=["sparse-bitmask", "sparse-24-bitmask"])
def sound(request, tmp_path_factory):
    """A sharded checkpoint, without checksums, which would catch everything first."""
    model = tiny_llama(num_hidden_layers=1)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data.view(-1, 4)[:, :2] = 0
    directory = tmp_path_factory.mktemp("sound") / "checkpoint"
    save_sparse(model, directory, request.param, max_shard_size="60KB", progress=False)
    (directory / "SHA256SUMS").unlink()
    summarize(directory, verify=True)
    return directory


def shards(directory):
    return sorted(directory.glob("*.safetensors"))


def split(path):
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join(path, header, data):
    """`header` is a dictionary, or JSON text for what no dictionary can say."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def with_part(rng, directory, *parts):
    """A shard and the name of a random tensor in it that is one of `parts` of a compressed weight."""
    found = [(path, name) for path in shards(directory) for name in split(path)[0] if name.rpartition(".")[2] in parts]
    return rng.choice(found) if found else (None, None)


def truncate(rng, directory):
    path = rng.choice(shards(directory))
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def append(rng, directory):
    path = rng.choice(shards(directory))
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 64)))


def lie_about_the_header(rng, directory):
    path = rng.choice(shards(directory))
    content = path.read_bytes()
    true_size = int.from_bytes(content[:8], "little")
    size = rng.choice([0, true_size - 1, true_size + 8, len(content), 2**40, 2**63, 2**64 - 1])
    path.write_bytes(size.to_bytes(8, "little") + content[8:])


def break_the_json(rng, directory):
    path = rng.choice(shards(directory))
    header, data = split(path)
    header = {"__metadata__": header.pop("__metadata__")} | header
    text = json.dumps(header)
    position = rng.randrange(text.index("}"), len(text))  # nobody reads the metadata
    join(path, text[:position] + rng.choice(["\x00", "}", '"', "\\", "[[[["]) + text[position:], data)


def lie_about_a_tensor(rng, directory):
    path = rng.choice(shards(directory))
    header, data = split(path)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    match rng.randrange(5):
        case 0:
            entry["data_offsets"][rng.randrange(2)] += rng.choice([-(2**40), -1, 1, 7, 2**40, 2**62])
        case 1:
            entry["shape"] = rng.choice([[2**31, 2**31], [2**40], [-1], [1] * 40, [0, 2**60], "wide", [1.5], []])
        case 2:
            entry["dtype"] = rng.choice(["F64", "BOOL", "F4", "", 7])
        case 3:
            del entry[rng.choice(list(entry))]
        case 4:
            entry["data_offsets"].reverse()
    join(path, header, data)


def store_a_tensor_twice(rng, directory):
    path, name = with_part(rng, directory, *PARTS)
    header, data = split(path)
    text = json.dumps(header)
    join(path, text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}" + "}", data)


def rewrite(rng, directory, change, *parts):
    path, name = with_part(rng, directory, *parts)
    if path is None:
        return False
    tensors = load_file(path)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, path, metadata={"format": "pt"})
    return True


def flip_a_mask_bit(rng, directory):
    def change(mask):
        position = rng.randrange(mask.numel())
        mask.view(-1)[position] ^= 1 << rng.randrange(8)
        return mask

    rewrite(rng, directory, change, "bitmask")


def lie_about_an_offset(rng, directory):
    def change(offsets):
        offsets[rng.randrange(len(offsets))] += rng.choice([-(2**62), -1, 1, 3, 2**31, 2**62])
        return offsets

    if not rewrite(rng, directory, change, "row_offsets"):
        flip_a_mask_bit(rng, directory)


def lie_about_a_shape(rng, directory):
    def change(shape):
        shape.view(-1)[rng.randrange(2)] = rng.choice([-1, 0, 1, 2**20, 2**31, 2**62])
        return shape

    rewrite(rng, directory, change, "shape")


def resize_a_part(rng, directory):
    def change(tensor):
        flat = tensor.flatten()
        return torch.cat([flat, flat])[: rng.choice([0, flat.numel() - 1, flat.numel() + 1])]

    rewrite(rng, directory, change, "compressed", "bitmask", "shape")


def change_a_dtype(rng, directory):
    def change(tensor):
        wrong = [torch.int16, torch.uint8, torch.int64, torch.float64, torch.bool]
        return tensor.to(rng.choice([dtype for dtype in wrong if dtype != tensor.dtype]))

    rewrite(rng, directory, change, "bitmask", "row_offsets", "shape")


def lose_a_part(rng, directory):
    path, name = with_part(rng, directory, *PARTS)
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    edit_json(directory / "model.safetensors.index.json", lambda index: index["weight_map"].pop(name))


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def lie_in_the_index(rng, directory):
    def change(index):
        weights = index["weight_map"]
        name = rng.choice([name for name in weights if name.rpartition(".")[2] in PARTS])
        match rng.randrange(4):
            case 0:
                weights[name] = rng.choice(
                    ["../outside.safetensors", "/etc/passwd", "no-such-file.safetensors", ".", 3]
                )
            case 1:
                weights[name + "x"] = weights[name]
            case 2:
                del weights[name]
            case 3:
                index["weight_map"] = rng.choice([[], None, "x"])

    edit_json(directory / "model.safetensors.index.json", change)


def mix_the_formats(rng, directory):
    def change(config):
        sparsity = config["quantization_config"]["sparsity_config"]
        other = {"sparse-bitmask": "sparse-24-bitmask", "sparse-24-bitmask": "sparse-bitmask"}[sparsity["format"]]
        sparsity["format"] = rng.choice([other, "sparse-bitmap", None, 24])

    edit_json(directory / "config.json", change)


CORRUPTIONS = [
    truncate,
    append,
    lie_about_the_header,
    break_the_json,
    lie_about_a_tensor,
    store_a_tensor_twice,
    flip_a_mask_bit,
    lie_about_an_offset,
    lie_about_a_shape,
    resize_a_part,
    change_a_dtype,
    lose_a_part,
    lie_in_the_index,
    mix_the_formats,
]


def test_every_corruption_is_refused_by_a_sentence_that_names_it(sound, tmp_path):
    names = {path.name for path in sound.iterdir()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    accepted = []
    for seed in range(INPUTS // 2):  # two formats
        rng = random.Random(seed)
        corrupt = CORRUPTIONS[seed % len(CORRUPTIONS)]
        directory = tmp_path / "corrupt"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(sound, directory)
        corrupt(rng, directory)
        try:
            summarize(directory, verify=True)
        except SparseCheckpointError as error:
            sentence = str(error)
            assert "\n" not in sentence and any(name in sentence for name in names), (corrupt.__name__, seed, sentence)
        else:
            accepted.append((corrupt.__name__, seed))
    assert not accepted
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY
