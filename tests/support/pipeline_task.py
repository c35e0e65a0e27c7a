"""A tiny model with an adapter and a domain of its own, as pipelines are given them."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from efx_plugin.evaluate.pipelines.protocol import PipelineResult, PipelineTask
from efx_plugin.evaluate.pipelines.registry import PIPELINES
from tests.support.tiny_llama import save_tiny_llama, tiny_llama

SMALL = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 2}


def tiny_task(folder: Path, **overrides: int) -> PipelineTask:
    """A bfloat16 model that knows nothing, an adapter for all of its linear layers, and a domain: counting.

    Args:
        folder: for the files.
        overrides: of the model's configuration.
    """
    sizes = SMALL | overrides
    model = tiny_llama(**sizes).to(torch.bfloat16)
    save_tiny_llama(folder / "model", **sizes)
    model.save_pretrained(folder / "model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder / "adapter")
    counting = (torch.arange(3, 64).unsqueeze(1) + torch.arange(32)) % 61 + 3
    (folder / "output").mkdir()
    return PipelineTask(
        model=folder / "model",
        adapter=folder / "adapter",
        calibration=counting[:8],
        training=counting[8:51],
        validation=counting[51:56],
        sparsity=0.5,
        mask_structure="0:0",
        seed=0,
        output=folder / "output",
    )


def run(task: PipelineTask, name: str, **changes) -> PipelineResult:
    """What a pipeline makes of a task with those changes, in a folder of its own unless `output` is among them."""
    if "output" not in changes:
        changes["output"] = Path(tempfile.mkdtemp(dir=task.output))
    return PIPELINES[name].run(replace(task, **changes))
