"""Lessons for the base language model: short conversations about a described thing, all balanced.

A lesson stands for a picture by words (`Lesson.words`), later by the picture itself. Right options
are uniform over positions and symbol sets, yes is as frequent as no, and no wording hints at the
answer, so that whatever bias a trained model shows comes from what it was trained on afterwards.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from llava.eval.question import SYMBOLS, parse_question
from mini.clipart import CATEGORIES
from mini.concepts import Concepts, Country, Emoji
from mini.recipes import figures
from mini.recipes.drawings import CAPITAL, KIND, WHOSE
from mini.recipes.emoji import CAPTION, CHOICE, CHOICE_ZH, YES_NO
from mini.recipes.facts import meaning
from mini.samples import LETTER, LETTER_ZH, SHORT, SHORT_ZH, Gallery
from mini.settings import PoolSettings
from mini.world import World

ALPHABETS = (*SYMBOLS.values(), "abcdefg", "1234567")
_ALPHABET_WEIGHTS = (10, 4, 3, 1, 1)
_N_OPTIONS = ((2, 3, 4, 5), (2, 2, 10, 1))
_HARD = 0.25  # share of wrong options that are of the same kind as the right one
_BIASES = ("position_bias", "flag_position_bias", "colour_shortcut", "yes_bias", "count_bias")
_FIGURES = (
    *((figures.silhouette, 600), (figures.silhouette_mcq, 400)),
    *((figures.easyvqa, 500), (figures.easyvqa_mcq, 300), (figures.digits_ocr, 300)),
)
_SHARES = {"emoji": 0.58, "flag": 0.1, "clipart": 0.1, "figure": 0.22}  # of pictures in lessons
CATEGORY = "Which category does it belong to?"
CATEGORY_ZH = "它属于哪一类？"


@dataclass(frozen=True)
class Thing:
    """What a picture can show; `kind` groups things that are alike, `words` describe it."""

    name: str
    zh: str
    kind: str
    words: tuple[str, ...] = ()
    group: str = ""
    group_zh: str = ""
    facts: tuple[tuple[str, str], ...] = ()  # question and answer
    drawn: str = "emoji"  # emoji, flag, clipart, figure (which has its whole lesson in `facts`)
    key: str = ""


@dataclass(frozen=True)
class Lesson:
    """`turns` are (question, answer) pairs; `thing` is in the picture, None for text only."""

    turns: tuple[tuple[str, str], ...]
    thing: Thing | None


def things(concepts: Concepts) -> list[Thing]:
    """Everything that training may know by name and picture."""
    emoji = [_emoji_thing(e) for e in concepts.emoji if e.role != "unseen"]
    return emoji + [_flag_thing(c) for c in concepts.countries]


def _emoji_thing(emoji: Emoji) -> Thing:
    return Thing(
        name=emoji.en,
        zh=emoji.zh,
        kind=emoji.subgroup,
        words=emoji.tags,
        group=emoji.group,
        group_zh=emoji.group_zh,
        facts=((CATEGORY, emoji.group),),
        key=emoji.hexcode,
    )


def _flag_thing(country: Country) -> Thing:
    facts = (
        ("What is its capital?", country.capital),
        ("On which continent is it?", country.region),
    )
    return Thing(
        country.en, country.zh, country.region, ("flag",), "flags", "", facts, "flag", country.code
    )


def figure_things(world: World, rng: random.Random) -> list[tuple[Thing, bytes]]:
    """Silhouettes, shapes and numbers with the pool's own questions, its biases switched off.

    The thing is named by the answer: what its picture has to convey.
    """
    gallery, unbiased = Gallery(), PoolSettings(**dict.fromkeys(_BIASES, 0.0))
    found = []
    for recipe, n in _FIGURES:
        for sample in recipe(world, gallery, n, rng, unbiased):
            question, answer = sample.turns
            if sample.task == "yesno":
                continue  # the picture conveys more than the answer
            parsed = parse_question(question)
            name = answer if parsed is None else parsed.options[parsed.option(answer)]
            key, turns = sample.image, ((question, answer),)
            thing = Thing(name, "", recipe.__name__, facts=turns, drawn="figure", key=key)
            found.append((thing, gallery[key]))
    return found


class Teacher:
    """Draws lessons about `things`; `concepts` provide wrong options and text-only questions."""

    def __init__(self, concepts: Concepts, known: list[Thing], rng: random.Random) -> None:
        self._rng = rng
        self._kinds: dict[str, list[Thing]] = {}
        for thing in known:
            self._kinds.setdefault(thing.kind, []).append(thing)
        self._drawn = {d: [t for t in known if t.drawn == d] for d in _SHARES}
        self._shares = {d: share for d, share in _SHARES.items() if self._drawn[d]}
        self._groups = sorted({(t.group, t.group_zh) for t in self._drawn["emoji"]})
        self._capitals = {c.code: c.capital for c in concepts.countries}
        self._lemmas = [w for w in concepts.words if not w.evaluation]

    def lesson(self, text_only: float = 0.15) -> Lesson:
        """One conversation of one to three turns."""
        if self._rng.random() < text_only:
            return Lesson((self._text_turn(),), None)
        drawn = self._rng.choices(list(self._shares), list(self._shares.values()))[0]
        return self.about(self._rng.choice(self._drawn[drawn]))

    def about(self, thing: Thing) -> Lesson:
        """A conversation about this thing; the first turn is most often multiple choice."""
        rng = self._rng
        if thing.drawn == "figure":
            return Lesson(thing.facts, thing)
        makers = {
            "emoji": (self._choice, self._yes_no, self._open, self._category),
            "flag": (self._choice, self._yes_no, self._open, self._capital),
            "clipart": (self._clipart_kind, self._caption),
        }[thing.drawn]
        weights = (8, 3, 3, 3)[: len(makers)]
        first = rng.choices(makers, weights)[0]
        turns = [first(thing)]
        if rng.random() < 0.6:
            turns.append(rng.choice(thing.facts) if thing.facts else self._caption(thing))
        if rng.random() < 0.3 and thing.drawn == "emoji":
            turns.append(self._caption(thing))
        return Lesson(tuple(turns), thing)

    def _choice(self, thing: Thing) -> tuple[str, str]:
        chinese = bool(thing.zh) and self._rng.random() < 0.2
        others = self._others(thing, 4)
        if chinese:
            names = [thing.zh, *(o.zh for o in others if o.zh and o.zh != thing.zh)]
            return self._ask(CHOICE_ZH, names, LETTER_ZH)
        question = WHOSE if thing.drawn == "flag" else self._rng.choice(CHOICE)
        return self._ask(question, [thing.name, *(other.name for other in others)])

    def _category(self, thing: Thing) -> tuple[str, str]:
        wrong = self._rng.sample([g for g in self._groups if g[0] != thing.group], 4)
        if self._rng.random() < 0.2:
            return self._ask(CATEGORY_ZH, [thing.group_zh, *(g[1] for g in wrong)], LETTER_ZH)
        return self._ask(CATEGORY, [thing.group, *(g[0] for g in wrong)])

    def _capital(self, thing: Thing) -> tuple[str, str]:
        capitals = [self._capitals[o.key] for o in self._others(thing, 4)]
        return self._ask(CAPITAL, [self._capitals[thing.key], *capitals])

    def _clipart_kind(self, thing: Thing) -> tuple[str, str]:
        wrong = self._rng.sample([c for c in CATEGORIES.values() if c != thing.kind], 4)
        return self._ask(KIND, [thing.kind, *wrong])

    def _yes_no(self, thing: Thing) -> tuple[str, str]:
        yes = self._rng.random() < 0.5
        shown = thing if yes else self._others(thing, 1)[0]
        if thing.zh and self._rng.random() < 0.2:
            return f"图中是{shown.zh}吗？\n{SHORT_ZH}", "是" if yes else "否"
        question = self._rng.choice(YES_NO).format(shown.name)
        return f"{question}\n{SHORT}", "Yes" if yes else "No"

    def _open(self, thing: Thing) -> tuple[str, str]:
        if thing.drawn == "flag":
            return f"Which country does this flag belong to?\n{SHORT}", thing.name
        if self._rng.random() < 0.2:
            return f"图中是什么？\n{SHORT_ZH}", thing.zh
        return f"{self._rng.choice(CHOICE[1:])}\n{SHORT}", thing.name

    def _caption(self, thing: Thing) -> tuple[str, str]:
        if thing.drawn == "clipart":
            return "Write a short description for this clip art.", f"{thing.name}."
        caption = f"A picture of {thing.name}."
        if len(thing.words) > 1 and self._rng.random() < 0.4:
            caption = f"{caption[:-1]}: {', '.join(self._rng.sample(thing.words, 2))}."
        return self._rng.choice(CAPTION), caption

    def _text_turn(self) -> tuple[str, str]:
        """Options compared with a quoted name, translated, or with the gloss of a word."""
        rng, turn = self._rng, self._rng.random()
        thing = rng.choice(self._drawn[rng.choice(("emoji", "emoji", "emoji", "flag"))])
        others = self._others(thing, 4)
        if turn < 0.35:
            names = [thing.name, *(other.name for other in others)]
            return self._ask(f"Which of these is {thing.name}?", names)
        if turn < 0.7 and thing.zh:
            names, zh = [thing.name, *(o.name for o in others)], [thing.zh, *(o.zh for o in others)]
            if rng.random() < 0.5:
                return self._ask(f"{thing.zh}是下列哪一项？", names, LETTER_ZH)
            return self._ask(f"Which of these is {thing.name}?", [z for z in zh if z])
        word = rng.choice(self._lemmas)
        if rng.random() < 0.5:
            wrong = [other.gloss for other in rng.sample(self._lemmas, 3) if other is not word]
            return self._ask(meaning(word), [word.gloss, *wrong])
        yes = rng.random() < 0.5
        kind = rng.choice((word if yes else rng.choice(self._lemmas)).hypernyms[:3])
        answer = "Yes" if kind in word.hypernyms else "No"
        return f'Is "{word.lemma}" a kind of {kind}?\n{SHORT}', answer

    def _ask(self, question: str, names: list[str], suffix: str = LETTER) -> tuple[str, str]:
        """Multiple choice whose right option is `names[0]`, at a uniform position."""
        names = list(dict.fromkeys(names))
        n = min(len(names), self._rng.choices(*_N_OPTIONS)[0])
        alphabet = self._rng.choices(ALPHABETS, _ALPHABET_WEIGHTS)[0]
        order = self._rng.sample(range(n), n)
        lines = [f"{alphabet[i]}. {names[k]}" for i, k in enumerate(order)]
        return "\n".join([question, *lines, suffix]), alphabet[order.index(0)]

    def _others(self, thing: Thing, n: int) -> list[Thing]:
        """Different things drawn alike, some of the same kind, none whose name contains the name's.

        "cat face" might be right too where "cat" is.
        """
        rng, words, found = self._rng, set(thing.name.split()), []
        while len(found) < n:
            near = rng.random() < _HARD
            other = rng.choice(self._kinds[thing.kind] if near else self._drawn[thing.drawn])
            named = set(other.name.split())
            if other not in found and not (words <= named or named <= words):
                found.append(other)
            elif near and rng.random() < 0.2:
                found.append(rng.choice(self._drawn[thing.drawn]))
        return [other for other in found if other is not thing]
