"""LoRA training that ends sparse, on transformers' Trainer."""

from efx_plugin.training.callback import EfficientXpertCallback

__all__ = ["EfficientXpertCallback"]
