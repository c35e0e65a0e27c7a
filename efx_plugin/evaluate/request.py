"""What a user asked `efx compare` for, and what of it can be refused at once: nothing here imports torch."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from efx_plugin.compress.request import find_directory, is_hub_name, refuse_data_file
from efx_plugin.errors import EfxError, UsageError
from efx_plugin.evaluate.cell import Cell, Data, sparsity_name
from efx_plugin.evaluate.data import Split, split_files
from efx_plugin.evaluate.domains import Domain, DomainCell
from efx_plugin.evaluate.pipelines.protocol import TRAINING_FAMILIES
from efx_plugin.evaluate.pipelines.registry import PIPELINES
from efx_plugin.evaluate.speed import REFERENCE, refuse_python

# The pipeline whose masks of two domains are compared.
MASKS_BY = "lora+expert"


@dataclass(frozen=True)
class CompareRequest:
    """Everything that decides what `efx compare` does.

    Attributes:
        model: directory of the base model with its tokenizer, or OWNER/NAME on the hub.
        adapter: directory of its LoRA adapter, or OWNER/NAME on the hub; None for none.
        data: files of the domain or data sets on the hub, see `read_documents`.
        heldout: files to evaluate on; without, documents of each file of `data` are held out.
        pipelines: keys of `PIPELINES`; without, all that need no training.
        sparsities: "0.5" or ".5" for a fraction of the weights, "2:4" for a structure.
        seeds: number of seeds, from 0 on.
        tasks, task_data: lm-eval tasks to score, and the folder of those that read local files.
        cache: folder of results.
        text_field: the field of the data that holds the text; None for the usual names, see `content_of`.
        other_adapter, other_data: of a second domain, whose masks are compared with those of the first.
        serve: python of an environment with vLLM, to time in what is made; None for none.
        samples, length, training_tokens, heldout_tokens: see `Data`.
    """

    model: Path
    adapter: Path | None
    data: tuple[str, ...]
    cache: Path
    heldout: tuple[str, ...] = ()
    pipelines: tuple[str, ...] = ()
    sparsities: tuple[str, ...] = ("0.5",)
    seeds: int = 1
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    text_field: str | None = None
    other_adapter: Path | None = None
    other_data: tuple[str, ...] = ()
    serve: str | None = None
    samples: int = Data.samples
    length: int = Data.length
    training_tokens: int = Data.training_tokens
    heldout_tokens: int = Data.heldout_tokens

    def checked(self) -> "CompareRequest":
        """The same request, once a look at names and files has found that they mean something.

        Raises:
            UsageError: a pipeline, a sparsity or a file that there is not, or no adapter where one is needed.
        """
        for name in self.pipelines:
            if name not in PIPELINES:
                near = difflib.get_close_matches(name, PIPELINES, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UsageError(f"there is no pipeline {name}: choose among {', '.join(PIPELINES)}{hint}")
        chosen = self.pipelines or tuple(name for name, one in PIPELINES.items() if one.family not in TRAINING_FAMILIES)
        if self.adapter is None and (needy := [name for name in chosen if PIPELINES[name].needs_adapter]):
            others = ", ".join(name for name, one in PIPELINES.items() if not one.needs_adapter)
            raise UsageError(
                f"{needy[0]} starts from an adapter: pass --adapter DIRECTORY, or --pipelines that need none ({others})"
            )
        if (self.other_adapter is None) != (not self.other_data):
            raise UsageError("--other-adapter and --other-data are of one domain: pass both or neither")
        if self.other_adapter is not None and self.adapter is None:
            raise UsageError("masks of two domains are compared with an adapter for each: pass --adapter too")
        if self.serve is not None:
            if REFERENCE not in chosen:
                raise UsageError(f"--serve times what is made beside {REFERENCE}: add {REFERENCE} to --pipelines")
            refuse_python(self.serve)
        for text in self.sparsities:
            parse_sparsity(text)
        for option, files in (("--data", self.data), ("--heldout", self.heldout), ("--other-data", self.other_data)):
            for file in files:
                if not is_hub_name(file):
                    refuse_data_file(Path(file), option)
        if self.task_data is not None and not self.task_data.is_dir():
            raise UsageError(f"there is no directory {self.task_data}: pass the folder with the data of the tasks")
        adapter, other = (
            None if folder is None else find_directory(folder, "an adapter")
            for folder in (self.adapter, self.other_adapter)
        )
        model = find_directory(self.model, "a model")
        return replace(self, model=model, adapter=adapter, other_adapter=other, pipelines=chosen)

    def split(self) -> Split:
        """Split the data.

        Raises:
            EfxError: it cannot be read or split, or is too little to choose learning rates on.
        """
        split = self._split(self.data, self.heldout, "--heldout")
        if split.data.validation is None and (
            trained := [one for one in self.pipelines if PIPELINES[one].needs_training]
        ):
            raise EfxError(
                f"{trained[0]} chooses its learning rate on documents of their own, and {self.data[0]} has too few for "
                "that: pass more of them"
            )
        return split

    def split_other(self, data: Data) -> Split | None:
        """Split the data of the second domain, 15 % of the documents held out; None without one.

        Args:
            data: of the first.

        Raises:
            EfxError: it cannot be read or split, or is called as the first.
        """
        if not self.other_data:
            return None
        split = self._split(self.other_data, (), None)
        if split.data.name == data.name:
            raise EfxError(f"both domains are called {data.name} after their files: rename a file")
        return split

    def _split(self, files: Sequence[str], heldout: Sequence[str], option: str | None) -> Split:
        return split_files(
            self.cache / "data",
            files,
            heldout,
            text_field=self.text_field,
            heldout_option=option,
            samples=self.samples,
            length=self.length,
            training_tokens=self.training_tokens,
            heldout_tokens=self.heldout_tokens,
        )

    def domain_cells(self, data: Data, other: Data | None) -> list[DomainCell]:
        """The comparison of the masks of both domains at the first of the sparsities, where there is a second."""
        if other is None or self.adapter is None or self.other_adapter is None:
            return []
        domains = (Domain(self.adapter, data), Domain(self.other_adapter, other))
        return [DomainCell(self.model, domains, MASKS_BY, *parse_sparsity(self.sparsities[0]))]

    def cells(self, data: Data) -> list[Cell]:
        """The cells of a checked request: seed after seed, so that the first table is whole early.

        Raises:
            EfxError: the model cannot be looked at, which is needed where a pipeline has `groups`.
        """
        cells: list[Cell] = []
        variants = {name: self._variants(name) for name in self.pipelines}
        for seed in range(self.seeds):
            for name in self.pipelines:
                for sparsity, structure, used_seed in self._points(name, seed):
                    cell = Cell(self.model, self.adapter, name, sparsity, used_seed, data, structure)
                    cell = replace(cell, tasks=self.tasks, task_data=self.task_data)
                    cells += [replace(cell, arguments=arguments) for arguments in variants[name]]
        return list(dict.fromkeys(cells))

    def _variants(self, pipeline: str) -> list[tuple[tuple[str, Any], ...]]:
        """Arguments of a pipeline's cells: one for each of its groups that fits the model; none where none does."""
        groups = PIPELINES[pipeline].groups
        if not groups:
            return [()]
        widths = _input_widths(self.model)
        fitting = [group for group in groups if all(width % group == 0 for width in widths)]
        return [(("group", group),) for group in fitting] or [()]

    def served(self, cells: Sequence[Cell]) -> dict[str, Cell]:
        """Of the cells those to time in vLLM by the names of their lines: the dense expert and what is ours."""
        served = {}
        for cell in cells:
            if self.serve and cell.seed == 0 and (cell.pipeline == REFERENCE or PIPELINES[cell.pipeline].ours):
                sparsity = sparsity_name(cell.sparsity, cell.mask_structure) if cell.sparsity else ""
                served[f"{cell.pipeline} {sparsity}".strip()] = cell
        return served

    def _points(self, pipeline: str, seed: int) -> Sequence[tuple[float, str, int]]:
        """Sparsity, mask structure and seed of a pipeline's cells: dense ones depend on none of them."""
        family = PIPELINES[pipeline].family
        if family == "dense":
            return [(0.0, "0:0", 0)]
        if family == "quantized":
            return [(0.0, "0:0", seed)]
        return [(*parse_sparsity(text), seed) for text in self.sparsities]


def _input_widths(model: Path) -> set[int]:
    """Numbers of inputs that the target layers of a model have."""
    from efx_plugin.engine.blocks import linears_in_blocks
    from efx_plugin.model.loading import inspect_sources

    return {layer.base.in_features for layer in linears_in_blocks(inspect_sources(model, None).skeleton)}


def parse_sparsity(text: str) -> tuple[float, str]:
    """Sparsity and mask structure of ".5" or "2:4".

    Raises:
        UsageError: it is neither.
    """
    n, colon, m = text.partition(":")
    if colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m):
        return int(n) / int(m), text
    try:
        sparsity = float(text)
    except ValueError:
        sparsity = 0.0
    if not 0 < sparsity < 1:
        raise UsageError(f"the sparsity {text} is no fraction between 0 and 1 and no structure: pass .5 or 2:4")
    return sparsity, "0:0"
