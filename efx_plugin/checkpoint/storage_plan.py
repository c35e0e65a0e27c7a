"""How each weight will be stored, decided before a byte is written: the format, the exact sizes, the shards."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from efx_plugin.checkpoint.codec import bits
from efx_plugin.checkpoint.formats import registry
from efx_plugin.checkpoint.formats.protocol import Format, Layout
from efx_plugin.checkpoint.storage import safetensors_file
from efx_plugin.errors import EfxError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Source(NamedTuple):
    """Dense weights to be stored: dtype and shape of each, and a function that reads one, contiguous, onto the CPU."""

    layout: Layout
    read: Callable[[str], torch.Tensor]


class Survey(NamedTuple):
    """What the choice of a format needs to know of a Linear weight [rows, columns]."""

    rows: int
    columns: int
    dtype: torch.dtype
    nonzeros: int
    fitting: frozenset[str]  # names of the formats that can store it

    def nbytes(self, form: Format | None) -> int:
        """Bytes on disk in that format, or dense."""
        if form is None:
            return safetensors_file.nbytes(self.dtype, (self.rows, self.columns))
        layout = form.layout(self.rows, self.columns, self.nonzeros, self.dtype)
        return sum(safetensors_file.nbytes(*tensor) for tensor in layout.values())

    def gains(self, form: Format) -> bool:
        """Whether the format can store the weight and makes it smaller."""
        return form.name in self.fitting and self.nbytes(form) < self.nbytes(None)


class Item(NamedTuple):
    """One weight of the source and the tensors that it is stored as, in the order in which they are written."""

    name: str
    compress: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None  # None: as it is
    layout: Layout

    @property
    def nbytes(self) -> int:
        return sum(safetensors_file.nbytes(*tensor) for tensor in self.layout.values())


def survey(source: Source, name: str, is_linear: bool) -> Survey | None:
    """Look at one weight: None unless it is a Linear's.

    Raises:
        EfxError: the weight holds NaN or infinity, or its dtype cannot be stored.
    """
    dtype, _ = source.layout[name]
    if not safetensors_file.is_storable(dtype):
        raise EfxError(f"{name} is of {dtype}, which safetensors cannot store")
    weight = source.read(name)
    check_finite(name, weight)
    if not is_linear:
        return None
    mask = bits.nonzero_mask(weight)
    rows, columns = weight.shape
    fitting = frozenset(form.name for form in registry.FORMATS if form.fits(mask, columns))
    return Survey(rows, columns, dtype, int(bits.row_counts(mask).sum()), fitting)


def choose(structure: str, surveys: Mapping[str, Survey]) -> tuple[Format, frozenset[str]]:
    """The format, and which Linear weights to store in it: those that it makes smaller, and `_fellows` that fit it.

    Args:
        structure: the name of a format, or "auto": the first of the registry that makes every sparse weight smaller,
            or if none does, the one that saves most bytes; of formats that can store the fellows too. Sparse is what at
            least one format makes smaller.
        surveys: name -> survey of every Linear weight.

    Raises:
        EfxError: no weight is sparse, or one does not fit the format that is asked for.
    """
    gaining = {
        form.name: frozenset(name for name, found in surveys.items() if found.gains(form)) for form in registry.FORMATS
    }
    sparse = frozenset().union(*gaining.values())
    if not sparse:
        raise EfxError("no Linear weight has enough zeros to be stored sparsely: prune the model before saving it")
    if structure == "auto":

        def saved(form: Format) -> int:
            return sum(surveys[name].nbytes(None) - surveys[name].nbytes(form) for name in gaining[form.name])

        whole = [
            form
            for form in registry.FORMATS
            if all(form.name in surveys[name].fitting for name in _fellows(gaining[form.name], surveys))
        ]
        covering = [form for form in whole if gaining[form.name] == sparse]
        form = covering[0] if covering else max(whole or registry.FORMATS, key=saved)
    else:
        form = registry.find_format(structure, "structure")
        for name in sorted(sparse):
            if form.name not in surveys[name].fitting:
                raise EfxError(
                    f"{name} is not {form.structure} sparse and would lose weights as {form.name}: use "
                    f'structure="auto" or prune to {form.structure}'
                )
    fellows = _fellows(gaining[form.name], surveys)
    return form, frozenset(name for name in fellows if form.name in surveys[name].fitting)


def _fellows(names: frozenset[str], surveys: Mapping[str, Survey]) -> frozenset[str]:
    """`names`, and the weights that share module and input width with one of them.

    Serving hosts fuse such layers (q, k and v; gate and up) and take them all sparse or none. A weight with hardly any
    zeros grows by its mask, 1/16 of its size in bfloat16.
    """

    def kin(name: str) -> tuple[str, int]:
        return name.removesuffix(".weight").rpartition(".")[0], surveys[name].columns

    groups = {kin(name) for name in names}
    return frozenset(name for name in surveys if kin(name) in groups)


def check_structure(structure: str) -> None:
    """Refuse a structure that `choose` does not know.

    Raises:
        EfxError: naming those it does.
    """
    names = registry.format_names()
    if structure not in ("auto", *names):
        raise EfxError(f"structure is {structure!r}: it can be auto, {', '.join(names)}")


def make_items(layout: Layout, surveys: Mapping[str, Survey], form: Format, sparse: Iterable[str]) -> list[Item]:
    """How every weight of the source is stored, in its order."""
    items = []
    for name, described in layout.items():
        if name not in sparse:
            items.append(Item(name, None, {name: described}))
            continue
        prefix, found = name.removesuffix(".weight"), surveys[name]
        parts = form.layout(found.rows, found.columns, found.nonzeros, found.dtype)
        items.append(Item(name, form.compress, {f"{prefix}.{part}": described for part, described in parts.items()}))
    return items


def make_shards(items: Iterable[Item], max_shard_size: int) -> list[list[Item]]:
    """Fill shards in order; the parts of a weight stay together, and a weight larger than a shard gets its own."""
    shards: list[list[Item]] = []
    room = 0
    for item in items:
        if not shards or item.nbytes > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(item)
        room -= item.nbytes
    return shards


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 5000000000, "5GB" or "500MiB".

    Raises:
        EfxError: it is none.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+)\s*([KMG]I?B)", size.strip().upper())
        size = int(match[1]) * _UNITS[match[2]] if match else 0
    if size <= 0:
        raise EfxError('max_shard_size must be a positive number of bytes or a size like "5GB"')
    return size


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Raises:
        EfxError: naming it.
    """
    if not is_finite(weight):
        raise EfxError(
            f"{name} holds NaN or infinity: the model was damaged in training or pruning, go back to one that was not"
        )


def is_finite(weight: torch.Tensor) -> bool:
    """Whether every value is a finite number."""
    if not weight.is_floating_point() or weight.numel() == 0:
        return True
    if weight.dtype.itemsize == 1:
        weight = weight.float()
    # Both ends are NaN if any value is; much cheaper than torch.isfinite.
    return all(torch.isfinite(end).item() for end in torch.aminmax(weight))
