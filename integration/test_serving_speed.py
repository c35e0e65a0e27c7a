"""`efx compare --serve` times vLLM's engines; on a tiny model its times mean nothing."""

import sys

import pytest

from efx_plugin.evaluate.speed import BATCHES, measure, refuse_python
from integration.benchmarks.serve import make_model
from integration.test_serving_benchmarks import TINY

pytestmark = pytest.mark.serving


def test_engines_dense_and_sparse_answer_in_turn(tmp_path):
    for name in ("dense", "sparse"):
        make_model(TINY, f"{name} bf16", tmp_path / name)
    refuse_python(sys.executable)
    found = measure(sys.executable, tmp_path / "dense", {"lora+expert 50 %": tmp_path / "sparse"}, tmp_path)
    assert found.keys() == {"lora", "lora+expert 50 %"}
    for line in found.values():
        assert tuple(line) == BATCHES
        assert all(speed.tokens_per_second > 0 and speed.over_dense > 0 for speed in line.values())
    assert "sparse layers run on the" in (tmp_path / "sparse.serve.log").read_text()
