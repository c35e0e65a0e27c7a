"""Whatever is raised ends as one sentence that names the cause, and the exit code says whose mistake it was."""

import errno
import json
from pathlib import Path

import huggingface_hub.errors
import pytest
import safetensors
import tokenizers
import torch
import transformers
from peft import LoraConfig

from efx_plugin import failures
from efx_plugin.checkpoint import summary
from efx_plugin.cli import main
from efx_plugin.errors import EfxError, SparseCheckpointError, UsageError


def raised(action):
    """The exception of an action that this package took."""
    space = {"__name__": "efx_plugin.compress.somewhere", "action": action}
    exec("def take():\n    action()", space)
    with pytest.raises(Exception) as caught:
        space["take"]()
    return caught.value


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: transformers.AutoConfig.from_pretrained("/nowhere/model"), ["transformers 5.", "/nowhere/model"]),
        (lambda: LoraConfig.from_pretrained("/nowhere/adapter"), ["failed", "/nowhere/adapter"]),
        (lambda: safetensors.safe_open("/nowhere/x.safetensors", "pt"), ["x.safetensors"]),
        (lambda: safetensors.deserialize(b"damaged"), ["safetensors", "SafetensorError"]),
        (lambda: tokenizers.Tokenizer.from_str("{"), ["EOF while parsing"]),
        (lambda: torch.nn.Linear(2, 3)(torch.ones(4)), ["torch", "RuntimeError"]),
        (lambda: raise_(huggingface_hub.errors.OfflineModeIsEnabled("offline")), ["huggingface_hub", "offline"]),
        (lambda: raise_(torch.OutOfMemoryError("CUDA out of memory. Tried")), ["GPU", "--device cpu"]),
        (
            lambda: torch.empty(1 << 60, dtype=torch.uint8),
            ["memory of this machine does not suffice for 1152921504606846976 bytes"],
        ),
        (lambda: raise_(MemoryError()), ["memory of this machine"]),
        (lambda: raise_(OSError(errno.ENOSPC, "No space left on device", "/x/y")), ["disk of /x/y is full"]),
        (lambda: raise_(RuntimeError("I/O error: No space left on device (os error 28)")), ["disk of", "is full"]),
        (lambda: Path("/nowhere/file").read_text(), ["/nowhere/file: no such file or directory"]),
        (lambda: raise_(ModuleNotFoundError("No module", name="llmcompressor.core")), ["efx-plugin[compress]"]),
        (lambda: raise_(ModuleNotFoundError("No module named 'zyx'", name="zyx")), ["unexpected", "zyx"]),
        (lambda: {}["model"], ["unexpected error in efx-plugin itself", "KeyError: 'model'"]),
        (lambda: json.loads("{"), ["unexpected", "JSONDecodeError"]),
    ],
)
def test_an_exception_becomes_one_sentence_with_its_cause(action, words):
    said = failures.sentence(raised(action))
    assert all(word in said for word in words), said
    assert "\n" not in said and not said.endswith(".")


def test_a_sentence_stays_as_it_is_behind_other_exceptions_too():
    outer = RuntimeError("pipeline failed")
    outer.__cause__ = EfxError("x has no y: add it")
    assert failures.sentence(outer) == "x has no y: add it"
    assert failures.exit_code(UsageError("")) == 2
    assert failures.exit_code(EfxError("")) == failures.exit_code(SparseCheckpointError("")) == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("no such thing: name another"), 2, "efx: no such thing: name another"),
        (EfxError("it does not fit: take another"), 1, "efx: it does not fit: take another"),
        (ZeroDivisionError("division by zero"), 1, "efx: unexpected error in efx-plugin itself"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_a_command_that_fails_says_why_and_shows_the_traceback_on_demand(
    monkeypatch, capsys, tmp_path, error, code, said, debug
):
    monkeypatch.setattr(summary, "summarize", lambda *args, **kwargs: raise_(error))
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(tmp_path), *(["--debug"] if debug else [])])
    assert ended.value.code == code
    printed = capsys.readouterr().err
    assert (printed.splitlines() or [""])[-1].startswith(said)
    assert ("Traceback" in printed) == (debug and code != 130)
