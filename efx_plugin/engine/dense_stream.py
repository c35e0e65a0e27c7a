"""The dense model beside the pruned one: what its decoder blocks compute on the same calibration batches.

A block is calibrated before it is pruned. So while it is still dense it can run twice for each batch: on the hidden
states that the pruned blocks before it give, as it does anyway, and on those that it had in the dense model. There is
no second model, only its hidden states in front of one block.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from torch import Tensor, nn

from efx_plugin.errors import EfxError
from efx_plugin.model.hooks import RegisterHook, register_hook

# The model is tried on so many tokens.
_TRIED = 16


class DenseStream:
    """Hidden states of the dense model, all batches of them, in front of the block that comes next.

    They wait in the memory of the CPU. Until a block is pruned both models are one, and nothing is computed twice.

    Attributes:
        parted: whether a block has been pruned, to be set by who prunes it.
        running: whether the dense model computes now: hooks of the pruned model must not count that pass.

    Args:
        blocks: the decoder blocks by name, in order.
        planned: names of those that are going to be pruned.
        silence: a context in which hooks that others have put on the model stand still.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        planned: Collection[str],
        silence: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        names = list(blocks)
        places = [index for index, name in enumerate(names) if name in planned]
        self._first, self._last = names[places[0]], names[places[-1]]
        self._others = {name: blocks[name] for name in names[places[0] : places[-1]] if name not in planned}
        self._silence = silence
        self._waiting: deque[Tensor] = deque()
        self.parted = self.running = False

    def attach(self, register: RegisterHook) -> None:
        """Hook the blocks between pruned ones that stay as they are; `BlockCalibration` hooks the pruned ones."""
        for name, block in self._others.items():
            register(block, partial(self.advance, name), "forward", with_kwargs=True)

    def unseen_by(self, register: RegisterHook) -> RegisterHook:
        """`register` for hooks that do not see the dense model compute."""

        def registered(module: nn.Module, hook: Callable[..., Any], kind: str, **kwargs: Any) -> object:
            return register(
                module, lambda *args, **named: None if self.running else hook(*args, **named), kind, **kwargs
            )

        return registered

    @torch.no_grad()
    def advance(
        self,
        name: str,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
        attach: Callable[[RegisterHook], None] | None = None,
    ) -> None:
        """Take one batch through the next block, from a forward hook on it that knows the keyword arguments.

        The batches come in the same order to every block.

        Args:
            name: the block's name.
            block, args, kwargs, output: what the hook was given, in the pruned model.
            attach: puts up hooks for this pass; None wants none.

        Raises:
            EfxError: batches come otherwise than they came to the block before.
        """
        if self.running:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        dense = hidden if name == self._first else self._next(name, hidden)
        if self.parted:
            named = {key: None if key == "past_key_values" else value for key, value in kwargs.items()}
            if args:
                args = (dense, *args[1:])
            else:
                named["hidden_states"] = dense
            with ExitStack() as hooks, self._silence():
                if attach is not None:
                    attach(partial(register_hook, hooks))
                self.running = True
                hooks.callback(setattr, self, "running", False)
                output = block(*args, **named)
        if name != self._last:
            self._waiting.append(_hidden_states(output).cpu())

    def _next(self, name: str, hidden: Tensor) -> Tensor:
        if not self._waiting or self._waiting[0].shape != hidden.shape:
            raise EfxError(
                f"{name} gets other calibration batches than the decoder block before it, so the dense model cannot "
                "compute beside the pruned one: set dense_targets to 0"
            )
        return self._waiting.popleft().to(hidden.device)


@torch.no_grad()
def obstacle_to_dense_stream(
    model: nn.Module, blocks: Mapping[str, nn.Module], batch: Mapping[str, Tensor]
) -> str | None:
    """Why the hidden states of a model cannot be followed from block to block; None where they can.

    Args:
        model: a transformers model, wherever its weights lie; it is run on a few tokens.
        blocks: its decoder blocks by name, in order.
        batch: a calibration batch with input_ids, [batch, tokens].
    """
    names, called = list(blocks), list[str]()
    previous: Tensor | None = None
    changed: str | None = None

    def before(name: str, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal changed
        hidden = args[0] if args else kwargs.get("hidden_states")
        follows = previous is None or (
            isinstance(hidden, Tensor) and (hidden is previous or torch.equal(hidden, previous.to(hidden.device)))
        )
        changed = changed if follows or changed is not None else name

    def after(name: str, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        nonlocal previous
        previous = _hidden_states(output)
        called.append(name)

    with ExitStack() as hooks:
        for name, block in blocks.items():
            register_hook(hooks, block, partial(before, name), "forward_pre", with_kwargs=True)
            register_hook(hooks, block, partial(after, name), "forward")
        model(input_ids=batch["input_ids"][:1, :_TRIED].to(get_execution_device(model)), use_cache=False)
    if called != names:
        return f"{type(model).__name__} does not call its decoder blocks once each and in order"
    return None if changed is None else f"{type(model).__name__} changes the hidden states before {changed}"


def _hidden_states(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
