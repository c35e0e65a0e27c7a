import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efx_plugin.errors import EfxError
from efx_plugin.model.adapters import linear_layers
from efx_plugin.training.recorder import Recorder
from tests.support.tiny_llama import tiny_llama

IDS = (torch.arange(3, 67).unsqueeze(1) + torch.arange(16)) % 125 + 3
PER_STEP = 2 * 16  # tokens


class Silent(torch.nn.Module):
    """Takes what a model takes, and computes nothing."""

    def forward(self, **_):
        pass


def recorder_of(model, tokens, step=0, fisher=False):
    layers = linear_layers(model)[:2] if fisher else []
    return Recorder(model, tokens=tokens, step=step, fisher_layers=layers)


def train(model, recorder, steps, pruning_step=3):
    """Forward and backward passes of two texts a step, from the step that the recorder has reached."""
    for step in range(recorder.step, recorder.step + steps):
        recorder.watch_before(pruning_step)
        ids = IDS[2 * step : 2 * step + 2]
        model(input_ids=ids, labels=ids).loss.backward()
        recorder.step = step + 1


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@given(tokens=st.integers(1, 5 * PER_STEP), steps=st.integers(1, 5))
def test_the_fewest_last_batches_that_hold_the_tokens_are_kept(tokens, steps):
    model = Silent()
    recorder = recorder_of(model, tokens)
    for step in range(steps):
        model(input_ids=IDS[2 * step : 2 * step + 2])
    kept = min(steps, -(-tokens // PER_STEP))
    assert recorder.recorded == kept * PER_STEP
    recording = recorder.take()
    assert recording.tokens == kept * PER_STEP
    expected = IDS[2 * (steps - kept) : 2 * steps]
    assert torch.equal(torch.cat([batch.inputs["input_ids"] for batch in recording.batches]), expected)
    assert recorder.recorded == 0


def test_padding_and_tokens_whose_label_is_not_used_do_not_count():
    model = tiny_llama().train()
    recorder = recorder_of(model, tokens=1000)
    position = torch.arange(16)
    attended = (position < 12).long().expand(2, -1)
    labels = torch.where(position >= 4, IDS[:2], -100)
    model(input_ids=IDS[:2], attention_mask=attended, labels=labels)
    model(input_ids=IDS[:2], labels=torch.where(position == 0, IDS[:2], -100))  # labels are shifted: none is used
    (batch,) = recorder.take().batches
    assert torch.equal(batch.mask, ((position >= 4) & (position < 12)).expand(2, -1))
    assert "labels" not in batch.inputs


def test_evaluations_are_not_recorded_and_nothing_is_once_it_is_closed():
    model = tiny_llama()
    recorder = recorder_of(model, tokens=1000)
    model(input_ids=IDS[:2])
    with torch.no_grad():
        model.train()(input_ids=IDS[:2])
    assert recorder.recorded == 0
    model(input_ids=IDS[:2])
    recorder.close()
    model(input_ids=IDS[:2])
    assert recorder.recorded == PER_STEP


def test_a_batch_without_tokens_by_name_is_refused():
    model = tiny_llama().train()
    recorder_of(model, tokens=1000)
    with pytest.raises(EfxError, match=r"neither input_ids nor inputs_embeds .* pass them by name in compute_loss"):
        model(IDS[:2])


def test_a_pruning_point_without_a_token_is_refused():
    model = tiny_llama().train()
    recorder = recorder_of(model, tokens=1000, step=7)
    model(input_ids=IDS[:2], labels=torch.full_like(IDS[:2], -100))
    with pytest.raises(EfxError, match="before the pruning point at step 7, so it cannot be calibrated"):
        recorder.take()


def test_gradients_are_watched_in_the_steps_that_fill_the_calibration_alone():
    model = tiny_llama().train()
    recorder, watched = recorder_of(model, tokens=2 * PER_STEP, fisher=True), []
    for step in range(6):
        train(model, recorder, 1, pruning_step=6)
        watched.append(recorder.watches)
        assert recorder.step == step + 1
    # Nothing is known of the first step's tokens, so it is watched too.
    assert watched == [True, False, False, False, True, True]
    found = recorder.take().fisher
    assert not recorder.watches

    again = recorder_of(model, tokens=2 * PER_STEP, step=4, fisher=True)
    train(model, again, 2, pruning_step=6)
    expected = again.take().fisher
    assert same(found.sensitivities, expected.sensitivities)
    assert same(found.energies, expected.energies)


def test_without_layers_to_watch_there_is_no_fisher():
    model = tiny_llama().train()
    recorder = recorder_of(model, tokens=PER_STEP)
    train(model, recorder, 1, pruning_step=1)
    assert not recorder.watches
    assert recorder.take().fisher is None


@pytest.mark.parametrize("fisher", [False, True])
def test_a_recorder_goes_on_from_the_state_of_another(fisher):
    model = tiny_llama().train()
    whole = recorder_of(model, tokens=3 * PER_STEP, fisher=fisher)
    train(model, whole, 2)
    tensors, values = whole.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    values = json.loads(json.dumps(values))
    train(model, whole, 1)
    whole.close()
    expected = whole.take()

    resumed = recorder_of(model, tokens=3 * PER_STEP, step=2, fisher=fisher)
    resumed.restore(tensors, values)
    train(model, resumed, 1)
    found = resumed.take()
    assert found.tokens == expected.tokens == 3 * PER_STEP
    for one, other in zip(found.batches, expected.batches, strict=True):
        assert same(one.inputs, other.inputs)
        assert torch.equal(one.mask, other.mask)
    if fisher:
        assert same(found.fisher.sensitivities, expected.fisher.sensitivities)
        assert same(found.fisher.energies, expected.fisher.energies)
