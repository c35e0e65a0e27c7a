"""The kernel `cuda`: sparse linear layers on NVIDIA GPUs from Ampere on.

Up to a number of tokens (`variants.crossovers`) the product is computed straight from the records, by a kernel for few
tokens or by one for many, which is another one on an H100. Beyond it panels of rows are expanded, one after the other,
into one buffer, and multiplied by cuBLAS.

int8 weights meet activations of 16 bits (W8A16), also where the model quantizes them (W8A8), which would save nothing
here: results are nearer to those of the unquantized model, and a warning says so.

What takes time or memory once is done in `pack`: functions are compiled and loaded, and the buffer is allocated. So a
call may be captured in a CUDA graph: it allocates its result alone (and a copy of activations that are not contiguous,
not aligned, or not a multiple of 64 wide; for many tokens on an H100 one of all), by torch's allocator, and waits for
nothing.
"""

import logging
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from efx_plugin.kernels.cuda import layout, program, variants, wgmma
from efx_plugin.kernels.cuda.buffer import panel_buffer
from efx_plugin.kernels.cuda.driver import Function
from efx_plugin.kernels.cuda.gemm import Gemm
from efx_plugin.kernels.cuda.variants import Launch, Variant
from efx_plugin.kernels.cuda.wgmma import Wgmma
from efx_plugin.kernels.panels import Panel, cut, multiply

_CAPABILITY = (8, 0)  # the first that has cp.async, and mma of bfloat16
_ALIGNMENT = 16  # bytes
_MOST_COLUMNS = variants.PANEL_BYTES // (2 * layout.TILE_ROWS)  # of which a panel fits into the buffer
_PANEL_ROWS = 128  # a panel is a multiple of this high where it can be: cuBLAS tiles by it

logger = logging.getLogger(__name__)


class CudaKernel:
    name = "cuda"
    summary = "non-zeros expanded in registers, tensor cores; for the largest batches in panels, cuBLAS"
    device = "cuda"

    def obstacle(self, weight: Tensor, dtype: torch.dtype, scales: Tensor | None) -> str | None:
        """Why the weight [out, in] cannot be packed: its dtype or shape, or what this machine lacks."""
        if torch.version.hip is not None:
            return "there is no sparse kernel for AMD GPUs (ROCm)"
        if weight.numel() == 0:
            return "the weight is empty"
        if scales is not None and scales.ndim == 2:
            return "the sparse kernel for GPUs takes no weights of four bits"
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
            `starts` and `records` of `layout.pack`, a tensor without elements that tells shape and dtype: [out, in, 0],
            of the weight's dtype; for int8 the scales too, float32 [out].
        """
        outline = weight.new_empty((*weight.shape, 0))
        if scales is None:
            loaded(weight.device, weight.dtype, is_int8=False).prepare(len(weight))
            return *layout.pack(weight), outline
        for dtype in variants.DTYPES:  # of activations that may come
            loaded(weight.device, dtype, is_int8=True).prepare(len(weight))
        if quantize_activations:
            _warn_of_activations()
        return *layout.pack(weight), outline, scales.clone(memory_format=torch.contiguous_format)

    def linear(self, x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        """x [..., in] times the packed weight, plus `bias` [out] if given: [..., out], contiguous."""
        starts, records, outline, *quantized = packed
        *leading, columns = x.shape
        if (
            outline.shape != (out_features, columns, 0)
            or (x.dtype not in variants.DTYPES if quantized else outline.dtype is not x.dtype)
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
            scales = quantized[0] if quantized else None
            functions = loaded(x.device, x.dtype, is_int8=bool(quantized))
            functions.multiply(x, starts, records, scales, bias, y.view(tokens, out_features))
        return y

    def unpack(self, packed: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in], bfloat16, float16 or int8, and the scales float32 [out] of int8."""
        starts, records, outline, *quantized = packed
        rows, columns, _ = outline.shape
        weight = layout.unpack(starts, records, rows, columns, outline.dtype)
        return weight, quantized[0].clone() if quantized else None


KERNEL = CudaKernel()


class Loaded:
    """The functions for one kind of weight and activations on a device.

    Args:
        device: with an index.
        dtype: of activations.
        is_int8: weights are int8; else of that dtype too.

    Attributes:
        buffer: what panels are expanded into.
        crossovers: up to how many tokens each way to multiply is used.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, is_int8: bool) -> None:
        capability = torch.cuda.get_device_capability(device)
        arch = program.architecture(capability)
        assert arch is not None, "the kernel's obstacle was not asked for"
        self._device, self._arch, self._kind = device, arch, (dtype, is_int8)
        self._properties = torch.cuda.get_device_properties(device)
        self.crossovers = variants.crossovers(capability)
        self._decode: dict[Variant, Function] = {}
        self._chosen: dict[tuple[int, int], tuple[Function, Variant]] = {}  # by rows and tokens
        self._expand_variant = variants.expand_variant(dtype, is_int8)
        self._expand = self._load_first(self._expand_variant)
        self._many: Gemm | Wgmma
        if capability == wgmma.CAPABILITY:
            self._many = Wgmma(self._load, dtype, is_int8, self._properties)
        else:
            self._many = Gemm(self._load, arch, dtype, is_int8, self._properties)
        self.buffer = panel_buffer(device)

    def prepare(self, rows: int) -> None:
        """Load what weights of so many rows need."""
        for tokens in range(1, self.crossovers.decode + 1):
            if (rows, tokens) not in self._chosen:
                self._choose(rows, tokens)

    def multiply(
        self, x: Tensor, starts: Tensor, records: Tensor, scales: Tensor | None, bias: Tensor | None, y: Tensor
    ) -> None:
        """Set y [tokens, out] to x [tokens, in] times the packed weight, plus bias.

        Args:
            x: from `prepared`.
            starts, records, scales: as packed.
            bias: contiguous.
            y: contiguous.
        """
        tokens = x.shape[0]
        if tokens <= self.crossovers.decode:
            self.multiply_records(x, starts, records, scales, bias, y)
        elif tokens <= self.crossovers.gemm:
            self.multiply_many(x, starts, records, scales, bias, y)
        else:
            self.multiply_panels(x, starts, records, scales, bias, y)

    def multiply_records(
        self, x: Tensor, starts: Tensor, records: Tensor, scales: Tensor | None, bias: Tensor | None, y: Tensor
    ) -> None:
        """`multiply` for up to `crossovers.decode` tokens."""
        (tokens, columns), rows = x.shape, y.shape[1]
        function, variant = self._chosen.get((rows, tokens)) or self._choose(rows, tokens)
        how = _launch(variant, rows, columns)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        arguments = (x, starts, records, scales, bias, y, tokens, rows, columns)
        function.launch(how.grid, how.block, how.shared_bytes, stream, arguments)

    def multiply_many(
        self, x: Tensor, starts: Tensor, records: Tensor, scales: Tensor | None, bias: Tensor | None, y: Tensor
    ) -> None:
        """`multiply` straight from the records, for many tokens."""
        stream = torch.cuda.current_stream(self._device)
        self._many.multiply((x, starts, records, scales, bias), y, self.buffer, stream)

    def multiply_panels(
        self, x: Tensor, starts: Tensor, records: Tensor, scales: Tensor | None, bias: Tensor | None, y: Tensor
    ) -> None:
        """`multiply` by cuBLAS on expanded panels."""
        columns = x.shape[1]
        stream = torch.cuda.current_stream(self._device)

        def expand(first: int, rows: int, dense: Tensor) -> None:
            how = _launch(self._expand_variant, rows, columns)
            arguments = (starts, records, scales, dense, first, rows, columns)
            self._expand.launch(how.grid, how.block, how.shared_bytes, stream.cuda_stream, arguments)

        with self.buffer.borrowed(stream, x.dtype) as buffer:
            multiply(x, bias, y, panels(y.shape[1], columns), buffer, expand)

    def _choose(self, rows: int, tokens: int) -> tuple[Function, Variant]:
        """The variant of `decode` for so many rows and tokens."""
        dtype, is_int8 = self._kind
        most, properties = self.crossovers.decode, self._properties
        warps = variants.decode_warps(rows, 1 if is_int8 else 2, most, properties)
        fit = variants.decode_variants(dtype, is_int8, warps, most)
        variant = variants.decode_variant(fit, tokens, rows, properties.multi_processor_count)
        if variant not in self._decode:
            self._decode[variant] = self._load_first(variant)
        self._chosen[rows, tokens] = self._decode[variant], variant
        return self._chosen[rows, tokens]

    def _load_first(self, variant: Variant) -> Function:
        how = variants.launch(variant, layout.TILE_ROWS, layout.TILE_COLUMNS)
        return self._load(variant, self._arch, how.shared_bytes)

    def _load(self, variant: Variant, arch: str, shared_bytes: int) -> Function:
        cubin = program.cached_cubin(variants.source(*variant.files), variant.file, dict(variant.defines), arch)
        return Function(cubin, variant.symbol, shared_bytes, self._device.index)


@cache
def loaded(device: torch.device, dtype: torch.dtype, *, is_int8: bool) -> Loaded:
    """The functions for a kind of weight and activations on a device, compiled and loaded at the first call."""
    return Loaded(device, dtype, is_int8)


@cache
def _warn_of_activations() -> None:
    logger.warning(
        "efx-plugin: the model quantizes activations to int8 (W8A8), and the sparse kernel for GPUs leaves them in 16 "
        "bits, as for W8A16: results are nearer to those of the unquantized model"
    )


@cache
def panels(rows: int, columns: int) -> tuple[Panel, ...]:
    """The panels of a weight."""
    most = variants.panel_rows(columns)
    return cut(rows, most, _PANEL_ROWS if most >= _PANEL_ROWS else layout.TILE_ROWS)


@cache
def _launch(variant: Variant, rows: int, columns: int) -> Launch:
    return variants.launch(variant, rows, columns)


def prepared(x: Tensor) -> Tensor:
    """Activations [tokens, in] as the functions take them: copied where they are not so already."""
    beyond = -x.shape[1] % layout.TILE_COLUMNS
    x = torch.nn.functional.pad(x, (0, beyond)) if beyond else x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x
