"""A model on its way through a pipeline: loaded and calibrated as in all others, and rounded to what is stored."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe, repack_moe
from llmcompressor.modifiers import Modifier
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from efx_plugin.checkpoint import save_sparse
from efx_plugin.compress.calibration import as_dataset
from efx_plugin.engine.blocks import linears_in_blocks
from efx_plugin.engine.compute_dtype import choose_for, convert, restore, stored_dtype
from efx_plugin.engine.sequential import Batch
from efx_plugin.errors import EfxError
from efx_plugin.evaluate import bits
from efx_plugin.evaluate.pipelines.damage import DenseWeights
from efx_plugin.evaluate.pipelines.protocol import PipelineResult, PipelineTask
from efx_plugin.model.adapters import LinearLayer, inner_model, linear_layers, merge_adapters
from efx_plugin.model.channels import Reordered
from efx_plugin.model.loading import inspect_sources
from efx_plugin.modifier import EfficientXpertModifier


@dataclass
class Draft:
    """A model in the dtype to compute in on this machine.

    Attributes:
        task: what the pipeline was given.
        network: the model; a PeftModel until its adapter is merged.
        tokenizer: the adapter's, or the model's.
        stored: dtype of the weights as they are stored.
        dtypes: see `convert`.
        notes: see `PipelineResult`.
        reordered: layers whose channels are in another order than in the dense model, by name.
    """

    task: PipelineTask
    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    stored: torch.dtype
    dtypes: dict[str, torch.dtype]
    notes: list[str] = field(default_factory=list)
    reordered: dict[str, Reordered] = field(default_factory=dict)

    @classmethod
    def load(cls, task: PipelineTask, *, adapted: bool) -> "Draft":
        """The model of a task; all random numbers start from the task's seed.

        Args:
            adapted: put the adapter on it.

        Raises:
            EfxError: the adapter is missing, or they cannot be loaded.
        """
        if adapted and task.adapter is None:
            raise EfxError("the model is to be pruned or quantized with its adapter and there is none: pass an adapter")
        set_seed(task.seed)
        sources = inspect_sources(task.model, task.adapter if adapted else None)
        network = sources.load()
        inner: Any = inner_model(network)
        linearize_moe(inner)
        stored, _ = stored_dtype((tensor.dtype, tensor.numel()) for tensor in network.parameters())
        return cls(task, network, sources.tokenizer(), stored, convert(network, choose_for(network).dtype))

    @property
    def targets(self) -> list[LinearLayer]:
        """The layers that every pipeline compresses: the linear layers of the decoder blocks."""
        return linears_in_blocks(self.network)

    def merge(self) -> PreTrainedModel:
        """The plain model, which `network` is from then on."""
        if isinstance(self.network, PeftModel):
            self.network = merge_adapters(self.network)
        assert isinstance(self.network, PreTrainedModel)
        return self.network

    def keep_dense(self) -> DenseWeights:
        """The targets' weights as they are now, adapters included, to measure damage against."""
        return DenseWeights(self.targets, self.task.output / "dense.safetensors", self.stored)

    def ignored(self) -> list[str]:
        """Patterns of the linear layers that are no targets, the output layer among them, for a modifier's `ignore`."""
        targets = {layer.name for layer in self.targets}
        # SparseGPT and Wanda put a full stop behind the names of layers that are targeted as "Linear".
        return [
            rf"re:{re.escape(layer.name)}\.?$" for layer in linear_layers(self.network) if layer.name not in targets
        ]

    def calibrate(self, *modifiers: Modifier, written: Tensor | None = None) -> None:
        """Run modifiers of llm-compressor on the task's calibration sequences, as they are and in their order.

        Args:
            written: more sequences of the same length, int64 [n, length]; None for none.
        """
        sequences = self.task.calibration if written is None else torch.cat([self.task.calibration, written])
        oneshot(
            model=inner_model(self.network),
            processor=self.tokenizer,
            recipe=list(modifiers),
            dataset=as_dataset(sequences),
            num_calibration_samples=len(sequences),
            max_seq_length=sequences.shape[1],
            shuffle_calibration_samples=False,
        )
        for modifier in modifiers:
            if isinstance(modifier, EfficientXpertModifier):
                self.reordered |= modifier.reordered

    def batches(self) -> list[Batch]:
        """The task's calibration sequences for the engine."""
        sequences = self.task.calibration.split(1)
        return [Batch({"input_ids": one}, torch.ones_like(one, dtype=torch.bool)) for one in sequences]

    def round(self) -> PreTrainedModel:
        """The plain model, its weights rounded to what is stored of them, experts as the architecture has them."""
        model = self.merge()
        model.eval()
        repack_moe(model)
        restore(model, self.dtypes)
        return model

    def finish(self, dense: DenseWeights | None = None) -> PipelineResult:
        """The pruned model, rounded to what is stored, and measured: bits are those of a sparse checkpoint of it.

        Args:
            dense: the weights before pruning, which damage is measured against.

        Raises:
            EfxError: it has so few zeros that no sparse format gains, or holds NaN.
        """
        model = self.merge()
        damage = {} if dense is None else dense.damage(model, self.task.calibration, self.reordered)
        layers = describe(self.targets, damage=damage)
        sparsity = _sparsity(self.targets)
        model = self.round()
        checkpoint = self.task.output / "checkpoint"
        save_sparse(model, checkpoint, progress=False)
        return PipelineResult(model, sparsity, bits.stored(checkpoint), bits.served(checkpoint), layers, self.notes)


def describe(layers: Sequence[LinearLayer], damage: Mapping[str, float]) -> list[dict[str, Any]]:
    """`PipelineResult.layers`, with the zeros that the layers have."""
    return [{"name": layer.name, "sparsity": _sparsity([layer]), "damage": damage.get(layer.name)} for layer in layers]


def _sparsity(layers: Sequence[LinearLayer]) -> float:
    zeros = sum(layer.base.weight.numel() - int(layer.base.weight.count_nonzero()) for layer in layers)
    return zeros / sum(layer.base.weight.numel() for layer in layers)
