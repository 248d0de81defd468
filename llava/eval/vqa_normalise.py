"""The answer normaliser of the EvalAI server, as TextVQA, VQAv2 and VizWiz answers are compared.

Its published form has quirks, and published numbers have them too, so they are kept:

    period          every "." that no digit follows goes, also after a digit ("3." is "3"): the
                    condition on the character before it was mistyped. Only the first 32 of them
                    go, because a flag was passed where the count belongs.
    punctuation     a mark beside a space ANYWHERE in the text is deleted everywhere ("a-b - c" is
                    "ab c"); a mark that is nowhere beside a space becomes a space.
    "'s"            gets a space before it: "that's" is "that 's", but "thats" becomes "that's".
    contractions    "somebody'd" loses its apostrophe, where all others get one.

Left out, because it cannot happen once commas are gone: the rule for commas between digits, and
contractions with capitals ("Im"), since the text is lower-case by then.
"""

from __future__ import annotations

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32
_ARTICLES = {"a", "an", "the"}
_NUMBERS = dict(
    zip(
        "none zero one two three four five six seven eight nine ten".split(),
        "0 0 1 2 3 4 5 6 7 8 9 10".split(),
        strict=True,
    )
)
# Each is reached from every form that lacks exactly one of its apostrophes.
_WITH_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll
    you're you've
""".split()
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _WITH_APOSTROPHES
    for i, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def normalise(answer: str) -> str:
    """`answer` as it is compared: lower-case, without articles, numbers up to ten as digits."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return " ".join(_word(word) for word in _without_marks(text).split() if word not in _ARTICLES)


def _without_marks(text: str) -> str:
    beside_space = {mark for mark in _PUNCTUATION if f"{mark} " in text or f" {mark}" in text}
    table = {ord(mark): "" if mark in beside_space else " " for mark in _PUNCTUATION}
    return _PERIOD.sub("", text.translate(table), count=_MAX_PERIODS)


def _word(word: str) -> str:
    word = _NUMBERS.get(word, word)
    return _CONTRACTIONS.get(word, word)
