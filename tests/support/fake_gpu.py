"""A GPU that is none: what is launched on it is computed by torch, on tensors of the CPU.

It stands below `efx_plugin.kernels.cuda.driver.Function`, so that all above it runs as it does on a GPU.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from efx_plugin.kernels.cuda import buffer, kernel, layout, program, variants


class Launched(NamedTuple):
    """`numbers` are those of the arguments that are int."""

    symbol: str
    stream: int
    grid: int
    block: int
    shared_bytes: int
    numbers: tuple[int, ...]


class Stream:
    def __init__(self, address: int, gpu: "FakeGpu") -> None:
        self.cuda_stream = address
        self.gpu = gpu

    def wait_event(self, event: "Event") -> None:
        self.gpu.waits.append((self.cuda_stream, event.stream))


class Event:
    stream: int | None = None

    def record(self, stream: Stream) -> None:
        self.stream = stream.cuda_stream


class FakeGpu:
    """One device.

    Attributes:
        capability: its compute capability.
        multi_processor_count, shared_memory_per_multiprocessor: more of its properties.
        stream: the current one.
        is_capturing: whether it is being captured.
        compiled: macros of each compilation.
        loaded: symbol and allowed shared memory of each function.
        launched: what has been launched, in order.
        waits: which stream waits for which.
    """

    def __init__(self) -> None:
        self.capability = (8, 0)
        self.multi_processor_count, self.shared_memory_per_multiprocessor = 108, 164 << 10
        self.stream = Stream(0xABC, self)
        self.is_capturing = False
        self.compiled: list[dict[str, int]] = []
        self.loaded: list[tuple[str, int]] = []
        self.launched: list[Launched] = []
        self.waits: list[tuple[int, int]] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Let the kernel find this device in the place of the CPU."""
        patch.setattr(program, "cached_cubin", self._compile)
        patch.setattr(kernel, "Function", lambda *arguments: Function(self, *arguments))
        others_properties = torch.cuda.get_device_properties  # torch.compile looks at the device that there is
        for name, value in {
            "get_device_capability": lambda device: self.capability,
            "get_device_properties": lambda device=None: self if device else others_properties(),
            "current_device": lambda: None,  # the index of torch.device("cpu")
            "current_stream": lambda device=None: self.stream,
            "is_current_stream_capturing": lambda: self.is_capturing,
            "Event": Event,
        }.items():
            patch.setattr(torch.cuda, name, value)
        for made_once in (kernel.loaded, kernel._warn_of_activations, buffer.panel_buffer):
            made_once.cache_clear()

    def compute(self, function: "Function", how: Launched, arguments: Sequence[Tensor | int | None]) -> None:
        """What a launch does."""
        KERNELS[how.symbol](*arguments)

    def _compile(self, source: str, name: str, defines: dict[str, int], arch: str) -> bytes:
        of_device = "sm_{}{}".format(*self.capability)
        assert arch in (of_device, f"{of_device}a")
        self.compiled.append(defines)
        return json.dumps([name, defines]).encode()


class Function:
    """In the place of `driver.Function`."""

    def __init__(self, gpu: FakeGpu, cubin: bytes, symbol: str, shared_bytes: int, device: int | None) -> None:
        gpu.loaded.append((symbol, shared_bytes))
        self.gpu, self.symbol, self.allowed = gpu, symbol, shared_bytes
        self.file: str
        self.defines: dict[str, int]
        self.file, self.defines = json.loads(cubin)

    def launch(
        self, grid: int, block: int, shared_bytes: int, stream: int, arguments: Sequence[Tensor | int | None]
    ) -> None:
        assert shared_bytes <= self.allowed
        numbers = tuple(one for one in arguments if isinstance(one, int))
        how = Launched(self.symbol, stream, grid, block, shared_bytes, numbers)
        self.gpu.launched.append(how)
        with _disable_current_modes(), torch.no_grad():  # a device's work is none of the host's
            self.gpu.compute(self, how, arguments)


def _decode(
    x: Tensor,
    starts: Tensor,
    records: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    tokens: int,
    rows: int,
    columns: int,
) -> None:
    _expect(x, (tokens, columns))
    _expect(y, (tokens, rows))
    assert columns % layout.TILE_COLUMNS == 0 and 1 <= tokens <= variants.MOST_TOKENS_DECODED
    exact = x.double() @ _weight(starts, records, scales, rows, columns, x.dtype).double().T
    y.copy_(exact if bias is None else exact + bias.double())


def _gemm(
    x: Tensor,
    starts: Tensor,
    records: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    tokens: int,
    rows: int,
    columns: int,
    splits: int,
) -> None:
    """With several splits `out` gets the whole sums first, and zeros for the other splits."""
    _expect(x, (tokens, columns))
    assert columns % layout.TILE_COLUMNS == 0 and 1 <= splits <= columns // layout.TILE_COLUMNS
    exact = x.double() @ _weight(starts, records, scales, rows, columns, x.dtype).double().T
    if splits == 1:
        _expect(out, (tokens, rows))
        out.copy_(exact if bias is None else exact + bias.double())
        return
    assert out.dtype == torch.float32 and out.data_ptr() % 16 == 0
    sums = out[: splits * tokens * rows].view(splits, tokens, rows)
    sums.zero_()
    sums[0] = exact


def _reduce(
    partial: Tensor, scales: Tensor | None, bias: Tensor | None, y: Tensor, tokens: int, rows: int, splits: int
) -> None:
    _expect(y, (tokens, rows))
    assert scales is None or scales.shape == (rows,)
    sums = partial[: splits * tokens * rows].view(splits, tokens, rows).sum(0)
    y.copy_(sums if bias is None else sums + bias.float())


def _arrange(x: Tensor, image: Tensor, tokens: int, columns: int) -> None:
    """The activations in their order, in the place of another."""
    _expect(x, (tokens, columns))
    assert columns % layout.TILE_COLUMNS == 0 and image.data_ptr() % 16 == 0
    image[: x.numel()] = x.flatten()


def _wgmma(image: Tensor, *others: Any) -> None:
    tokens, _, columns, _ = others[-4:]
    _gemm(image[: tokens * columns].view(tokens, columns), *others)


def _expand(
    starts: Tensor, records: Tensor, scales: Tensor | None, dense: Tensor, first: int, rows: int, columns: int
) -> None:
    _expect(dense, (rows, columns))
    assert columns % layout.TILE_COLUMNS == 0 and first % layout.TILE_ROWS == 0
    wide = layout.tiles_of(rows, columns)[1]
    own = starts[first // layout.TILE_ROWS * wide :]
    scales = scales if scales is None else scales[first:]
    dense.copy_(_weight(own, records, scales, rows, columns, dense.dtype))


def _weight(
    starts: Tensor, records: Tensor, scales: Tensor | None, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The weight in records, of `dtype`, or of int8 values and float32 scales: float32."""
    if scales is None:
        return layout.unpack(starts, records, rows, columns, dtype)
    assert scales.dtype == torch.float32 and scales.is_contiguous()
    return layout.unpack(starts, records, rows, columns, torch.int8) * scales[:rows, None]


def _expect(tensor: Tensor, shape: tuple[int, int]) -> None:
    assert tensor.shape == shape and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


KERNELS = {
    "efx_decode": _decode,
    "efx_expand": _expand,
    "efx_gemm": _gemm,
    "efx_reduce": _reduce,
    "efx_arrange": _arrange,
    "efx_wgmma": _wgmma,
    "efx_add": _reduce,
}
