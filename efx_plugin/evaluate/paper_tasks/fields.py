"""From the fields of a data set to those that the task files ask for: `gold`, `summary`."""

from typing import Any

_ENTAILMENT = ("contradiction", "entailment", "neutral")
_VERDICTS = ("yes", "no", "maybe")


def casehold(documents: Any) -> Any:
    """`label`, a number or a digit, is the right one of the five `endings`."""
    return documents.map(lambda row: {"gold": int(row["label"])})


def contract_nli(documents: Any) -> Any:
    """`label`: 0 contradiction, 1 entailment, 2 neutral; or the word."""
    return documents.map(lambda row: {"gold": _number(row["label"], _ENTAILMENT)})


def mednli(documents: Any) -> Any:
    """`gold_label` is a word."""
    return documents.map(lambda row: {"gold": _number(row["gold_label"], _ENTAILMENT)})


def pubmedqa(documents: Any) -> Any:
    """`context` holds the paragraphs of an abstract in its list `contexts`."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "gold": _number(row["final_decision"], _VERDICTS),
            "abstract": "\n".join(row["context"]["contexts"]),
        }

    return documents.map(convert)


def hqs(documents: Any) -> Any:
    """`CHQ` is a consumer's health question, `Summary` the question in short."""
    return documents.map(lambda row: {"text": row["CHQ"], "summary": row["Summary"]})


def _number(label: int | str, names: tuple[str, ...]) -> int:
    return names.index(label.lower()) if isinstance(label, str) else int(label)
