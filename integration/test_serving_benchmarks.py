"""The benchmarks of serving measure what they say, on a tiny model and a small layer; their times mean nothing here."""

import argparse
import io
import json
import os
import sys
import time

import psutil
import pytest
import torch
from rich.console import Console

from efx_plugin.errors import EfxError
from integration.benchmarks import dense, kernels, serve, timing
from integration.benchmarks.progress import progress_on

pytestmark = pytest.mark.serving

TINY = serve.MODEL | {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_engines_and_loading(tmp_path):
    output = tmp_path / "serve.json"
    report = serve.bench(
        tmp_path / "model", TINY, output, eager=True, batches=(1, 3), prefill_tokens=64, rounds=2, loads=1
    )
    assert json.loads(output.read_text()) == report
    assert report["versions"].keys() == {"efx-plugin", "vllm", "torch"}
    assert report["tokens_per_second"].keys() == report["loading"].keys() == serve.KINDS.keys()
    rivals = {"sparse bf16": ["bf16"], "sparse W8A8": ["bf16", "W8A8"], "sparse W4A16": ["bf16", "W8A8", "W4A16"]}
    linears, head = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 128 * 192 * 3), 320 * 128
    for kind, found in report["sparse"].items():
        assert found["operator"] != "dense"
        assert list(found["over"]) == [f"dense {width}" for width in rivals[kind]]
        bf16 = found["over"]["dense bf16"]
        assert bf16["by_bytes"] == pytest.approx((linears + head) / (found["weight_bytes"] * linears + head))
        for name in ("1", "3", "prefill"):
            cells = [over["workloads"][name] for over in found["over"].values()]
            assert all(0.01 < cell["ratio"] < 100 and cell["spread"] >= 0 for cell in cells)
            assert sum(cell["rival"] for cell in cells) == 1
    assert not psutil.Process().children()


@pytest.mark.parametrize("fails", ["input(); sys.exit('out of memory')", "sys.exit('out of memory')"])
def test_a_process_that_fails_is_named_with_its_log(tmp_path, fails):
    command = [sys.executable, "-c", f"import sys; print('ready', flush=True); {fails}"]
    with (
        pytest.raises(RuntimeError, match=r"the engine stopped: its message is in .*engine\.log"),
        open(tmp_path / "engine.log", "w") as log,
        timing.process("the engine", command, os.environ, log) as (ask, pid),
    ):
        if "input" not in fails:
            psutil.wait_procs([psutil.Process(pid)], timeout=10)
        ask("{}")
    assert "out of memory" in (tmp_path / "engine.log").read_text()


def test_an_output_that_is_no_terminal_gets_lines_of_progress():
    lines = io.StringIO()
    with progress_on(Console(file=lines, width=100), seconds=0.01) as progress:
        task = progress.add_task("loading", total=4)
        progress.advance(task)
        while "loading: 1 of 4 after" not in lines.getvalue():
            time.sleep(0.01)


def test_interleaving_alternates_what_goes_first():
    order = []
    seconds = timing.interleave({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert seconds == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert timing.ratio(seconds["a"], seconds["b"]) == 6 / 5


def test_kernels(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EFX_KERNEL", "reference")
    monkeypatch.setattr(kernels, "SECONDS", 0.1)
    to_measure = kernels.cases([(1024, 512)], [0.4])
    kernels.run(to_measure, [1, 8], tmp_path / "kernels")
    assert (tmp_path / "kernels.png").stat().st_size > 1000
    assert "fastest" not in capsys.readouterr().out  # there is no rival but oneDNN's bf16
    records = json.loads((tmp_path / "kernels.json").read_text())
    for record, m in zip(records, [1, 8], strict=True):
        case = {"n": 1024, "k": 512, "m": m, "sparsity": 0.4, "structure": "unstructured", "dtype": "bf16"}
        assert record | case == record
        assert {"isa", "threads", "ratio", "bytes_ratio", "spread", "gb_per_s", "fraction_of_limit"} < record.keys()
        assert record["ratio_to"] == {"bf16": record["ratio"]} and record["rival_ratio"] == {}
        assert 0.01 < record["ratio"] < 100
        # Both sides of a ratio read the same number of weights.
        dense_over_ours = record["dense_gb_per_s"] / record["gb_per_s"] * record["bytes_ratio"]
        assert dense_over_ours == pytest.approx(record["ratio"], rel=0.5)


@pytest.mark.parametrize("emulated", [False, True])
def test_rivals_have_at_least_as_many_bits(monkeypatch, emulated):
    monkeypatch.setattr(kernels, "cpu_multiplies_in", lambda dtype: not emulated)
    floats = ["bf16", "fp32"] if emulated else ["bf16"]
    assert kernels.rival_forms(16) == floats
    assert kernels.rival_forms(8) == [*floats, "int8"]
    assert kernels.rival_forms(4) == [*floats, "int8", "int4"]


def test_kernels_of_few_bits_are_measured_against_dense_ones_of_few_bits(tmp_path, monkeypatch, capsys):
    seconds = {"ours": 1.0, "memory": 3.0, "bf16": 4.0, "fp32": 8.0, "int8": 2.0, "int4": 2.5}

    def repeat(functions):
        assert all(function() > 0 for function in functions.values())
        return {name: [seconds[name]] for name in functions}

    monkeypatch.setenv("EFX_KERNEL", "reference")
    monkeypatch.setattr(kernels, "repeat", repeat)
    monkeypatch.setattr(kernels, "WORKING_SET", 2e6)
    monkeypatch.setattr(kernels, "cpu_multiplies_in", lambda dtype: False)
    to_measure = [kernels.Case(1024, 512, 0.5, "unstructured", dtype) for dtype in ("w8a16", "w4a8")]
    kernels.run(to_measure, [1, 8], tmp_path / "kernels")
    eight, _, four, _ = json.loads((tmp_path / "kernels.json").read_text())
    assert eight["ratio"] == four["ratio"] == 0.25
    assert eight["ratio_to"] == {"bf16": 0.25, "fp32": 0.125, "int8": 0.5}
    assert four["ratio_to"] == {"bf16": 0.25, "fp32": 0.125, "int8": 0.5, "int4": 0.4}
    assert eight["rival_ratio"] == {"fp32": 2.0, "int8": 0.5}
    assert four["rival_ratio"] == {"fp32": 2.0, "int8": 0.5, "int4": 0.625}
    printed = capsys.readouterr().out
    assert "fastest" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["dense", "fp32", "1024x512", "2.00", "2.00"] in lines
    assert ["dense", "int8", "1024x512", "0.50", "0.50"] in lines
    assert ["dense", "int4", "1024x512", "0.62", "0.62"] in lines
    assert ["w8a16", "50%", "1024x512", "0.50", "8", "0.50", "8"] in lines
    assert ["w4a8", "50%", "1024x512", "0.50", "8", "0.50", "8"] in lines


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_dense_forms_compute_the_product_of_what_they_are_quantized_to(form):
    weight = torch.randn(64, 256).bfloat16() * (torch.rand(64, 256) < 0.5)
    group = 256 if form == "int8" else dense.GROUP
    values, scales = dense.quantize(weight, dense.BITS[form], group)
    assert torch.equal(values.sign(), weight.sign())  # no weight more is zero
    most = 2 ** (dense.BITS[form] - 1) - 1
    assert values.abs().unflatten(1, (-1, group)).amax(-1).eq(most).all()
    x = torch.randn(5, 256).bfloat16()
    one, other = dense.Layers(form, weight, 2)(x, 2)
    assert torch.equal(one, other)
    expected = x.double() @ (values.double() * scales.double().repeat_interleave(group, 1)).T
    error = torch.linalg.vector_norm(one - expected) / torch.linalg.vector_norm(expected)
    assert error < 0.02  # activations in eight bits


def test_shapes_that_dense_int4_cannot_take_are_refused():
    assert kernels.shape("64x256") == (64, 256)
    for text in ("48x256", "64x192"):
        with pytest.raises(argparse.ArgumentTypeError, match="32 has to divide OUT, and 128 IN"):
            kernels.shape(text)


def test_a_kernel_that_computes_something_else_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("EFX_KERNEL", "reference")
    monkeypatch.setattr(
        kernels,
        "sparse_linear",
        lambda x, packed: (
            1.1 * torch.ops.efx.sparse_linear(x, packed.tensors, None, packed.out_features, packed.kernel)
        ),
    )
    with pytest.raises(EfxError, match=r"off by 0\.1.* of oneDNN's with 1 tokens"):
        next(kernels.measure(kernels.Case(1024, 512, 0.4, "unstructured", "bf16"), [1]))


@pytest.mark.parametrize("case", kernels.cases([(64, 96)], [0.4, 0.5]))
def test_weights_are_as_sparse_as_they_say(case):
    weight = kernels.make_weight(case)
    assert (weight == 0).float().mean().item() == pytest.approx(case.sparsity, abs=0.03)
    if case.structure == "2:4":
        assert ((weight.view(-1, 4) != 0).sum(1) == 2).all()
