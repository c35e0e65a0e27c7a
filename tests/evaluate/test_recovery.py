"""What is kept of a baseline, and files in the form of llm-compressor's lm-eval tests."""

import math
from pathlib import Path

import pytest

from efx_plugin.errors import EfxError, UsageError
from efx_plugin.evaluate.recovery import read_config, recoveries, require
from efx_plugin.evaluate.tasks import Score


def scored(**metrics):
    name, value = next(iter(metrics.items()))
    return {"task": Score(name, value, None, None, 10, metrics, tuple(key for key in metrics if "perplexity" in key))}


@pytest.mark.parametrize(
    ("base", "here", "kept"),
    [
        ({"acc": 0.8}, {"acc": 0.76}, 0.95),
        ({"acc": 0.8}, {"acc": 0.7562}, 0.95),  # to a hundredth, as upstream rounds
        ({"acc": 0.5}, {"acc": 0.6}, 1.2),
        ({"perplexity": 10.0}, {"perplexity": 12.5}, 0.8),
        ({"acc": 0.0}, {"acc": 0.0}, 1.0),
        ({"acc": 0.0}, {"acc": 0.1}, math.inf),
    ],
)
def test_what_is_kept_is_the_ratio_in_the_direction_of_better(base, here, kept):
    (found,) = recoveries(scored(**base), scored(**here), 0.9)
    assert found.recovery == kept
    assert found.passed == (kept >= 0.9)


def test_a_threshold_may_be_for_each_metric():
    scores = scored(**{"acc,none": 0.5, "acc_norm,none": 0.5})
    found = recoveries(scores, scores, {"acc_norm,none": 0.8})
    assert {one.metric: one.threshold for one in found} == {"acc,none": 0.95, "acc_norm,none": 0.8}


def test_too_little_is_one_sentence():
    found = recoveries(scored(acc=0.8, f1=0.5), scored(acc=0.6, f1=0.5), 0.95)
    with pytest.raises(EfxError, match=r"^expert keeps less of base than is asked for: task acc 0\.75 < 0\.95$"):
        require(found, Path("expert"), "base")
    require([one for one in found if one.passed], Path("expert"), "base")


def test_a_file_of_upstream_is_read(tmp_path):
    path = tmp_path / "w4a16.yaml"
    path.write_text(
        "cadence: weekly\nmodel: some/base\nscheme: W4A16\ndataset_id: some/calibration\n"
        "lmeval:\n  recovery_threshold:\n    exact_match,strict-match: 0.94\n"
        "  metrics:\n    exact_match,strict-match: 0.72\n"
    )
    read = read_config(path)
    assert (read.model, read.tasks, read.fewshot, read.limit) == ("some/base", ("gsm8k",), 5, 1000)
    assert read.threshold == {"exact_match,strict-match": 0.94}


def test_a_file_of_ours_is_read(tmp_path):
    path = tmp_path / "expert.yaml"
    path.write_text(
        "model: ./merged\nlmeval:\n  task: arc_easy, efx_health_term\n  num_fewshot: 0\n  limit: 40\n"
        "  apply_chat_template: true\n  recovery_threshold: 0.9\n"
    )
    read = read_config(path)
    assert (read.tasks, read.fewshot, read.limit, read.chat) == (("arc_easy", "efx_health_term"), 0, 40, True)
    assert read.threshold == 0.9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "missing.yaml cannot be read: .*No such file"),
        ("lmeval: {}", r"model: field required; efx eval takes model and, under lmeval, task, num_fewshot, limit"),
        ("model: x\nlmeval: {model: vllm}", r"lmeval\.model: extra inputs are not permitted; efx eval takes"),
        ("model: x\nlmeval: {limit: many}", r"lmeval\.limit: input should be a valid integer"),
        ("model: [", "is not YAML"),
        ("- a list", "the file: input should be"),
    ],
)
def test_a_file_that_asks_for_something_else_is_refused(tmp_path, text, message):
    path = tmp_path / "missing.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_config(path)
