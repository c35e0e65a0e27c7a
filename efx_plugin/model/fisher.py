"""Fisher sensitivity c_o = E[(∂L/∂y_o)²]: what every output of a linear layer is worth to the loss of a token.

Training computes these gradients anyway. One-shot pruning takes them in one backward pass before it starts, because
afterwards every decoder block is seen on its own and without gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

from efx_plugin.method.sensitivity import square_gradient_sum
from efx_plugin.method.statistics import InputStatistics
from efx_plugin.model.adapters import LinearLayer
from efx_plugin.model.distributed import all_reduce_sum
from efx_plugin.model.propagation import RegisterHook, TokenMask, every_token


class FisherStatistics:
    """Squared gradients of the outputs of linear layers, and energies of their inputs, over every backward pass.

    Attributes:
        sums: squared gradients summed over tokens, fp32 [out] by name of the layer.
        inputs: energies of the inputs of the layers, by name.
        count: tokens that have been seen.

    Args:
        layers: the layers to watch.
        token_mask: which tokens count.
    """

    def __init__(self, layers: list[LinearLayer], token_mask: TokenMask = every_token):
        self._layers, self._token_mask = layers, token_mask
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.inputs: dict[str, InputStatistics] = {}
        for layer in self._layers:
            device = layer.base.weight.device
            self.sums[layer.name] = torch.zeros(layer.base.out_features, device=device)
            self.inputs[layer.name] = InputStatistics(layer.base.in_features, full=False, device=device)
        self.count = 0

    def attach(self, register: RegisterHook) -> None:
        for layer in self._layers:
            register(layer.module, partial(self._see, layer.name), "forward")

    def see_tokens(self, count: int) -> None:
        """Count the tokens of a batch, once."""
        self.count += count

    def _see(self, name: str, _module: nn.Module, args: tuple, output: Tensor) -> None:
        # Of the two forward passes under gradient checkpointing only one's output is part of the graph, and a hook on
        # a tensor runs once for each time that its gradient is computed.
        if output.requires_grad:
            output.register_hook(partial(self._see_gradient, name, args[0].detach(), self._token_mask()))

    def _see_gradient(self, name: str, inputs: Tensor, mask: Tensor | None, gradient: Tensor) -> None:
        if mask is not None:
            # An expert sees a list of tokens; those that are not its own, or are padding, get no gradient.
            rows = mask if gradient.shape[:-1] == mask.shape else gradient.any(dim=-1)
            inputs, gradient = (tensor[rows.to(tensor.device)] for tensor in (inputs, gradient))
        self.inputs[name].update(inputs)
        self.sums[name] += square_gradient_sum(gradient)

    def result(self) -> "Fisher":
        """The means over the tokens of all processes."""
        count = all_reduce_sum(torch.tensor(float(self.count)))
        sensitivities = {name: all_reduce_sum(total) / count.to(total.device) for name, total in self.sums.items()}
        for inputs in self.inputs.values():
            inputs.all_reduce()
        energies = {
            name: inputs.energy if inputs.count else torch.zeros(inputs.features)  # no token reached it
            for name, inputs in self.inputs.items()
        }
        return Fisher(sensitivities, energies)


@dataclass(frozen=True)
class Fisher:
    """What one pass over the model measures, by name of the layer, fp32: c [out], and E[x²] of the inputs [in]."""

    sensitivities: dict[str, Tensor]
    energies: dict[str, Tensor]


def measure_fisher(
    model: nn.Module, layers: list[LinearLayer], batches: Iterable[Mapping[str, Tensor]], tokens: int
) -> Fisher:
    """Run batches forward and backward until `tokens` are seen. No parameter gets a gradient or changes.

    Args:
        model: a causal language model; its decoder blocks are checkpointed where they can be, so that memory holds
            the activations of one.
        layers: the layers to watch.
        batches: mappings of input_ids [batch, tokens] and, where some tokens are not to count, attention_mask and
            loss_mask of the same shape.
        tokens: how many to spend.
    """
    current: dict[str, Tensor] = {}
    statistics = FisherStatistics(layers, lambda: current["mask"])
    embedding = model.get_input_embeddings()
    with ExitStack() as cleanup, tqdm(total=tokens, desc="Fisher sensitivities", unit="token") as progress:

        def register(module: nn.Module, hook: Callable, _kind: str) -> None:
            cleanup.callback(module.register_forward_hook(hook).remove)

        statistics.attach(register)
        register(embedding, lambda _module, _args, output: output.requires_grad_(), "forward")
        cleanup.enter_context(_frozen(model))
        cleanup.enter_context(_checkpointed(model))
        cleanup.enter_context(torch.enable_grad())
        for batch in batches:
            if statistics.count >= tokens:
                break
            ids, attended = (batch[name].to(embedding.weight.device) for name in ("input_ids", "attention_mask"))
            mask = attended.bool()
            if "loss_mask" in batch:
                mask = mask & batch["loss_mask"].to(mask.device).bool()
            current["mask"] = mask
            logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits
            logits.backward(_loss_gradient(logits, ids, mask))
            del logits
            count = int(mask.sum())
            statistics.see_tokens(count)
            progress.update(min(count, tokens - progress.n))
    return statistics.result()


@torch.no_grad()
def _loss_gradient(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The gradient of the summed negative log-likelihood of the tokens that count, softmax minus one-hot.

    Only a few tokens at a time are held in fp32: the logits of a long sequence are among the largest tensors there are.
    """
    gradient = torch.zeros_like(logits)
    for first in range(0, logits.shape[1] - 1, 64):
        last = min(first + 64, logits.shape[1] - 1)
        part = logits[:, first:last].float().softmax(dim=-1)
        targets = ids[:, first + 1 : last + 1].to(part.device).unsqueeze(-1)
        part.scatter_add_(-1, targets, part.new_full(targets.shape, -1))
        gradient[:, first:last] = part.mul_(mask[:, first + 1 : last + 1].to(part.device).unsqueeze(-1))
    return gradient


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_()


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    if not model.supports_gradient_checkpointing or model.is_gradient_checkpointing:
        yield
        return
    # A block is checkpointed in training mode only; the modules inside keep theirs, and so no dropout.
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and not m.training]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # what transformers does for adapters, and is done here for every model
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
        model.gradient_checkpointing_disable()
