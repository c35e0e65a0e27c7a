"""The dtype to compute in: float32 where the processor cannot multiply in the dtype that a model is stored in.

Pruning, calibration, training and evaluation then run several times faster. float32 holds every number of the stored
dtype, so widening changes no weight. On the way back each weight is rounded once, and zeros stay zeros.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from compressed_tensors.compressors import NaiveQuantizationCompressor
from loguru import logger
from torch import Tensor, nn

from efx_plugin.errors import EfxError
from efx_plugin.machine import cpu_multiplies_in, cpu_name, free_memory, time_over_float32, why_emulated

_QUANTIZED = ("weight", "weight_scale", "weight_zero_point")
CHOICES = ("auto", "float32", "checkpoint")
# Float32 weights may take this part of the free memory; calibration needs some as well.
_SHARE = 0.8
# Matrix products that take this many times as long as in float32 are worth a notice.
_WORTH_A_NOTICE = 1.2


@dataclass(frozen=True)
class ComputeDtype:
    """A choice: `dtype` to compute in, `reason` as a sentence for the user."""

    dtype: torch.dtype
    reason: str


def choose_compute_dtype(stored: torch.dtype, parameters: int, wanted: str = "auto") -> ComputeDtype:
    """The dtype to compute in on this machine.

    Args:
        stored: dtype of most of the weights.
        parameters: number of weights.
        wanted: of `CHOICES`. "auto" is float32 where this machine computes on a CPU that cannot multiply in the stored
            dtype and has the memory, else "checkpoint", the stored dtype.

    Raises:
        EfxError: float32 is asked for and does not fit into memory, or `wanted` is no choice.
    """
    if wanted not in CHOICES:
        raise EfxError(f"the compute dtype {wanted!r} does not exist: choose one of {', '.join(CHOICES)}")
    name = _name(stored)
    if wanted == "checkpoint":
        return ComputeDtype(stored, f"computing in {name}, the model's dtype, as asked for")
    if stored == torch.float32:
        return ComputeDtype(stored, "computing in float32, the model's dtype")
    if wanted == "auto":
        if torch.accelerator.is_available():
            return ComputeDtype(stored, f"computing in {name}, the model's dtype, on the accelerator")
        if cpu_multiplies_in(stored):
            return ComputeDtype(stored, f"computing in {name}, the model's dtype: {cpu_name()} has instructions for it")
    needed, free = 4 * parameters, free_memory()
    memory = f"{_size(parameters)} parameters take {needed / 1e9:.1f} GB of memory so, {free / 1e9:.1f} GB are free"
    if needed > _SHARE * free:
        if wanted == "float32":
            raise EfxError(
                f"in float32 the model does not fit into memory: its {memory}; leave --compute-dtype at auto, or free "
                "memory"
            )
        return ComputeDtype(
            stored,
            f"computing in {name}, the model's dtype, although {why_emulated(stored)} and float32 would be faster: its "
            f"{memory}, which does not leave enough",
        )
    why = "as asked for" if wanted == "float32" else f"because {why_emulated(stored)}"
    return ComputeDtype(torch.float32, f"computing in float32 {why}; {memory}; weights are stored in {name} again")


def stored_dtype(tensors: Iterable[tuple[torch.dtype, int]]) -> tuple[torch.dtype, int]:
    """The dtype of most floating-point values, and the number of floating-point values in all dtypes.

    Args:
        tensors: dtype and number of values of each weight.
    """
    sizes: Counter[torch.dtype] = Counter()
    for dtype, size in tensors:
        if dtype.is_floating_point:
            sizes[dtype] += size
    if not sizes:
        return torch.float32, 0
    return sizes.most_common(1)[0][0], sizes.total()


def choose_for(model: nn.Module, wanted: str = "auto") -> ComputeDtype:
    """`choose_compute_dtype` for a model."""
    return choose_compute_dtype(*stored_dtype((tensor.dtype, tensor.numel()) for tensor in model.parameters()), wanted)


def convert(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Widen bfloat16 and float16 weights where `dtype` is float32, one at a time, in place; else do nothing.

    Returns:
        The dtype that each weight had, by the name that it has once adapters are merged; for `restore`.
    """
    dtypes: dict[str, torch.dtype] = {}
    if dtype != torch.float32:
        return dtypes
    for name, tensor in _weights(model):
        if tensor.is_floating_point():
            dtypes[_plain(name)] = tensor.dtype
            if tensor.dtype.itemsize == 2:
                tensor.data = tensor.data.to(dtype)
    return dtypes


def restore(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round every weight to the dtype that it had before `convert`, in place; a new one to the most frequent of them.

    Zeros stay zeros. A weight that was quantized since keeps its bytes; it stays in float32, and its scale is rounded.

    Raises:
        EfxError: a weight is too large for its dtype.
    """
    if set(dtypes.values()) <= {torch.float32}:
        return
    usual = Counter(dtypes.values()).most_common(1)[0][0]
    quantized = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if round_scale(module, dtypes.get(_plain(f"{name}.weight"), usual))
    }
    for name, tensor in _weights(model):
        wanted = dtypes.get(_plain(name), usual)
        if tensor.dtype != torch.float32 or wanted == torch.float32 or name in quantized:
            continue
        rounded = tensor.data.to(wanted)
        if bool((rounded.isinf() & tensor.data.isfinite()).any()):
            raise EfxError(
                f"{name} holds weights that are too large for {_name(wanted)}: store the model in bfloat16 or float32 "
                "and prune that"
            )
        tensor.data = rounded


@contextmanager
def computed_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The model's weights in that dtype, and as they were afterwards."""
    dtypes = convert(model, dtype)
    try:
        yield
    finally:
        restore(model, dtypes)


def warn_of_slow_dtype(model: nn.Module, remedy: str) -> None:
    """Warn where a model computes on a CPU that cannot multiply in its dtype. The model is not changed.

    Args:
        remedy: what the sentence ends with.
    """
    weights = [tensor for tensor in model.parameters() if tensor.is_floating_point()]
    # With an accelerator, llm-compressor brings block after block there.
    if torch.accelerator.is_available() or any(tensor.device.type not in ("cpu", "meta") for tensor in weights):
        return
    dtype, _ = stored_dtype((tensor.dtype, tensor.numel()) for tensor in weights)
    if cpu_multiplies_in(dtype) or (times := time_over_float32(dtype)) < _WORTH_A_NOTICE:
        return
    logger.warning(
        f"the model is in {_name(dtype)}, and {why_emulated(dtype)}: matrix products would be {times:.1f} times faster "
        f"in float32; {remedy}"
    )


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and what else is stored; tied ones once."""
    stored = model.state_dict(keep_vars=True).keys()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in stored:
            yield name, tensor


def round_scale(module: nn.Module, dtype: torch.dtype) -> bool:
    """Quantize a layer's weight with the scale that it was calibrated with, and give its bytes that scale in `dtype`.

    Returns:
        Whether it is quantized. Such a weight stays in float32, which holds every product of a byte and a scale.
    """
    scheme = getattr(module, "quantization_scheme", None)
    state = {name: value.data for name, value in module.named_parameters(recurse=False) if name in _QUANTIZED}
    if getattr(scheme, "weights", None) is None or not {"weight", "weight_scale"} <= state.keys():
        return False
    scale = state["weight_scale"].to(dtype)
    stored = NaiveQuantizationCompressor.compress(state, scheme) | {"weight_scale": scale.float()}
    module.weight.data = NaiveQuantizationCompressor.decompress(stored, scheme)["weight"]
    module.weight_scale.data = scale
    return True


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
