"""What a pipeline is. A new one is a class with these members, and a line in `registry`.

Modules of pipelines import torch and what stands on it inside `run`: the command line looks at names alone.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import LongTensor
    from transformers import PreTrainedModel

# What a pipeline is compared with: its rivals are those of its own family at the same sparsity, see `report`.
Family = Literal["dense", "one-shot", "healed", "quantized", "sparse and quantized", "trained"]
# Families whose pipelines train the model, which takes many times as long as the others.
TRAINING_FAMILIES: tuple[Family, ...] = ("healed", "trained")


@dataclass(frozen=True)
class PipelineTask:
    """What a pipeline is given: the same for all of them.

    Attributes:
        model: directory of the base model, with its tokenizer.
        adapter: directory of a LoRA adapter for it; None where the comparison has none.
        calibration: int64 [sequences, length] of token ids of the domain, chosen by the seed; none for dense pipelines.
        training: int64 [n, length] of token ids of the domain, all that a trained pipeline may train on, chosen by the
            seed.
        validation: int64 [n, length] of token ids of other documents of the domain, on which a trained pipeline chooses
            its learning rate; none for pipelines that do not train, as in `training`.
        sparsity: fraction of the weights to prune in every linear layer inside the decoder blocks, the target layers.
        mask_structure: "N:M", or "0:0" for unstructured.
        seed: of all that is random.
        output: an empty folder for files, removed after the cell; what would be served is left in `checkpoint` below
            it, but by dense pipelines.
        arguments: the pipeline's own arguments by name.
    """

    model: Path
    adapter: Path | None
    calibration: "LongTensor"
    training: "LongTensor"
    validation: "LongTensor"
    sparsity: float
    mask_structure: str
    seed: int
    output: Path
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline made.

    Attributes:
        model: a plain model with dense tensors: zeros in place, every value as it will be stored (quantized values
            multiplied with their scales).
        sparsity: fraction of zeros over the target layers.
        bits_per_weight_stored, bits_per_weight_served: over the target layers, zeros counted as weights, with masks
            and scales; see `efx_plugin.evaluate.bits`.
        layers: of each target layer `name`, `sparsity`, and `damage`: relative error of its output on the calibration
            tokens, |x(U - W)^T|^2 / |x U^T|^2, None where the pipeline does not measure it.
        notes: sentences for whoever reads the table, such as the learning rate that was chosen.
    """

    model: "PreTrainedModel"
    sparsity: float
    bits_per_weight_stored: float
    bits_per_weight_served: float
    layers: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Pipeline(Protocol):
    """A way to make an expert."""

    @property
    def name(self) -> str:
        """What every table calls it."""

    @property
    def family(self) -> Family:
        """What it is compared with. Pipelines of the family "dense" depend neither on sparsity nor on the seed,
        "quantized" ones not on sparsity."""

    @property
    def ours(self) -> bool:
        """Whether this package brings it forward; all others are rivals."""

    @property
    def needs_adapter(self) -> bool:
        """Whether it starts from the adapter that the user brings."""

    @property
    def needs_training(self) -> bool:
        """Whether it trains on `PipelineTask.training`."""

    @property
    def groups(self) -> tuple[int, ...]:
        """Sizes of quantization groups, its argument `group`, that are compared side by side: each has a cell of its
        own where it divides the inputs of all target layers. Empty where the pipeline chooses its group itself."""

    def prepare(self) -> None:
        """Import what `run` needs, which takes long."""

    def run(self, task: PipelineTask) -> PipelineResult:
        """Make the expert.

        Raises:
            EfxError: it cannot be made of these inputs.
        """
