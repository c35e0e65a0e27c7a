"""What this machine has: free memory, an accelerator, and the dtypes that its processor multiplies in."""

import contextlib
import os
import platform
import time
from functools import cache
from pathlib import Path

import torch

# Values of oneDNN's ONEDNN_MAX_CPU_ISA that hide the processor's dot products of bfloat16.
_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
_NO_LIMIT = {"", "DEFAULT", "ALL"}


def free_memory() -> int:
    """Bytes that this process can still get: of the machine's, and of its container's where that has a limit."""
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(FileNotFoundError, ValueError):  # no control groups, or no limit ("max")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def to_accelerator(model: torch.nn.Module) -> None:
    """Move a model to the accelerator, where there is one."""
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())


def cpu_multiplies_in(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions that multiply numbers of this dtype; without, torch emulates them.

    ONEDNN_MAX_CPU_ISA, with which oneDNN is told to use less than there is, counts.
    """
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if dtype != torch.bfloat16:
        return True
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # Of x86, that function is true for AVX-512 without bfloat16 as well, which emulates.
    _, allowed = _limit()
    return allowed not in _WITHOUT_BFLOAT16 and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def why_emulated(dtype: torch.dtype) -> str:
    """Why `cpu_multiplies_in` is false, as a main clause: the processor, or the variable that oneDNN obeys."""
    name = str(dtype).removeprefix("torch.")
    variable, allowed = _limit()
    if allowed in _NO_LIMIT:
        return f"{cpu_name()} has no instructions for {name}"
    return f"oneDNN may use no instructions of {cpu_name()} for {name} with {variable}={allowed}"


def _limit() -> tuple[str, str]:
    """The variable that says which instructions oneDNN may use at most, and its value in capitals."""
    variable = "ONEDNN_MAX_CPU_ISA" if "ONEDNN_MAX_CPU_ISA" in os.environ else "DNNL_MAX_CPU_ISA"
    return variable, os.environ.get(variable, "").upper()


def cpu_name() -> str:
    """The processor's name, for messages."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def time_over_float32(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a matrix product takes in this dtype on the CPU: measured, in a moment.

    The shortest of some turns: other work on the machine makes a turn longer, never shorter.
    """
    seconds = {one: float("inf") for one in (torch.float32, dtype)}
    factors = {one: torch.ones(256, 256, dtype=one) for one in seconds}
    for turn in range(6):
        for one, factor in factors.items():
            begin = time.perf_counter()
            torch.mm(factor, factor)
            if turn:  # the libraries prepare themselves in the first
                seconds[one] = min(seconds[one], time.perf_counter() - begin)
    return seconds[dtype] / seconds[torch.float32]
