"""EfficientXpertModifier under the real llm-compressor and PEFT, on tiny models: recipes, pipelines, refusals."""

import pytest
import torch
from compressed_tensors.offload import dispatch_with_map, remove_dispatch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq import base as gptq
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from efx_plugin import EfficientXpertModifier, merge_adapters, modifier
from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.engine.block_pruner import store_in_base
from efx_plugin.engine.blocks import plan_blocks
from efx_plugin.engine.sequential import Batch, prune_in_sequence
from efx_plugin.errors import EfxError
from efx_plugin.model import architectures
from tests.support.tiny_llama import save_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

RECIPE = """
prune_stage:
  pruning_modifiers:
    EfficientXpertModifier:
      sparsity: 0.5
      targets: ["Linear"]
      ignore: ["lm_head"]
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def calibration():
    ids = torch.randint(3, 128, (12, 48), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 48] * 12})


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory)


def adapted(directory):
    torch.manual_seed(0)
    model = get_peft_model(load(directory), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.eval()


def run(model, directory, calibration, recipe=RECIPE, **options):
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(directory),
        recipe=recipe,
        dataset=calibration,
        num_calibration_samples=12,
        max_seq_length=48,
        shuffle_calibration_samples=False,
        **options,
    )
    return model


def projections(model):
    return {name: p.detach() for name, p in model.named_parameters() if "_proj.weight" in name}


def assert_half_of_every_block_is_zero(model, slack=0.002):
    weights = projections(model)
    assert len(weights) == 21
    for block in range(3):
        inside = [weight for name, weight in weights.items() if f"layers.{block}." in name]
        zeros = sum(int((weight == 0).sum()) for weight in inside)
        assert abs(zeros / sum(weight.numel() for weight in inside) - 0.5) < slack
        assert all((weight == 0).any() for weight in inside)
    assert (model.lm_head.weight != 0).all()


@pytest.mark.parametrize("pipeline", ["sequential", "basic", "independent"])
def test_a_yaml_recipe_prunes_every_block(directory, calibration, pipeline):
    assert_half_of_every_block_is_zero(run(load(directory), directory, calibration, pipeline=pipeline))


def test_an_instance_and_yaml_prune_alike(directory, calibration):
    from_yaml = run(load(directory), directory, calibration)
    from_instance = run(load(directory), directory, calibration, recipe=EfficientXpertModifier(sparsity=0.5))
    for name, weight in projections(from_yaml).items():
        assert torch.equal(weight, projections(from_instance)[name])


def test_adapters_are_pruned_as_if_merged_first_wherever_they_sit(directory, calibration):
    plain = run(merge_adapters(adapted(directory)), directory, calibration)
    inner = adapted(directory)
    run(inner.base_model.model, directory, calibration)
    zeros_of = {name: weight == 0 for name, weight in projections(plain).items()}
    for name, weight in projections(merge_adapters(inner)).items():
        agreement = ((weight == 0) == zeros_of[name]).float().mean()
        assert agreement > 0.995, name


@pytest.mark.parametrize("merge", [merge_adapters, lambda model: model.merge_and_unload()])
@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_zeros_of_a_peft_model_survive_either_merge(directory, calibration, pipeline, merge):
    model = adapted(directory)
    model.config._name_or_path = str(directory)
    run(model, directory, calibration, pipeline=pipeline)
    merged = merge(model)
    assert_half_of_every_block_is_zero(merged)
    text = torch.arange(3, 40).unsqueeze(0)
    assert merged(text).logits.isfinite().all()


def test_the_peft_model_is_pruned_like_its_inner_model(directory, calibration):
    """Whether the cache is on differs between the two, and must not matter."""
    outer, inner = adapted(directory), adapted(directory)
    outer.config._name_or_path = str(directory)
    run(outer, directory, calibration, pipeline="basic")
    run(inner.base_model.model, directory, calibration, pipeline="basic")
    of_inner = projections(merge_adapters(inner))
    for name, weight in projections(merge_adapters(outer)).items():
        assert ((weight == 0) == (of_inner[name] == 0)).float().mean() > 0.995, name


def test_the_saved_recipe_runs_again(directory, calibration, tmp_path):
    model = run(load(directory), directory, calibration)
    model.save_pretrained(tmp_path / "saved")
    again = run(load(directory), directory, calibration, recipe=str(tmp_path / "saved" / "recipe.yaml"))
    for name, weight in projections(model).items():
        assert torch.equal(weight, projections(again)[name])


def test_two_of_four_by_recipe_and_a_layer_left_alone(directory, calibration):
    recipe = EfficientXpertModifier(sparsity=0.5, mask_structure="2:4", ignore=["lm_head", "re:.*down_proj"])
    for name, weight in projections(run(load(directory), directory, calibration, recipe=recipe)).items():
        zeros = (weight.reshape(-1, 4) == 0).sum(dim=1)
        assert (zeros == (0 if "down_proj" in name else 2)).all()


def test_channels_in_an_order_of_their_own_are_pruned_with_less_error(directory, calibration):
    errors = {}
    for ordered in (False, True):
        one = EfficientXpertModifier(mask_structure="2:4", channel_permutation=ordered)
        assert_half_of_every_block_is_zero(run(load(directory), directory, calibration, recipe=one))
        assert len(one.report) == 21 and len(one.reordered) == (15 if ordered else 0)
        readers = [layer for layer in one.report if layer.name.endswith(("o_proj", "down_proj"))]
        errors[ordered] = sum(layer.relative_error for layer in readers)
    assert errors[True] < 0.95 * errors[False]


def test_only_the_tokens_of_the_loss_mask_count(directory, calibration):
    """Padding garbage behind the mask must not move the mask of the first block."""
    garbage = calibration.map(
        lambda row: {
            "input_ids": row["input_ids"][:32] + [5] * 16,
            "loss_mask": [1] * 32 + [0] * 16,
        }
    )
    cut = calibration.map(
        lambda row: {"input_ids": row["input_ids"][:32], "attention_mask": [1] * 32, "loss_mask": [1] * 32}
    )
    modifiers = [EfficientXpertModifier(propagation="none", comparison_group="row") for _ in range(2)]
    one = run(load(directory), directory, garbage, recipe=modifiers[0], use_loss_mask=True)
    other = run(load(directory), directory, cut, recipe=modifiers[1], use_loss_mask=True)
    of_other = projections(other)
    for name, weight in projections(one).items():
        if "layers.0." in name:
            assert ((weight == 0) == (of_other[name] == 0)).float().mean() > 0.995, name


@pytest.mark.parametrize(
    "arguments",
    [
        {"saliency": "wanda", "propagation": "weight", "comparison_group": "row", "allocation": "uniform"},
        {"saliency": "wanda", "propagation": "activation", "comparison_group": "matrix"},
        {"saliency": "wanda", "propagation": "block", "comparison_group": "block", "repair": "none"},
        {"repair": "paper", "kappa": 0.5},
        {"repair": "adapter"},
    ],
)
def test_points_of_the_family_run_on_a_model_with_its_adapter(directory, calibration, arguments):
    model = adapted(directory)
    run(model.base_model.model, directory, calibration, recipe=EfficientXpertModifier(**arguments))
    assert_half_of_every_block_is_zero(merge_adapters(model), slack=0.01)


def test_allocation_over_the_model_gives_blocks_their_own_sparsity_and_the_model_its_total(directory, calibration):
    model = load(directory)
    for parameter in model.model.layers[2].parameters():
        parameter.data *= 3  # a block whose weights matter more
    weights = projections(run(model, directory, calibration, recipe=EfficientXpertModifier(allocation="layer")))
    zeros = [sum(int((w == 0).sum()) for name, w in weights.items() if f"layers.{i}." in name) for i in range(3)]
    sizes = [sum(w.numel() for name, w in weights.items() if f"layers.{i}." in name) for i in range(3)]
    assert abs(sum(zeros) / sum(sizes) - 0.5) < 1e-4
    assert max(zeros) - min(zeros) > 0.02 * sizes[0]


def test_a_mapping_of_sparsities_in_a_recipe(directory, calibration):
    recipe = RECIPE.replace("sparsity: 0.5", 'sparsity: {"re:.*mlp.*": 0.6, "Linear": 0.4}')
    weights = projections(run(load(directory), directory, calibration, recipe=recipe))
    for part, sparsity in (("mlp", 0.6), ("self_attn", 0.4)):
        some = [weight for name, weight in weights.items() if part in name]
        zeros, size = sum(int((weight == 0).sum()) for weight in some), sum(weight.numel() for weight in some)
        assert abs(zeros / size - sparsity) < 1e-3


def test_fisher_falls_back_to_block_where_the_backward_pass_does_not_fit(directory, calibration, monkeypatch, warnings):
    def no_memory(*_args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("efx_plugin.modifier.measure_fisher", no_memory)
    fallen = run(load(directory), directory, calibration)
    asked = run(load(directory), directory, calibration, recipe=EfficientXpertModifier(propagation="block"))
    assert any("does not fit into memory, so propagation 'fisher' falls back to 'block'" in text for text in warnings)
    for name, weight in projections(asked).items():
        assert torch.equal(weight, projections(fallen)[name])
    with pytest.raises(EfxError, match="does not fit into memory, so allocation 'layer' cannot be measured"):
        run(load(directory), directory, calibration, recipe=EfficientXpertModifier(allocation="layer"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"targets": ["re:.*no_such"]}, r"match no linear layer of LlamaForCausalLM"),
        ({"ignore": []}, "lm_head is targeted but lies outside the decoder blocks"),
        (
            {"sparsity": 0.6, "mask_structure": "3:5"},
            "does not divide the 64 inputs of model.layers.0.self_attn.q_proj",
        ),
        ({"channel_permutation": True}, "that a new mask of N:M structure loses less in: set mask_structure"),
    ],
)
def test_recipes_that_do_not_fit_the_model_are_refused(directory, calibration, arguments, sentence):
    with pytest.raises(EfxError, match=sentence):
        run(load(directory), directory, calibration, recipe=EfficientXpertModifier(**arguments))


def test_channels_stay_as_they_are_in_architectures_that_are_not_known(directory, calibration, monkeypatch, warnings):
    monkeypatch.delitem(architectures.PROPAGATION_MAPS, "LlamaForCausalLM")
    one = EfficientXpertModifier(mask_structure="2:4", channel_permutation=True)
    assert_half_of_every_block_is_zero(run(load(directory), directory, calibration, recipe=one))
    assert one.reordered == {}
    (said,) = [text for text in warnings if "no propagation map for LlamaForCausalLM" in text]
    assert said.endswith("channel_permutation leaves its channels as they are")


def test_nan_weights_are_refused_by_name(directory, calibration):
    model = load(directory)
    model.model.layers[2].mlp.gate_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(EfxError, match=r"layers\.2\.mlp\.gate_proj contains NaN"):
        run(model, directory, calibration)


def test_missing_calibration_data_is_refused(directory):
    with pytest.raises(EfxError, match="needs calibration data"):
        oneshot(model=load(directory), recipe=RECIPE)


def test_a_later_modifier_that_refills_zeros_is_caught(directory, calibration):
    class Refill(EfficientXpertModifier):
        def on_initialize(self, state, **kwargs):
            return True

        def on_calibration_start(self, state, event, **kwargs):
            pass

        def on_finalize(self, state, **kwargs):
            return True

        def on_calibration_end(self, state, event, **kwargs):
            state.model.model.layers[1].mlp.up_proj.weight.data.fill_(1)

    with pytest.raises(EfxError, match=r"layers\.1\.mlp\.up_proj had \d+ zeros after pruning and has 0 now"):
        run(load(directory), directory, calibration, recipe=[EfficientXpertModifier(), Refill()], pipeline="sequential")


def test_processes_that_all_read_the_same_data_are_warned_of(directory, calibration, monkeypatch, warnings):
    """As llm-compressor 0.14 makes them do when each is given the whole dataset."""
    monkeypatch.setattr(modifier, "world", lambda: (0, 2))
    monkeypatch.setattr(modifier, "gather_objects", lambda value: [value, value])
    run(load(directory), directory, calibration)
    assert any("2 processes start with the same calibration data" in text for text in warnings)


def test_the_dense_model_beside_the_pruned_one_is_that_of_the_engine(directory, calibration):
    """Both drivers follow it, the modifier in llm-compressor's sequential pipeline."""
    arguments = PruningArguments(propagation="block", dense_targets=1)
    expected = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    ids = torch.tensor(calibration["input_ids"])
    batches = [Batch({"input_ids": row[None]}, torch.ones_like(row[None], dtype=torch.bool)) for row in ids]
    prune_in_sequence(expected, plan_blocks(expected, arguments), arguments, batches, store=store_in_base)
    found = run(load(directory), directory, calibration, EfficientXpertModifier(**arguments.model_dump()))
    for name, weight in projections(found).items():
        assert torch.equal(weight, projections(expected)[name]), name


def test_targets_of_the_dense_model_change_what_reads_the_residual_stream_behind_a_pruned_block(directory, calibration):
    sparse, dense = (
        projections(run(load(directory), directory, calibration, EfficientXpertModifier(dense_targets=share)))
        for share in (0, 1)
    )
    readers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    for name, weight in dense.items():
        if "layers.2." not in name:
            reads = "layers.1." in name and name.split(".")[-2] in readers
            assert torch.equal(weight, sparse[name]) != reads, name


@pytest.mark.parametrize("pipeline", ["basic", "sequential"])
def test_where_all_blocks_are_calibrated_at_once_the_dense_model_is_the_only_one(directory, calibration, pipeline):
    runs = []
    for share in (0, 1):
        model = adapted(directory)
        model.config._name_or_path = str(directory)
        run(model, directory, calibration, EfficientXpertModifier(dense_targets=share), pipeline=pipeline)
        runs.append(projections(merge_adapters(model)))
    for name, weight in runs[0].items():
        assert torch.equal(weight, runs[1][name]), name


def test_an_offloaded_model_is_pruned_with_targets_of_the_dense_model_as_one_in_memory_is(
    directory, calibration, tmp_path
):
    recipe = {"propagation": "block", "dense_targets": 1}
    expected = run(load(directory), directory, calibration, EfficientXpertModifier(**recipe))
    model = load(directory)
    dispatch_with_map(model, {name: ("cpu", "disk") for name, _ in model.named_modules()}, str(tmp_path))
    run(model, directory, calibration, EfficientXpertModifier(**recipe))
    remove_dispatch(model, onload_tensors=True)
    for name, weight in projections(model).items():
        assert torch.equal(weight, projections(expected)[name]), name


def test_blocks_that_are_not_the_models_own_leave_the_dense_model_out(directory, calibration, warnings):
    options = {"sequential_targets": ["LlamaAttention", "LlamaMLP"]}
    parts = run(load(directory), directory, calibration, EfficientXpertModifier(dense_targets=1), **options)
    assert any("not the model's decoder blocks, so dense_targets falls back to 0" in text for text in warnings)
    expected = run(load(directory), directory, calibration, EfficientXpertModifier(dense_targets=0), **options)
    for name, weight in projections(expected).items():
        assert torch.equal(weight, projections(parts)[name]), name


def test_quantization_behind_it_is_calibrated_on_the_pruned_model_alone(directory, calibration, monkeypatch):
    """GPTQ hooks the same layers, and must not count what the dense model feeds them."""
    counts = {}

    def count(inputs, *args, **kwargs):
        counts.setdefault(share, []).append(inputs.shape)
        return accumulate(inputs, *args, **kwargs)

    accumulate = gptq.accumulate_hessian
    monkeypatch.setattr(gptq, "accumulate_hessian", count)
    for share in (0, 1):
        pruning = EfficientXpertModifier(propagation="none", dense_targets=share)
        quantization = GPTQModifier(scheme="W8A8", targets=["Linear"], ignore=["lm_head"])
        run(load(directory), directory, calibration, [pruning, quantization], pipeline="sequential")
    assert counts[0] == counts[1]
