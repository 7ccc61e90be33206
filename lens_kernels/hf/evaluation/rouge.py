"""ROUGE-L with the settings of the DistillLens paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean ROUGE-L of the predictions, from 0 to 100.

    A prediction's score is the F-measure over stemmed words, for its best reference.

    Args:
        predictions: One text per row.
        references: For each row, a list of correct texts.
    """
    if len(predictions) != len(references):
        raise ValueError(
            "predictions and references must pair up:"
            f" got {len(predictions)} and {len(references)}; give references for every prediction"
        )
    if not predictions:
        raise ValueError("predictions must hold at least one text to score, got none")
    for i, texts in enumerate(references):
        if isinstance(texts, str):
            raise TypeError(
                f"references[{i}] must be a list of texts, got a str; put it in a list of one"
            )
        if not texts:
            raise ValueError(
                f"references[{i}] must hold at least one text, got none; leave the row out"
            )
    scorer = load_scorer()
    pairs = zip(predictions, references, strict=True)
    scores = [scorer.score_multi(texts, x)["rougeL"].fmeasure for x, texts in pairs]
    return float(100 * sum(scores) / len(scores))


def load_scorer() -> Any:
    """Return the scorer of the package rouge-score."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise RuntimeError(
            "ROUGE-L needs the package rouge-score: pip install 'lens-kernels[train]'"
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=True)
