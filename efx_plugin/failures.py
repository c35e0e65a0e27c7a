"""What a command says when it fails: any exception as one sentence with its cause. Nothing here imports torch."""

import errno
import re
import traceback
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from efx_plugin.errors import EfxError, UsageError, one_line

# Libraries whose exceptions tell of unfit input, by the names of their packages.
_HOSTS = {
    "compressed_tensors": "compressed-tensors",
    "datasets": "datasets",
    "huggingface_hub": "huggingface_hub",
    "llmcompressor": "llm-compressor",
    "lm_eval": "lm-eval",
    "matplotlib": "matplotlib",
    "peft": "PEFT",
    "pyarrow": "pyarrow",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "transformers": "transformers",
    "vllm": "vLLM",
}
# Packages that an extra brings, by the extra.
_EXTRAS = {
    "compress": ("datasets", "llmcompressor", "loguru", "peft", "pyarrow", "pydantic", "yaml"),
    "eval": ("lm_eval", "rouge_score", "sklearn"),
    "plot": ("matplotlib",),
    "serve": ("vllm",),
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def exit_code(error: Exception) -> int:
    """2 for wrong usage, else 1."""
    return 2 if isinstance(error, UsageError) else 1


def sentence(error: Exception) -> str:
    """An exception as one sentence without a final full stop.

    What this package raises on purpose is such a sentence already. Where a library raised, it is named with the cause
    that it gives; what this package raised without meaning to says so.
    """
    for cause in _causes(error):
        if isinstance(cause, EfxError):
            return str(cause)
    if isinstance(error, ModuleNotFoundError) and (missing := _missing(error)):
        return missing
    if (memory := _memory(error)) is not None:
        return memory
    if (room := _room(error)) is not None:
        return room
    if (host := _host(error)) is not None:
        return f"{host} failed: {_cause(error)} (--debug shows the traceback)"
    if isinstance(error, OSError):
        return _system(error)
    return f"unexpected error in efx-plugin itself ({_cause(error)}): report it with the traceback that --debug shows"


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _cause(error: BaseException) -> str:
    """What the exception says, after its kind, without which "'model'" of a KeyError says nothing."""
    said, kind = one_line(error), type(error).__name__
    return said if said == kind else f"{kind}: {said}"


def _missing(error: ModuleNotFoundError) -> str | None:
    package = (error.name or "").partition(".")[0]
    for extra, packages in _EXTRAS.items():
        if package in packages:
            return f"this command needs {package}: pip install 'efx-plugin[{extra}]'"
    return None


def _memory(error: BaseException) -> str | None:
    said = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return f"the memory of the GPU does not suffice ({one_line(error)}): pass --device cpu, or a smaller --length"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in said or "Cannot allocate memory" in said:
        asked = re.search(r"\d+ bytes", said)
        wanted = f" for {asked[0]} more" if asked else ""
        return f"the memory of this machine does not suffice{wanted}: close other programs or use a larger machine"
    return None


def _host(error: BaseException) -> str | None:
    """The library that this package had called when the exception arose; None where it arose in this package."""
    frames = [
        str(frame.f_globals.get("__name__", "")).partition(".")[0]
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    last = max((index for index, package in enumerate(frames) if package == "efx_plugin"), default=-1)
    inside = [package for package in frames[last + 1 :] if package in _HOSTS]
    package = inside[0] if inside else type(error).__module__.partition(".")[0]
    if package not in _HOSTS:
        return None
    try:
        return f"{_HOSTS[package]} {version(package)}"
    except PackageNotFoundError:  # vLLM has several distributions
        return _HOSTS[package]


def _room(error: Exception) -> str | None:
    # Libraries in Rust tell of a full disk in their own exceptions.
    if getattr(error, "errno", None) not in _NO_ROOM and "No space left on device" not in str(error):
        return None
    where = getattr(error, "filename", None) or "the destination"
    return f"the disk of {where} is full: make room or write elsewhere"


def _system(error: OSError) -> str:
    said = one_line(OSError(error.strerror or str(error)))
    return f"{error.filename}: {said[:1].lower()}{said[1:]}" if error.filename else said
