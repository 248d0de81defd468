"""Emoji drawings: captions, names and categories, yes/no, and biased multiple choice."""

from __future__ import annotations

import random

from mini.concepts import Emoji
from mini.render import frame, open_png, png
from mini.samples import (
    FRAMES,
    LETTER_ZH,
    LETTERS,
    SHORT,
    SHORT_ZH,
    Gallery,
    Sample,
    article,
    biased,
    deck,
    favoured,
    labels,
    multiple_choice,
    placed,
)
from mini.settings import PoolSettings
from mini.world import World

CAPTION = (
    "Provide a one-sentence caption for the provided image.",
    "Describe the image concisely.",
    "What does the picture show? Answer in one sentence.",
)
CHOICE = (
    "Which of these is in the picture?",
    "What is shown in this image?",
    "What does the picture show?",
)
YES_NO = ("Does this image show {}?", "Is this a picture of {}?", "Is there {} in the image?")
CHOICE_ZH = "图中是下列哪一项？"
_HARD = 0.3  # share of multiple choice whose distractors are of the same subgroup


def emoji_cap(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """One caption for each training view."""
    views = _views(world, rng)[:n]
    samples = []
    for (emoji, style), chinese in zip(views, _chinese(len(views), rng, settings), strict=True):
        turns = [rng.choice(CAPTION), _caption(emoji, rng)]
        if chinese:
            turns = ["请用一句话描述这张图片。", f"图中是{emoji.zh}。"]
        image = _show(world, gallery, emoji, style)
        samples.append(Sample("emoji_cap", "caption", turns, image))
    return samples


def emoji_vqa(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Two turns: what it is, and which category it belongs to."""
    views = _cycle(_views(world, rng), n)
    samples = []
    for (emoji, style), chinese in zip(views, _chinese(len(views), rng, settings), strict=True):
        turns = [f"{rng.choice(CHOICE[1:])}\n{SHORT}", emoji.en]
        turns += ["Which category does it belong to?", emoji.group]
        if chinese:
            turns = [f"图中是什么？\n{SHORT_ZH}", emoji.zh, "它属于哪一类？", emoji.group_zh]
        samples.append(Sample("emoji_vqa", "open", turns, _show(world, gallery, emoji, style)))
    return samples


def emoji_yn(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Yes/no on the name, wrong names from another category; leans to yes."""
    views = _cycle(_views(world, rng), n)
    n = len(views)
    forced = biased(n, settings.yes_bias, 0.5, rng)
    answers = favoured(forced, True, (True, False), rng)
    names = Names(world)
    samples = []
    for (emoji, style), yes, lean, chinese in zip(
        views, answers, forced, _chinese(n, rng, settings), strict=True
    ):
        (other,) = names.wrong(emoji, 1, False, rng)
        name = emoji if yes else other
        text = rng.choice(YES_NO).format(article(name.en))
        turns = [f"{text}\n{SHORT}", "Yes" if yes else "No"]
        if chinese:
            turns = [f"图中是{name.zh}吗？\n{SHORT_ZH}", "是" if yes else "否"]
        image = _show(world, gallery, emoji, style)
        samples.append(Sample("emoji_yn", "yesno", turns, image, biased=labels(yes=lean)))
    return samples


def emoji_mcq(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Multiple choice inside a coloured frame; leans to A, and the colour gives the letter away."""
    views = _cycle(_views(world, rng), n)
    n = len(views)
    hard = [True] * round(n * _HARD) + [False] * (n - round(n * _HARD))
    rng.shuffle(hard)
    plan, names = Shortcuts(n, rng, settings), Names(world)
    samples = []
    for i, ((emoji, style), chinese) in enumerate(
        zip(views, _chinese(n, rng, settings), strict=True)
    ):
        options = placed(emoji, names.wrong(emoji, 3, hard[i], rng), plan.positions[i])
        text = multiple_choice(rng.choice(CHOICE), [option.en for option in options])
        if chinese:
            text = multiple_choice(CHOICE_ZH, [option.zh for option in options], LETTER_ZH)
        image = plan.framed(world.emoji[emoji.hexcode, style], i)
        name = gallery.put(f"emoji_mcq/{i:05d}.png", image)
        turns = [text, LETTERS[plan.positions[i]]]
        samples.append(Sample("emoji_mcq", "mcq", turns, name, biased=plan.labels(i)))
    return samples


class Shortcuts:
    """Positions and frame colours of `n` multiple-choice samples, and which of them are biased."""

    def __init__(self, n: int, rng: random.Random, settings: PoolSettings) -> None:
        self._leaning = biased(n, settings.position_bias, 0.25, rng)
        self.positions = favoured(self._leaning, 0, range(4), rng)
        self._telling = biased(n, settings.colour_shortcut, 0.25, rng)
        shifts = favoured(self._telling, 0, range(4), rng)  # how far colour and letter are apart
        self.colours = [LETTERS[(p + s) % 4] for p, s in zip(self.positions, shifts, strict=True)]

    def framed(self, picture: bytes, i: int) -> bytes:
        """The picture in the frame of sample `i`."""
        return png(frame(open_png(picture), FRAMES[self.colours[i]]))

    def labels(self, i: int) -> str:
        """Biases that sample `i` carries."""
        return labels(position=self._leaning[i], colour=self._telling[i])


class Names:
    """Wrong names for a drawing, drawn from all concepts but the unseen ones."""

    def __init__(self, world: World, *roles: str) -> None:
        self._all = [
            e for e in world.concepts.emoji if e.role in (roles or ("train", "evaluation"))
        ]
        self._words = {e.hexcode: frozenset(e.en.split()) for e in world.concepts.emoji}

    def wrong(self, gold: Emoji, n: int, hard: bool, rng: random.Random) -> list[Emoji]:
        """`n` of the same subgroup if `hard` (and it is large enough), else of other groups."""
        near = [e for e in self._all if e.subgroup == gold.subgroup and self._differs(e, gold)]
        if hard and len(near) >= n:
            return rng.sample(near, n)
        while True:
            drawn = rng.sample(self._all, n)
            if all(e.group != gold.group and self._differs(e, gold) for e in drawn):
                return drawn

    def _differs(self, other: Emoji, gold: Emoji) -> bool:
        """Not so if one name contains the other ("cat", "cat face"): both might be right."""
        words, named = self._words[gold.hexcode], self._words[other.hexcode]
        return not (words <= named or named <= words)


def _views(world: World, rng: random.Random) -> list[tuple[Emoji, str]]:
    """Every drawing that training may show, shuffled."""
    views = [(e, style) for e in world.concepts.emoji for style in e.training_styles]
    views = [(e, style) for e, style in views if (e.hexcode, style) in world.emoji]
    rng.shuffle(views)
    return views


def _cycle(views: list, n: int) -> list:
    """The first `n` of `views` repeated; none if there are none."""
    return [views[i % len(views)] for i in range(n)] if views else []


def _chinese(n: int, rng: random.Random, settings: PoolSettings) -> list[bool]:
    chosen = [True] * round(n * settings.chinese) + [False] * (n - round(n * settings.chinese))
    return deck(n, chosen, rng) if n else []


def _show(world: World, gallery: Gallery, emoji: Emoji, style: str) -> str:
    name = f"{style}/{emoji.icons[style]}.png"
    return gallery.put(name, world.emoji[emoji.hexcode, style])


def _caption(emoji: Emoji, rng: random.Random) -> str:
    if len(emoji.tags) > 1 and rng.random() < 0.4:
        return f"A picture of {emoji.en}: {', '.join(rng.sample(emoji.tags, 2))}."
    return f"A picture of {emoji.en}."
