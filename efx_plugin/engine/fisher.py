"""Fisher sensitivity c_o = E[(∂L/∂y_o)²]: what every output of a linear layer is worth to the loss of a token.

Training computes these gradients anyway. One-shot pruning takes them in one backward pass before it starts, because
afterwards every decoder block is seen on its own and without gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import find_labels

from efx_plugin.engine.distributed import all_reduce_statistics, all_reduce_sum
from efx_plugin.engine.memory import return_freed_memory
from efx_plugin.errors import EfxError
from efx_plugin.method.sensitivity import square_gradient_sum
from efx_plugin.method.statistics import InputStatistics
from efx_plugin.model.adapters import LinearLayer
from efx_plugin.model.hooks import RegisterHook, TokenMask, every_token


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

    def _see(self, name: str, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # Of the two forward passes under gradient checkpointing only one's output is part of the graph, and a hook on
        # a tensor runs once for each time that its gradient is computed.
        if not output.requires_grad:
            return
        mask, inputs = self._token_mask(), args[0].detach()
        if mask is not None and output.shape[:-1] != mask.shape:
            # An expert sees a list of tokens; those that are not its own, or are padding, get no gradient.
            output.register_hook(partial(self._see_expert_gradient, name, inputs))
            return
        self.inputs[name].update(inputs if mask is None else inputs[mask.to(inputs.device)])
        output.register_hook(partial(self._see_gradient, name, mask))

    def _see_gradient(self, name: str, mask: Tensor | None, gradient: Tensor) -> None:
        self.sums[name] += square_gradient_sum(gradient if mask is None else gradient[mask.to(gradient.device)])

    def _see_expert_gradient(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        self.inputs[name].update(inputs[gradient.any(dim=-1)])
        self.sums[name] += square_gradient_sum(gradient)

    def result(self) -> "Fisher":
        """The means over the tokens of all processes.

        Raises:
            EfxError: a gradient was not finite.
        """
        device = next(iter(self.sums.values())).device
        count = all_reduce_sum(torch.tensor(float(self.count), device=device))
        sensitivities = {name: all_reduce_sum(total) / count.to(total.device) for name, total in self.sums.items()}
        for name, sensitivity in sensitivities.items():
            if not sensitivity.isfinite().all():
                raise EfxError(
                    f"the gradients of the loss at {name} contain NaN or infinity: use bfloat16 or float32, and in "
                    "training a lower rate"
                )
        for inputs in self.inputs.values():
            all_reduce_statistics(inputs)
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
    model: PreTrainedModel, layers: list[LinearLayer], batches: Iterable[Mapping[str, Tensor]], tokens: int
) -> Fisher:
    """Run batches forward and backward until `tokens` are seen. No parameter gets a gradient or changes.

    Args:
        model: a language model, or a classifier with a decoder; its decoder blocks are checkpointed where they can be,
            so that memory holds the activations of one.
        layers: the layers to watch.
        batches: mappings of input_ids [batch, tokens] and, where some tokens are not to count, attention_mask and
            loss_mask of the same shape; for a classifier with its labels too, see `obstacle_to_loss`.
        tokens: how many to spend.
    """
    current: dict[str, Tensor] = {}
    statistics = FisherStatistics(layers, lambda: current["mask"])
    embedding: Any = model.get_input_embeddings()
    with ExitStack() as cleanup, tqdm(total=tokens, desc="Fisher sensitivities", unit="token") as progress:

        def register(module: nn.Module, hook: Callable[..., Any], _kind: str) -> None:
            cleanup.callback(module.register_forward_hook(hook).remove)

        statistics.attach(register)
        register(embedding, lambda _module, _args, output: output.requires_grad_(), "forward")
        cleanup.enter_context(_frozen(model))
        cleanup.enter_context(_checkpointed(model))
        cleanup.enter_context(torch.enable_grad())
        for batch in batches:
            if statistics.count >= tokens:
                break
            ids = batch["input_ids"].to(embedding.weight.device)
            attended = batch["attention_mask"].to(ids.device) if "attention_mask" in batch else torch.ones_like(ids)
            mask = attended.bool()
            if "loss_mask" in batch:
                mask = mask & batch["loss_mask"].to(mask.device).bool()
            current["mask"] = mask
            if is_language_model(model):
                _backward(model, ids, attended, mask)
            else:
                _backward_of_classifier(model, ids, attended, batch)
            count = int(mask.sum())
            statistics.see_tokens(count)
            progress.update(min(count, tokens - progress.n))
    return_freed_memory()
    return statistics.result()


def obstacle_to_loss(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> str | None:
    """Why the loss of a model has no gradients on these batches; None where it has.

    A language model is trained on the tokens themselves. A classifier needs its labels, which text alone does not have.
    """
    if is_language_model(model):
        return None
    if all(set(_label_names(model)) & batch.keys() for batch in batches):
        return None
    return f"a {type(model).__name__} has no loss on calibration data without {' and '.join(_label_names(model))}"


def no_layer_allocation(reason: str) -> EfxError:
    """The error where the loss cannot be measured and allocation "layer" needs it."""
    return EfxError(f"{reason}, so allocation 'layer' cannot be measured: set allocation to 'matrix'")


def is_language_model(model: PreTrainedModel) -> bool:
    """Whether the model gives logits over its vocabulary."""
    return model.get_output_embeddings() is not None


def _label_names(model: PreTrainedModel) -> list[str]:
    return [name for name in find_labels(type(model)) if name != "return_loss"]


def _backward_of_classifier(model: PreTrainedModel, ids: Tensor, attended: Tensor, batch: Mapping[str, Tensor]) -> None:
    """The gradients of the model's own loss, summed over what has a label: texts, or tokens."""
    labels = {name: batch[name].to(ids.device) for name in _label_names(model) if name in batch}
    loss = model(input_ids=ids, attention_mask=attended, **labels).loss
    labelled = max(int((one != -100).sum()) if one.dim() > 1 else len(one) for one in labels.values())
    (loss * labelled).backward()


# Logits are among the largest tensors there are, and some libraries copy a weight for a product: so many tokens, and
# rows of the output layer, at a time.
_TOKENS_AT_ONCE, _ROWS_AT_ONCE = 32, 4096
# What some architectures do to logits behind the output layer.
_BEHIND_THE_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def _backward(model: PreTrainedModel, ids: Tensor, attended: Tensor, mask: Tensor) -> None:
    """The gradients of the summed negative log-likelihood of the tokens that count."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if (
        type(head) is not nn.Linear
        or head.bias is not None
        or any(getattr(config, name, None) for name in _BEHIND_THE_HEAD)
    ):
        logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits
        gradient = torch.zeros_like(logits)
        for some, targets, counts in _parts(ids, mask):
            gradient[:, some] = _loss_gradient(logits.detach()[:, some], targets, counts)
        logits.backward(gradient)
        return
    hidden = model.base_model(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
    gradient = torch.zeros_like(hidden)
    with torch.no_grad():
        for some, targets, counts in _parts(ids, mask):
            rows = head.weight.split(_ROWS_AT_ONCE)
            of_logits = _loss_gradient(torch.cat([hidden[:, some] @ part.T for part in rows], -1), targets, counts)
            for part, of_part in zip(rows, of_logits.to(hidden.dtype).split(_ROWS_AT_ONCE, -1), strict=True):
                gradient[:, some] += of_part @ part
    hidden.backward(gradient)


def _parts(ids: Tensor, mask: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few positions at a time, the tokens after them, and which of those count."""
    for first in range(0, ids.shape[1] - 1, _TOKENS_AT_ONCE):
        last = min(first + _TOKENS_AT_ONCE, ids.shape[1] - 1)
        yield slice(first, last), ids[:, first + 1 : last + 1], mask[:, first + 1 : last + 1]


def _loss_gradient(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """Softmax minus one-hot, fp32."""
    gradient = logits.float().softmax(dim=-1)
    targets = targets.to(gradient.device).unsqueeze(-1)
    gradient.scatter_add_(-1, targets, gradient.new_full(targets.shape, -1))
    return gradient.mul_(counts.to(gradient.device).unsqueeze(-1))


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
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
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
