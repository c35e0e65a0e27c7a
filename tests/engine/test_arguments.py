import pytest
from pydantic import ValidationError

from efx_plugin.engine.arguments import PruningArguments
from efx_plugin.errors import EfxError


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sparsty": 0.5}, "PruningArguments has no argument 'sparsty': did you mean 'sparsity'"),
        ({"sparsity": 1.0}, "sparsity 1.0 is neither a fraction between 0 and 1 nor a mapping"),
        ({"sparsity": {}}, "sparsity {} is neither"),
        ({"sparsity": {"re:.*mlp.*": 1.5}}, "is neither a fraction"),
        ({"mask_structure": "2:4", "sparsity": 0.6}, "prunes 2 of 4 weights, sparsity 0.6 does not"),
        ({"mask_structure": "4:4"}, "prunes 4 of 4"),
        ({"mask_structure": "2:4", "sparsity": {"Linear": 0.5}}, "prunes 2 of 4"),
        ({"mask_structure": "2:4", "allocation": "layer"}, "prunes every 4 weights alike, so allocation 'layer' has"),
        ({"allocation": "layer", "propagation": "block"}, "allocation 'layer' compares scores of different decoder"),
        ({"allocation": "layer", "sparsity": {"Linear": 0.5}}, "give a number instead of a mapping"),
        ({"comparison_group": "block"}, "saliency 'obs' chooses within one matrix: set comparison_group to 'matrix'"),
    ],
)
def test_arguments_that_do_not_exist_or_contradict_each_other_are_named(arguments, sentence):
    with pytest.raises(EfxError, match=sentence):
        PruningArguments(**arguments)


def test_propagation_is_used_only_where_it_can_change_a_mask():
    assert PruningArguments().uses_propagation
    assert not PruningArguments(mask_structure="2:4").uses_propagation
    assert not PruningArguments(propagation="none").uses_propagation
    assert not PruningArguments(comparison_group="row", allocation="uniform").uses_propagation
    assert PruningArguments(comparison_group="row", allocation="matrix").uses_propagation


def test_the_dense_model_computes_only_for_a_repair_that_can_use_its_outputs():
    assert PruningArguments(dense_targets=0.5).uses_dense_model
    assert PruningArguments(dense_targets=1, repair="adapter").uses_dense_model
    assert not PruningArguments(dense_targets=0).uses_dense_model
    assert not PruningArguments(dense_targets=1, repair="none").uses_dense_model
    assert not PruningArguments(dense_targets=1, repair="paper").uses_dense_model
    with pytest.raises(ValidationError, match="dense_targets"):
        PruningArguments(dense_targets=1.5)


@pytest.mark.parametrize("repair", ["none", "paper", "adapter"])
def test_swaps_need_kept_weights_that_are_refitted(repair):
    with pytest.raises(EfxError, match="set repair to 'weights', or swap_rounds to 0"):
        PruningArguments(swap_rounds=1, repair=repair)
    assert PruningArguments(swap_rounds=1).uses_grams


def test_energies_suffice_for_wanda_without_a_repair_of_outputs():
    assert PruningArguments().uses_grams
    assert not PruningArguments(saliency="wanda", repair="none").uses_grams
    assert not PruningArguments(saliency="wanda", repair="paper").uses_grams
    assert PruningArguments(saliency="wanda", repair="adapter").uses_grams
