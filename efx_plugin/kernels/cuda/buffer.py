"""The memory on a device that weights are expanded into, panel by panel, or that holds the partial sums of `gemm`. All
products of the device share it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from efx_plugin.kernels.cuda.variants import PANEL_BYTES


class PanelBuffer:
    """Memory for one panel at a time.

    Streams take turns: each waits, on the device, for the one before. Not so under capture, because a graph is replayed
    on any stream and at any time: on one device one graph at a time may be replayed.

    Args:
        device: with an index.
    """

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(PANEL_BYTES, dtype=torch.uint8, device=device)
        self._lock = threading.Lock()  # several threads launch one product after the other
        self._released = torch.cuda.Event()
        self._user: torch.cuda.Stream | None = None

    @contextmanager
    def borrowed(self, stream: torch.cuda.Stream, dtype: torch.dtype) -> Iterator[Tensor]:
        """The memory as one row of `dtype`, for what is launched on the device's current stream inside of `with`."""
        with self._lock:
            captured = torch.cuda.is_current_stream_capturing()
            if not captured and self._user not in (None, stream):
                stream.wait_event(self._released)
            yield self._memory.view(dtype)
            if not captured:
                self._released.record(stream)
                self._user = stream


@cache
def panel_buffer(device: torch.device) -> PanelBuffer:
    """The buffer of a device, made at the first call."""
    return PanelBuffer(device)
