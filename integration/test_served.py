"""The comparison of two servings: what it lets pass and what it does not."""

import copy
import math

import pytest

from integration.served import difference, relative_error

pytestmark = pytest.mark.integration

CONFIG = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 76}


def answers(margin: float = 1.0) -> dict:
    """Two prompts whose given tokens have log-probabilities of standard deviation 1, and two tokens after each."""
    best = [[[5, -1.0], [6, -1.0 - margin]], [[7, -1.0], [8, -1.0 - margin]]]
    output = {"token_ids": [5, 7], "text": None, "given": [-4.0, -2.0], "best": best}
    return {"outputs": [output, copy.deepcopy(output)], "relative_error": 0.1}


def changed(served: dict, **fields) -> dict:
    """The second prompt's output with other fields."""
    first, second = served["outputs"]
    return served | {"outputs": [first, second | fields]}


def test_the_same_is_no_difference():
    assert difference(answers(), answers()) is None


@pytest.mark.parametrize(("error", "is_rounding"), [(0.13, True), (0.21, False), (math.nan, False)])
def test_log_probabilities_of_given_tokens_keep_within_the_bound(error, is_rounding):
    # Of four errors two are not zero: their root mean square is .71 of each.
    served = changed(answers(), given=[-4.0 + error, -2.0 - error])
    assert (difference(answers(), served) is None) is is_rounding


@pytest.mark.parametrize(("error", "is_rounding"), [(0.13, True), (0.21, False)])
def test_log_probabilities_of_generated_tokens_keep_within_the_bound(error, is_rounding):
    best = [[[5, -1.0 + error], [6, -2.0 - error]], [[7, -1.0 + error], [8, -2.0 - error]]]
    assert (difference(answers(), changed(answers(), best=best)) is None) is is_rounding


@pytest.mark.parametrize(("margin", "is_tie"), [(0.4, True), (0.5, False)])
def test_tokens_differ_where_they_are_tied(margin, is_tie):
    # 3 sqrt(2) times the bound of .1
    served = changed(answers(margin), token_ids=[6, 319])
    assert (difference(answers(margin), served) is None) is is_tie


def test_a_token_far_from_the_best_is_no_tie():
    assert "token 1 is 9 instead of 7" in difference(answers(), changed(answers(), token_ids=[5, 9]))


def test_an_answer_that_ends_early_is_a_difference():
    assert "there are 1 tokens, not 2" in difference(answers(), changed(answers(), token_ids=[5]))


def test_the_bound_grows_with_the_depth_and_with_the_unit():
    deeper, quantized = CONFIG | {"num_hidden_layers": 30}, {"group_0": {"input_activations": {"num_bits": 8}}}
    assert relative_error(CONFIG, "float32") < relative_error(CONFIG, "bfloat16") < relative_error(deeper, "bfloat16")
    w8a8 = CONFIG | {"quantization_config": {"config_groups": quantized}}
    assert relative_error(CONFIG, "bfloat16") < relative_error(w8a8, "bfloat16")
