"""A new format is a class in a new file and a line in the registry: everything else works with what the class says."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from efx_plugin.checkpoint import expand, export_checkpoint, linear_bytes, load_sparse, read_index, save_sparse
from efx_plugin.checkpoint.codec import bits
from efx_plugin.checkpoint.formats import registry
from efx_plugin.checkpoint.formats.protocol import Layout, Parts
from efx_plugin.checkpoint.summary import summarize
from efx_plugin.errors import SparseCheckpointError
from tests.support.tiny_llama import tiny_llama


class Coordinates:
    """The non-zeros, and where each lies in the flat weight. Its parts share no name with the formats that exist."""

    name = "toy-coordinates"
    structure = "anywhere"

    def fits(self, mask: np.ndarray, columns: int) -> bool:
        return True

    def layout(self, rows: int, columns: int, nonzeros: int, dtype: torch.dtype) -> Layout:
        return {"kept": (dtype, (nonzeros,)), "places": (torch.int32, (nonzeros,)), "shape": (torch.int64, (2,))}

    def compress(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        places = weight.flatten().nonzero().flatten()
        return {"kept": weight.flatten()[places], "places": places.int(), "shape": torch.tensor(weight.shape)}

    def dense_layout(self, parts: Parts, where: str) -> tuple[torch.dtype, tuple[int, int]]:
        if parts.keys() != self.layout(0, 0, 0, torch.float32).keys():
            raise SparseCheckpointError(f"{where}.kept or one of its fellows is missing")
        rows, columns = parts["shape"].tolist()
        return parts["kept"].dtype, (rows, columns)

    def check(self, parts: Parts, where: str) -> None:
        _, (rows, columns) = self.dense_layout(parts, where)
        if parts["places"].shape != parts["kept"].shape or int(parts["places"].max()) >= rows * columns:
            raise SparseCheckpointError(f"{where}.places lie outside of the weight")

    def decompress(self, parts: Parts) -> torch.Tensor:
        weight = torch.zeros(parts["shape"].tolist(), dtype=parts["kept"].dtype).flatten()
        weight[parts["places"].long()] = parts["kept"]
        return weight.reshape(parts["shape"].tolist())


@pytest.fixture
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "FORMATS", (*registry.FORMATS, Coordinates()))


@pytest.fixture
def model():
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data[torch.rand(parameter.shape, generator=generator) < 0.7] = 0
    return model


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("_registered")
def test_it_is_saved_inspected_exported_and_loaded_by_code_that_does_not_know_it(tmp_path, model):
    save_sparse(model, tmp_path / "sparse", structure="toy-coordinates", progress=False)
    names = read_index(tmp_path / "sparse")
    assert "model.layers.0.mlp.up_proj.places" in names
    assert not any(name.endswith(("compressed", "bitmask")) for name in names)

    summary = summarize(tmp_path / "sparse", verify=True)
    weights = {name: p for name, p in model.named_parameters() if "_proj" in name}
    assert summary.format == "toy-coordinates"
    assert {one.name: one.zeros for one in summary.weights} == {n: int((p == 0).sum()) for n, p in weights.items()}
    assert linear_bytes(tmp_path / "sparse")["dense"] == sum(p.nbytes for p in weights.values())

    state = model.state_dict()
    assert same(dict(expand(tmp_path / "sparse")), state)
    assert same(load_sparse(tmp_path / "sparse").state_dict(), state)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").state_dict(), state)

    export_checkpoint(tmp_path / "sparse", tmp_path / "dense", structure="dense", progress=False)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict(), state)
    export_checkpoint(tmp_path / "dense", tmp_path / "again", structure="toy-coordinates", progress=False)
    assert same(load_sparse(tmp_path / "again").state_dict(), state)


@pytest.mark.usefixtures("_registered")
def test_auto_takes_the_first_format_that_makes_every_sparse_weight_smaller(tmp_path, model):
    save_sparse(model, tmp_path / "unstructured", progress=False)
    assert summarize(tmp_path / "unstructured").format == "sparse-bitmask"  # ahead of the toy
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            fours = parameter.data.view(-1, 4)
            fours.scatter_(1, fours.abs().topk(2, dim=1, largest=False).indices, 0)
    save_sparse(model, tmp_path / "24", progress=False)
    assert summarize(tmp_path / "24").format == "sparse-24-bitmask"


def test_without_its_line_it_is_unknown(tmp_path, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(registry, "FORMATS", (*registry.FORMATS, Coordinates()))
        save_sparse(model, tmp_path / "sparse", structure="toy-coordinates", progress=False)
    with pytest.raises(SparseCheckpointError, match="'toy-coordinates': the formats are sparse-24-bitmask, sparse-bit"):
        load_sparse(tmp_path / "sparse")


@pytest.mark.parametrize("form", registry.FORMATS, ids=registry.format_names())
def test_a_format_is_all_that_the_protocol_asks(form):
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 3, 0, 0]])
    assert form.fits(bits.nonzero_mask(weight), 8)
    parts = form.compress(weight)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == form.layout(1, 8, 3, weight.dtype)
    on_meta = {name: part if name == "shape" else part.to("meta") for name, part in parts.items()}
    assert form.dense_layout(on_meta, "w") == (torch.float32, (1, 8))
    form.check(parts, "w")
    assert torch.equal(form.decompress(parts), weight)
