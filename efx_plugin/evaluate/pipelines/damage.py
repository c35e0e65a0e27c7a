"""What compression did to each layer: the error of its output on calibration tokens."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from efx_plugin.engine.blocks import linears_in_blocks
from efx_plugin.model.adapters import LinearLayer, effective_weight
from efx_plugin.model.channels import Reordered

# Calibration tokens that damage is measured on: enough for two digits, and little time.
TOKENS = 2048


class DenseWeights:
    """The weights of linear layers before they are compressed, kept in a file: memory holds one model.

    Args:
        layers: the layers, with their adapters or without.
        path: of the file.
        dtype: to keep them in.
    """

    def __init__(self, layers: Iterable[LinearLayer], path: Path, dtype: torch.dtype) -> None:
        self._path = path
        save_file({layer.name: effective_weight(layer).to(dtype) for layer in layers}, path)

    @torch.no_grad()
    def damage(
        self, model: PreTrainedModel, sequences: Tensor, reordered: Mapping[str, Reordered] | None = None
    ) -> dict[str, float]:
        """‖(U − W) x‖² / ‖U x‖² of each layer, by name: U is the dense weight, W the model's, x what the layer is
        given in the model.

        Args:
            model: the compressed model, plain.
            sequences: int64 [n, length] of token ids, of which the first `TOKENS` tokens or so are taken.
            reordered: layers whose channels are in another order than they were in the dense model, by name.
        """
        layers = linears_in_blocks(model)
        errors = {layer.name: 0.0 for layer in layers}
        energies, moved = dict(errors), reordered or {}

        def see(name: str, module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> None:
            inputs, weight = args[0], module.get_parameter("weight")
            dense = file.get_tensor(name).to(weight.device, weight.dtype)
            if name in moved:
                dense = moved[name].of(dense)
            energies[name] += float((inputs @ dense.T).float().square().sum())
            errors[name] += float((inputs @ (dense - weight).T).float().square().sum())

        with safe_open(self._path, framework="pt") as file, ExitStack() as hooks:
            for layer in layers:
                hooks.callback(layer.base.register_forward_hook(partial(see, layer.name)).remove)
            for sequence in sequences[: max(1, TOKENS // sequences.shape[1])].to(model.device).split(1):
                model(input_ids=sequence, use_cache=False)
        return {name: error / energies[name] if energies[name] else 0.0 for name, error in errors.items()}
