"""int8 weights that are sparse as well are served as they are, like the same weights stored otherwise."""

import pytest

from efx_plugin.checkpoint import export_checkpoint, load_sparse, save_sparse
from efx_plugin.errors import EfxError
from integration.served import difference
from integration.serving_models import (
    assert_same,
    engine,
    kernel,
    negate_one,
    plant,
    quantized_model,
    serve,
    swap_rows,
)
from tests.support.quantized import W8A8, W8A16, save_compressed

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def w8a8(tmp_path_factory):
    """Llama, quantized: a directory with `sparse`, and `quantized` by compressed-tensors, without the sparsity."""
    directory = tmp_path_factory.mktemp("w8a8")
    model = quantized_model(directory / "tiny", W8A8, "Llama")
    save_sparse(model, directory / "sparse", progress=False)
    save_compressed(model, directory / "quantized")
    return directory


@pytest.fixture(scope="module")
def quantized(w8a8):
    """What vLLM's own int8 kernel gives."""
    return serve(w8a8 / "quantized")


def test_w8a8_is_served_as_the_quantized_checkpoint(w8a8, quantized):
    assert_same(quantized, serve(w8a8 / "sparse"), kernel("W8A8"))


@pytest.mark.parametrize("fault", [negate_one, swap_rows])
def test_a_fault_in_w8a8_is_more_than_rounding(w8a8, quantized, fault, tmp_path):
    assert "log-probabilities" in str(difference(quantized, serve(plant(fault, w8a8 / "sparse", tmp_path / "planted"))))


def test_the_dense_export_of_w8a8_is_served(w8a8, quantized, tmp_path):
    export_checkpoint(w8a8 / "sparse", tmp_path / "dense", structure="dense", progress=False)
    assert_same(quantized, serve(tmp_path / "dense"), "dense")


# Phi-3 is fused on disk, scales as well.
@pytest.mark.parametrize("architecture", ["Llama", "Phi3"])
def test_w8a16_is_served_as_the_weights_it_stands_for(tmp_path, architecture):
    model = quantized_model(tmp_path / "tiny", W8A16, architecture)
    save_sparse(model, tmp_path / "sparse", progress=False)
    # vLLM has no kernel for dense W8A16 on a CPU. Scale times int8 is exact in bfloat16 here.
    load_sparse(tmp_path / "sparse").save_pretrained(tmp_path / "plain")
    assert_same(serve(tmp_path / "plain"), serve(tmp_path / "sparse"), kernel("W8A16"))


def test_what_cannot_be_served_names_the_remedy(tmp_path):
    fp8 = {part: args | {"type": "float"} for part, args in W8A8.items()}
    save_sparse(quantized_model(tmp_path / "tiny", fp8, "Llama"), tmp_path / "sparse", progress=False)
    with (
        pytest.raises(EfxError, match=r"both sparse and quantized, .*export_checkpoint\(.*structure=\"dense\"\)"),
        engine(tmp_path / "sparse"),
    ):
        pass
