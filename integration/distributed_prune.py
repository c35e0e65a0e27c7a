"""One of several processes that prune a tiny model together, each on its share of the data: see test_distributed.

Usage: torchrun --nproc-per-node N -m integration.distributed_prune OUTPUT ARGUMENTS, with the arguments as JSON.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed as dist

from efx_plugin.arguments import PruningArguments
from efx_plugin.model.adapters import linear_layers
from efx_plugin.model.blocks import plan_blocks
from efx_plugin.model.fisher import measure_fisher
from efx_plugin.model.pruner import BlockPruner
from integration.assets import tiny_llama

SEQUENCES = 8


def main(output: Path, arguments: PruningArguments) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    ids = torch.randint(3, 128, (SEQUENCES, 1, 32), generator=torch.Generator().manual_seed(0))[rank::world]
    batches = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    model = tiny_llama()
    plans = plan_blocks(model, arguments)
    sensitivities = None
    if arguments.propagation == "fisher":
        layers = [layer for plan in plans for layer in plan.layers]
        sensitivities = measure_fisher(model, layers, batches, tokens=10**6).sensitivities
    for plan in plans:
        pruner = BlockPruner(
            model, plan.name, plan.block, plan.layers, plan.others, arguments, sensitivities=sensitivities, averages={}
        )
        handles = []
        pruner.attach(
            lambda module, hook, kind, handles=handles, **kw: handles.append(
                getattr(module, f"register_{kind}_hook")(hook, **kw)
            )
        )
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        for handle in handles:
            handle.remove()
        pruner.prune()
    weights = {layer.name: layer.base.weight.detach() for layer in linear_layers(model)}
    save_file(weights, output / f"{world}-{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), PruningArguments(**json.loads(sys.argv[2])))
