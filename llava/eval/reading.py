"""How an answer becomes the position of an option.

    exact   the answer is the symbol, nothing else (the paper's reading; the default)
    parse   exact; or it begins with an offered symbol, a point and a space; or "The answer is X."
            stands in it exactly once
    logit   the offered symbol whose first token has the largest logit where the answer begins; of
            equal ones the first. It reads every answer

All three are read from one reply. An answer that none of the offered symbols can be read from is
UNREAD, and wrong.

Sources: exact is ARDS's evaluation, parse the rule of LLaVA's eval_science_qa (where any character
may stand for the last point), logit Zong et al., "Fool Your (Vision and) Language Model With
Embarrassingly Simple Permutations".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llava.eval.metrics import UNREAD

READINGS = ("exact", "parse", "logit")
_SENTENCE = re.compile(r"The answer is (\S)\.")


def read(reading: str, text: str, logits: Sequence[float], symbols: str) -> int:
    """Position that an answer names among the offered `symbols`, or UNREAD.

    `logits` (n,) belong to the symbols. Raises KeyError for another reading.
    """
    return {"exact": _exact, "parse": _parse, "logit": _logit}[reading](text, logits, symbols)


def _exact(text: str, logits: Sequence[float], symbols: str) -> int:
    text = text.strip()
    return symbols.find(text) if len(text) == 1 else UNREAD


def _parse(text: str, logits: Sequence[float], symbols: str) -> int:
    text = text.strip()
    if text and text[0] in symbols and (len(text) == 1 or text[1:3] == ". "):
        return symbols.index(text[0])
    named = _SENTENCE.findall(text)
    return symbols.find(named[0]) if len(named) == 1 else UNREAD


def _logit(text: str, logits: Sequence[float], symbols: str) -> int:
    return max(range(len(symbols)), key=lambda position: logits[position])
