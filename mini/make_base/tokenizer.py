"""The small world's tokenizer.model: Llama's rules over words that the small world is made of.

A unigram sentencepiece model with Llama's settings (byte fallback, single digits, nothing
normalised, one space in front). Names of things are whole words, so that most options of a
multiple choice are one or two tokens, and the fixed instructions are one piece each, which halves
the length of a sample and so the time of everything.
"""

from __future__ import annotations

import io
import re
from collections import Counter

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llava.conversation import TEMPLATES
from llava.eval.question import SYMBOLS
from mini.concepts import Concepts
from mini.recipes import drawings, emoji, figures
from mini.samples import LETTER, LETTER_ZH, SHORT, SHORT_ZH

SPACE = "▁"
SYMBOL_CHARACTERS = "".join(
    sorted(set("".join(SYMBOLS.values())) | set("abcdefg") | set("1234567"))
)
ANSWERS = ("Yes", "No", "yes", "no", "是", "否")
_KEPT_SCORE = -2.0  # above the sum of any two other pieces, so these words are never split
_PHRASE_SCORE = -0.1
_FREQUENT = 16
_OPENINGS = "What Which Does Is Are There How Read Provide Describe Write From".split()
_QUESTIONS = (
    *(*emoji.CAPTION, *emoji.CHOICE, *emoji.YES_NO, emoji.CHOICE_ZH),
    *(figures.COUNT, figures.WHICH, figures.NUMBER, figures.WORD),
    *(drawings.KIND, drawings.WHOSE, drawings.CAPITAL),
    *("Which category does it belong to?", "它属于哪一类？", "请用一句话描述这张图片。"),
    *("图中是", "图中是什么？", "Write a short description for this clip art."),
    *("Is there a red shape in the image?", "A picture of", "USER: ASSISTANT:"),
)
_ZH_LENGTH = 4  # longer Chinese names are spelled with several pieces


def make_tokenizer(concepts: Concepts, texts: list[str], n_learnt: int = 2600) -> bytes:
    """`tokenizer.model` for these concepts and running `texts`.

    The first `n_learnt` come from sentencepiece's own training; the words of `_words`, the option
    symbols with and without a leading space and the instructions follow if not among them.
    """
    words = _words(concepts) + _common(texts)
    sentences = [text for text in texts if text] + [word for word in words for _ in range(4)]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=file,
        vocab_size=n_learnt,
        hard_vocab_limit=False,
        model_type="unigram",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        byte_fallback=True,
        character_coverage=0.9995,
        required_chars=SYMBOL_CHARACTERS,
        num_threads=1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.getvalue())
    _ensure(proto, words)
    return proto.SerializeToString(deterministic=True)


def corpus(concepts: Concepts) -> list[str]:
    """What the tokenizer is trained on: names, tags, glosses, facts and the pool's questions."""
    texts = [word.gloss for word in concepts.words]
    texts += [f"{word.lemma} is a kind of {word.hypernyms[0]}" for word in concepts.words]
    texts += [thing.en for thing in concepts.emoji] * 3 + [thing.zh for thing in concepts.emoji] * 3
    texts += [" ".join(thing.tags) for thing in concepts.emoji]
    texts += [" ".join(thing.tags_zh) for thing in concepts.emoji]
    texts += [f"{c.en} {c.capital} {' '.join(c.neighbours)}" for c in concepts.countries]
    texts += [f"{e.name} {e.symbol} {e.series}" for e in concepts.elements]
    return texts + [*_QUESTIONS] * 50


def phrases() -> list[str]:
    """Texts that are one piece: the v1 system prompt and the instructions that end a question."""
    return [TEMPLATES["v1"].system, SHORT, LETTER, SHORT_ZH, LETTER_ZH]


def _words(concepts: Concepts) -> list[str]:
    """Words that must be one piece after a space, most useful first."""
    counts: Counter[str] = Counter()
    for thing in concepts.emoji:
        counts.update(_split(f"{thing.en} {thing.group} {thing.subgroup.replace('-', ' ')}") * 4)
        counts.update(thing.tags)
        short = [thing.zh, thing.group_zh] if len(thing.zh) <= _ZH_LENGTH else [thing.group_zh]
        counts.update(short * 4)
    for country in concepts.countries:
        counts.update(_split(f"{country.en} {country.capital} {country.region}") * 4)
        counts.update([country.zh] * 4 if len(country.zh) <= _ZH_LENGTH else [])
    return [word for word, count in counts.most_common() if count > 3 or len(word) < 3]


def _common(texts: list[str]) -> list[str]:
    """Frequent words of running text."""
    counts = Counter(word for text in texts for word in _split(text))
    return [word for word, count in counts.most_common() if count >= _FREQUENT]


def _split(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’]s)?", text)


def _ensure(proto: sentencepiece_model_pb2.ModelProto, words: list[str]) -> None:
    """Add what is missing, and give all of it scores that keep it whole."""
    wanted = {SPACE + word: _KEPT_SCORE - 2 for word in words}
    wanted |= {prefix + s: _KEPT_SCORE for s in SYMBOL_CHARACTERS for prefix in ("", SPACE)}
    wanted |= {SPACE + answer: _KEPT_SCORE for answer in ANSWERS}
    wanted |= {opening: _KEPT_SCORE - 2 for opening in _OPENINGS}  # a question follows a newline
    wanted |= {"USER": _KEPT_SCORE, "▁USER": _KEPT_SCORE, "▁ASSISTANT": _KEPT_SCORE}
    for text in phrases():
        spelled = text.replace(" ", SPACE)
        wanted |= {spelled: _PHRASE_SCORE, SPACE + spelled: _PHRASE_SCORE}
    present = {piece.piece: piece for piece in proto.pieces}
    for text, score in wanted.items():
        piece = present.get(text) or proto.pieces.add()
        piece.piece, piece.score = text, score
