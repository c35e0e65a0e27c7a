"""The model and the adapter that a user names: looked at before anything is loaded, then loaded whole.

Everything that can be wrong is found in a rehearsal on the meta device: the model's class, its weights and the adapter
are put together from the names and shapes in the files' headers, by the code that loads them later. So what does not
fit is named within seconds, and nothing is dropped or made up.
"""

import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from efx_plugin.checkpoint.storage import safetensors_file, shards
from efx_plugin.errors import EfxError, one_line
from efx_plugin.model.adapter_files import AdapterFiles, read_adapter
from efx_plugin.model.adapters import merge_adapters, merge_unusual
from efx_plugin.model.model_files import ModelFiles, read_json, read_model

_VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
_TOKENIZER_FILES = (
    *_VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_GENERATION_CONFIG = "generation_config.json"
_PROCESSOR_CONFIG = "processor_config.json"
# What torch says of a tensor of another shape.
_OTHER_SHAPE = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((\[.*?\])\) from checkpoint, "
    r"the shape in current model is torch\.Size\((\[.*?\])\)"
)


@dataclass(frozen=True)
class Sources:
    """A model and perhaps an adapter, found fit to be pruned.

    Attributes:
        files: the model's folder, its config and its class.
        adapter: the adapter's folder, its config and tensors; None without one.
        tokenizer_folder: where the tokenizer comes from.
        vocabulary: rows of the embeddings, where the adapter was trained on another number than the model has.
        skeleton: what `load` returns, without weights: on the meta device.
        notices: sentences about what is not as one might expect.
    """

    files: ModelFiles
    adapter: AdapterFiles | None
    tokenizer_folder: Path
    vocabulary: int | None
    skeleton: nn.Module
    notices: tuple[str, ...]

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class under `architectures` of config.json."""
        return self.files.model_class

    @property
    def processors(self) -> tuple[str, ...]:
        """Files of the processors for other inputs than text, such as images."""
        return tuple(name for name in self.companions if name.endswith(_PROCESSOR_CONFIG))

    @cached_property
    def companions(self) -> dict[str, Path]:
        """Files that belong beside the weights, by name: tokenizer, templates, processors, generation config.

        Of those the adapter's folder has, its own are taken; the files of two tokenizers are never mixed.
        """
        found = shards.companions(self.files.folder)
        if self.tokenizer_folder != self.files.folder:
            found = {name: path for name, path in found.items() if not _is_tokenizer_file(name)}
        return found | self._of_adapter

    @cached_property
    def _of_adapter(self) -> dict[str, Path]:
        if self.adapter is None:
            return {}
        return {
            name: path
            for name, path in shards.companions(self.adapter.folder).items()
            if (self.tokenizer_folder == self.adapter.folder and _is_tokenizer_file(name))
            or name == _GENERATION_CONFIG
            or name.endswith(_PROCESSOR_CONFIG)
        }

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The adapter's tokenizer where its folder has one, else the model's.

        Raises:
            EfxError: it cannot be read.
        """
        return _read_tokenizer(self.tokenizer_folder, self.files.trust_remote_code)

    def load(self, dtype: torch.dtype | str = "auto") -> nn.Module:
        """The model with its weights: a PeftModel where plain LoRA sits on linear layers, else a plain model.

        Args:
            dtype: of the weights; "auto" keeps what is stored.

        Raises:
            EfxError: a file has changed since it was looked at, cannot be read, or holds NaN or infinity.
        """
        model = self.load_base(dtype)
        if self.adapter is None:
            return model
        return _add_adapter(model, self.adapter, self.vocabulary, rehearsal=False)

    def load_base(self, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
        """As `load`, without the adapter, and with the vocabulary that the model's folder has."""
        model, _ = _load_model(self.files, None, dtype)
        _refuse_not_finite(dict(model.named_parameters()), self.files.folder)
        return model

    def load_merged(self) -> PreTrainedModel:
        """As `load`, with the adapter merged in: in float32, rounded once to the dtype that is stored."""
        model: Any = self.load()
        if isinstance(model, PeftModel):
            model = merge_adapters(model)
        return model  # type: ignore[no-any-return]

    def describe(self) -> list[str]:
        """What is going to be pruned, a sentence each."""
        lines = [f"model: {self.model_class.__name__} from {self.files.folder}"]
        if self.adapter is not None:
            lines.append(f"adapter: {len(self.adapter.tensors)} tensors from {self.adapter.folder}")
        lines.append(f"tokenizer: from {self.tokenizer_folder}")
        others = [name for name in self._of_adapter if not _is_tokenizer_file(name)]
        return [*lines, *(f"{name}: from {self._of_adapter[name].parent}" for name in others), *self.notices]


def inspect_sources(model: Path, adapter: Path | None, *, trust_remote_code: bool = False) -> Sources:
    """Look at a model and an adapter: config, headers and tokenizer alone, in seconds.

    Args:
        model: directory of a model.
        adapter: directory of a LoRA adapter for it.
        trust_remote_code: run the code that comes with the model.

    Raises:
        EfxError: what cannot be pruned, in one sentence with the remedy.
    """
    files = read_model(model, trust_remote_code=trust_remote_code)
    if shards.has_adapter(model) and (adapter is None or not adapter.samefile(model)):
        raise EfxError(
            f"{model} holds a model and an adapter beside it: if the adapter is merged already, remove its files, else "
            f"pass --adapter {model} too"
        )
    adapted = None if adapter is None else read_adapter(adapter, files.model_class.__name__, model)
    notices = [*files.notices, *(adapted.notices if adapted else ())]
    with _quiet():
        plain, unexpected = _load_model(files, safetensors_file.on_meta(files.index), "auto")
        if unexpected:
            notices.append(
                f"{len(unexpected)} tensors of {files.folder} belong to no part of {files.model_class.__name__} "
                f"and are left out, the first of them {min(unexpected)}"
            )
        skeleton: nn.Module = plain
        vocabulary, rows = None, vocabulary_size(plain)
        if adapted is not None:
            vocabulary = _resized_vocabulary(plain, adapted)
            if vocabulary is not None:
                notices.append(
                    f"the adapter was trained on a vocabulary of {vocabulary} tokens, so the model's "
                    f"{vocabulary_size(plain)} become as many"
                )
            skeleton = _add_adapter(plain, adapted, vocabulary, rehearsal=True)
            rows = vocabulary or rows
    folder = next((one for one in (adapter, model) if one is not None and _has_tokenizer(one)), None)
    if folder is None:
        raise EfxError(
            f"{model} has no tokenizer{'' if adapter is None else f', nor has {adapter}'}: copy tokenizer.json and "
            "tokenizer_config.json of the base model there"
        )
    if (tokens := len(_read_tokenizer(folder, trust_remote_code))) > rows:
        if folder == adapter and _has_tokenizer(model) and len(_read_tokenizer(model, trust_remote_code)) < tokens:
            raise EfxError(
                f"the adapter in {adapter} was trained on a vocabulary of {tokens} tokens, the model has {rows}, and "
                "the adapter holds no embeddings: save it with save_embedding_layers=True, or pass the model with its "
                "resized embeddings"
            )
        notices.append(
            f"the tokenizer of {folder} has {tokens} tokens and the model {rows}: the last ones are unknown to it"
        )
    sources = Sources(files, adapted, folder, vocabulary, skeleton, tuple(notices))
    for name, path in sources.companions.items():
        if name == _GENERATION_CONFIG or name.endswith(_PROCESSOR_CONFIG):
            read_json(path)  # what cannot be read would keep the expert from being loaded
    return sources


def _load_model(
    files: ModelFiles, tensors: dict[str, Tensor] | None, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, set[str]]:
    """The model, made of `tensors` on the meta device or read from its files, and the names in the files that it does
    not use."""
    name = files.model_class.__name__
    options: dict[str, Any] = {"config": deepcopy(files.config), "dtype": dtype, "output_loading_info": True}
    loaded: Any  # with output_loading_info a pair, which transformers' annotations leave out
    try:
        if tensors is None:
            with _without_adapter(files.folder) as folder:
                loaded = files.model_class.from_pretrained(folder, **options)
        else:
            options |= {"device_map": "meta", "state_dict": tensors, "ignore_mismatched_sizes": True}
            loaded = files.model_class.from_pretrained(None, **options)
    except Exception as error:  # each family checks its sizes in its own way
        raise EfxError(f"transformers cannot make a {name} of {files.folder}: {one_line(error)}") from error
    model, info = loaded
    model.config._name_or_path = str(files.folder)
    if any(".lora_" in key or ".base_layer." in key for key in info["unexpected_keys"]):
        raise EfxError(
            f"{files.folder} was stored with its adapter unmerged: store what "
            "efx_plugin.merge_adapters(peft_model) returns"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        weight, theirs, ours = mismatched[0]
        raise EfxError(
            f"{weight} in {files.folder} has the shape {list(theirs)} and config.json asks for {list(ours)}: they do "
            "not belong together, download the model again"
        )
    if missing := info["missing_keys"]:
        head = model.get_output_embeddings()
        hint = "download it again, or correct `architectures` in config.json"
        if head is not None and missing == {f"{_name_of(model, head)}.weight"}:
            hint = "if the model's output layer is its embedding, set tie_word_embeddings to true in config.json"
        raise EfxError(f"{files.folder} has no {min(missing)}, which a {name} needs: {hint}")
    return model, info["unexpected_keys"]


@contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """A model's folder without an adapter in it, which transformers would load as well.

    It is the folder itself where there is none, else one with links to the other files.
    """
    if not (folder / shards.ADAPTER_CONFIG).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as links:
        for path in folder.iterdir():
            if path.name != shards.ADAPTER_CONFIG:
                Path(links, path.name).symlink_to(path.resolve())
        yield Path(links)


def _refuse_not_finite(tensors: Mapping[str, Tensor], folder: Path) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise EfxError(f"{name} in {folder} contains NaN or infinity: the weights are damaged, load them anew")


def _add_adapter(model: PreTrainedModel, adapter: AdapterFiles, vocabulary: int | None, rehearsal: bool) -> nn.Module:
    """The model with every tensor of the adapter in its place.

    Raises:
        EfxError: a tensor fits nowhere, or one that the adapter's config asks for is not there.
    """
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    result: Any
    try:
        adapted = PeftModel(model, deepcopy(adapter.config), low_cpu_mem_usage=rehearsal)
        tensors = dict(adapter.tensors) if rehearsal else load_peft_weights(str(adapter.folder), device="cpu")
        result = set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=rehearsal)
    except Exception as error:  # PEFT raises what it meets: KeyError, ValueError, RuntimeError
        reason = one_line(error)
        if found := _OTHER_SHAPE.search(str(error)):
            name, theirs, ours = found.groups()
            reason = f"{name} has the shape {theirs} and would need {ours}"
        raise EfxError(
            f"the adapter in {adapter.folder} does not fit {type(model).__name__} ({reason}): pass the model that it "
            f"was trained on{_named_base(adapter)}"
        ) from error
    if not rehearsal:
        _refuse_not_finite(tensors, adapter.folder)
    if homeless := [name for name in result.unexpected_keys if not adapter.is_copy(name)]:
        raise EfxError(
            f"the adapter in {adapter.folder} holds {min(homeless)}, which has no place in a {type(model).__name__}: "
            f"pass the model that it was trained on{_named_base(adapter)}"
        )
    if lost := [name for name in result.missing_keys if _belongs_to_adapter(adapted, name)]:
        raise EfxError(
            f"the adapter in {adapter.folder} has no {min(lost)}, which its config asks for in this model: "
            f"copy it anew if it was not saved whole, else pass the model that it was trained on{_named_base(adapter)}"
        )
    try:
        merge_unusual(adapted)
    except Exception as error:  # PEFT's variants of LoRA have limits of their own
        raise EfxError(
            f"the adapter in {adapter.folder} cannot be merged ({one_line(error)}): train a plain LoRA adapter instead"
        ) from error
    unmerged = any(isinstance(module, BaseTunerLayer) for module in adapted.modules())
    loaded: nn.Module = adapted.eval() if unmerged else adapted.unload()
    return loaded


def _belongs_to_adapter(model: PeftModel, name: str) -> bool:
    """Whether a tensor is the adapter's own ("default" to PEFT), and not another's under a second name."""
    module, inside, _ = name.rpartition(".trainable_tokens_")
    tied = inside and getattr(model.get_submodule(module), "tied_adapter", None) is not None
    return "default" in name.split(".") and not tied


def _named_base(adapter: AdapterFiles) -> str:
    named = adapter.config.base_model_name_or_path
    return f", {named}" if named else ""


def _resized_vocabulary(model: PreTrainedModel, adapter: AdapterFiles) -> int | None:
    """Rows of the embeddings that the adapter was trained on; None where the model has as many.

    Raises:
        EfxError: the adapter's tensors contradict each other, or rows that the model lacks are not among them.
    """
    rows = vocabulary_size(model)
    found: dict[int, str] = {}
    whole = set()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is None:
            continue
        leaf = _name_of(model, module).rpartition(".")[2]
        for name, tensor in adapter.tensors.items():
            _, inside, kind = name.rpartition(f".{leaf}.")
            if not inside:
                continue
            if kind == "lora_embedding_A":
                found[tensor.shape[1]] = name
            elif kind in ("lora_B.weight", "lora_magnitude_vector") and isinstance(module, nn.Linear):
                found[tensor.shape[0]] = name
            elif "lora_" not in kind and kind.endswith("weight"):
                found[tensor.shape[0]] = name
                whole.add(leaf)
    if set(found) <= {rows}:
        return None
    if len(found) > 1:
        raise EfxError(
            f"the adapter in {adapter.folder} was trained on embeddings of {sorted(found)} rows at once "
            f"({', '.join(found.values())}): save it again"
        )
    (wanted,) = found
    needed = {
        _name_of(model, module).rpartition(".")[2]
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    if model.config.get_text_config().tie_word_embeddings and whole:
        needed = whole
    if wanted > rows and not needed <= whole:
        raise EfxError(
            f"the adapter in {adapter.folder} was trained on a vocabulary of {wanted} tokens, the model has "
            f"{rows}, and the added rows of {min(needed - whole)} are not in the adapter: save it with "
            "save_embedding_layers=True, or pass the model with its resized embeddings"
        )
    return wanted


def vocabulary_size(model: nn.Module) -> int:
    """Tokens that a model embeds: the rows of its embeddings, which may be more than its tokenizer has."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    found: str = next(name for name, module in model.named_modules() if module is wanted)
    return found


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARY_FILES)


def _is_tokenizer_file(name: str) -> bool:
    return name in _TOKENIZER_FILES or name == "additional_chat_templates" or name.endswith(".tiktoken")


def _read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a tokenizer of some kind stumbles over
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise EfxError(
                f"the tokenizer in {folder} has code of its own, which would have to run: read it and pass "
                "--trust-remote-code"
            ) from error
        raise EfxError(f"the tokenizer in {folder} cannot be read ({one_line(error)}): copy it anew") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers says nothing of the rehearsal: its findings become sentences here."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
