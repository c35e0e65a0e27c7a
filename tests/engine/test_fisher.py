import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

from efx_plugin.engine.fisher import measure_fisher, obstacle_to_loss
from efx_plugin.model.adapters import linear_layers
from tests.support.tiny_llama import tiny_llama
from tests.support.tiny_models import tiny_model


def batches(count=3, length=24, batch=2):
    ids = torch.randint(3, 128, (count, batch, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def layers_of(model):
    return [layer for layer in linear_layers(model) if layer.name != "lm_head"]


def by_hand(model, data):
    """Gradients of the summed loss with respect to each layer's outputs, by an additive probe."""
    sums, count = {}, 0
    for batch in data:
        probes = {}
        handles = []
        for layer in layers_of(model):

            def hook(_module, _args, output, name=layer.name, probes=probes):
                probes[name] = torch.zeros_like(output, requires_grad=True)
                return output + probes[name]

            handles.append(layer.module.register_forward_hook(hook))
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].flatten(), reduction="sum"
        )
        kept = batch["attention_mask"].bool()
        for (name, probe), gradient in zip(
            probes.items(), torch.autograd.grad(loss, list(probes.values())), strict=True
        ):
            assert gradient.shape == probe.shape
            sums[name] = sums.get(name, 0) + gradient[kept].square().sum(dim=0)
        count += int(kept.sum())
        for handle in handles:
            handle.remove()
    return {name: total / count for name, total in sums.items()}


@pytest.mark.parametrize(
    "make",
    [tiny_llama, lambda: tiny_llama(tie_word_embeddings=True), lambda: tiny_model("Gemma2", vocab_size=128)],
    ids=["Llama", "tied", "Gemma2, capped logits"],
)
@pytest.mark.parametrize("length", [24, 80])
def test_sensitivities_are_the_mean_squared_gradients_of_the_loss(make, length):
    model, data = make(), batches(length=length)
    fisher = measure_fisher(model, layers_of(model), data, tokens=10**6)
    expected = by_hand(model, data)
    assert set(fisher.sensitivities) == set(expected)
    for name, c in fisher.sensitivities.items():
        torch.testing.assert_close(c, expected[name], rtol=1e-4, atol=1e-8)


def test_padding_and_the_tokens_outside_of_the_loss_mask_do_not_count():
    model, data = tiny_llama(), batches()
    cut = [{name: tensor[:, :16] for name, tensor in batch.items()} for batch in data]
    for batch in data:
        batch["attention_mask"][:, 16:] = 0
    by_padding = measure_fisher(model, layers_of(model), data, tokens=10**6)
    alone = measure_fisher(model, layers_of(model), cut, tokens=10**6)
    for name, c in alone.sensitivities.items():
        torch.testing.assert_close(by_padding.sensitivities[name], c, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(by_padding.energies[name], alone.energies[name], rtol=1e-4, atol=1e-8)
    for batch, short in zip(data, cut, strict=True):
        batch["attention_mask"][:] = 1
        batch["loss_mask"] = torch.zeros_like(batch["input_ids"])
        batch["loss_mask"][:, :16] = 1
        short["loss_mask"] = torch.ones_like(short["input_ids"])
    by_loss_mask = measure_fisher(model, layers_of(model), data, tokens=10**6)
    for name, c in alone.sensitivities.items():
        torch.testing.assert_close(by_loss_mask.sensitivities[name], c, rtol=1e-4, atol=1e-8)


def test_it_stops_at_the_tokens_it_was_given():
    model, data = tiny_llama(), batches()
    few = measure_fisher(model, layers_of(model), iter(data), tokens=48)
    one = measure_fisher(model, layers_of(model), data[:1], tokens=10**6)
    assert all(torch.equal(c, one.sensitivities[name]) for name, c in few.sensitivities.items())


@pytest.mark.parametrize("adapted", [False, True])
def test_the_model_is_left_as_it_was(adapted):
    model = tiny_llama()
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).get_base_model().eval()
    before = {name: (parameter.clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    model(**batches(1)[0])  # transformers installs hooks of its own at the first call
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    measure_fisher(model, layers_of(model), batches(1), tokens=1)
    assert not model.is_gradient_checkpointing
    assert modes == {name: module.training for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert hooks == sum(len(module._forward_hooks) for module in model.modules())


def classifier(kind):
    config = tiny_llama().config
    config.num_labels = 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (LlamaForSequenceClassification, torch.tensor([0, 2])),
        (LlamaForSequenceClassification, torch.tensor([[0], [2]])),
        (LlamaForTokenClassification, torch.tensor([[-100, 2] * 12, [1] * 24])),
    ],
    ids=["texts", "texts, in columns", "tokens"],
)
def test_a_classifiers_sensitivities_come_from_its_own_loss(kind, labels):
    model, data = classifier(kind), [batch | {"labels": labels} for batch in batches(1)]
    assert obstacle_to_loss(model, data) is None
    layers = [layer for layer in linear_layers(model) if layer.name != "score"]
    fisher = measure_fisher(model, layers, data, tokens=10**6)
    probes = {}
    for layer in layers:

        def hook(_module, _args, output, name=layer.name):
            probes[name] = torch.zeros_like(output, requires_grad=True)
            return output + probes[name]

        layer.module.register_forward_hook(hook)
    logits = model(input_ids=data[0]["input_ids"], attention_mask=data[0]["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
    for (name, probe), gradient in zip(probes.items(), torch.autograd.grad(loss, list(probes.values())), strict=True):
        expected = gradient.square().sum(dim=(0, 1)) / probe[..., 0].numel()
        torch.testing.assert_close(fisher.sensitivities[name], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, LlamaForTokenClassification])
def test_a_classifier_has_no_loss_on_text_without_labels(kind):
    assert "has no loss on calibration data without labels" in obstacle_to_loss(classifier(kind), batches())
    assert obstacle_to_loss(tiny_llama(), batches()) is None
