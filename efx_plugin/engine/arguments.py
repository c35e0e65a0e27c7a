"""The arguments of pruning, which the one-shot modifier and the training callback share."""

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from efx_plugin.errors import EfxError

# Presets of compressed-tensors that a modifier quantizes to. Those of 8 bits have a scale for each row here, which is
# what the sparse kernels take.
Quantization = Literal["W8A8", "W8A16", "W4A16"]


class PruningArguments(BaseModel):
    """What to prune, how much, by which score, and how to repair it.

    A weight's score is its saliency, what it is worth to its layer's output, times the propagated sensitivity of that
    output, what the output is worth to what follows (paper, eq. 2). The lowest scores of a comparison group are pruned
    and the layer is repaired. The defaults are the best combination measured; the published method is saliency
    "wanda", propagation "weight", comparison_group "row", allocation "uniform" and repair "paper".

    Args:
        sparsity: fraction of the weights to prune, between 0 and 1; or a mapping from names, `re:` patterns or class
            names of layers to such fractions, the first that matches. Layers then compete only with those of the same
            fraction.
        mask_structure: "N:M" prunes N of every M consecutive inputs (then sparsity must be N/M); "0:0" is
            unstructured.
        targets: names, `re:` patterns or class names of the layers to prune.
        ignore: the same for layers to leave alone.
        saliency: "magnitude" (the squared weight), "wanda" (times the energy of its input) or "obs" (the rise of the
            output's error once the other weights of the row have made up for it, as SparseGPT has it).
        propagation: "none"; "weight" (norms of the consumers' weights, as published); "activation" (forward statistics
            of the consumers); "block" (squared gradients within the decoder block); "fisher" (squared gradients of the
            loss). "weight" and "activation" need to know who consumes whom in the architecture.
        comparison_group: among which weights the lowest scores are pruned: of a "row", a "matrix", or all matrices of
            a decoder "block". The factor of propagation is the same for a whole row, so in "row" it changes nothing.
            With N:M structure the group is always the M inputs.
        allocation: how the sparsity is spread: "uniform" (every matrix alike), "matrix" (a matrix gets what it loses
            when all entries of its decoder block compete) or "layer" (a decoder block gets what it loses when all
            entries of the model compete, its matrices then as in "matrix"; needs propagation "fisher", and no N:M
            structure, in which every matrix loses the same).
        floor: where entries of different rows compete, no row may lose more of its weights than floor times the
            sparsity of the competition (of the model or the decoder block in an allocation, of the matrix in its mask),
            nor keep less than 2 - floor times what the competition leaves.
        swap_rounds: how often pruned weights may come back in place of kept ones of their row (or of their M), before
            the repair: where the refitted row errs less, by the Gram. Needs repair "weights"; a round costs as much
            as six of its steps.
        repair: "none"; "paper" (moves the adapter so that pruned weights shrink, as published); "adapter" (least
            squares on the layer's output within the adapter's subspace); "weights" (least squares over all kept
            weights).
        repair_steps: conjugate gradient steps of repair "weights" and "adapter".
        dense_targets: which outputs repair "weights" and "adapter" fit a layer to that reads the residual stream: 0
            takes those that its unpruned weights give on what the pruned blocks before it have made of that stream; 1
            those of the dense model, which then computes beside the pruned one, a decoder block at a time; a number in
            between their mixture. Other layers of a block are always repaired as by 0.
        dampening_frac: fraction of the mean diagonal that is added to the diagonal of every system that is solved.
        kappa: weight of all inputs against the pruned ones in repair "paper".
        new_score_weight: weight of the new scores in their running average over refreshes of the mask, which keeps the
            rest of the old one (paper, eta); one-shot pruning has no refreshes.
        propagation_tokens: tokens spent on the gradients of propagation "block", and of "fisher" in one-shot pruning.
        seed: of the random directions in propagation "block".

    Raises:
        EfxError: an argument that does not exist, or arguments that contradict each other.
    """

    model_config = ConfigDict(extra="forbid")

    sparsity: float | dict[str, float] = 0.5
    mask_structure: str = Field(default="0:0", pattern=r"^\d+:\d+$")
    targets: str | list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: str | list[str] = Field(default_factory=lambda: ["lm_head"])
    saliency: Literal["magnitude", "wanda", "obs"] = "obs"
    propagation: Literal["none", "weight", "activation", "block", "fisher"] = "fisher"
    comparison_group: Literal["row", "matrix", "block"] = "matrix"
    allocation: Literal["uniform", "matrix", "layer"] = "matrix"
    floor: float = Field(default=1.4, ge=1)
    swap_rounds: int = Field(default=0, ge=0)
    repair: Literal["none", "paper", "adapter", "weights"] = "weights"
    repair_steps: int = Field(default=10, ge=1)
    dense_targets: float = Field(default=0.0, ge=0, le=1)
    dampening_frac: float = Field(default=0.01, gt=0)
    kappa: float = Field(default=1.0, ge=0, le=1)
    new_score_weight: float = Field(default=0.5, gt=0, le=1)
    propagation_tokens: int = Field(default=4096, ge=1)
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_arguments(cls, arguments: Any) -> Any:
        # EfxError is no ValueError, so pydantic lets it through as it is instead of wrapping it in a report.
        for name in set(arguments) - set(cls.model_fields):
            close = difflib.get_close_matches(name, cls.model_fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(sorted(cls.model_fields))}"
            raise EfxError(f"{cls.__name__} has no argument {name!r}: {hint}")
        return arguments

    @model_validator(mode="after")
    def _check_combination(self) -> "PruningArguments":
        fractions = self.sparsity.values() if isinstance(self.sparsity, dict) else [self.sparsity]
        if not fractions or not all(0 < fraction < 1 for fraction in fractions):
            raise EfxError(f"sparsity {self.sparsity} is neither a fraction between 0 and 1 nor a mapping to such")
        if (n_of_m := self.n_of_m) is not None:
            n, m = n_of_m
            if not 0 < n < m or isinstance(self.sparsity, dict) or abs(self.sparsity - n / m) > 1e-6:
                raise EfxError(
                    f"mask_structure {self.mask_structure!r} prunes {n} of {m} weights, sparsity {self.sparsity} does "
                    f"not: set sparsity to N/M with 0 < N < M, or mask_structure to '0:0'"
                )
            if self.allocation == "layer":
                raise EfxError(
                    f"mask_structure {self.mask_structure!r} prunes every {m} weights alike, so allocation 'layer' has "
                    "nothing to spread: leave allocation out, or set mask_structure to '0:0'"
                )
        if self.allocation == "layer" and self.propagation != "fisher":
            raise EfxError(
                f"allocation 'layer' compares scores of different decoder blocks, for which propagation "
                f"{self.propagation!r} has no common unit: set propagation to 'fisher'"
            )
        if self.allocation == "layer" and isinstance(self.sparsity, dict):
            raise EfxError("allocation 'layer' spreads one sparsity over the model: give a number instead of a mapping")
        if self.saliency == "obs" and self.comparison_group == "block":
            raise EfxError(
                "saliency 'obs' chooses within one matrix: set comparison_group to 'matrix'; with allocation 'matrix' "
                "the matrices of a block still compete for their sparsities"
            )
        if self.swap_rounds and self.repair != "weights":
            raise EfxError(
                f"swaps count on kept weights that are refitted, and repair {self.repair!r} refits none: set repair to "
                "'weights', or swap_rounds to 0"
            )
        return self

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """The mask structure as (n, m), None when it is unstructured."""
        n, m = (int(part) for part in self.mask_structure.split(":"))
        return None if (n, m) == (0, 0) else (n, m)

    @property
    def uses_propagation(self) -> bool:
        """Whether sensitivities can change a mask: entries of different rows must compete somewhere."""
        if self.propagation == "none" or self.n_of_m is not None:
            return False
        return self.comparison_group != "row" or self.allocation != "uniform"

    @property
    def uses_grams(self) -> bool:
        """Whether whole Grams of the inputs are needed, rather than their energies."""
        return self.saliency == "obs" or self.repair in ("adapter", "weights")

    @property
    def uses_dense_model(self) -> bool:
        """Whether the dense model has to compute beside the pruned one."""
        return self.dense_targets > 0 and self.repair in ("adapter", "weights")

    @property
    def uses_adapter(self) -> bool:
        """Whether the repair moves a LoRA adapter, which every layer has to have then."""
        return self.repair in ("paper", "adapter")
