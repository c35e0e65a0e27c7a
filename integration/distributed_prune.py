"""One of several processes that prune a tiny model with llm-compressor, each on its share of the data: see
test_distributed.

Usage: torchrun --nproc-per-node N -m integration.distributed_prune DIRECTORY ARGUMENTS, with those of the modifier as
JSON. DIRECTORY/model is pruned, and DIRECTORY/N-RANK.safetensors gets the weights of the linear layers.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from safetensors.torch import save_file
from torch import distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from efx_plugin.model.adapters import linear_layers
from efx_plugin.modifier import EfficientXpertModifier

SEQUENCES, LENGTH = 8, 32


def main(directory: Path, arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # llm-compressor's init_dist knows accelerators alone
    rank, world = dist.get_rank(), dist.get_world_size()
    ids = torch.randint(3, 128, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))[rank::world].tolist()
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(directory / "model"),
        recipe=EfficientXpertModifier(**arguments),
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * LENGTH] * len(ids)}),
        num_calibration_samples=len(ids),
        max_seq_length=LENGTH,
        shuffle_calibration_samples=False,
    )
    weights = {layer.name: layer.base.weight.detach() for layer in linear_layers(model)}
    save_file(weights, directory / f"{world}-{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
