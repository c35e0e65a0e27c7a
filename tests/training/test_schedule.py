import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efx_plugin.errors import EfxError
from efx_plugin.training import EfficientXpertCallback
from efx_plugin.training.schedule import LEAST_WARMUP_STEPS, Schedule


@given(
    max_steps=st.integers(1, 2000),
    warmup=st.floats(0, 1),
    final=st.floats(0, 1),
    refreshes=st.integers(1, 12),
)
def test_pruning_points_are_distinct_steps_between_the_phases_and_evenly_spaced(max_steps, warmup, final, refreshes):
    first, last = max(1, round(max_steps * warmup)), max_steps - round(max_steps * final)
    try:
        schedule = Schedule(warmup, refreshes, final)
    except EfxError:
        assert warmup + final > 1 or (refreshes == 1 and warmup + final < 1)
        return
    try:
        steps = schedule.steps(max_steps)
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
        ({}, [100]),
        ({"warmup_fraction": 0.5}, [150]),
        ({"warmup_fraction": 0}, [1]),
        ({"warmup_fraction": 1}, [300]),
        ({"final_fraction": 0.2}, [240]),
        ({"refreshes": 2}, [100, 200]),
        ({"refreshes": 2, "final_fraction": 0.5}, [100, 150]),
        ({"refreshes": 3, "final_fraction": 0}, [100, 200, 300]),
    ],
)
def test_defaults_of_the_schedule(arguments, steps):
    assert EfficientXpertCallback(**arguments).schedule.steps(300) == steps


@given(max_steps=st.integers(1, 4 * LEAST_WARMUP_STEPS))
def test_a_short_training_is_pruned_late_unless_it_is_told_when(max_steps):
    (step,) = Schedule().steps(max_steps)
    assert step >= min(max_steps, LEAST_WARMUP_STEPS)
    assert step == max(round(max_steps / 3), min(max_steps, LEAST_WARMUP_STEPS))
    assert Schedule(1 / 3).steps(max_steps) == [max(1, round(max_steps / 3))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_fraction": 0.8, "final_fraction": 0.3, "refreshes": 2}, "add up to 1 at most"),
        ({"warmup_fraction": -0.1}, "add up to 1 at most"),
        ({"final_fraction": 0.5, "warmup_fraction": 0.3}, "one pruning point"),
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
        Schedule(refreshes=5).steps(9)
