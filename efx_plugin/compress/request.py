"""What a user asked `efx prune`, `heal` or `quantize` for, and what of it can be refused at once. No torch here."""

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from efx_plugin.checkpoint.storage.atomic import refuse_existing
from efx_plugin.compress.recipe import RecipeText
from efx_plugin.errors import UsageError, one_line

# Endings of files that are read as calibration data, each perhaps followed by .gz.
KINDS_OF_DATA = (".txt", ".json", ".jsonl", ".csv", ".parquet")
# What is downloaded of a model or an adapter: all but weights in other forms than safetensors.
_PARTS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "README.md")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class _OnText:
    dataset: str

    @property
    def dataset_name(self) -> str:
        """The name of the text for the model card; the last part where it is a path."""
        return self.dataset if is_hub_name(self.dataset) else Path(self.dataset).name


@dataclass(frozen=True)
class PruneRequest(_OnText):
    """Everything that decides what `efx prune` does.

    Attributes:
        model: directory of a model with its tokenizer, or OWNER/NAME on the hub.
        output: directory to write; it must not exist.
        recipe: what to prune, and how.
        dataset: a file of calibration data, or the name of a data set on the hub; see `read_documents`.
        adapter: directory of a LoRA adapter, or OWNER/NAME on the hub; merged in fp32.
        text_field: the field of the data that holds the text; None for the usual names, see `calibration_set`.
        samples, length: number and tokens of the calibration sequences.
        generate: tokens that the model, with its adapter, writes to be calibrated on as well; see `write_sequences`.
        structure: sparse format, see `save_sparse`.
        compute_dtype: what to calibrate and prune in, see `choose_compute_dtype`; weights are stored in the model's.
        trust_remote_code: run the code that comes with the model.
        progress: show a progress bar while writing.
    """

    model: Path
    output: Path
    recipe: RecipeText
    dataset: str
    adapter: Path | None = None
    text_field: str | None = None
    samples: int = 128
    length: int = 512
    generate: int = 0
    structure: str = "auto"
    compute_dtype: str = "auto"
    trust_remote_code: bool = False
    progress: bool = True

    def checked(self) -> "PruneRequest":
        """The same request, once everything that it names is found on this machine or on the hub.

        A model or an adapter that is named as on the hub is downloaded into the hub's cache.

        Raises:
            UsageError: one of the inputs is not there, or is of no kind that can be read.
            EfxError: the output exists already or cannot be created.
        """
        _refuse(self.output, self.dataset)
        adapter = None if self.adapter is None else find_directory(self.adapter, "an adapter")
        return replace(self, model=find_directory(self.model, "a model"), adapter=adapter)


@dataclass(frozen=True)
class HealRequest(_OnText):
    """Everything that decides what `efx heal` does.

    Attributes:
        model: directory of a sparse checkpoint with its tokenizer.
        output: directory to write; it must not exist.
        dataset, text_field: text of the domain, see `PruneRequest`.
        tokens: of the text that are trained on, once; a tenth as many more are held out.
        generate: tokens that the teacher writes, to be trained on as well, see `write_sequences`; half of them without
            the adapter where there is one, see `write_general`.
        length: tokens of a sequence.
        learning_rate: at its peak.
        batch_size: sequences of a step.
        seed: of the order of the sequences, and of what the teacher writes.
        teacher: directory of the dense expert, or of the model that `adapter` makes one; None for text alone.
        adapter: directory of a LoRA adapter for the teacher; None for none.
        progress: show a progress bar while writing.
    """

    model: Path
    output: Path
    dataset: str
    text_field: str | None = None
    tokens: int = 60_000
    generate: int = 0
    length: int = 512
    learning_rate: float = 2e-4
    batch_size: int = 1
    seed: int = 0
    teacher: Path | None = None
    adapter: Path | None = None
    progress: bool = True

    def checked(self) -> "HealRequest":
        """The same request, once everything that it names is found on this machine.

        Raises:
            UsageError: one of the inputs is not there, or is of no kind that can be read.
            EfxError: the output exists already or cannot be created.
        """
        _refuse(self.output, self.dataset)
        if self.adapter is not None and self.teacher is None:
            raise UsageError(
                "--adapter makes an expert of the teacher: pass --teacher, the model it was trained on, too"
            )
        if self.generate and self.teacher is None:
            raise UsageError("--generate asks the teacher for text: pass --teacher, the dense expert, too")
        return replace(
            self,
            model=find_directory(self.model, "a sparse model"),
            teacher=None if self.teacher is None else find_directory(self.teacher, "a model"),
            adapter=None if self.adapter is None else find_directory(self.adapter, "an adapter"),
        )


@dataclass(frozen=True)
class QuantizeRequest(_OnText):
    """Everything that decides what `efx quantize` does.

    Attributes:
        model: directory of a sparse checkpoint with its tokenizer.
        output: directory to write; it must not exist.
        recipe: see `quantizing_recipe`.
        dataset, text_field, samples, length, compute_dtype, progress: see `PruneRequest`.
    """

    model: Path
    output: Path
    recipe: RecipeText
    dataset: str
    text_field: str | None = None
    samples: int = 128
    length: int = 512
    compute_dtype: str = "auto"
    progress: bool = True

    def checked(self) -> "QuantizeRequest":
        """The same request, once everything that it names is found on this machine.

        Raises:
            UsageError: one of the inputs is not there, or is of no kind that can be read.
            EfxError: the output exists already or cannot be created.
        """
        _refuse(self.output, self.dataset)
        return replace(self, model=find_directory(self.model, "a sparse model"))


def _refuse(output: Path, dataset: str) -> None:
    """Refuse an output that exists or cannot be made, and a data file that is not there or cannot be read."""
    refuse_existing(output)
    if not is_hub_name(dataset):
        refuse_data_file(Path(dataset), "--dataset")


def is_hub_name(named: str) -> bool:
    """Whether a name means something on the hub, OWNER/NAME, and no path of this machine."""
    path = Path(named)
    return _HUB_NAME.fullmatch(named) is not None and not path.exists() and not path.parent.exists()


def kind_of_data(path: Path) -> str | None:
    """The ending that says what a file of calibration data holds, without .gz; None for one that is not read."""
    name = path.name.lower().removesuffix(".gz")
    return next((kind for kind in KINDS_OF_DATA if name.endswith(kind)), None)


def find_directory(path: Path, what: str) -> Path:
    """The directory of a model or an adapter, downloaded into the hub's cache where it is named as on the hub.

    Args:
        what: "a model" or "an adapter", for messages.

    Raises:
        UsageError: there is none.
    """
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{path} is a file: pass the directory of {what}")
    if is_hub_name(str(path)):
        return _download(str(path), what)
    raise UsageError(f"there is no directory {path}: pass the directory of {what}{_near(path, directories=True)}")


def _download(name: str, what: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_PARTS)))
    except Exception as error:  # no network, no such name, no access
        raise UsageError(
            f"there is no directory {name}, and the hub does not give {what} of that name ({one_line(error)}): run hf "
            f"download {name} --local-dir DIRECTORY where it is reachable, and pass DIRECTORY"
        ) from error


def refuse_data_file(path: Path, option: str) -> None:
    """Refuse a path that is no file of records.

    Args:
        option: the option that took it, for messages.

    Raises:
        UsageError: it is not there, or of no kind that is read.
    """
    endings = f"a file that ends in {', '.join(KINDS_OF_DATA)}, or one of these with .gz"
    if path.is_dir():
        raise UsageError(f"{path} is a directory: pass {option} {endings}")
    if not path.exists():
        raise UsageError(f"there is no file {path}: pass {option} {endings}{_near(path)}")
    if kind_of_data(path) is None:
        raise UsageError(f"{path} holds no text that can be read: pass {option} {endings}")


def _near(path: Path, directories: bool = False) -> str:
    """A hint at what lies in the same directory under nearly that name."""
    if not path.parent.is_dir():
        return ""
    names = [other.name for other in path.parent.iterdir() if other.is_dir() == directories]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.with_name(near[0])}?" if near else ""
