"""LoRA training that ends sparse: TRL's SFTTrainer with EfficientXpertCallback, export, and vLLM.

    .venv/bin/python -m integration.train_expert            # SmolLM2 on licence texts
    .venv/bin/python -m integration.train_expert --tiny     # a random model, in a minute

SmolLM2-135M-Instruct stands in for the paper's models and licence texts for its legal corpora. The checkpoint and
`report.json` are left in `build/train_expert/`.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from efx_plugin.checkpoint import linear_bytes, load_sparse, save_sparse
from efx_plugin.engine.compute_dtype import choose_for, computed_in
from efx_plugin.model.adapters import merge_adapters
from efx_plugin.training import EfficientXpertCallback
from integration.assets import smollm2, splits, token_blocks
from integration.demo import ROOT, serve
from integration.expert import PROJECTIONS, load, perplexity, round_to_stored
from integration.served import difference, relative_error
from tests.support.tiny_llama import save_tiny_llama

WINDOW = 256  # tokens per training and evaluation sequence
TRAINING_TOKENS = 60_000
HELDOUT_TOKENS = 12_288
PROMPT_TOKENS = 32
NEW_TOKENS = 32
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a random model that counts, instead of SmolLM2")
    output = ROOT / "build" / "train_expert"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    report = train_tiny_expert(output) if parser.parse_args().tiny else train_smollm2_expert(output)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    if report["difference"]:
        raise SystemExit(f"vLLM does not serve the checkpoint as transformers computes it: {report['difference']}")


def train_smollm2_expert(output: Path) -> dict[str, Any]:
    """A 50 % sparse legal expert of SmolLM2 in `output`/expert; returns the report."""
    directory, texts = smollm2(), splits("legal", seed=SEED)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    training = token_blocks(tokenizer, texts["train"], WINDOW, TRAINING_TOKENS)
    heldout = token_blocks(tokenizer, texts["heldout"], WINDOW, HELDOUT_TOKENS)
    return train_expert(directory, training, heldout, output, learning_rate=1e-3)


def train_tiny_expert(output: Path) -> dict[str, Any]:
    """The same of a random model that learns to count."""
    directory = save_tiny_llama(output / "model", vocab_size=256, hidden_size=128, intermediate_size=192)
    counting = (torch.arange(3, 131).unsqueeze(1) + torch.arange(64)) % 253 + 3
    training, heldout = counting.repeat(2, 1), (counting[:8] + 60) % 253 + 3
    return train_expert(directory, training, heldout, output, learning_rate=1e-2, calibration_tokens=2048)


def train_expert(
    directory: Path,
    training: torch.Tensor,
    heldout: torch.Tensor,
    output: Path,
    *,
    learning_rate: float,
    **pruning: Any,
) -> dict[str, Any]:
    """Train, prune, export, serve.

    Args:
        directory: base model and tokenizer.
        training, heldout: int64 [sequences, tokens].
        output: directory for everything that is written.
        learning_rate: at its peak.
        pruning: arguments of EfficientXpertCallback.
    """
    model = load(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    base_perplexity = perplexity(model, heldout)
    callback = EfficientXpertCallback(sparsity=0.5, **pruning)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": training.tolist()}),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
        callbacks=[callback],
        args=SFTConfig(
            output_dir=str(output / "trainer"),
            per_device_train_batch_size=4,
            num_train_epochs=1,
            learning_rate=learning_rate,
            warmup_steps=0.1,
            max_length=training.shape[1],
            bf16=model.dtype == torch.bfloat16,
            use_cpu=not torch.accelerator.is_available(),  # bf16 is refused on a CPU not asked for
            gradient_checkpointing=False,  # saves memory that is not short here
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            seed=SEED,
        ),
    )
    trainer.train()
    measured = next(entry for entry in reversed(trainer.state.log_history) if "sparsity" in entry)

    expert = merge_adapters(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
    round_to_stored(expert)
    save_sparse(expert, output / "expert", tokenizer=tokenizer, progress=False)
    size = linear_bytes(output / "expert")
    prompts = heldout[:3, :PROMPT_TOKENS]
    served = serve(output / "expert", prompts.tolist(), NEW_TOKENS)
    loaded = load_sparse(output / "expert")
    with computed_in(loaded, choose_for(loaded).dtype):
        computed = answer(loaded, prompts)
    return {
        "perplexity": {"base": base_perplexity, "sparse expert": perplexity(expert, heldout)},
        "sparsity": measured["sparsity"],
        "repair_gain": measured["repair_gain"],
        "pruning_seconds": measured["pruning_seconds"],
        "linear_bytes_sparse / dense": size["sparse"] / size["dense"],
        "operator": served["operator"],
        "difference": difference(served, computed),
        "texts": [one["text"] for one in served["outputs"]],
    }


@torch.inference_mode()
def answer(model, prompts: torch.Tensor) -> dict[str, Any]:
    """What `served.ask` returns, without `best`, of the same generation by transformers."""
    outputs = model.eval().generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=model.config.eos_token_id,
    )
    rows = outputs[:, prompts.shape[1] :].tolist()
    end = model.config.eos_token_id
    logprobs = model(prompts).logits[:, :-1].float().log_softmax(-1)
    given = logprobs.gather(-1, prompts[:, 1:, None])[..., 0].tolist()
    return {
        "outputs": [
            {"token_ids": row[: row.index(end) + 1] if end in row else row, "given": one}
            for row, one in zip(rows, given, strict=True)
        ],
        "relative_error": relative_error(model.config.to_dict(), str(model.dtype).removeprefix("torch.")),
    }


if __name__ == "__main__":
    main()
