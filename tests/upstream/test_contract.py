"""A contract test fails where a host has changed, with a sentence that says what has and who relies on it."""

from pathlib import Path

import pytest

from tests.upstream.contract import holds, says, takes
from tests.upstream.sources import Sources


def scale(weight, factor):
    """A function of a host."""
    doubled = weight + weight
    return doubled * factor


def test_the_sentence_names_release_change_and_user():
    with pytest.raises(AssertionError, match=r"^torch \d[^:]+: there is no sum, and efx_plugin.method relies on it"):
        holds(False, "torch", "there is no sum", "efx_plugin.method")


@pytest.mark.parametrize("parameters", [["factor", "weight"], ["weight", "scale"]])
def test_parameters_in_another_order_or_of_other_names_are_a_change(parameters):
    takes(scale, ["weight", "factor"], "torch", "us")
    with pytest.raises(AssertionError, match=r"test_contract.scale takes \["):
        takes(scale, parameters, "torch", "us")


def test_what_happens_in_another_order_is_a_change():
    says(scale, ["weight + weight", "* factor"], "torch", "us")
    with pytest.raises(AssertionError, match="no longer says 'weight - weight'"):
        says(scale, ["weight - weight"], "torch", "us")
    with pytest.raises(AssertionError, match="in this order"):
        says(scale, ["* factor", "weight + weight"], "torch", "us")


def test_sources_are_read_without_being_run(tmp_path: Path):
    folder, metadata = tmp_path / "host" / "layers", tmp_path / "host-1.2.dist-info"
    folder.mkdir(parents=True)
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: host\nVersion: 1.2\n")
    (folder / "__init__.py").write_text("from host.layers.linear import Linear as Plain\n")
    (folder / "linear.py").write_text(
        "raise SystemExit\n"
        "if True:\n    LIMIT = 3\n"
        "class Base:\n    def apply(self, layer, *, bias=None):\n        self.rank = 0  # a comment\n"
        "class Linear(Base):\n    size: int = 4\n"
    )
    host = Sources("host", tmp_path)
    assert host.release == "1.2"
    assert host.names("host.layers") == {"Plain"}
    assert host.names("host.layers.linear") == {"LIMIT", "Base", "Linear"}
    assert host.parameters("host.layers.linear", "Linear.apply") == ["self", "layer", "bias"]
    assert host.attributes("host.layers.linear", "Linear") == {"size", "rank", "apply"}
    assert host.text("host.layers.linear", "Base.apply").endswith("self.rank = 0")
    assert not host.names("host.gone") and not host.parameters("host.layers.linear", "Gone.apply")
