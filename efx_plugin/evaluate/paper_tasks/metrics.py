"""Metrics of the paper's tasks: accuracy and macro-F1 over answers, ROUGE over summaries."""

from collections.abc import Sequence
from typing import Any

Answer = tuple[int, int]  # the right one and the chosen one


def choice(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Accuracy, and what macro-F1 is made of, of a question whose `gold` is the number of the right answer.

    Args:
        doc: the question.
        results: log-likelihood of each answer, and whether it is the greedy one.
    """
    chosen = max(range(len(results)), key=lambda number: results[number][0])
    return {"acc": float(chosen == doc["gold"]), "macro_f1": (int(doc["gold"]), chosen)}


def macro_f1(answers: Sequence[Answer]) -> float:
    """Unweighted mean of the F1 of every class that is right or chosen somewhere, 0 to 1."""
    from sklearn.metrics import f1_score

    right, chosen = zip(*answers, strict=True)
    return float(f1_score(right, chosen, average="macro"))


def rouge(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """F of ROUGE-1, ROUGE-2 and ROUGE-L of a summary against `doc["summary"]`, with stems, 0 to 1.

    Args:
        doc: the document.
        results: one summary, as it was generated.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rougeL", "rouge1", "rouge2"], use_stemmer=True).score(doc["summary"], results[0])
    return {name: score.fmeasure for name, score in scores.items()}
