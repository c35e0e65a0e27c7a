"""`efx serve`: vLLM's OpenAI-compatible server on a checkpoint, set up for the machine that it runs on.

What can be checked is checked before vLLM is imported, which takes seconds. Then the server takes the place of this
process, so that signals and exit codes are vLLM's own.
"""

import json
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from efx_plugin.checkpoint.config import sparsity_of
from efx_plugin.errors import EfxError

PLUGIN = "efx_plugin"  # the name of our entry point in vLLM's group
KV_SHARE = 0.25  # of the memory that the weights leave free
KV_GIB = (1, 32)  # the least and the most that we choose
GIB = 2**30


def serve(
    directory: Path,
    *,
    host: str,
    port: int,
    tensor_parallel_size: int = 1,
    kv_cache: float | None = None,
    eager: bool = False,
    arguments: Sequence[str] = (),
) -> NoReturn:
    """Become vLLM's server for the model in `directory`.

    A vLLM that is built for CPU gets every core that this process may use, split over the ranks (its own choice keeps
    one back), a KV cache by the free memory, bfloat16, and the context length that the cache allows; but whatever the
    environment or `arguments` settle stays as they say. The dtype is bfloat16 also where the processor emulates it:
    sparse kernels take the same time in float32, which would double the KV cache and every tensor that is stored dense.

    Args:
        directory: a model directory, sparse or not.
        host, port: where to listen.
        tensor_parallel_size: number of ranks.
        kv_cache: GiB of KV cache per rank; by default, on CPU, a quarter of what the weights leave free, 1 to 32.
        eager: do not compile the model.
        arguments: further arguments of `vllm serve`.

    Raises:
        EfxError: the directory is no model's, vLLM is missing or would not load the plugin that a sparse checkpoint
            needs, the port cannot be listened on, or there are fewer cores than ranks.
    """
    config = _read_config(directory)
    if find_spec("vllm") is None:
        raise EfxError(
            "efx serve needs vLLM: pip install 'efx-plugin[serve]', or 'efx-plugin[serve-cpu]' without a GPU"
        )
    if sparsity_of(config) is not None:  # vLLM refuses it without us; what is wrong in it is for vLLM to say
        _check_plugin()
    _check_port(host, port)

    environment = dict(os.environ)
    command = [str(directory), "--host", host, "--port", str(port)]
    if tensor_parallel_size > 1:
        command += ["--tensor-parallel-size", str(tensor_parallel_size)]
    if eager:
        command.append("--enforce-eager")
    if kv_cache is not None:
        command += _kv_cache_flag(kv_cache)
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # which vLLM would prefer to the flag
    if _vllm_is_for_cpu():
        if "VLLM_CPU_OMP_THREADS_BIND" not in environment:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = thread_binding(tensor_parallel_size)
        command += _cpu_flags(directory, tensor_parallel_size, {*_flags(command), *_flags(arguments)}, environment)
    command += arguments

    changed = [f"{name}={value}" for name, value in environment.items() if os.environ.get(name) != value]
    print("efx: running", shlex.join([*changed, "vllm", "serve", *command]), file=sys.stderr, flush=True)
    environment.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own command line does
    # -P: a folder called vllm where the user happens to be is not what is meant.
    os.execve(sys.executable, [sys.executable, "-P", "-m", __name__, *command], environment)


def thread_binding(ranks: int) -> str:
    """All cores that this process may use in equal shares, as VLLM_CPU_OMP_THREADS_BIND wants them: "0,1|2,3".

    Raises:
        EfxError: there are fewer cores than ranks.
    """
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // ranks
    if not share:
        raise EfxError(f"{ranks} tensor-parallel ranks need a core each, and this process may use {len(cores)} only")
    return "|".join(",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(ranks))


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not directory.is_dir():
        raise EfxError(
            f"{directory} is not a directory: give the directory of a model, as efx prune or export write it"
        )
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise EfxError(f"{directory} has no config.json: give the directory of a model") from None
    except ValueError as error:
        raise EfxError(f"{path} is not JSON ({error}): download or export the model again") from error
    if not isinstance(config, dict):
        raise EfxError(f"{path} does not hold a JSON object: download or export the model again")
    return config


def _check_plugin() -> None:
    if not entry_points(group="vllm.general_plugins", name=PLUGIN):
        raise EfxError("the checkpoint is sparse, and vLLM cannot find efx-plugin: install it with pip next to vLLM")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise EfxError(
            f"the checkpoint is sparse, and VLLM_PLUGINS={allowed!r} keeps vLLM from loading efx-plugin: add {PLUGIN} "
            "to it or unset it"
        )


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
            listener.bind(address)
    except OSError as error:
        raise EfxError(f"cannot listen on {host}:{port} ({error.strerror}): choose another --port or --host") from error


def _vllm_is_for_cpu() -> bool:
    """By the rule with which vLLM itself chooses, without importing it."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:  # the distribution for CPU is called vllm-cpu
        return True


def _cpu_flags(directory: Path, ranks: int, settled: set[str], environment: Mapping[str, str]) -> list[str]:
    """Our choices for what the user has not settled; a --config file may settle anything."""
    if "--config" in settled:
        return []
    flags = []
    if "--dtype" not in settled:
        flags += ["--dtype", "bfloat16"]
    if "--kv-cache-memory-bytes" not in settled and not environment.get("VLLM_CPU_KVCACHE_SPACE"):
        from efx_plugin.machine import free_memory  # imports torch

        weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        gib = int(KV_SHARE * (free_memory() - weights) / GIB / ranks)
        flags += _kv_cache_flag(min(max(gib, KV_GIB[0]), KV_GIB[1]))
    if "--max-model-len" not in settled:
        flags += ["--max-model-len", "auto"]  # what the cache holds, up to what the model can
    return flags


def _flags(arguments: Sequence[str]) -> set[str]:
    """Names of the flags, in the spelling with dashes; vLLM takes underscores too."""
    return {argument.split("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")}


def _kv_cache_flag(gib: float) -> list[str]:
    return ["--kv-cache-memory-bytes", f"{round(gib * 1024)}M"]  # vLLM's M is 2**20


def run_server(arguments: list[str]) -> None:
    """`vllm serve` with these arguments.

    The console script `vllm` is not used because it asks for the version of a distribution called vllm before it does
    anything, and the one for CPU is called vllm-cpu.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="efx")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args([command.name, *arguments])
    command.validate(parsed)
    command.cmd(parsed)


if __name__ == "__main__":
    run_server(sys.argv[1:])
