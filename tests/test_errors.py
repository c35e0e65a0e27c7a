"""The errors that users meet are written alike."""

import ast
from pathlib import Path

import pytest

import efx_plugin

PACKAGE = Path(efx_plugin.__file__).parent


def messages(path: Path) -> list[tuple[int, str]]:
    """Line and text of every error message that is written out in a file; a blank for each value put in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        name = getattr(node.func, "id", getattr(node.func, "attr", None)) if isinstance(node, ast.Call) else None
        if name in ("EfxError", "UsageError", "SparseCheckpointError") and node.args:
            parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else " " for part in parts)
            found.append((node.lineno, text))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_message_is_one_sentence_without_a_final_full_stop(path):
    for line, text in messages(path):
        assert not text.endswith(".") or text.endswith("..."), (line, text)  # dots stand for the rest of a command
        assert "\n" not in text, (line, text)


def test_there_are_messages_to_look_at():
    assert sum(len(messages(path)) for path in PACKAGE.rglob("*.py")) > 100
