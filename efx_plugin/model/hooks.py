"""What hooks on a model are told: how to register, and which tokens count."""

from collections.abc import Callable

from torch import Tensor

# Gives a bool mask [batch, tokens] of the tokens to calibrate on in the current batch; None stands for all of them.
TokenMask = Callable[[], Tensor | None]


def every_token() -> None:
    """The token mask of calibration data without padding."""


# Registers a hook on a module; the keyword arguments are those of Module.register_forward_hook and its like.
RegisterHook = Callable[..., object]
