"""Fine-tuning with PEFT and the Trainer, and perplexity, on a tiny model."""

import math

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from integration.expert import perplexity, train_lora
from tests.support.tiny_llama import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.integration

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def blocks():
    """Text with something to learn: each token is followed by its successor."""
    starts = torch.arange(3, 67).unsqueeze(1)
    return (starts + torch.arange(32)) % 125 + 3


def adapter_weights(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def test_lora_learns_on_all_seven_projections_and_touches_nothing_else(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = perplexity(model, blocks)
    expert = train_lora(model, TOKENIZER, blocks.repeat(4, 1), lr=5e-3)
    assert isinstance(expert, PeftModel)
    assert perplexity(expert, blocks) < 0.8 * before
    kinds = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in adapter_weights(expert)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with expert.disable_adapter():
        assert perplexity(expert, blocks) == pytest.approx(before, rel=1e-6)
    unchanged = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in expert.named_parameters()
        if "lora_" not in name
    }
    assert unchanged.keys() == base.keys()
    assert all(torch.equal(p, base[name]) for name, p in unchanged.items())
    assert list(tmp_path.iterdir()) == []


def test_rank_alpha_and_seed_mean_what_they_say(blocks):
    def trained(seed):
        return train_lora(tiny_llama(), TOKENIZER, blocks[:16], rank=4, alpha=6, seed=seed)

    one, same, other = trained(1), trained(1), trained(2)
    layer = one.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.r["default"] == 4
    assert layer.scaling["default"] == 1.5
    for name, weight in adapter_weights(one).items():
        assert torch.equal(weight, adapter_weights(same)[name])
        assert weight.dtype == torch.float32
    assert any(not torch.equal(w, adapter_weights(other)[n]) for n, w in adapter_weights(one).items())


def test_every_window_is_seen_once_and_callbacks_run(blocks):
    class Watch(TrainerCallback):
        rates = ()

        def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
            self.rates += (lr_scheduler.get_last_lr()[0],)

    watch = Watch()
    train_lora(tiny_llama(), TOKENIZER, blocks[:42], lr=1e-3, batch_size=2, callbacks=[watch])
    assert len(watch.rates) == 21
    peak = watch.rates.index(max(watch.rates))
    assert max(watch.rates) == pytest.approx(1e-3)
    assert peak == 2  # three steps of warm-up; the rate shown is the next step's
    assert list(watch.rates[peak:]) == sorted(watch.rates[peak:], reverse=True)
    assert watch.rates[-1] == 0


def test_perplexity_is_exp_of_the_mean_loss_whatever_the_batches(blocks):
    model = tiny_llama().train()
    with torch.no_grad():
        losses = [model(input_ids=b[None], labels=b[None]).loss.item() for b in blocks]
    for batch_size in (1, 5, 64):
        expected = math.exp(sum(losses) / len(losses))
        assert perplexity(model, blocks, batch_size) == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_perplexity_of_an_indifferent_model_is_its_vocabulary(blocks):
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, blocks) == pytest.approx(128, rel=1e-5)
