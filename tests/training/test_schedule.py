import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efx_plugin.errors import EfxError
from efx_plugin.training import EfficientXpertCallback
from efx_plugin.training.schedule import pruning_steps


@given(
    max_steps=st.integers(1, 2000),
    warmup=st.floats(0, 1),
    final=st.floats(0, 1),
    refreshes=st.integers(1, 12),
)
def test_pruning_points_are_distinct_steps_between_the_phases_and_evenly_spaced(max_steps, warmup, final, refreshes):
    first, last = max(1, round(max_steps * warmup)), max_steps - round(max_steps * final)
    try:
        steps = pruning_steps(max_steps, warmup, refreshes, final)
    except EfxError:
        assert refreshes > 1
        assert last - first < refreshes - 1
        return
    assert len(steps) == len(set(steps)) == refreshes
    assert steps == sorted(steps)
    assert steps[0] == first
    assert steps[0] >= 1 and steps[-1] <= max_steps
    if refreshes > 1:
        assert steps[-1] == last
        gaps = [after - before for before, after in itertools.pairwise(steps)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({}, [30]),
        ({"warmup_fraction": 0.5}, [45]),
        ({"warmup_fraction": 0}, [1]),
        ({"warmup_fraction": 1}, [90]),
        ({"refreshes": 2}, [30, 60]),
        ({"refreshes": 3, "final_fraction": 0}, [30, 60, 90]),
    ],
)
def test_defaults_of_the_schedule(arguments, steps):
    callback = EfficientXpertCallback(**arguments)
    assert pruning_steps(90, callback.warmup_fraction, callback.refreshes, callback.final_fraction) == steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_fraction": 0.8, "final_fraction": 0.3, "refreshes": 2}, "add up to 1 at most"),
        ({"warmup_fraction": -0.1}, "add up to 1 at most"),
        ({"final_fraction": 0.5}, "one pruning point"),
        ({"refreshes": 0}, "refreshes 0"),
        ({"calibration_tokens": 0}, "calibration_tokens 0"),
        ({"sparsty": 0.5}, "no argument 'sparsty': did you mean 'sparsity'"),
        ({"saliency": "best"}, "saliency='best'"),
        ({"mask_structure": "2:4", "sparsity": 0.6}, "prunes 2 of 4"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused_in_one_sentence(arguments, message):
    with pytest.raises(EfxError, match=message) as error:
        EfficientXpertCallback(**arguments)
    assert "\n" not in str(error.value)


def test_more_pruning_points_than_steps_are_refused():
    with pytest.raises(EfxError, match="5 pruning points do not fit into 9 training steps, of which 3 warm up and 3"):
        pruning_steps(9, 1 / 3, 5, 1 / 3)
