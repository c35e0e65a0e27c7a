"""LoRA training of a tiny model under EfficientXpertCallback, in this process or in others: for tests."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from efx_plugin.model.adapters import read_parameter
from efx_plugin.training import EfficientXpertCallback
from tests.support.tiny_llama import tiny_llama

STEPS = 12
# Text with something to learn: each token is followed by its successor.
TEXT = (torch.arange(3, 67).unsqueeze(1) + torch.arange(32)) % 125 + 3


def tiny_peft_model(dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    """A tiny Llama with a fresh adapter, the same at every call; `options` are fields of LoraConfig."""
    set_seed(0)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    return get_peft_model(tiny_llama().to(dtype), LoraConfig(**fields))


def tiny_callback(**pruning) -> EfficientXpertCallback:
    """The callback, which prunes after a third of the steps unless it is told otherwise: by default `STEPS` of them are
    so few that it would prune after the last."""
    return EfficientXpertCallback(**({"warmup_fraction": 1 / 3} | pruning))


def tiny_trainer(
    output: Path,
    callback: TrainerCallback,
    *,
    model: torch.nn.Module | None = None,
    callbacks: tuple = (),
    rows: list[dict[str, Any]] | None = None,
    **arguments,
) -> Trainer:
    """A Trainer of `STEPS` steps that calls `callbacks` and then `callback`; `arguments` are TrainingArguments."""
    fields = {
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return Trainer(
        model=tiny_peft_model() if model is None else model,
        args=TrainingArguments(output_dir=str(output), **(fields | arguments)),
        train_dataset=rows or [{"input_ids": ids, "labels": ids} for ids in TEXT],
        data_collator=default_data_collator,
        callbacks=[*callbacks, callback],
    )


class Kill(TrainerCallback):
    """Kills its process, as a scheduler or a full memory would, at the first event of this name after a step."""

    def __init__(self, event: str, step: int):
        self.step = step
        setattr(self, event, self._kill)

    def _kill(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(output: Path, *, pruning: dict[str, Any], kill: tuple[str, int] | None = None, **arguments) -> None:
    """Train, resuming where there is a checkpoint, and store the masks and weights of the end in `output`."""
    torch.set_num_threads(1)
    # With several processes on CPUs the Trainer resumes to "cpu:0", a place that torch.load has not heard of.
    torch.serialization.register_package(
        0, lambda _storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )
    callback = tiny_callback(**pruning)
    resume = any(output.glob("checkpoint-*"))
    trainer = tiny_trainer(output, callback, callbacks=(Kill(*kill),) if kill else (), **arguments)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        torch.save({"masks": callback.masks, "weights": trainer.model.state_dict()}, output / "end.pt")


def train_sharded(output: Path, *, pruning: dict[str, Any]) -> None:
    """`train` by hand, sharded by FSDP2 where there are several processes: accelerate shards on GPUs alone."""
    torch.set_num_threads(1)
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model = tiny_peft_model().train()
    if count > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (count,))
        for block in model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    callback = tiny_callback(**pruning)
    state, control = TrainerState(max_steps=STEPS), TrainerControl()
    events = {"model": model, "optimizer": optimizer}
    arguments = TrainingArguments(output_dir=str(output), use_cpu=True)
    callback.on_train_begin(arguments, state, control, **events)
    for step in range(STEPS):
        ids = TEXT[4 * step : 4 * step + 4].chunk(count)[rank]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        callback.on_step_end(arguments, state, control, **events)
    callback.on_train_end(arguments, state, control, **events)
    weights = {name: read_parameter(parameter) for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save({"masks": callback.masks, "weights": weights}, output / "end.pt")


def in_processes(count: int, output: Path, function: Callable = train, **options) -> list[int]:
    """`function` in new processes, as torchrun starts them where there are several; returns their exit codes."""
    output.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["integration.tiny_training"])
    port = 20_000 + os.getpid() % 20_000
    processes = [
        context.Process(target=_ranked, args=(rank, count, port, function, output, options)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _ranked(rank: int, count: int, port: int, function: Callable, output: Path, options: dict[str, Any]) -> None:
    if count > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    function(output, **options)
