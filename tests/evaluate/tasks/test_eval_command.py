"""`efx eval` as it is typed: a sparse checkpoint beside the dense one, what it prints and how it ends."""

import contextlib
import io
import json

import pytest
import torch

from efx_plugin.checkpoint import save_sparse
from efx_plugin.cli import main
from tests.support.questions import tiny_questions, write_jsonl
from tests.support.tiny_llama import save_tiny_llama, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Directories of a dense model, of the same model sparse, of another one, and of questions."""
    folder = tmp_path_factory.mktemp("eval")
    model = tiny_llama()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight[:, ::2] = 0
    model.save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    save_sparse(model, folder / "sparse", tokenizer=tiny_tokenizer())
    save_tiny_llama(folder / "other")
    (folder / "questions").mkdir()
    write_jsonl(folder / "questions" / "general_term.jsonl", tiny_questions(16))
    (folder / "recovery.yaml").write_text(
        f"model: {folder / 'dense'}\nlmeval: {{task: efx_general_term, num_fewshot: 0, limit: 16}}\n"
    )
    return folder


def efx(*arguments):
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
        raise SystemExit(0)
    return ended.value.code or 0, stdout.getvalue(), stderr.getvalue()


def evaluate(places, model, *options):
    return efx("eval", places / model, "--task-data", places / "questions", *options)


def test_a_sparse_checkpoint_is_worth_what_the_dense_one_is(places):
    options = ("--tasks", "efx_general_term", "--baseline", places / "dense", "--json")
    code, stdout, _ = evaluate(places, "sparse", *options)
    report = json.loads(stdout)
    assert code == 0
    assert report["tasks"]["efx_general_term"]["documents"] == 16
    assert report["tasks"]["efx_general_term"]["chance"] == 0.25
    assert [one["recovery"] for one in report["recovery"]] == [1.0, 1.0]


def test_a_file_in_upstreams_form_says_the_same(places):
    code, stdout, _ = evaluate(places, "sparse", "--config", places / "recovery.yaml")
    assert code == 0
    assert "kept of" in stdout
    assert stdout.count("passed") == 2


def test_less_than_the_threshold_ends_with_one_sentence(places):
    options = ("--tasks", "efx_general_term", "--baseline", places / "dense", "--recovery-threshold", "9", "--quiet")
    code, stdout, stderr = evaluate(places, "other", *options)
    assert (code, stdout) == (1, "")
    assert stderr.splitlines()[-1].startswith(f"efx: {places / 'other'} keeps less of {places / 'dense'} than is asked")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to ask: pass --tasks or --config"),
        (["--tasks", "x", "--recovery-threshold", "0.9"], "--recovery-threshold is about a --baseline: pass one"),
        (["--tasks", "x", "--config", "recovery.yaml"], "--tasks and --config say the same: pass one of the two"),
    ],
)
def test_wrong_usage_is_one_sentence(places, options, message):
    code, _, stderr = evaluate(places, "dense", *options)
    assert (code, stderr) == (2, f"efx: {message}\n")
