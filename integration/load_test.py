"""`make load-test`: many clients against `efx serve`, and a server that afterwards is as it was before.

    .venv-serve/bin/python -m integration.load_test --seconds 120 --clients 32

Clients ask for completions of mixed prompt and output lengths, streamed and not, hang up midway, and send requests that
are malformed. Beside them a fixed prompt is asked for greedily again and again. What is demanded:

- every request is answered in full, but for the malformed ones, which get a 4xx with a JSON body;
- the tokens of the fixed prompt are, under load and after it, those that the idle server gave before;
- the server's memory does not grow in the second half of the load, and no request is left running;
- the server ends on SIGTERM with exit code 0 and leaves no process behind.

Everything is in `build/bench/load.json`; the exit code is 1 if a demand was not met.

A row may be rounded differently in another batch, in vLLM's dense layers too, and greedy tokens can change with it
where the best two are nearly equal. So the fixed prompt is the one, of several, whose continuation the idle server
decides most clearly: the report has that margin, next to how far the load has moved the log-probabilities.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp
import psutil
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from efx_plugin.checkpoint import save_sparse
from efx_plugin.errors import EfxError
from integration.assets import smollm2
from integration.benchmarks.progress import progress_on
from integration.benchmarks.timing import OUTPUT, write_json
from integration.packages import make_once

BUILD = Path(__file__).resolve().parent.parent / "build"
GROWTH = 0.02  # of the resident memory in the second half of the load, at most
MARGIN = 0.5  # nats between the best two tokens at every step of the fixed prompt, at least
NEW_TOKENS = 24  # after the fixed prompt
# Lists that a language model continues, to choose the fixed prompt from.
LISTS = [
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, " * 5,
    "January, February, March, April, May, June, July, August, September, October, November, December, " * 3,
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z " * 2,
    "one two three four five six seven eight nine ten " * 4,
    ", ".join(map(str, range(1, 31))) + ", ",
]
START_SECONDS = 600  # a big model compiles for minutes
ANSWER_SECONDS = 300  # a request that takes longer hangs


class Violation(Exception):
    """The server did what it must not."""


# -------------------------------------------------------------------------------------------------- server


@dataclass(frozen=True)
class Server:
    """A running `efx serve`."""

    process: subprocess.Popen
    url: str
    model: str
    vocabulary: int
    context: int  # tokens of prompt and answer together

    def resident_bytes(self) -> int:
        """Of all its processes together."""
        root = psutil.Process(self.process.pid)
        total = root.memory_info().rss
        for child in root.children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # some live for a moment only
                total += child.memory_info().rss
        return total


@contextmanager
def served(model: Path, *options: str, log: Path) -> Iterator[Server]:
    """`efx serve` on a free port until the block ends, its output in the file `log`.

    Raises:
        EfxError: the server did not start.
        Violation: it did not end well, see `stop`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("efx"), "serve", model, "--port", str(port), *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(process, url, log)
        with urllib.request.urlopen(f"{url}/v1/models") as response:
            described = json.load(response)["data"][0]
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        yield Server(process, url, described["id"], vocabulary, described["max_model_len"])
    except BaseException:
        _kill(process)
        raise
    stop(process)


def stop(process: subprocess.Popen) -> None:
    """End a server with SIGTERM.

    Raises:
        Violation: it took more than half a minute, its exit code is not 0, or a process of its tree lives on.
    """
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        _kill(process)
        raise Violation("the server did not end within 30 seconds of SIGTERM") from None
    # A process that has ended stays as a zombie where the machine's first process reaps none.
    time_limit = time.monotonic() + 5
    while (orphans := [child for child in children if _runs(child)]) and time.monotonic() < time_limit:
        time.sleep(0.1)
    names = [orphan.name() for orphan in orphans]
    for orphan in orphans:
        orphan.kill()
    if names or code:
        raise Violation(f"after SIGTERM the server's exit code was {code}, and these processes lived on: {names}")


def _wait_until_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    time_limit = time.monotonic() + START_SECONDS
    while time.monotonic() < time_limit and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    last = "\n".join(log.read_text().splitlines()[-20:])
    raise EfxError(f"the server did not start; the end of {log}:\n{last}")


def _kill(process: subprocess.Popen) -> None:
    """The server and all that it has started, at once."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()
    process.wait()


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


# ------------------------------------------------------------------------------------------------ requests


def completion(server: Server, rng: random.Random, new_tokens: int = 64) -> dict[str, Any]:
    """A well-formed request: up to 512 tokens of prompt and `new_tokens` of answer, short ones more often."""
    prompt_length = _log_uniform(rng, min(512, server.context // 2))
    return {
        "model": server.model,
        "prompt": [rng.randrange(3, server.vocabulary) for _ in range(prompt_length)],
        "max_tokens": _log_uniform(rng, min(new_tokens, server.context // 2)),
        # Without a `seed`: where a seeded prompt is split over two steps, vLLM 0.32 on CPU dies of "CPU Generator does
        # not use offset", whatever the model.
        "temperature": rng.choice([0, 0.8]),
        "ignore_eos": True,
        "return_token_ids": True,
    }


def _log_uniform(rng: random.Random, most: int) -> int:
    return round(most ** rng.random())


async def whole(session: aiohttp.ClientSession, server: Server, rng: random.Random) -> int:
    request = completion(server, rng)
    return len((await _answer(session, request))["token_ids"])


async def streamed(session: aiohttp.ClientSession, server: Server, rng: random.Random) -> int:
    request = completion(server, rng)
    tokens = 0
    async for choice in _events(session, request):
        tokens += len(choice["token_ids"])
    if tokens != request["max_tokens"]:
        raise Violation(f"{tokens} tokens were streamed instead of {request['max_tokens']}")
    return tokens


async def cancelled(session: aiohttp.ClientSession, server: Server, rng: random.Random) -> int:
    """Hang up while the answer is being made."""
    request = completion(server, rng, new_tokens=128)
    with suppress(TimeoutError):
        async with asyncio.timeout(rng.uniform(0, 1)):
            await _answer(session, request)
    return 0


async def cancelled_stream(session: aiohttp.ClientSession, server: Server, rng: random.Random) -> int:
    """Hang up in the middle of a stream."""
    request = completion(server, rng, new_tokens=128)
    tokens, enough = 0, rng.uniform(0, request["max_tokens"])
    events = _events(session, request)
    async for choice in events:
        tokens += len(choice["token_ids"])
        if tokens >= enough:
            break
    await events.aclose()  # which closes the connection
    return tokens


async def malformed(session: aiohttp.ClientSession, server: Server, rng: random.Random) -> int:
    name = rng.choice(list(MALFORMED))
    body = MALFORMED[name](completion(server, rng), server)
    async with session.post("/v1/completions", data=body, headers={"Content-Type": "application/json"}) as response:
        answer = await response.text()
        if not 400 <= response.status < 500:
            raise Violation(f"{name}: status {response.status}, {answer[:200]}")
        if not json.loads(answer)["error"]["message"]:
            raise Violation(f"{name}: status {response.status} without a message")
    return 0


MALFORMED: dict[str, Callable[[dict[str, Any], Server], str]] = {
    "half of a JSON": lambda request, server: json.dumps(request)[: len(json.dumps(request)) // 2],
    "a list": lambda request, server: json.dumps([request]),
    "unknown model": lambda request, server: json.dumps(request | {"model": "nobody/has-it"}),
    "negative max_tokens": lambda request, server: json.dumps(request | {"max_tokens": -1}),
    "max_tokens in words": lambda request, server: json.dumps(request | {"max_tokens": "many"}),
    "prompt is an object": lambda request, server: json.dumps(request | {"prompt": {"text": "t5"}}),
    "prompt too long": lambda request, server: json.dumps(request | {"prompt": [5] * (server.context + 1)}),
    "temperature is a list": lambda request, server: json.dumps(request | {"temperature": [1]}),
    "token outside of the vocabulary": lambda request, server: json.dumps(
        request | {"prompt": [server.vocabulary * 2]}
    ),
}

# How often each is chosen.
KINDS: dict[Callable[[aiohttp.ClientSession, Server, random.Random], Awaitable[int]], int] = {
    whole: 5,
    streamed: 5,
    cancelled: 2,
    cancelled_stream: 2,
    malformed: 2,
}


async def _answer(session: aiohttp.ClientSession, request: dict[str, Any]) -> dict[str, Any]:
    """The one choice of a completion, with as many tokens as were asked for."""
    async with session.post("/v1/completions", json=request) as response:
        if response.status != 200:
            raise Violation(f"status {response.status}: {(await response.text())[:200]}")
        answer = await response.json()
    [choice] = answer["choices"]
    if not len(choice["token_ids"]) == answer["usage"]["completion_tokens"] == request["max_tokens"]:
        raise Violation(f"{len(choice['token_ids'])} tokens were answered instead of {request['max_tokens']}")
    return choice


async def _events(session: aiohttp.ClientSession, request: dict[str, Any]):
    """The choices in the events of a streamed completion, which has to end as the protocol says."""
    async with session.post("/v1/completions", json=request | {"stream": True}) as response:
        if response.status != 200:
            raise Violation(f"status {response.status}: {(await response.text())[:200]}")
        done = False
        async for line in response.content:
            if line == b"\n":
                continue
            if done or not line.startswith(b"data: "):
                raise Violation(f"not an event: {line[:200]!r}")
            done = line == b"data: [DONE]\n"
            if not done:
                event = json.loads(line.removeprefix(b"data: "))
                if "choices" not in event:
                    raise Violation(f"an event without choices: {line[:200]!r}")
                [choice] = event["choices"]
                yield choice
        if not done:
            raise Violation("the stream ended without [DONE]")


# -------------------------------------------------------------------------------------------- fixed prompt


@dataclass
class FixedPrompt:
    """A prompt, what the idle server says after it, and how that compares under load."""

    prompt: str | list[int]
    tokens: list[int]
    logprobs: list[float]
    margin: float  # the smallest difference between the log-probabilities of the best two tokens
    asked: int = 0
    drift: float = 0.0  # the largest change of a log-probability

    async def ask_again(self, session: aiohttp.ClientSession, server: Server) -> None:
        """Raises Violation where the tokens differ."""
        now = await ask_greedily(session, server, self.prompt, len(self.tokens))
        self.asked += 1
        if now.tokens != self.tokens:
            raise Violation(f"the fixed prompt gave {now.tokens} instead of {self.tokens}")
        self.drift = max([self.drift, *(abs(a - b) for a, b in zip(now.logprobs, self.logprobs, strict=True))])


async def ask_greedily(
    session: aiohttp.ClientSession, server: Server, prompt: str | list[int], new_tokens: int
) -> FixedPrompt:
    request = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 2,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # two tokens may have the same text
    }
    choice = await _answer(session, request)
    best_two = [sorted(top.values(), reverse=True)[:2] for top in choice["logprobs"]["top_logprobs"]]
    margin = min(best - second for best, second in best_two)
    return FixedPrompt(prompt, choice["token_ids"], choice["logprobs"]["token_logprobs"], margin)


async def choose_prompt(
    session: aiohttp.ClientSession, server: Server, prompts: Sequence[str | list[int]], new_tokens: int
) -> FixedPrompt:
    """The one whose continuation is the clearest.

    Raises:
        Violation: none is clear enough.
    """
    asked = [await ask_greedily(session, server, prompt, new_tokens) for prompt in prompts]
    clearest = max(asked, key=lambda candidate: candidate.margin)
    if clearest.margin < MARGIN:
        raise Violation(f"no prompt has a margin of {MARGIN} nats: {clearest.margin:.2f} is the best")
    return clearest


# ---------------------------------------------------------------------------------------------------- load


@dataclass
class Tally:
    """What became of the requests of one load."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by kind
    errors: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    tokens: int = 0


async def load(
    session: aiohttp.ClientSession,
    server: Server,
    clients: int,
    seconds: float,
    seed: str,
    fixed: FixedPrompt | None = None,
) -> Tally:
    """Keep the server busy; `fixed` is asked for again every other second."""
    tally = Tally()
    end = time.monotonic() + seconds

    async def attempt(kind: str, request: Awaitable[int | None]) -> None:
        begin = time.monotonic()
        try:
            tokens = await request  # first, because other clients add to the sum meanwhile
            tally.tokens += tokens or 0
        # What a broken answer can raise: the connection, the time limit, JSON or UTF-8, its structure, our demands.
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError, Violation) as error:
            tally.errors[kind].append(f"{kind}: {type(error).__name__}: {error}")
        tally.seconds[kind].append(time.monotonic() - begin)

    async def client(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        while time.monotonic() < end:
            [kind] = rng.choices(list(KINDS), KINDS.values())
            await attempt(kind.__name__, kind(session, server, rng))

    async def ask_fixed_prompt() -> None:
        while time.monotonic() < end:
            await attempt("fixed_prompt", fixed.ask_again(session, server))
            await asyncio.sleep(2)

    await asyncio.gather(*map(client, range(clients)), *([ask_fixed_prompt()] if fixed else []))
    return tally


async def run(
    server: Server,
    *,
    clients: int,
    seconds: float,
    prompts: Sequence[str | list[int]],
    new_tokens: int,
    progress: Progress,
) -> dict[str, Any]:
    """Warm the server up, load it, and report.

    Args:
        server: the server, idle.
        clients: clients at once.
        seconds: length of the load.
        prompts: to choose the fixed prompt from, as text or token ids.
        new_tokens: greedy tokens after the fixed prompt.
        progress: where to show it.

    Returns:
        What load.json holds, but for the model; `violations` lists what was wrong, in sentences.
    """
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, timeout=timeout, connector=connector) as session:
        task = progress.add_task("choosing the fixed prompt", total=None)
        fixed = await choose_prompt(session, server, prompts, new_tokens)
        progress.update(task, description="warming up")
        warm_up = await load(session, server, clients, seconds / 8, "warm-up")
        memory = {"after_warm_up": server.resident_bytes()}

        async def watch() -> None:
            progress.update(task, description=f"{clients} clients", total=seconds)
            for second in range(round(seconds)):
                if second == round(seconds / 2):
                    memory["middle"] = server.resident_bytes()
                progress.update(task, completed=second)
                await asyncio.sleep(1)

        begin = time.monotonic()
        tally, _ = await asyncio.gather(load(session, server, clients, seconds, "load", fixed), watch())
        elapsed = time.monotonic() - begin
        errors = [error for kind in (warm_up.errors | tally.errors).values() for error in kind]
        if server.process.poll() is not None:
            raise Violation(
                f"the server ended under the load, with exit code {server.process.returncode}: {errors[:1]}"
            )
        try:
            await fixed.ask_again(session, server)
        except (aiohttp.ClientError, TimeoutError, Violation) as error:
            errors.append(f"after the load: {error}")
        memory["after"] = server.resident_bytes()
        progress.update(task, completed=seconds)
        unfinished = await _requests_in_the_engine(session)

    growth = memory["after"] / memory["middle"] - 1
    violations = list(errors)
    violations += [f"no request was of the kind {kind.__name__}" for kind in KINDS if not tally.seconds[kind.__name__]]
    if growth > GROWTH:
        violations.append(f"resident memory grew by {growth:.1%} in the second half of the load")
    if unfinished:
        violations.append(f"{unfinished:.0f} requests are still in the engine after the load")
    return {
        "clients": clients,
        "seconds": elapsed,
        "requests": {
            kind: {
                "count": len(latencies),
                "errors": len(tally.errors[kind]),
                "p50_seconds": median(latencies),
                "p99_seconds": quantiles(latencies, n=100, method="inclusive")[-1] if latencies[1:] else latencies[0],
            }
            for kind, latencies in sorted(tally.seconds.items())
            if latencies
        },
        "tokens_per_second": tally.tokens / elapsed,
        "fixed_prompt": {
            "tokens": len(fixed.tokens),
            "asked": fixed.asked,
            "margin_nats": fixed.margin,
            "drift_nats": fixed.drift,
        },
        "resident_bytes": memory,
        "growth_second_half": growth,
        "violations": violations,
    }


async def _requests_in_the_engine(session: aiohttp.ClientSession) -> float:
    """Running and waiting, by the server's own metrics, which the last request's steps have brought up to date."""
    async with session.get("/metrics") as response:
        metrics = await response.text()
    counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", metrics, re.M)
    if len(counts) != 2:
        raise Violation("the server's metrics do not say how many requests it has")
    return sum(map(float, counts))


# ------------------------------------------------------------------------------------------------- command


def sparse_smollm2() -> Path:
    """SmolLM2-135M-Instruct, the smallest weights of every linear layer pruned, as a sparse checkpoint; made once.

    30 % sparse: by magnitude alone, no more of a model this small can go if it is to continue a list with certainty.
    """

    def build(partial: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16)
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                weight = module.weight.data
                weight.view(-1)[weight.abs().view(-1).argsort()[: round(0.3 * weight.numel())]] = 0
        save_sparse(model, partial, tokenizer=AutoTokenizer.from_pretrained(smollm2()))

    return make_once(BUILD / "load" / "smollm2-135m-instruct-30", build)


def show(report: dict[str, Any], console: Console) -> None:
    table = Table("requests", "count", "errors", "p50 s", "p99 s", title=report["model"])
    for kind, figures in report["requests"].items():
        seconds = [f"{figures[name]:.2f}" for name in ("p50_seconds", "p99_seconds")]
        table.add_row(kind, str(figures["count"]), str(figures["errors"]), *seconds)
    console.print(table)
    fixed, memory = report["fixed_prompt"], report["resident_bytes"]
    console.print(
        f"{report['tokens_per_second']:.1f} tokens/s from {report['clients']} clients, {report['seconds']:.0f} s"
    )
    console.print(
        f"fixed prompt: {fixed['tokens']} greedy tokens asked {fixed['asked']} times; the idle server decides each by "
        f"{fixed['margin_nats']:.2f} nats or more, the load moved none by more than {fixed['drift_nats']:.3f}"
    )
    mib = ", ".join(f"{name.replace('_', ' ')} {size / 2**20:,.0f} MiB" for name, size in memory.items())
    console.print(f"resident: {mib}; second half {report['growth_second_half']:+.2%} (at most {GROWTH:+.0%})")
    for violation in report["violations"][:20]:
        console.print(f"[red]violation:[/] {violation}", markup=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of the checkpoint (default: a sparse SmolLM2-135M)")
    parser.add_argument("--seconds", type=float, default=120, help="length of the load (default: 120)")
    parser.add_argument("--clients", type=int, default=32, help="clients at once (default: 32)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    console = Console()
    try:
        model = args.model or sparse_smollm2()
        with (
            # A bigger KV cache would hide in its size what the rest grows by.
            served(model, "--kv-cache", "1", *["--eager"] * args.eager, log=BUILD / "load" / "server.log") as server,
            progress_on(console) as progress,
        ):
            report = asyncio.run(
                run(
                    server,
                    clients=args.clients,
                    seconds=args.seconds,
                    prompts=LISTS,
                    new_tokens=NEW_TOKENS,
                    progress=progress,
                )
            )
    except (EfxError, Violation) as error:
        sys.exit(f"load test: {error}")
    report = {"model": str(model), **report}
    show(report, console)
    write_json(OUTPUT / "load.json", report)
    sys.exit(1 if report["violations"] else 0)


if __name__ == "__main__":
    main()
