"""How alike two texts are: ROUGE-L and chrF, by the packages that the field compares itself with.

Both are imported when first used; nltk, which rouge-score brings along, takes most of a second. Neither fetches
anything.
"""

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.chrf import CHRF


def rouge_l(reference: str, answer: str) -> float:
    """Return the F-measure of the longest common subsequence of words (Lin 2004), 0 to 1."""
    return float(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure)


def chrf(reference: str, answer: str) -> float:
    """Return the F-measure of character n-grams up to 6 (Popović 2015, chrF2), 0 to 100. It needs no word borders."""
    return float(_chrf().sentence_score(answer, [reference]).score)


class _Words:
    """rouge-score's own tokenizer keeps ASCII letters only, which leaves nothing of Vietnamese or Greek."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


@lru_cache(maxsize=1)
def _rouge_scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


@lru_cache(maxsize=1)
def _chrf() -> "CHRF":
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()
