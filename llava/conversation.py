"""Conversation templates as data: turns become segments of text, each supervised or not.

The text is LLaVA-1.5's, character for character (docs/Data.md lists the templates). Knowing which
characters are supervised *before* tokenising is what lets `llava.tokens` mask labels by
construction, so that no sample is lost to a tokenisation mismatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llava.errors import DataError, UsageError

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_INDEX = -200
"""id in the place of an image, before it is expanded"""
IGNORE_INDEX = -100
"""label where the model is not supervised"""
ROLES = ("human", "gpt")


class Segment(NamedTuple):
    """A stretch of the rendered text; `supervised` text is what the model learns to write."""

    text: str
    supervised: bool


class Speaker(NamedTuple):
    """A turn reads `open + gap + text + close`, and `open` alone when its text is empty."""

    open: str
    gap: str
    close: str


@dataclass(frozen=True)
class Template:
    """How a family of models spells a conversation.

    Of an answer, everything after `gpt.open` is supervised: the gap, the text and the closing.
    """

    system: str
    human: Speaker
    gpt: Speaker
    first_gap: str | None = None
    """Replaces `human.gap` in the first question, where Llama 2 hides its system text."""
    caption_only: bool = False
    """Alignment pre-training: the image and the answer, no question, exactly two turns."""


def _two_separators(person: str) -> Template:
    system = (
        f"A chat between a curious {person} and an artificial intelligence assistant. The "
        f"assistant gives helpful, detailed, and polite answers to the {person}'s questions. "
    )
    return Template(system, Speaker("USER:", " ", " "), Speaker("ASSISTANT:", " ", "</s>"))


def _chatml(system: str) -> Template:
    return Template(
        f"<|im_start|>system\n{system}<|im_end|>",
        Speaker("<|im_start|>user\n", "", "<|im_end|>"),
        Speaker("<|im_start|>assistant\n", "", "<|im_end|>"),
    )


def _one_separator() -> Template:
    system = (
        "A chat between a curious human and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the human's questions.###"
    )
    return Template(system, Speaker("Human:", " ", "###"), Speaker("Assistant:", " ", "###"))


_VICUNA = _two_separators("user")
_PLAIN = Template("", Speaker("", "", ""), Speaker("", "", "\n"), caption_only=True)
_LLAMA_2 = Template(
    "",
    Speaker("", "<s>[INST] ", " [/INST]"),
    Speaker("", " ", " </s>"),
    first_gap=(
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to "
        "understand the visual content that the user provides, and assist the user with a "
        "variety of tasks using natural language.\n<</SYS>>\n\n"
    ),
)
_MISTRAL = Template("", Speaker("", "[INST] ", " [/INST]"), Speaker("", " ", " </s>"))
_MPT = _chatml(
    "A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_CHATML = _chatml("Answer the questions.")
_V0 = _one_separator()

TEMPLATES: dict[str, Template] = {
    "v1": _VICUNA,
    "vicuna_v1": _VICUNA,
    "llava_v1": _two_separators("human"),
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "llava_llama_2": _LLAMA_2,
    "mistral_instruct": _MISTRAL,
    "mpt": _MPT,
    "chatml_direct": _CHATML,
    "mistral_direct": _CHATML,
    "v0": _V0,
    "default": _V0,
    "llava_v0": _V0,
}


def get_template(name: str) -> Template:
    """The template called `name`; UsageError naming the known ones otherwise."""
    if name not in TEMPLATES:
        raise UsageError(f"unknown template {name!r}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def check_turns(turns: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    """The turns that take part: a leading `gpt` turn is dropped, as LLaVA does.

    Raises DataError, naming the turn (counted from 0 in the record), on an unknown role, turns
    that do not alternate, or no question at all.
    """
    for index, (role, _) in enumerate(turns):
        if role not in ROLES:
            raise DataError(f"turn {index} is from {role[:40]!r}; a turn is from 'human' or 'gpt'")
    dropped = 1 if turns and turns[0][0] == "gpt" else 0
    if len(turns) == dropped:
        raise DataError("conversations holds no question; it needs at least one 'human' turn")
    for index, (role, _) in enumerate(turns[dropped:]):
        if role != ROLES[index % 2]:
            raise DataError(
                f"turn {index + dropped} is from {role!r} where {ROLES[index % 2]!r} belongs; "
                "turns must alternate"
            )
    return turns[dropped:]


def place_image(text: str) -> str:
    """Gather the `<image>`s of a turn into one, on its own line in front (LLaVA's pre-pass)."""
    if IMAGE_TOKEN not in text:
        return text
    rest = text.replace(IMAGE_TOKEN, "").strip()
    return f"{IMAGE_TOKEN}\n{rest}".strip()


def render(template: Template, turns: Sequence[tuple[str, str]], has_image: bool) -> list[Segment]:
    """Spell a conversation as segments.

    Args:
        turns: (role, text) with role "human" or "gpt"; the last answer may be empty or absent.
        has_image: whether `<image>` is a placeholder; in a text-only record it is plain text.

    Raises DataError where LLaVA's trainer would have stopped: see `check_turns`; a Llama 2 or
    Mistral conversation without a first question; a `plain` record that is not one captioned turn.
    """
    turns = check_turns(turns)
    if has_image:
        turns = [(role, place_image(text)) for role, text in turns]
    if template.caption_only:
        return _render_caption(template, turns, has_image)
    if not turns[0][1] and not template.human.open:
        raise DataError("the first question is empty, and this template cannot spell that")
    segments = [Segment(template.system, False)]
    for index, (role, text) in enumerate(turns):
        open_, gap, close = template.human if role == "human" else template.gpt
        if index == 0 and template.first_gap is not None:
            gap = template.first_gap
        segments.append(Segment(open_, False))
        if text:
            segments.append(Segment(gap + text + close, role == "gpt"))
    return [segment for segment in segments if segment.text]


def _render_caption(
    template: Template, turns: Sequence[tuple[str, str]], has_image: bool
) -> list[Segment]:
    if len(turns) != 2:
        raise DataError(f"template 'plain' takes one question and one caption, got {len(turns)}")
    if has_image and IMAGE_TOKEN not in turns[0][1]:
        raise DataError(f"template 'plain' needs {IMAGE_TOKEN} in the first turn")
    image = [Segment(IMAGE_TOKEN, False)] if has_image else []
    return [*image, Segment(turns[1][1] + template.gpt.close, True)]
