"""Channels inside a decoder block that may stand in any order, and reordering them.

A gated MLP computes the same whatever the order of the channels between gate and up on one side and down on the other.
So does attention with the channels of a head between v and o, as long as all query heads that share it have them in the
same order.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from efx_plugin.model.adapters import LinearLayer, read_parameter, write_parameter
from efx_plugin.model.architectures import BlockMap, Rows


@dataclass(frozen=True)
class FreeChannels:
    """Channels that some layers write and one layer reads, in every head alike.

    Attributes:
        writers: outputs [heads · width] each.
        reader: its inputs are [heads · copies · width].
        heads: key-value heads; 1 in an MLP.
        copies: query heads that share each of them; 1 in an MLP.
        width: channels of a head.
    """

    writers: tuple[Rows, ...]
    reader: LinearLayer
    heads: int
    copies: int
    width: int

    def by_head(self, of_inputs: Tensor) -> Tensor:
        """What is known of the reader's inputs, [rows, in], as [heads, copies · rows, width]."""
        by_head = of_inputs.view(len(of_inputs), self.heads, self.copies, self.width)
        return by_head.permute(1, 2, 0, 3).flatten(1, 2)


def free_channels(block: BlockMap) -> list[FreeChannels]:
    """Those of the attention and of every MLP of a decoder block."""
    attention, value = block.attention, block.attention.value
    heads, copies = attention.kv_heads, attention.heads // attention.kv_heads
    found = [FreeChannels((value,), attention.output.layer, heads, copies, (value.stop - value.start) // heads)]
    for mlp in block.mlps:
        found.append(FreeChannels((mlp.gate, mlp.up), mlp.down.layer, 1, 1, mlp.down.layer.base.in_features))
    return found


@dataclass(frozen=True)
class Reordered:
    """What became of a layer: dimension 0, its outputs, or 1, its inputs, are now in the order `index`, int64."""

    dimension: int
    index: Tensor

    def of(self, weight: Tensor) -> Tensor:
        """A weight [out, in] in that order."""
        return weight.index_select(self.dimension, self.index.to(weight.device))


def reorder(channels: FreeChannels, order: Tensor) -> Mapping[str, Reordered]:
    """Put channels into another order, in weights, biases and adapters: the block computes what it did.

    Args:
        order: for each head which channel comes first, second, ..., int64 [heads, width].

    Returns:
        What became of the layers, by name.
    """
    order = order.cpu()
    written = (order + channels.width * torch.arange(channels.heads).unsqueeze(1)).flatten()
    heads = torch.arange(channels.heads * channels.copies).view(channels.heads, channels.copies, 1)
    read = (order.unsqueeze(1) + channels.width * heads).flatten()
    found: dict[str, Reordered] = {}
    for rows in channels.writers:
        index = torch.arange(rows.layer.base.out_features)
        index[rows.start : rows.stop] = rows.start + written
        _reorder(rows.layer, Reordered(0, index))
        before = found.get(rows.layer.name)  # a layer in which several are fused
        found[rows.layer.name] = Reordered(0, index if before is None else before.index[index])
    found[channels.reader.name] = Reordered(1, read)
    _reorder(channels.reader, found[channels.reader.name])
    return found


@torch.no_grad()
def _reorder(layer: LinearLayer, change: Reordered) -> None:
    linears: list[nn.Linear] = [layer.base]
    if isinstance(layer.module, LoraLayer):
        linears += (layer.lora.lora_B if change.dimension == 0 else layer.lora.lora_A).values()
    for linear in linears:
        write_parameter(linear, change.of(read_parameter(linear.weight)))
        if change.dimension == 0 and linear.bias is not None:
            write_parameter(linear, change.of(read_parameter(linear.bias)), "bias")
