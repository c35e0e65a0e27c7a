"""Questions for tests of tasks, in files, in the words of `tiny_tokenizer`."""

import json
import random
from pathlib import Path


def write_jsonl(path: Path, records) -> Path:
    """A JSON record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tiny_text(pick: random.Random, words: int) -> str:
    return " ".join(f"t{pick.randrange(3, 128)}" for _ in range(words))


def tiny_questions(count: int, answers: int = 4) -> list[dict]:
    """Questions of random words with `answers` answers each, as our multiple-choice tasks read them."""
    pick = random.Random(0)
    return [
        {
            "text": tiny_text(pick, 6),
            "choices": [tiny_text(pick, pick.randrange(1, 5)) for _ in range(answers)],
            "gold": pick.randrange(answers),
        }
        for _ in range(count)
    ]
