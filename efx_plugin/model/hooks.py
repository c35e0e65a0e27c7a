"""What hooks on a model are told: how to register, and which tokens count."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

# Gives a bool mask [batch, tokens] of the tokens to calibrate on in the current batch; None stands for all of them.
TokenMask = Callable[[], Tensor | None]


def every_token() -> None:
    """The token mask of calibration data without padding."""


# Registers a hook on a module; the keyword arguments are those of Module.register_forward_hook and its like.
RegisterHook = Callable[..., object]


def register_hook(hooks: ExitStack, module: nn.Module, hook: Callable[..., Any], kind: str, **kwargs: Any) -> None:
    """A hook ("forward" or "forward_pre") that lasts until the stack closes."""
    hooks.callback(getattr(module, f"register_{kind}_hook")(hook, **kwargs).remove)
