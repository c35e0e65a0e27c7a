"""The kernel `cuda`: sparse linear layers on NVIDIA GPUs from Ampere on.

Up to a number of tokens (`variants.crossovers`) the product is computed straight from the records, by a kernel for few
tokens or by one for many. Beyond it panels of rows are expanded, one after the other, into one buffer that stays in the
L2 cache, and multiplied by cuBLAS.

int8 weights meet activations of 16 bits (W8A16), also where the model quantizes them (W8A8), which would save nothing
here: results are nearer to those of the unquantized model, and a warning says so.

What takes time or memory once is done in `pack`: functions are compiled and loaded, and the buffer is allocated. So a
call may be captured in a CUDA graph: it allocates its result alone (and a copy of activations that are not contiguous,
not aligned, or not a multiple of 64 wide), by torch's allocator, and waits for nothing.
"""

import logging
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from efx_plugin.kernels.cuda import gemm, layout, program, variants
from efx_plugin.kernels.cuda.buffer import panel_buffer
from efx_plugin.kernels.cuda.driver import Function
from efx_plugin.kernels.cuda.variants import Launch, Variant

_CAPABILITY = (8, 0)  # the first that has cp.async, and mma of bfloat16
_ALIGNMENT = 16  # bytes
_MOST_COLUMNS = variants.PANEL_BYTES // (2 * layout.TILE_ROWS)  # of which a panel fits into the buffer
_PANEL_ROWS = 128  # a panel is a multiple of this high where it can be: cuBLAS tiles by it

logger = logging.getLogger(__name__)


class CudaKernel:
    name = "cuda"
    summary = "non-zeros expanded in registers, tensor cores; for the largest batches in the L2 cache, cuBLAS"
    device = "cuda"

    def obstacle(self, weight: Tensor, dtype: torch.dtype, scales: Tensor | None) -> str | None:
        """Why the weight [out, in] cannot be packed: its dtype or shape, or what this machine lacks."""
        if torch.version.hip is not None:
            return "there is no sparse kernel for AMD GPUs (ROCm)"
        if weight.numel() == 0:
            return "the weight is empty"
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
            loaded(weight.device, weight.dtype, is_int8=False)
            return *layout.pack(weight), outline
        for dtype in variants.DTYPES:  # of activations that may come
            loaded(weight.device, dtype, is_int8=True)
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
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, is_int8: bool) -> None:
        capability = torch.cuda.get_device_capability(device)
        arch = program.architecture(capability)
        assert arch is not None, "the kernel's obstacle was not asked for"

        def load(variant: Variant, shared_bytes: int) -> Function:
            source = variants.source(*variant.files)
            cubin = program.cached_cubin(source, variant.file, dict(variant.defines), arch)
            return Function(cubin, variant.symbol, shared_bytes, device.index)

        def load_first(variant: Variant) -> Function:
            return load(variant, variants.launch(variant, layout.TILE_ROWS, layout.TILE_COLUMNS).shared_bytes)

        def load_gemm(variant: Variant) -> Function:
            return load(variant, gemm.shared_bytes(variant))

        self._device = device
        self._crossovers = variants.crossovers(capability)
        self._decode = [(variant, load_first(variant)) for variant in variants.decode_variants(dtype, is_int8)]
        self._expand_variant = variants.expand_variant(dtype, is_int8)
        self._expand = load_first(self._expand_variant)
        self._gemm_variants = gemm.gemm_variants(dtype, is_int8)
        self._gemm = {one: load_gemm(one) for one in self._gemm_variants}
        self._reduce = {one: load_gemm(gemm.reduce_variant(one)) for one in self._gemm_variants}
        properties = torch.cuda.get_device_properties(device)
        self._gemm_blocks = gemm.blocks_at_once(self._gemm_variants, properties)
        self.buffer = panel_buffer(device)

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
        if tokens <= self._crossovers.decode:
            self.multiply_records(x, starts, records, scales, bias, y)
        elif tokens <= self._crossovers.gemm:
            self.multiply_gemm(x, starts, records, scales, bias, y)
        else:
            self.multiply_panels(x, starts, records, scales, bias, y)

    def multiply_records(
        self, x: Tensor, starts: Tensor, records: Tensor, scales: Tensor | None, bias: Tensor | None, y: Tensor
    ) -> None:
        """`multiply` for up to 64 tokens."""
        (tokens, columns), rows = x.shape, y.shape[1]
        variant, function = next(pair for pair in self._decode if tokens <= pair[0].tokens)
        how = _launch(variant, rows, columns)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        arguments = (x, starts, records, scales, bias, y, tokens, rows, columns)
        function.launch(how.grid, how.block, how.shared_bytes, stream, arguments)

    def multiply_gemm(
        self, x: Tensor, starts: Tensor, records: Tensor, scales: Tensor | None, bias: Tensor | None, y: Tensor
    ) -> None:
        """`multiply` straight from the records, for many tokens."""
        (tokens, columns), rows = x.shape, y.shape[1]
        plan = gemm.plan(self._gemm_variants, tokens, rows, columns, self._gemm_blocks)
        function, sizes = self._gemm[plan.variant], (tokens, rows, columns, plan.splits)
        stream = torch.cuda.current_stream(self._device)
        if plan.reduce is None:
            function.launch(*plan.gemm, stream.cuda_stream, (x, starts, records, scales, bias, y, *sizes))
            return
        with self.buffer.borrowed(stream, torch.float32) as partial:
            function.launch(*plan.gemm, stream.cuda_stream, (x, starts, records, scales, bias, partial, *sizes))
            arguments = (partial, scales, bias, y, tokens, rows, plan.splits)
            self._reduce[plan.variant].launch(*plan.reduce, stream.cuda_stream, arguments)

    def multiply_panels(
        self, x: Tensor, starts: Tensor, records: Tensor, scales: Tensor | None, bias: Tensor | None, y: Tensor
    ) -> None:
        """`multiply` by cuBLAS on expanded panels."""
        columns = x.shape[1]
        stream = torch.cuda.current_stream(self._device)
        with self.buffer.borrowed(stream, x.dtype) as buffer:
            for first, rows in panels(y.shape[1], columns):
                how = _launch(self._expand_variant, rows, columns)
                dense = buffer[: rows * columns].view(rows, columns)
                arguments = (starts, records, scales, dense, first, rows, columns)
                self._expand.launch(how.grid, how.block, how.shared_bytes, stream.cuda_stream, arguments)
                part = y[:, first : first + rows]
                if bias is None:
                    torch.mm(x, dense.T, out=part)
                else:
                    torch.addmm(bias[first : first + rows], x, dense.T, out=part)


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
