"""Recipes by name, by path and without a file; what llm-compressor would skip in silence is refused."""

import re

import pytest
import yaml

from efx_plugin.compress.recipe import default_recipe, find_recipe
from efx_plugin.errors import EfxError, UsageError
from efx_plugin.recipe_files import builtin_recipes


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_recipe_of_the_package_is_found_by_name_and_by_path(name):
    path = builtin_recipes()[name]
    assert find_recipe(name).text == find_recipe(str(path)).text == path.read_text()


def test_a_name_that_is_near_one_is_suggested(tmp_path):
    with pytest.raises(UsageError, match=r"no recipe expert50, .*wanda_50.*: did you mean expert_50\?"):
        find_recipe("expert50")
    with pytest.raises(UsageError, match=r"pass the path of a YAML file"):
        find_recipe(str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize(
    ("arguments", "sparsity", "structure"),
    [((), 0.5, "0:0"), ((0.7,), 0.7, "0:0"), ((None, "2:4"), 0.5, "2:4"), ((None, "3:4"), 0.75, "3:4")],
)
def test_the_default_recipe_has_the_default_method(arguments, sparsity, structure):
    ((modifier, given),) = default_recipe(*arguments).content["prune_stage"]["pruning_modifiers"].items()
    assert modifier == "EfficientXpertModifier"
    assert (given["sparsity"], given["mask_structure"]) == (sparsity, structure)


def test_the_default_recipe_quantizes_where_it_is_asked_to():
    (given,) = default_recipe(quantization="W4A16").content["prune_stage"]["pruning_modifiers"].values()
    assert given["quantization"] == "W4A16"
    (modifier,) = default_recipe(quantization="W4A16").instantiate().modifiers
    assert modifier.quantization == "W4A16"


def test_the_default_recipe_without_options_is_expert_50():
    assert default_recipe().content == find_recipe("expert_50").content


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1.5,), "1.5"),
        ((0.7, "2:4"), "2:4"),
        ((None, "two"), "two"),
        ((None, "0:0:4"), "0:0:4"),
        ((None, "4:4"), "1.0"),
        ((None, None, "W2A16"), "--quantization W2A16 is none of W8A8, W8A16, W4A16"),
    ],
)
def test_options_that_make_no_recipe_are_wrong_usage(arguments, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        default_recipe(*arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "a_stage: {x_modifiers: {A: {}}}\nb_stage: {x_modifiers: {A: {}}}\na_stage: {y_modifiers: {B: {}}}\n",
            "1 and 3",
        ),
        ("a_stage:\n  x_modifiers:\n    A: {}\n    A: {b: 1}\n", "'A' twice, in lines 3 and 4"),
        ("a_stage:\n  x_modifiers:\n    A:\n      b: 1\n      b: 2\n", "'b' twice, in lines 4 and 5"),
        ("a_stage: [", "is not YAML"),
        ("", "holds no stages"),
        ("- a_stage", "holds no stages"),
        ("a: {x_modifiers: {A: {}}}", "'a' in the recipe .* would be ignored"),
        ("1: {x_modifiers: {A: {}}}", "1 in the recipe .* would be ignored"),
        ("a_stage: {x: {A: {}}}", "'x' in the recipe .* would be ignored"),
        ("a_stage: {x_modifiers: {A: }}", "write A: {}"),
        ("a_stage: {x_modifiers: {}}", "names no modifier"),
        ("a_stage: {x_modifiers: {A: {b: !!python/object:os.system {}}}}", "is not YAML"),
    ],
)
def test_what_would_be_skipped_in_silence_is_refused(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(EfxError, match=words):
        find_recipe(str(path))


def test_another_encoding_and_a_directory_are_named(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes("# für 50 %\n".encode("latin-1"))
    with pytest.raises(EfxError, match=r"not UTF-8.*at byte 3"):
        find_recipe(str(tmp_path / "recipe.yaml"))
    with pytest.raises(EfxError, match="cannot be read"):
        find_recipe(str(tmp_path))


def test_an_anchor_may_be_merged_into_several_places(tmp_path):
    text = "a_stage:\n  x_modifiers:\n    A: &a {b: 1}\n    B: {<<: *a, c: 2}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert find_recipe(str(tmp_path / "recipe.yaml")).content == yaml.safe_load(text)
