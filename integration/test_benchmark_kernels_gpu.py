"""What the benchmark for GPUs does around the GPU: its plan, its records, its report, and its model, on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from integration.benchmarks import decode_gpu, kernels_gpu, kernels_gpu_report
from tests.support.fake_gpu import FakeGpu

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).parents[1]
TINY = decode_gpu.LLAMA_8B | {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    gpu = FakeGpu()
    gpu.install(monkeypatch)
    monkeypatch.setattr(kernels_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return gpu


class FakeGraph:
    def __init__(self, calls):
        self.calls = calls

    def __call__(self) -> float:
        self.calls()
        return 0.01


# The plan.


def test_all_steps_fit_into_the_time():
    assert sum(step.seconds for step in kernels_gpu.plan()) <= 480


def test_what_is_right_comes_first_and_everything_is_measured():
    names = [step.name for step in kernels_gpu.plan()]
    assert names[0] == "correctness"
    assert len(set(names)) == len(names)
    few = {f"{size} at {part}, few tokens" for size in ("1B", "8B", "70B") for part in ("40%", "50%", "60%", "50% 2:4")}
    many = {f"{size} at 50%, many tokens" for size in ("1B", "8B", "70B")}
    few_int8 = "8B at 50% int8, few tokens"
    assert few | many | {few_int8, "model", "crossovers", "copy bandwidth"} < set(names)
    assert [2**i for i in range(14)] == kernels_gpu.FEW + kernels_gpu.MANY
    assert len(kernels_gpu.CHECKED) * 2 >= 32


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_steps_that_do_not_fit_are_left_out_and_named():
    clock, records = Clock(), []

    def one(seconds):
        for index in range(3):
            clock.now += seconds
            yield {"what": "one", "index": index}

    steps = [
        kernels_gpu.Step("first", 5, lambda: one(2)),
        kernels_gpu.Step("long", 50, lambda: one(1)),
        kernels_gpu.Step("longer than planned", 1, lambda: one(8)),
        kernels_gpu.Step("never", 1, lambda: one(1)),
    ]
    kernels_gpu.run(steps, 20, records.append, clock)
    assert [(record["what"], record.get("step")) for record in records if record["what"] != "one"] == [
        ("seconds", "first"),
        ("left out", "long"),
        ("left out", "the rest of longer than planned"),
        ("seconds", "longer than planned"),
        ("left out", "never"),
    ]


def test_a_step_that_fails_does_not_keep_others_from_running(capsys):
    def fails():
        yield {"what": "one"}
        raise RuntimeError("no memory")

    records = []
    steps = [kernels_gpu.Step("bad", 1, fails), kernels_gpu.Step("good", 1, lambda: iter([{"what": "two"}]))]
    kernels_gpu.run(steps, 20, records.append, Clock())
    assert [record["what"] for record in records] == ["one", "failed", "seconds", "two", "seconds"]
    assert records[1]["error"] == "RuntimeError: no memory"


# The measurements, on a device that torch stands in for.


def test_a_right_kernel_is_found_right(gpu, monkeypatch):
    monkeypatch.setattr(kernels_gpu, "CHECKED", [(40, 72, 5), (50, 70, 64), (33, 70, 100)])
    records = list(kernels_gpu.correctness())
    assert all(record["right"] for record in records)
    ways = {tokens: {record["path"] for record in records if record["m"] == tokens} for tokens in (5, 64, 100)}
    assert ways[5] == ways[64] == {"multiply", *kernels_gpu_report.PATHS}
    assert ways[100] == {"multiply", *kernels_gpu_report.PATHS[1:]}
    assert {(record["dtype"], record["weights"]) for record in records} == {
        (dtype, weights) for dtype in ("bfloat16", "float16") for weights in (dtype, "int8")
    }


@pytest.mark.parametrize("tokens", [5, 100])
def test_a_wrong_kernel_is_found_wrong(gpu, monkeypatch, tokens):
    monkeypatch.setattr(kernels_gpu, "CHECKED", [(40, 72, tokens)])
    compute = gpu.compute

    def forgets_one(function, how, arguments):
        compute(function, how, arguments)
        result = 3 if how.symbol == "efx_expand" else 5
        arguments[result][0, -1] = float("nan")

    monkeypatch.setattr(gpu, "compute", forgets_one)
    assert not any(record["right"] for record in kernels_gpu.correctness())


def test_a_measurement_says_what_it_measured(gpu, monkeypatch):
    monkeypatch.setattr(kernels_gpu, "Graph", FakeGraph)
    monkeypatch.setattr(kernels_gpu, "WORKING_SET", 1 << 16)
    for structure, weights in (("unstructured", "bfloat16"), ("2:4", "bfloat16"), ("unstructured", "int8")):
        case = kernels_gpu.Case(64, 128, 0.5, structure, weights)
        weight = kernels_gpu.make_weight(case)
        assert abs((weight == 0).float().mean() - 0.5) < 0.02
        records = list(kernels_gpu.measure(case, [1, 8], ("multiply_records", "multiply_panels")))
        assert [(record["m"], record["path"]) for record in records] == [
            (m, path) for m in (1, 8) for path in ("multiply_records", "multiply_panels")
        ]
        for record in records:
            assert record["ratio"] == 1 and record["structure"] == structure and record["weights"] == weights
            least, most = (0.3, 0.35) if weights == "int8" else (0.5, 0.6)
            assert least < record["bytes_ratio"] < most


# The report.


def made_up(run: str = "2026-01-01 00:00:00") -> list[dict]:
    records = [{"what": "copy", "gb_per_s": 2000.0}, {"what": "correctness", "right": True, "error": 1e-3}]
    records.append({"what": "machine", "capability": [9, 0]})
    kinds = [*((*structure, "bfloat16") for structure in kernels_gpu.STRUCTURES), (0.5, "unstructured", "int8")]
    for (n, k), (sparsity, structure, weights), m in [
        ((n, k), kind, m) for n, k in kernels_gpu.SHAPES["8B"] for kind in kinds for m in (1, 8, 64, 512, 8192)
    ]:
        figures = {"ratio": 0.6 + m / 8192, "spread": 0.01, "bytes_ratio": 0.576, "gb_per_s": 1600.0, "sparse_us": 9.0}
        records.append(
            {"what": "linear", "path": "multiply", "n": n, "k": k, "m": m, "sparsity": sparsity}
            | {"structure": structure, "weights": weights}
            | figures
        )
    for path, slope, offset in (("multiply_records", 4, 0), ("multiply_many", 2, 40), ("multiply_panels", 1, 200)):
        for m in (8, 16, 32, 64, 128, 256)[: 4 if path == "multiply_records" else 6]:
            figures = {"sparse_us": float(slope * m + offset), "n": 4096, "k": 4096, "m": m}
            records.append({"what": "linear", "path": path} | figures)
    for form, speed, size in (("dense", 100.0, 16), ("sparse", 140.0, 10)):
        figures = {"form": form, "tokens_per_s": speed, "bytes": size, "linear_bytes": size - 2, "sequences": 8}
        records.append({"what": "model", "layers": 32, "parameters": 8.03e9} | figures)
    records.append({"what": "left out", "step": "70B", "because": "3 s are left of 480"})
    return [{"run": run, "card": "Imaginary GPU"} | record for record in records]


def test_tables_and_picture_show_the_last_run(tmp_path, capsys):
    old = made_up("2025-01-01 00:00:00")
    old[1]["right"] = False
    path = tmp_path / "kernels_gpu.json"
    path.write_text(json.dumps(old + made_up()))
    command = [sys.executable, "-m", "integration.benchmarks.kernels_gpu", "--report", "--output", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["1", "of", "1", "results", "are", "right"] in lines
    assert ["weight", "shape", "bytes", "M=1", "M=8", "M=64", "M=512", "M=8192", "±", "of", "copy"] in lines
    assert ["50%", "2:4", "4096x4096", "0.576", "0.60", "0.60", "0.61", "0.66", "1.60", "0.01", "0.80"] in lines
    assert ["50%", "int8", "4096x4096", "0.576", "0.60", "0.60", "0.61", "0.66", "1.60", "0.01", "0.80"] in lines
    row = "4096x4096 32.0 / 56.0 / 208.0 64.0 / 72.0 / 216.0 128.0 / 104.0 / 232.0 256.0 / 168.0 / 264.0"
    assert f"{row} / 296.0 / 328.0 / 552.0 / 456.0".split() in lines
    assert "MEASURED in variants.py: (9, 0): Crossovers(decode=16, gemm=128)" in result.stdout
    assert ["8", "100.0", "140.0", "1.40", "0.625", "0.571"] in lines
    assert "left out: " in result.stdout
    assert (tmp_path / "kernels_gpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_is_said_and_ends_in_an_error(tmp_path):
    records = made_up()
    records[1]["right"] = False
    (tmp_path / "kernels_gpu.json").write_text(json.dumps(records))
    command = [sys.executable, "-m", "integration.benchmarks.kernels_gpu", "--report", "--output", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert "0 of 1 results are right" in result.stdout and "WRONG correctness" in result.stdout
    assert result.stderr == "error: the kernels compute something else than float64: no figure above counts\n"


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "torch finds no GPU"), (["--report"], "is not there: run this")]
)
def test_without_a_gpu_or_results_it_ends_in_one_sentence(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["kernels_gpu", "--output", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match=message):
        kernels_gpu.main()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--time-limit", "long"], ["--unknown"]])
def test_what_is_no_argument_is_refused(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["kernels_gpu", *arguments])
    with pytest.raises(SystemExit) as stopped:
        kernels_gpu.main()
    assert stopped.value.code == 2


def test_it_is_imported_where_there_is_little_more_than_torch():
    """On a bare machine: nothing of the package's requirements, no numpy."""
    missing = ("wrapt", "numpy", "rich", "matplotlib", "transformers", "compressed_tensors", "psutil", "cuda")
    script = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in {missing} else found(name)
import integration.benchmarks.kernels_gpu as bench
import efx_plugin.kernels
assert not set({missing}) & set(sys.modules), set({missing}) & set(sys.modules)
assert bench.obstacle() == "torch finds no GPU"
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


# The model.


def test_the_size_of_a_model_is_reckoned_right():
    model = decode_gpu.make_model(TINY, "cpu")
    norms = sum(parameter.numel() for name, parameter in model.named_parameters() if "norm" in name)
    assert decode_gpu.parameters(TINY) == sum(parameter.numel() for parameter in model.parameters()) - norms
    assert decode_gpu.parameters(decode_gpu.LLAMA_8B) == pytest.approx(8.03e9, rel=1e-3)


def test_the_sparse_model_decodes_what_the_dense_one_does():
    model = decode_gpu.make_model(TINY, "cpu")
    linears = decode_gpu.linear_layers(model)
    assert len(linears) == 7 * TINY["num_hidden_layers"]
    for linear in linears.values():
        assert abs((linear.weight == 0).float().mean() - decode_gpu.SPARSITY) < 0.05
    dense = decode_gpu.Decoding(model, 3, 5, 4)
    decode_gpu.make_sparse(model)
    assert not decode_gpu.linear_layers(model)
    sparse = decode_gpu.Decoding(model, 3, 5, 4)
    torch.testing.assert_close(sparse.first_logits, dense.first_logits, rtol=0.02, atol=0.02)
    sparse.step()
    assert sparse.tokens.shape == (3, 1) and sparse.cache.get_seq_length() == 6


def test_both_models_are_measured(monkeypatch):
    monkeypatch.setattr(decode_gpu, "SEQUENCES", (1, 3))
    monkeypatch.setattr(decode_gpu, "PROMPT", 5)
    monkeypatch.setattr(decode_gpu, "STEPS", 2)
    for name, value in {
        "empty_cache": lambda: None,
        "memory_allocated": lambda: 0,
        "mem_get_info": lambda: (
            1.1 * 2 * decode_gpu.parameters(TINY | {"num_hidden_layers": 1}) / decode_gpu.SHARE,
            0,
        ),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with torch.inference_mode():
        records = list(decode_gpu.measure_model(TINY, "cpu", FakeGraph))
    measured = [record for record in records if record["what"] == "model"]
    assert [(record["form"], record["sequences"]) for record in measured] == [
        (form, sequences) for form in ("dense", "sparse") for sequences in (1, 3)
    ]
    assert {record["layers"] for record in records} == {1}  # what there is room for
    assert all(record["tokens_per_s"] == pytest.approx(record["sequences"] / 0.01) for record in measured)
    assert measured[2]["linear_bytes"] < measured[0]["linear_bytes"]
    assert [record["right"] for record in records if record["what"] == "logits"] == [True, True]
