"""`make demo`: from a general model and a LoRA adapter to a sparse legal expert that vLLM serves, with its rivals.

SmolLM2-135M-Instruct stands in for the paper's models and licence texts stand in for its legal corpora. Everything is
measured in this run: nothing in the table or in `build/demo/report.json` comes from elsewhere.
"""

import json
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import LoggerConfig, configure_logger, oneshot
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from efx_plugin.checkpoint import linear_bytes, save_sparse
from efx_plugin.engine.compute_dtype import choose_for
from efx_plugin.machine import cpu_name
from efx_plugin.model.adapters import merge_adapters
from integration.assets import smollm2, splits, token_blocks
from integration.expert import load as load_model
from integration.expert import perplexity, round_to_stored, train_lora
from integration.served import difference

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "demo"
MODEL = "SmolLM2-135M-Instruct"
CORPUS = "licence texts (stand-in for legal corpora)"
SEED = 0
SPARSITY = 0.5
WINDOW = 256  # tokens per training, calibration and evaluation sequence
TRAINING_TOKENS = 60_000
CALIBRATION_SEQUENCES = 32
HELDOUT_TOKENS = 12_288
PROMPT_TOKENS = 32
NEW_TOKENS = 48
RIVALS = {"wanda": "wanda_50.yaml", "sparsegpt": "sparsegpt_50.yaml"}

console = Console()


def main() -> None:
    started = time.perf_counter()
    configure_logger(LoggerConfig(console_log_level="WARNING"))  # the progress bars say enough
    torch.manual_seed(SEED)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)

    with step("Model and text"):
        model_directory = smollm2()
        texts = splits("legal", seed=SEED)
        tokenizer = AutoTokenizer.from_pretrained(model_directory)
        training = token_blocks(tokenizer, texts["train"], WINDOW, TRAINING_TOKENS)
        calibration = calibration_set(
            token_blocks(tokenizer, texts["calibration"], WINDOW, CALIBRATION_SEQUENCES * WINDOW)
        )
        heldout = token_blocks(tokenizer, texts["heldout"], WINDOW, HELDOUT_TOKENS)
        prompts = heldout[:: len(heldout) // 3, :PROMPT_TOKENS][:3].tolist()
        chosen = choose_for(AutoModelForCausalLM.from_pretrained(model_directory))
        console.print(chosen.reason)

    ppl = {}
    with step(f"Fine-tuning: LoRA on {training.numel():,} tokens of licence text"):
        model = load(model_directory)
        ppl["base"] = perplexity(model, heldout)
        adapted = train_lora(model, tokenizer, training, seed=SEED)
        adapted.save_pretrained(OUTPUT / "adapter")

    with step("Merging the adapter: the dense expert"):
        dense = round_to_stored(merge_adapters(adapted))
        ppl["lora"] = perplexity(dense, heldout)
        # llm-compressor wants a directory behind every model, and so does the pruning of each rival from scratch.
        dense.save_pretrained(OUTPUT / "lora-merged")
        tokenizer.save_pretrained(OUTPUT / "lora-merged")

    for name, recipe in RIVALS.items():
        with step(f"Rival: llm-compressor's {name} on the merged model, {recipe}"):
            pruned = prune(load(OUTPUT / "lora-merged"), tokenizer, calibration, recipe)
            ppl[name] = perplexity(round_to_stored(pruned), heldout)

    with step("Ours: EfficientXpertModifier on the model with its adapter, expert_50.yaml"):
        adapted = PeftModel.from_pretrained(load(model_directory), OUTPUT / "adapter")
        prune(adapted.base_model.model, tokenizer, calibration, "expert_50.yaml")
        expert = round_to_stored(merge_adapters(adapted))
        ppl["expert"] = perplexity(expert, heldout)
        sparsities = block_sparsities(expert)

    with step("Exporting: dense and sparse-bitmask"):
        expert.save_pretrained(OUTPUT / "expert-dense")
        tokenizer.save_pretrained(OUTPUT / "expert-dense")
        metadata = {
            "base_model": MODEL,
            "adapter": f"LoRA, rank 8, {training.numel():,} tokens of {CORPUS}",
            "calibration": f"{CALIBRATION_SEQUENCES} sequences of {WINDOW} tokens of {CORPUS}",
            "figures": {f"held-out perplexity, {name}": f"{value:.2f}" for name, value in ppl.items()},
        }
        recipe = ROOT / "recipes" / "expert_50.yaml"
        save_sparse(expert, OUTPUT / "expert-sparse", tokenizer=tokenizer, recipe=recipe, metadata=metadata)
        disk = linear_bytes(OUTPUT / "expert-sparse")

    served = {}
    for kind in ("dense", "sparse"):
        with step(f"Serving the {kind} checkpoint in vLLM"):
            served[kind] = serve(OUTPUT / f"expert-{kind}", prompts, NEW_TOKENS)

    report = {
        "model": MODEL,
        "corpus": CORPUS,
        "seed": SEED,
        "sparsity": SPARSITY,
        "processor": cpu_name(),
        "compute_dtype": {"pruning": str(chosen.dtype).removeprefix("torch."), "serving": served["sparse"]["dtype"]},
        "perplexity": ppl,
        "retention": ppl["lora"] / ppl["expert"],
        "disk_bytes": disk,
        "served": {
            "difference": difference(served["dense"], served["sparse"]),
            "operator": served["sparse"]["operator"],
            "tokens_per_second": {kind: served[kind]["tokens_per_second"] for kind in served},
        },
        "block_sparsity": {"min": min(sparsities.values()), "max": max(sparsities.values())},
        "versions": served["sparse"]["versions"] | versions(),
        "seconds": time.perf_counter() - started,
    }
    (OUTPUT / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    show(report, tokenizer, prompts, served["sparse"]["outputs"])
    if report["served"]["difference"]:
        raise SystemExit(f"the sparse checkpoint is not served as the dense one: {report['served']['difference']}")


@contextmanager
def step(title: str):
    console.rule(f"[bold]{title}", align="left")
    started = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - started:.0f} s[/dim]")


def load(directory: Path) -> PreTrainedModel:
    # At this length, eager attention is a little faster on a CPU than torch's fused one.
    return load_model(directory, attn_implementation="eager")


def calibration_set(blocks: torch.Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": blocks.tolist(), "attention_mask": torch.ones_like(blocks).tolist()})


def prune(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, calibration: Dataset, recipe: str):
    """The same calibration for everyone; returns the model, pruned in place."""
    oneshot(
        model=model,
        processor=tokenizer,
        recipe=str(ROOT / "recipes" / recipe),
        dataset=calibration,
        num_calibration_samples=len(calibration),
        max_seq_length=WINDOW,
        shuffle_calibration_samples=False,
    )
    return model


def block_sparsities(model: PreTrainedModel) -> dict[str, float]:
    """Fraction of zeros among the linear weights of every decoder block; refuses a matrix that lost nothing."""
    sparsities = {}
    for name, block in model.model.layers.named_children():
        weights = [module.weight for module in block.modules() if isinstance(module, torch.nn.Linear)]
        zeros = [int((weight == 0).sum()) for weight in weights]
        if not all(zeros):
            raise SystemExit(f"a matrix of decoder block {name} lost nothing")
        sparsities[name] = sum(zeros) / sum(weight.numel() for weight in weights)
    return sparsities


def serve(directory: Path, prompts: list[list[int]], new_tokens: int) -> dict:
    """Greedy generation in the serving environment, which shares nothing with this one but the checkpoint."""
    requests, output = directory.with_suffix(".prompts.json"), directory.with_suffix(".served.json")
    requests.write_text(json.dumps(prompts))
    command = [ROOT / ".venv-serve/bin/python", "-m", "integration.serve_once", "--model", directory, "--eager"]
    options = ["--prompts", requests, "--max-tokens", new_tokens, "--output", output]
    subprocess.run([str(part) for part in command + options], cwd=ROOT, check=True)
    return json.loads(output.read_text())


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "llmcompressor", "efx-plugin")}


def show(report: dict, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], outputs: list[dict]) -> None:
    ppl, disk, served = report["perplexity"], report["disk_bytes"], report["served"]
    table = Table(title=f"{report['model']}, {report['corpus']}, {SPARSITY:.0%} sparse, seed {SEED}")
    for column in ("model", "perplexity", "linears on disk", "tokens/s"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    speed = served["tokens_per_second"]
    dense_mb, sparse_mb = f"{disk['dense'] / 1e6:.0f} MB", f"{disk['sparse'] / 1e6:.0f} MB"
    table.add_row("base model", f"{ppl['base']:.2f}", dense_mb, "")
    table.add_row("dense LoRA expert", f"{ppl['lora']:.2f}", dense_mb, "")
    table.add_row("pruned by Wanda", f"{ppl['wanda']:.2f}", dense_mb, "")
    table.add_row("pruned by SparseGPT", f"{ppl['sparsegpt']:.2f}", dense_mb, "")
    table.add_row("EfficientXpert, stored dense", f"{ppl['expert']:.2f}", dense_mb, f"{speed['dense']:.1f}")
    table.add_row("EfficientXpert, sparse", f"{ppl['expert']:.2f}", sparse_mb, f"{speed['sparse']:.1f}", style="bold")
    console.print(table)
    console.print(
        f"Against Wanda {1 - ppl['expert'] / ppl['wanda']:.1%} and against SparseGPT "
        f"{1 - ppl['expert'] / ppl['sparsegpt']:.1%} lower perplexity; sparse linears take "
        f"{disk['sparse'] / disk['dense']:.3f} of dense; served as the dense checkpoint, up to rounding: "
        f"{served['difference'] is None}; sparse operator: {served['operator']}; every decoder block "
        f"{report['block_sparsity']['min']:.4f} to {report['block_sparsity']['max']:.4f} zeros; "
        f"{report['seconds']:.0f} s in all."
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        console.rule("[dim]held-out text, and how the sparse expert goes on in vLLM", align="left")
        console.print(tokenizer.decode(prompt).strip(), style="dim", markup=False, highlight=False)
        console.print(f">>>{output['text']}", style="bold", markup=False, highlight=False)
    console.print(f"Report: {(OUTPUT / 'report.json').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
