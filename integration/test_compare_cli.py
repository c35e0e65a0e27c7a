"""`efx compare` as a user types it on a model, an adapter and text of their own."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support.tiny_llama import save_tiny_llama, tiny_llama

pytestmark = pytest.mark.integration

EFX = str(Path(sys.executable).parent / "efx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, an adapter for it, and two hundred short documents."""
    folder = tmp_path_factory.mktemp("compare")
    save_tiny_llama(folder / "base")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(tiny_llama(), config).save_pretrained(folder / "lora")
    words = random.Random(0)
    documents = [" ".join(f"t{words.randint(3, 127)}" for _ in range(words.randint(10, 60))) for _ in range(200)]
    (folder / "domain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


def arguments(folder: Path, cache: Path, *more: str) -> list[str]:
    given = ["--model", str(folder / "base"), "--adapter", str(folder / "lora"), "--data", str(folder / "domain.jsonl")]
    return [EFX, "compare", *given, "--samples", "8", "--length", "32", "--cache", str(cache), *more]


def efx(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[1])


def results(cache: Path) -> dict[str, int]:
    """When each result was written, by the name of its file."""
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("*.json") if ".request." not in path.name}


def test_a_killed_comparison_goes_on_without_repeating_what_is_finished(folder, tmp_path):
    cache, html = tmp_path / "cache", tmp_path / "report.html"
    options = ["--pipelines", "lora", "lora+wanda", "lora+expert", "--sparsity", ".5", "2:4", "--html", str(html)]
    command = arguments(folder, cache, *options, "--json")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not results(cache):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = results(cache)
    assert len(finished) < 5 and not html.exists()

    result = efx(command)
    assert result.returncode == 0, result.stderr
    assert f"{len(finished)} of 5 cells are in" in result.stderr
    assert {name: written for name, written in results(cache).items() if name in finished} == finished
    report = json.loads(result.stdout)
    points = {(row["pipeline"], row["sparsity"], row["mask_structure"]) for row in report["rows"]}
    sparse = {(name, 0.5, structure) for name in ("lora+wanda", "lora+expert") for structure in ("0:0", "2:4")}
    assert points == {("lora", 0.0, "0:0")} | sparse
    for row in report["rows"]:
        assert row["perplexity"] > 1 and row["recovery"] > 0 and row["seconds"] > 0 and row["peak_mb"] > 0
        assert row["sparsity_achieved"] == pytest.approx(row["sparsity"], abs=0.01)
        low, high = (32, 32) if row["pipeline"] == "lora" else (17, 18.5)
        assert low <= row["bits_per_weight"] <= high
    assert html.read_text().count("<svg") == 6

    again = efx(arguments(folder, cache, *options[:-2]))
    assert again.returncode == 0 and "5 of 5 cells are in" in again.stderr
    assert "lora+expert" in again.stdout and "best rival" in again.stdout


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        (["--pipelines", "lora+wnda"], 2, "did you mean lora+wanda?"),
        (["--adapter", "none"], 2, "there is no directory none: pass the directory of an adapter"),
        (["--data", "few.jsonl"], 1, "few.jsonl has 2 different documents, too few to hold any out"),
        (["--serve", sys.executable], 2, "has not both vLLM and efx-plugin: pip install 'efx-plugin[serve]' there"),
        (["--adapter", "other"], 1, "does not fit LlamaForCausalLM"),
    ],
)
def test_what_cannot_be_compared_ends_in_one_sentence(folder, tmp_path, monkeypatch, changes, code, said):
    monkeypatch.chdir(tmp_path)
    Path("few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    wide = tiny_llama(hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    get_peft_model(wide, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("other")
    result = subprocess.run(arguments(folder, tmp_path / "cache", *changes), capture_output=True, text=True)
    assert result.returncode == code and result.stdout == ""
    *_, last = result.stderr.splitlines()
    assert last.startswith("efx: ") and said in last


def test_a_cell_that_fails_is_named_at_the_end(folder, tmp_path):
    """The structure does not divide the inputs of down_proj."""
    options = ["--pipelines", "lora", "lora+w3", "lora+expert", "--sparsity", "3:7", "--json"]
    result = efx(arguments(folder, tmp_path / "cache", *options))
    assert result.returncode == 1
    rows = json.loads(result.stdout)["rows"]
    assert [(row["pipeline"], row["arguments"]) for row in rows] == [("lora", {}), ("lora+w3", {"group": 32})]
    last = result.stderr.splitlines()[-1]
    assert last.startswith("efx: 1 of 3 cells failed, first lora+expert 3:7 domain, seed 0: ") and ".log" in last
    assert os.path.isfile(last.rpartition("its log is ")[2])
