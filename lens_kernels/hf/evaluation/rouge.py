"""ROUGE-L, with the settings of the DistillLens paper, or for texts in any script."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from lens_kernels.failures import install

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

TOKENIZERS = ("english", "unicode")
# Words that begin the Unicode names of letters in scripts without spaces between words.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def rouge_l(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "english"
) -> float:
    """Return the mean ROUGE-L of the predictions, from 0 to 100.

    A prediction's score is the F-measure over words, for its best reference. A warning appears if
    the tokenizer ``"english"`` loses letters of a reference.

    Args:
        predictions: One text per row.
        references: For each row, a list of correct texts.
        tokenizer: ``"english"``, as in the paper: stemmed words of ASCII letters and digits. All
            other characters are lost. ``"unicode"``: words in any script, without stemming.
    """
    scorer = load_scorer(tokenizer)
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
                f"references[{i}] must be a list of texts, got a str; pass a list with this text"
            )
        if not texts:
            raise ValueError(
                f"references[{i}] must hold at least one text, got none; leave the row out"
            )
    lost = sum(any(not word.isascii() for word in words(" ".join(x))) for x in references)
    if tokenizer == "english" and lost:
        warnings.warn(
            f"{lost} of {len(references)} rows have references with letters outside ASCII, which"
            " the ROUGE-L tokenizer 'english' drops: use the tokenizer 'unicode'",
            stacklevel=2,
        )
    pairs = zip(predictions, references, strict=True)
    scores = [scorer.score_multi(texts, x)["rougeL"].fmeasure for x, texts in pairs]
    return float(100 * sum(scores) / len(scores))


def words(text: str) -> list[str]:
    """Return the words of a text.

    Upper and lower case are equal, and so are different encodings of the same letter. A word is a
    run of letters, marks and digits. In scripts without spaces, each letter is a word.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    found = []
    for inside, run in groupby(text, lambda c: unicodedata.category(c)[0] in "LMN"):
        if not inside:
            continue
        word = ""
        for char in run:
            mark = unicodedata.category(char)[0] == "M"
            alone = unicodedata.name(char, "").startswith(UNSPACED)
            before = word and unicodedata.name(word[0], "").startswith(UNSPACED)
            if word and not mark and (alone or before):
                found.append(word)
                word = ""
            word += char
        found.append(word)
    return found


class _Words:
    tokenize = staticmethod(words)


def load_scorer(tokenizer: str = "english") -> RougeScorer:
    """Return the scorer of the package rouge-score for a tokenizer."""
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer must be one of {', '.join(TOKENIZERS)}, got {tokenizer!r}")
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise RuntimeError(
            f"ROUGE-L needs the package rouge-score: {install('rouge_score')}"
        ) from error
    chosen = _Words() if tokenizer == "unicode" else None
    return RougeScorer(["rougeL"], use_stemmer=True, tokenizer=chosen)
