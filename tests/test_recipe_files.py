"""The recipes that come with the package are found and can be read."""

import yaml

from efx_plugin.recipe_files import builtin_recipes


def test_every_recipe_is_found_by_its_name_and_has_stages_of_modifiers():
    recipes = builtin_recipes()
    assert {"expert_50", "expert_2of4", "wanda_50", "sparsegpt_50"} <= recipes.keys()
    for name, path in recipes.items():
        assert path.name == f"{name}.yaml"
        stages = yaml.safe_load(path.read_text())
        assert all(key.endswith("_modifiers") for stage in stages.values() for key in stage)
