"""The kernel `cuda`: sparse linear layers on NVIDIA GPUs from Ampere on.

Up to a number of tokens (`variants.crossover`) the product is computed straight from the records. Beyond it panels of
rows are expanded, one after the other, into one buffer that stays in the L2 cache, and multiplied by cuBLAS.

What takes time or memory once is done in `pack`: functions are compiled and loaded, and the buffer is allocated. So a
call may be captured in a CUDA graph: it allocates its result alone (and a copy of activations that are not contiguous,
not aligned, or not a multiple of 64 wide), by torch's allocator, and waits for nothing.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from efx_plugin.kernels.cuda import layout, program, variants
from efx_plugin.kernels.cuda.buffer import panel_buffer
from efx_plugin.kernels.cuda.driver import Function
from efx_plugin.kernels.cuda.variants import Launch, Variant

_CAPABILITY = (8, 0)  # the first that has cp.async, and mma of bfloat16
_ALIGNMENT = 16  # bytes
_MOST_COLUMNS = variants.PANEL_BYTES // (2 * layout.TILE_ROWS)  # of which a panel fits into the buffer
_PANEL_ROWS = 128  # a panel is a multiple of this high where it can be: cuBLAS tiles by it


class CudaKernel:
    name = "cuda"
    summary = "non-zeros expanded in registers, tensor cores; beyond 64 tokens expanded in the L2 cache, cuBLAS"
    device = "cuda"

    def obstacle(self, weight: Tensor, dtype: torch.dtype, scales: Tensor | None) -> str | None:
        """Why the weight [out, in] cannot be packed: its dtype or shape, or what this machine lacks."""
        if torch.version.hip is not None:
            return "there is no sparse kernel for AMD GPUs (ROCm)"
        if weight.numel() == 0:
            return "the weight is empty"
        if scales is not None:
            return "the sparse kernel for GPUs takes bfloat16 and float16 weights, not int8"
        if dtype not in variants.DTYPES:
            return f"the sparse kernel for GPUs takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        if weight.shape[1] > _MOST_COLUMNS:
            return f"the sparse kernel for GPUs takes rows of up to {_MOST_COLUMNS} weights, not {weight.shape[1]}"
        capability = torch.cuda.get_device_capability(weight.device)
        if capability < _CAPABILITY:
            return "the sparse kernel needs a GPU of compute capability {}.{}, this one has {}.{}".format(
                *_CAPABILITY, *capability
            )
        if (missing := program.missing()) is not None:
            return missing
        if program.architecture(capability) is None:
            return "NVRTC {}.{} does not know a GPU of compute capability {}.{}: install a newer torch".format(
                *program.nvrtc_version(), *capability
            )
        return None

    def pack(self, weight: Tensor, scales: Tensor | None, quantize_activations: bool) -> tuple[Tensor, ...]:
        """Pack a weight [out, in] on its device, and prepare the device for `linear`.

        Returns:
            `starts` and `records` of `layout.pack`, and a tensor without elements that tells shape and dtype: [out, in,
            0], of the weight's dtype.
        """
        loaded(weight.device, weight.dtype)
        return *layout.pack(weight), weight.new_empty((*weight.shape, 0))

    def linear(self, x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        """x [..., in] times the packed weight, plus `bias` [out] if given: [..., out], contiguous."""
        starts, records, outline = packed
        *leading, columns = x.shape
        if (
            outline.shape != (out_features, columns, 0)
            or outline.dtype is not x.dtype
            or (bias is not None and (bias.dtype is not x.dtype or bias.shape != (out_features,)))
        ):
            raise ValueError("sizes or dtypes of activations, weight and bias disagree")
        if x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return self.linear(x, packed, bias, out_features)
        y = x.new_empty((*leading, out_features))
        tokens = math.prod(leading)
        if tokens:
            x = prepared(x.reshape(tokens, columns))
            bias = None if bias is None else bias.contiguous()
            loaded(x.device, x.dtype).multiply(x, starts, records, bias, y.view(tokens, out_features))
        return y

    def unpack(self, packed: Sequence[Tensor]) -> tuple[Tensor, None]:
        """The weight [out, in], bfloat16 or float16."""
        starts, records, outline = packed
        rows, columns, _ = outline.shape
        return layout.unpack(starts, records, rows, columns, outline.dtype), None


KERNEL = CudaKernel()


class Loaded:
    """The functions for one dtype on a device.

    Args:
        device: with an index.
        dtype: of weights and activations.

    Attributes:
        buffer: what panels are expanded into.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        capability = torch.cuda.get_device_capability(device)
        arch = program.architecture(capability)
        assert arch is not None, "the kernel's obstacle was not asked for"
        source = variants.source()

        def load(variant: Variant) -> Function:
            cubin = program.cached_cubin(source, "sparse_linear.cu", dict(variant.defines), arch)
            shared_bytes = variants.launch(variant, layout.TILE_ROWS, layout.TILE_COLUMNS).shared_bytes
            return Function(cubin, variant.symbol, shared_bytes, device.index)

        self._device = device
        self._crossover = variants.crossover(capability)
        self._decode = [(variant, load(variant)) for variant in variants.decode_variants(dtype)]
        self._expand_variant = variants.expand_variant(dtype)
        self._expand = load(self._expand_variant)
        self.buffer = panel_buffer(device)

    def multiply(self, x: Tensor, starts: Tensor, records: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Set y [tokens, out] to x [tokens, in] times the packed weight, plus bias.

        Args:
            x: from `prepared`.
            starts, records: as packed.
            bias: contiguous.
            y: contiguous.
        """
        if x.shape[0] <= self._crossover:
            self.multiply_records(x, starts, records, bias, y)
        else:
            self.multiply_panels(x, starts, records, bias, y)

    def multiply_records(self, x: Tensor, starts: Tensor, records: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """`multiply` for up to 64 tokens."""
        (tokens, columns), rows = x.shape, y.shape[1]
        variant, function = next(pair for pair in self._decode if tokens <= pair[0].tokens)
        how = _launch(variant, rows, columns)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        arguments = (x, starts, records, bias, y, tokens, rows, columns)
        function.launch(how.grid, how.block, how.shared_bytes, stream, arguments)

    def multiply_panels(self, x: Tensor, starts: Tensor, records: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """`multiply` by cuBLAS on expanded panels."""
        columns = x.shape[1]
        stream = torch.cuda.current_stream(self._device)
        with self.buffer.borrowed(stream, x.dtype) as buffer:
            for first, rows in panels(y.shape[1], columns):
                how = _launch(self._expand_variant, rows, columns)
                dense = buffer[: rows * columns].view(rows, columns)
                arguments = (starts, records, dense, first, rows, columns)
                self._expand.launch(how.grid, how.block, how.shared_bytes, stream.cuda_stream, arguments)
                part = y[:, first : first + rows]
                if bias is None:
                    torch.mm(x, dense.T, out=part)
                else:
                    torch.addmm(bias[first : first + rows], x, dense.T, out=part)


@cache
def loaded(device: torch.device, dtype: torch.dtype) -> Loaded:
    """The functions for a dtype on a device, compiled and loaded at the first call."""
    return Loaded(device, dtype)


@cache
def panels(rows: int, columns: int) -> tuple[tuple[int, int], ...]:
    """First row and number of rows of each panel of a weight; of about the same height."""
    most = variants.panel_rows(columns)
    unit = _PANEL_ROWS if most >= _PANEL_ROWS else layout.TILE_ROWS
    count = math.ceil(rows / (most // unit * unit))
    step = math.ceil(rows / count / unit) * unit
    return tuple((first, min(step, rows - first)) for first in range(0, rows, step))


@cache
def _launch(variant: Variant, rows: int, columns: int) -> Launch:
    return variants.launch(variant, rows, columns)


def prepared(x: Tensor) -> Tensor:
    """Activations [tokens, in] as the functions take them: copied where they are not so already."""
    beyond = -x.shape[1] % layout.TILE_COLUMNS
    x = torch.nn.functional.pad(x, (0, beyond)) if beyond else x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x
