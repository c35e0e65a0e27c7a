"""A recipe as the user names it: found, read, and refused where llm-compressor would skip a part of it in silence."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from efx_plugin.errors import EfxError, UsageError
from efx_plugin.recipe_files import builtin_recipes

if TYPE_CHECKING:
    from llmcompressor.recipe import Recipe

_SHAPE = "NAME_stage: {NAME_modifiers: {MODIFIER: {argument: value}}}"
_DEFAULT_SPARSITY, _DEFAULT_STRUCTURE = 0.5, "0:0"


@dataclass(frozen=True)
class RecipeText:
    """A recipe that has been read.

    Attributes:
        label: what messages call it.
        text: the YAML text.
        content: stage -> group of modifiers -> modifier -> arguments.
    """

    label: str
    text: str
    content: dict[str, dict[str, dict[str, dict[str, Any]]]]

    def instantiate(self) -> "Recipe":
        """The modifiers, made by llm-compressor.

        Raises:
            EfxError: a modifier that does not exist, or an argument that it does not take.
        """
        from llmcompressor.recipe import Recipe
        from pydantic import ValidationError

        import efx_plugin.modifier  # noqa: F401  (known to llm-compressor by name from then on)

        try:
            return Recipe.from_dict(self.content)
        except EfxError as error:
            raise EfxError(f"{self.label}: {error}") from error
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise EfxError(f"{error.title} in {self.label} has a wrong argument ({reasons})") from error
        except (ValueError, TypeError) as error:
            raise EfxError(f"{self.label} cannot be used: {' '.join(str(error).split()).rstrip('.')}") from error


def find_recipe(named: str) -> RecipeText:
    """A recipe by the name of one that comes with the package, or by its path.

    Raises:
        UsageError: there is no such recipe.
        EfxError: it is not one that llm-compressor would carry out as it stands.
    """
    builtin = builtin_recipes()
    path = builtin.get(named, Path(named))
    if not path.exists():
        near = difflib.get_close_matches(named, builtin, n=1)
        hint = f"did you mean {near[0]}?" if near else "pass the path of a YAML file"
        raise UsageError(f"there is no recipe {named}, neither a file nor one of {', '.join(builtin)}: {hint}")
    label = f"the recipe {named}"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EfxError(f"{label} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise EfxError(f"{label} cannot be read: {error.strerror}") from error
    return RecipeText(label, text, _parse(text, label))


def default_recipe(
    sparsity: float | None = None, mask_structure: str | None = None, quantization: str | None = None
) -> RecipeText:
    """The default recipe: every linear layer but the output layer, by the default method.

    Args:
        sparsity: fraction of the weights to prune; by default N/M of the mask structure, else 0.5.
        mask_structure: "N:M", by default "0:0", unstructured.
        quantization: of `EfficientXpertModifier`; by default none.

    Raises:
        UsageError: they contradict each other or are out of range.
    """
    from pydantic import ValidationError

    from efx_plugin.engine.arguments import PruningArguments

    structure = _DEFAULT_STRUCTURE if mask_structure is None else mask_structure
    if sparsity is None:
        n, _, m = structure.partition(":")
        given = n.isdecimal() and m.isdecimal() and int(m) > 0
        sparsity = int(n) / int(m) if given else _DEFAULT_SPARSITY
    try:
        PruningArguments(sparsity=sparsity, mask_structure=structure)
    except EfxError as error:
        raise UsageError(f"--sparsity and --mask-structure: {error}") from error
    except ValidationError as error:
        raise UsageError(f"--mask-structure {structure} is not of the form N:M, such as 2:4") from error
    arguments = {"sparsity": f"{sparsity!r}", "mask_structure": f'"{structure}"'}
    if quantization is not None:
        arguments |= _quantization(quantization)
    return _of_modifier("the default recipe", "prune", arguments)


def quantizing_recipe(quantization: str) -> RecipeText:
    """The recipe that quantizes a sparse model and prunes nothing anew, its layers fitted halfway to the outputs of
    the model as it was.

    Raises:
        UsageError: there is no such quantization.
    """
    arguments = {"preserve_sparsity_mask": "true", "dense_targets": "0.5", **_quantization(quantization)}
    return _of_modifier("the recipe of efx quantize", "quantize", arguments)


def _quantization(named: str) -> dict[str, str]:
    from efx_plugin.engine.arguments import Quantization

    if named not in get_args(Quantization):
        raise UsageError(f"--quantization {named} is none of {', '.join(get_args(Quantization))}")
    return {"quantization": f'"{named}"'}


def _of_modifier(label: str, work: str, arguments: dict[str, str]) -> RecipeText:
    """`EfficientXpertModifier` with arguments in YAML, on every linear layer but the output layer."""
    arguments = {**arguments, "targets": '["Linear"]', "ignore": '["lm_head"]'}
    text = f"{work}_stage:\n  pruning_modifiers:\n    EfficientXpertModifier:\n"
    text += "".join(f"      {name}: {value}\n" for name, value in arguments.items())
    return RecipeText(label, text, _parse(text, label))


def _parse(text: str, label: str) -> dict[str, Any]:
    try:
        content = yaml.load(text, Loader=_UniqueKeys)  # a safe loader
    except _DuplicateKeyError as error:
        raise EfxError(f"{label} has the key {error.key!r} twice, in lines {error.lines}: rename one") from error
    except yaml.YAMLError as error:
        raise EfxError(f"{label} is not YAML ({' '.join(str(error).split())}): correct the file") from error
    if not isinstance(content, dict) or not content:
        raise EfxError(f"{label} holds no stages: write it as {_SHAPE}")
    for stage, groups in content.items():
        if not (str(stage).endswith("_stage") and isinstance(groups, dict)):
            raise EfxError(f"{stage!r} in {label} would be ignored: write it as {_SHAPE}")
        for group, modifiers in groups.items():
            if not (str(group).endswith("_modifiers") and isinstance(modifiers, dict)):
                raise EfxError(f"{group!r} in {label} would be ignored: write it as {_SHAPE}")
            for modifier, arguments in modifiers.items():
                if not isinstance(arguments, dict):
                    raise EfxError(f"{modifier} in {label} has no arguments: write {modifier}: {{}}")
    if not any(modifiers for groups in content.values() for modifiers in groups.values()):
        raise EfxError(f"{label} names no modifier: write it as {_SHAPE}")
    return content


class _DuplicateKeyError(yaml.YAMLError):
    def __init__(self, key: str, lines: str) -> None:
        super().__init__(key)
        self.key, self.lines = key, lines


class _UniqueKeys(yaml.SafeLoader):
    """Where a key stands twice, YAML's own loader keeps the last and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise _DuplicateKeyError(key.value, f"{seen[key.value]} and {line}")
            if isinstance(key, yaml.ScalarNode):
                seen[key.value] = line
        return super().construct_mapping(node, deep)
