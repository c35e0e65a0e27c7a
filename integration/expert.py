"""The dense expert that pruning starts from: a LoRA fine-tune with PEFT and transformers, and its perplexity.

The hyper-parameters are scaled to the stand-in model and text of `assets`: a stand-in for the paper's
fine-tuning (LLaMA-2 7B, rank 8, alpha 16, learning rate 2e-4, three epochs).
"""

import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from efx_plugin.engine.compute_dtype import choose_for, computed_in, convert, restore

STORED = torch.bfloat16  # the dtype of all checkpoints
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(directory: Path, **options) -> PreTrainedModel:
    """A model in the dtype to compute in on this machine; `options` are those of `from_pretrained`."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=STORED, **options)
    convert(model, choose_for(model).dtype)
    return model


def round_to_stored(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its weights rounded to what is stored of them, in place."""
    restore(model, {name: STORED for name, _ in model.named_parameters()})
    return model


def train_lora(
    model,
    tokenizer,
    blocks: torch.Tensor,
    *,
    rank: int = 8,
    alpha: int = 16,
    lr: float = 5e-4,
    batch_size: int = 4,
    seed: int = 0,
    callbacks=(),
):
    """Train a LoRA adapter on all seven projections for one pass over `blocks`; returns the PeftModel.

    The frozen weights keep their dtype, the adapter is float32, and products are computed in the dtype of the frozen
    weights (bfloat16 by autocast). The rate rises linearly over the first tenth of the steps and falls linearly to
    zero. Nothing is saved and nothing is reported; a progress bar shows the steps.

    Args:
        model: a transformers causal language model of Llama type, which PEFT wraps in place.
        tokenizer: stored with the trainer, so that callbacks find it there.
        blocks: int64 [windows, length] of token ids, see `assets.token_blocks`.
        rank, alpha: the adapter's inner dimension and scale (its product is multiplied by alpha / rank).
        lr: peak learning rate.
        batch_size: windows per step.
        seed: of the adapter's initial values and of the order of windows.
        callbacks: transformers.TrainerCallback instances to train under.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

    set_seed(seed)
    adapter = LoraConfig(r=rank, lora_alpha=alpha, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter)
    bf16 = model.dtype == torch.bfloat16
    steps = math.ceil(len(blocks) / batch_size)
    with tempfile.TemporaryDirectory() as unused:  # the Trainer insists on an output directory
        arguments = TrainingArguments(
            output_dir=unused,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=lr,
            lr_scheduler_type="linear",
            warmup_steps=math.ceil(steps / 10),
            bf16=bf16,
            use_cpu=not torch.accelerator.is_available(),  # bf16 is refused on a CPU not asked for
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
            data_collator=default_data_collator,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        trainer.train()
        # The Trainer leaves the model's forward under autocast; what comes next chooses its own precision.
        model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return model.eval()


@torch.inference_mode()
def perplexity(model, blocks: torch.Tensor, batch_size: int = 8) -> float:
    """exp of the mean negative log-likelihood of every token of `blocks` but the first of each window.

    The model computes in the dtype for this machine, the likelihood in float32.

    Args:
        model: a transformers or PEFT causal language model; evaluated without dropout, its mode restored.
        blocks: int64 [windows, length] of token ids.
        batch_size: windows per forward pass.
    """
    training = model.training
    model.eval()
    total = 0.0
    with (
        computed_in(model, choose_for(model).dtype),
        tqdm(total=len(blocks), desc="perplexity", unit="window") as progress,
    ):
        for batch in blocks.to(model.device).split(batch_size):
            logits = model(input_ids=batch, use_cache=False).logits
            for window, tokens in zip(logits, batch, strict=True):  # one at a time: float32 logits are large
                total += F.cross_entropy(window[:-1].float(), tokens[1:], reduction="sum").item()
            progress.update(len(batch))
    model.train(training)
    return math.exp(total / blocks[:, 1:].numel())
