"""`efx serve` as a user starts and stops it, and a short load on it."""

import asyncio
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from efx_plugin.cli import main
from efx_plugin.serving import launch
from integration.serving_models import save_tiny
from tests.support.tiny_llama import tiny_tokenizer

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    # Wide weights, for clear margins between the best two tokens.
    model = save_tiny(tmp_path_factory.mktemp("llama"), "Llama", initializer_range=0.4) / "sparse-bitmask"
    tiny_tokenizer(320).save_pretrained(model)
    return model


def test_a_loaded_server_answers_in_full_and_is_afterwards_as_before(sparse, tmp_path):
    # The end of the block sends SIGTERM and fails if the exit code is not 0 or a process lives on.
    from rich.progress import Progress

    from integration.load_test import KINDS, run, served

    rng = random.Random(0)
    prompts = [[rng.randrange(3, 320) for _ in range(rng.randint(2, 40))] for _ in range(64)]
    log = tmp_path / "server.log"
    with served(sparse, "--eager", "--kv-cache", "0.1", log=log) as server, Progress(disable=True) as progress:
        report = asyncio.run(run(server, clients=8, seconds=10, prompts=prompts, new_tokens=8, progress=progress))
    assert report["violations"] == []
    assert report["requests"].keys() == {"fixed_prompt", *(kind.__name__ for kind in KINDS)}
    assert report["fixed_prompt"]["asked"] >= 3
    assert report["fixed_prompt"]["margin_nats"] > 4 * report["fixed_prompt"]["drift_nats"]
    assert "sparse layers run on the" in log.read_text()


def run_in_place(*arguments):
    """The arguments and environment that `efx serve` would become a server with."""
    with patch.object(launch.os, "execve") as execve:
        main_until_exit("serve", *arguments)
    [(_, command, environment)] = (call.args for call in execve.call_args_list)
    assert command[:4] == [sys.executable, "-P", "-m", "efx_plugin.serving.launch"]
    return command[4:], environment


def main_until_exit(*arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code


@pytest.fixture
def unset(monkeypatch):
    """No setting of vLLM's in the environment."""
    for name in list(os.environ):
        if name.startswith("VLLM_"):
            monkeypatch.delenv(name)


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def flags(command):
    """By name; a switch is None."""
    values = {}
    for i, argument in enumerate(command):
        if argument.startswith("--"):
            following = command[i + 1 : i + 2]
            values[argument] = following[0] if following and not following[0].startswith("--") else None
    return values


def test_the_machine_is_used_in_full_unless_told(sparse, port, unset, capsys):
    command, environment = run_in_place(sparse, "--port", port)
    cores = sorted(os.sched_getaffinity(0))
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, cores))
    chosen = flags(command)
    assert command[0] == str(sparse) and chosen["--port"] == str(port)
    assert (chosen["--dtype"], chosen["--max-model-len"]) == ("bfloat16", "auto")
    assert 1024 <= int(chosen["--kv-cache-memory-bytes"].removesuffix("M")) <= 32 * 1024
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("efx: running VLLM_CPU_OMP_THREADS_BIND=")
    assert said.err.count("\n") == 1 and f"vllm serve {sparse} --host 127.0.0.1 --port {port}" in said.err


@pytest.mark.parametrize("cores, ranks, binding", [(2, 2, "0|1"), (5, 2, "0,1|2,3"), (4, 1, "0,1,2,3")])
def test_ranks_get_equal_shares_of_the_cores(cores, ranks, binding):
    with patch.object(launch.os, "sched_getaffinity", return_value=set(range(cores))):
        assert launch.thread_binding(ranks) == binding


def test_what_the_user_settles_wins(sparse, port, unset, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    further = ["--dtype=float32", "--max_model_len", "64", "--seed", "5"]
    command, environment = run_in_place(sparse, "--port", port, "--", *further)
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0" and environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert command == [str(sparse), "--host", "127.0.0.1", "--port", str(port), *further]
    # An option of the command line is nearer to the user than the environment.
    command, environment = run_in_place(sparse, "--port", port, "--kv-cache", "0.5", "--eager")
    assert flags(command)["--kv-cache-memory-bytes"] == "512M" and "VLLM_CPU_KVCACHE_SPACE" not in environment
    assert "--enforce-eager" in command
    # A file may settle anything.
    assert "--dtype" not in run_in_place(sparse, "--port", port, "--", "--config", "serve.yaml")[0]


def test_a_build_for_gpus_gets_no_settings_for_cpus(sparse, port, unset):
    with patch.object(launch, "version", return_value="0.32.0"):
        command, environment = run_in_place(sparse, "--port", port)
    assert command == [str(sparse), "--host", "127.0.0.1", "--port", str(port)]
    assert not any(name.startswith("VLLM_CPU") for name in environment)


def assert_refused(capsys, arguments, *words):
    """One sentence and exit code 1, before anything has started."""
    with patch.object(launch.os, "execve") as execve:
        assert main_until_exit("serve", *arguments) == 1
    execve.assert_not_called()
    said = capsys.readouterr().err
    assert said.startswith("efx: ") and said.count("\n") == 1
    assert all(word in said for word in words), said


@pytest.mark.parametrize("content, words", [(None, "has no config.json"), ("{", "is not JSON"), ("[]", "JSON object")])
def test_a_directory_without_a_model_is_refused(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert_refused(capsys, [tmp_path], str(tmp_path), words)


def test_what_is_no_directory_is_refused(sparse, tmp_path, capsys):
    assert_refused(capsys, [tmp_path / "nowhere"], "nowhere is not a directory")
    assert_refused(capsys, [sparse / "config.json"], "config.json is not a directory")


def test_a_taken_port_is_refused(sparse, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert_refused(capsys, [sparse, "--port", port], f"127.0.0.1:{port}", "in use", "choose another --port")


def test_without_vllm_the_remedy_is_named(sparse, capsys):
    with patch.dict(sys.modules, {"vllm": None}):
        assert_refused(capsys, [sparse], "needs vLLM", "pip install 'efx-plugin[serve]'")


def test_more_ranks_than_cores_are_refused(sparse, port, unset, capsys):
    assert_refused(capsys, [sparse, "--port", port, "--tensor-parallel-size", 4096], "4096", "core each")


def test_a_sparse_model_is_refused_where_the_plugin_is_switched_off(sparse, port, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    assert_refused(capsys, [sparse, "--port", port], "VLLM_PLUGINS", "add efx_plugin")
    # Dense models do not need it.
    run_in_place(sparse.parent / "dense", "--port", port)
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,efx_plugin")
    run_in_place(sparse, "--port", port)


def test_an_argument_that_vllm_does_not_know_ends_with_its_usage(sparse, port):
    efx = Path(sys.executable).with_name("efx")
    command = [str(part) for part in (efx, "serve", sparse, "--port", port, "--", "--no-such-flag")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "--no-such-flag" in result.stderr.splitlines()[-1]


def test_help_does_not_import_torch_or_vllm():
    program = (
        "import sys; from efx_plugin.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "finally: assert not {'torch', 'vllm'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(option in result.stdout for option in ("--host", "--port", "--kv-cache", "--eager"))
