import os

import pytest
import torch

from efx_plugin.errors import EfxError
from efx_plugin.training.state import link_state, read_state, write_state

TENSORS = {"weight": torch.arange(6.0).bfloat16().reshape(2, 3).T, "mask": torch.tensor([3, 4], dtype=torch.uint8)}
VALUES = {"pruned": 2, "arguments": {"sparsity": {"re:.*": 0.5}}, "fraction": 1 / 3}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint-7" / "state.safetensors"


def test_what_is_written_is_read(path):
    write_state(path, TENSORS, VALUES)
    tensors, values = read_state(path)
    assert values == VALUES
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_linked_file_outlives_the_first_one_and_a_missing_one_is_not_linked(path, tmp_path):
    later = tmp_path / "checkpoint-8" / path.name
    assert not link_state(path, later)
    write_state(path, TENSORS, VALUES)
    assert link_state(path, later)
    assert later.stat().st_ino == path.stat().st_ino
    path.unlink()
    assert read_state(later)[1] == VALUES


def test_a_process_killed_while_writing_leaves_what_was_there(path, monkeypatch):
    def killed(_descriptor):
        raise KeyboardInterrupt

    write_state(path, TENSORS, VALUES)
    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_state(path, {}, {"pruned": 3})
    assert read_state(path)[1] == VALUES


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_torn_or_missing_file_is_refused_by_name(path, kept):
    with pytest.raises(EfxError, match=r"state\.safetensors is missing in .*checkpoint-7.* earlier checkpoint"):
        read_state(path)
    write_state(path, TENSORS, VALUES)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(EfxError, match=r"cannot be read .*checkpoint-7.* resume from an earlier checkpoint"):
        read_state(path)


def test_a_full_disk_is_one_sentence(path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("efx_plugin.training.state.save_file", full)
    with pytest.raises(EfxError, match=r"cannot write .*state\.safetensors .*No space left"):
        write_state(path, TENSORS, VALUES)
