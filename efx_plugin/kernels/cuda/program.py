"""CUDA C++ to machine code at run time, by NVRTC, and the folder where the machine code is kept.

NVRTC is called through NVIDIA's `cuda.bindings`, and so is the driver in `driver.py`. NVRTC and these bindings are
requirements of every build of torch for CUDA that we support, so that a user installs neither them nor a compiler nor
a CUDA toolkit. The layer above the bindings, `cuda.core`, does not do: its launches go to torch's stream and can be
captured, but it cannot raise a function's limit of dynamic shared memory, which it only reads (1.2), and torch does not
bring it. A launch by ctypes takes three times as long.

Nothing here needs a GPU.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

_OPTIONS = ("--std=c++17",)
_DIGEST_BYTES = hashlib.sha256().digest_size

logger = logging.getLogger(__name__)


@cache
def missing() -> str | None:
    """What keeps this process from compiling, and what to install: a clause without a full stop; None if nothing."""
    major = (torch.version.cuda or "13").partition(".")[0]
    packages = [
        f"cuda-bindings=={major}.*",
        "nvidia-cuda-nvrtc-cu12" if major == "12" else f"nvidia-cuda-nvrtc=={major}.*",
    ]
    try:
        nvrtc_version()
    except (ImportError, RuntimeError) as error:  # without the library it is RuntimeError
        return (
            f"NVRTC, which compiles the GPU kernels, cannot be loaded ({type(error).__name__}): run "
            f"`pip install {' '.join(repr(package) for package in packages)}`"
        )
    return None


def nvrtc_version() -> tuple[int, int]:
    """The version of the NVRTC that is loaded.

    Raises:
        ImportError: there is no cuda.bindings.
        RuntimeError: there is no NVRTC.
    """
    major, minor = _call("nvrtcVersion")
    return major, minor


@cache
def architecture(capability: tuple[int, int]) -> str | None:
    """What to compile for, "sm_90", so that a device of this compute capability runs it; None if NVRTC knows nothing.

    Machine code runs on its own and on later minor versions of a compute capability.
    """
    major, minor = capability
    (supported,) = _call("nvrtcGetSupportedArchs")
    fit = [number for number in supported if number // 10 == major and number % 10 <= minor]
    return f"sm_{max(fit)}" if fit else None


def compile_cubin(source: str, name: str, defines: Mapping[str, int], arch: str) -> bytes:
    """Machine code of a CUDA C++ source.

    Args:
        source: the whole text; it includes nothing.
        name: what messages call it.
        defines: macros and their values.
        arch: such as "sm_90".

    Raises:
        RuntimeError: it does not compile; with NVRTC's messages.
    """
    (program,) = _call("nvrtcCreateProgram", source.encode(), name.encode(), 0, [], [])
    options = [f"--gpu-architecture={arch}", *_OPTIONS, *(f"-D{macro}={value}" for macro, value in defines.items())]
    try:
        try:
            _call("nvrtcCompileProgram", program, len(options), [option.encode() for option in options])
        except RuntimeError as error:
            log = _read("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace")
            raise RuntimeError(f"{name} does not compile with {' '.join(options)}: {error}\n{log}") from None
        return _read("nvrtcGetCUBIN", program)
    finally:
        _call("nvrtcDestroyProgram", program)


def cached_cubin(source: str, name: str, defines: Mapping[str, int], arch: str) -> bytes:
    """As `compile_cubin`, from the cache folder if it has been compiled before.

    The entry's name is a digest of all that the machine code depends on, NVRTC's version too. Its content begins with a
    digest of the code, so that a damaged entry is recognized and made anew. It appears complete, so that several
    processes may work on the folder at once.

    Raises:
        RuntimeError: it does not compile.
    """
    recipe = json.dumps([source, name, sorted(defines.items()), arch, _OPTIONS, nvrtc_version()])
    try:
        entry = cache_folder() / f"{hashlib.sha256(recipe.encode()).hexdigest()}.cubin"
        stored = entry.read_bytes() if entry.exists() else b""
    except (OSError, RuntimeError) as error:
        _warn(error)
        return compile_cubin(source, name, defines, arch)
    digest, code = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    if digest == hashlib.sha256(code).digest():
        return code
    code = compile_cubin(source, name, defines, arch)
    try:
        _replace(entry, hashlib.sha256(code).digest() + code)
    except OSError as error:
        _warn(error)
    return code


def cache_folder() -> Path:
    """Where machine code is kept: by the XDG Base Directory Specification, which ignores a relative XDG_CACHE_HOME.

    Raises:
        RuntimeError: the user has no home.
    """
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "efx-plugin" / "kernels"


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _warn(error: Exception) -> None:
    logger.warning("efx-plugin compiles the GPU kernels anew in each process, because they cannot be kept: %s", error)


def _read(function: str, program: object) -> bytes:
    """What NVRTC gives out in two calls, of which the first tells the size."""
    (size,) = _call(f"{function}Size", program)
    content = bytearray(size)
    _call(function, program, content)
    return bytes(content)


def _call(function: str, *arguments: object) -> tuple[Any, ...]:
    from cuda.bindings import nvrtc

    status, *results = getattr(nvrtc, function)(*arguments)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"{function} fails with {status.name}")
    return tuple(results)
