"""The zeros of a sparse model under a recipe that does not prune: quantization may fill them."""

from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from loguru import logger
from torch import Tensor, nn

from efx_plugin.engine.blocks import decoder_blocks
from efx_plugin.engine.zeros import pack_mask, restore_zeros
from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import inner_model, linear_layers
from efx_plugin.modifier import EfficientXpertModifier

# A layer with fewer zeros is dense; rounding alone makes some.
_SPARSE = 0.05
# These move what rounding loses onto other weights of a row, pruned ones among them.
_REFILL = ("GPTQModifier", "AutoRoundModifier")
# These rotate weights, after which no zero is one.
_ROTATE = ("QuIPModifier", "SpinQuantModifier")


def prunes(modifier: Modifier) -> bool:
    """Whether a modifier makes zeros."""
    return any(name in type(modifier).model_fields for name in ("sparsity", "mask_structure"))


def check_order(recipe: Recipe) -> None:
    """Refuse a modifier that fills what an earlier one has pruned; `EfficientXpertModifier` restores its zeros.

    Raises:
        EfxError: naming both.
    """
    pruner = None
    for modifier in recipe.modifiers:
        name = type(modifier).__name__
        if pruner is not None and (name in _ROTATE or (name in _REFILL and pruner != EfficientXpertModifier.__name__)):
            remedy = "prune with EfficientXpertModifier, which restores zeros, or quantize with QuantizationModifier"
            if name in _ROTATE:
                remedy = "leave it out"
            raise EfxError(f"{name} in the recipe would fill the weights that {pruner} has pruned: {remedy}")
        if prunes(modifier):
            pruner = name


class Zeros:
    """The zeros of a sparse model's linear layers, a bit for each weight.

    Args:
        model: the model before its adapter is merged and before the recipe runs.
        recipe: one that does not prune.

    Raises:
        EfxError: the model is not sparse, so that nothing sparse would come out; an adapter or the recipe would fill
            the zeros for good.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._kept: dict[str, Tensor] = {}
        prefixes = tuple(f"{name}." for name in decoder_blocks(inner_model(model)))
        for layer in linear_layers(model):
            kept = layer.base.weight != 0
            if layer.name.startswith(prefixes) and kept.float().mean() <= 1 - _SPARSE:
                self._kept[layer.name] = pack_mask(kept)
                if layer.module is not layer.base:
                    raise EfxError(
                        f"the adapter would fill the zeros of {layer.name} and the recipe does not prune them again: "
                        "add a pruning modifier to the recipe, or leave the adapter out"
                    )
        names = [type(modifier).__name__ for modifier in recipe.modifiers]
        if not self._kept:
            raise EfxError(
                f"{', '.join(names)} in the recipe prune nothing and the model is dense: add a pruning modifier, such "
                "as EfficientXpertModifier"
            )
        if rotating := next((name for name in names if name in _ROTATE), None):
            raise EfxError(
                f"{rotating} in the recipe would fill the zeros of this sparse model, {min(self._kept)} first: leave "
                "it out, or prune in the same recipe after it"
            )

    def restore(self, model: nn.Module) -> None:
        """Make what was zero zero again, and say how much of it was filled."""
        filled, zeros = restore_zeros({layer.name: layer.base for layer in linear_layers(model)}, self._kept)
        if filled:
            logger.warning(
                f"the recipe had filled {filled:,} of the model's {zeros:,} zeros ({filled / zeros:.2%}); they are "
                "zero again"
            )
