"""Machine code on a device, and its launches, by the CUDA driver through `cuda.bindings` (see `program.py`)."""

import ctypes
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Function:
    """A kernel function, loaded for good into a device's primary context, which is torch's.

    Args:
        cubin: machine code for this device.
        symbol: the function's name in it.
        shared_bytes: dynamic shared memory per block, at most; more than 48 KB have to be asked for.
        device: its index.

    Raises:
        RuntimeError: the driver refuses.
    """

    def __init__(self, cubin: bytes, symbol: str, shared_bytes: int, device: int) -> None:
        from cuda.bindings import driver

        attributes = driver.CUfunction_attribute
        limit = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (handle,) = _call("cuDeviceGet", device)
        (self._context,) = _call("cuDevicePrimaryCtxRetain", handle)
        _call("cuCtxPushCurrent", self._context)
        try:
            (self._module,) = _call("cuModuleLoadData", cubin)
            (self._function,) = _call("cuModuleGetFunction", self._module, symbol.encode())
            _call("cuFuncSetAttribute", self._function, limit, shared_bytes)
            # A module may be loaded lazily, which no stream that is captured allows. This question loads it now.
            _call("cuFuncGetAttribute", attributes.CU_FUNC_ATTRIBUTE_NUM_REGS, self._function)
        finally:
            _call("cuCtxPopCurrent")
        self._launch = driver.cuLaunchKernel
        self._success, self._no_context = driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_INVALID_CONTEXT

    def launch(
        self, grid: int, block: int, shared_bytes: int, stream: int, arguments: Sequence[Tensor | int | None]
    ) -> None:
        """Launch on a stream of the device, which is torch's current one. Nothing waits for it.

        Args:
            grid: blocks.
            block: threads of each.
            shared_bytes: dynamic shared memory of each.
            stream: the address of a CUDA stream.
            arguments: the function's, in its order: tensors, or None, for pointers, and numbers for int.

        Raises:
            RuntimeError: the driver refuses.
        """
        values = tuple([one.data_ptr() if isinstance(one, Tensor) else one or 0 for one in arguments])
        types = tuple([ctypes.c_int if isinstance(one, int) else ctypes.c_void_p for one in arguments])
        call = (self._function, grid, 1, 1, block, 1, 1, shared_bytes, stream, (values, types), 0)
        (status,) = self._launch(*call)
        if status == self._no_context:  # this thread has not used the device yet
            _call("cuCtxSetCurrent", self._context)
            (status,) = self._launch(*call)
        if status != self._success:
            raise _refusal("cuLaunchKernel", status)


def _call(function: str, *arguments: object) -> tuple[Any, ...]:
    from cuda.bindings import driver

    status, *results = getattr(driver, function)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise _refusal(function, status)
    return tuple(results)


def _refusal(function: str, status: Any) -> RuntimeError:
    return RuntimeError(f"the CUDA driver answers {function} with {status.name}")
