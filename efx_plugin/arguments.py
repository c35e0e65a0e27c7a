"""The public home of `PruningArguments`, the arguments that the modifier and the callback share."""

from efx_plugin.engine.arguments import PruningArguments

__all__ = ["PruningArguments"]
