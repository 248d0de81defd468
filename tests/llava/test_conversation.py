"""Templates spell what LLaVA-1.5 was trained on; what is supervised is the answers alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.conversation import TEMPLATES, check_turns, get_template, place_image, render
from llava.errors import DataError, UsageError

TURNS = [("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2")]
USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
HUMAN_SYSTEM = USER_SYSTEM.replace("user", "human")
LLAMA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers."
)


def chatml(system: str) -> tuple[str, str]:
    return (
        f"<|im_start|>system\n{system}<|im_end|><|im_start|>user\nq1<|im_end|><|im_start|>assistant"
        "\na1<|im_end|><|im_start|>user\nq2<|im_end|><|im_start|>assistant\na2<|im_end|>",
        "a1<|im_end|>a2<|im_end|>",
    )


EXPECTED = {
    "v1": (
        f"{USER_SYSTEM} USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>",
        " a1</s> a2</s>",
    ),
    "llava_v1": (
        f"{HUMAN_SYSTEM} USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>",
        " a1</s> a2</s>",
    ),
    "llava_llama_2": (
        f"[INST] <<SYS>>\n{LLAMA_SYSTEM}\n<</SYS>>\n\nq1 [/INST] a1 </s>"
        "<s>[INST] q2 [/INST] a2 </s>",
        " a1 </s> a2 </s>",
    ),
    "mistral_instruct": (
        "[INST] q1 [/INST] a1 </s>[INST] q2 [/INST] a2 </s>",
        " a1 </s> a2 </s>",
    ),
    "mpt": chatml(MPT_SYSTEM),
    "chatml_direct": chatml("Answer the questions."),
    "v0": (
        f"{HUMAN_SYSTEM}###Human: q1###Assistant: a1###Human: q2###Assistant: a2###",
        " a1### a2###",
    ),
}


def spelled(name: str, turns: list[tuple[str, str]], has_image: bool = False) -> str:
    return "".join(s.text for s in render(get_template(name), turns, has_image))


def supervised(name: str, turns: list[tuple[str, str]], has_image: bool = False) -> str:
    return "".join(s.text for s in render(get_template(name), turns, has_image) if s.supervised)


@pytest.mark.parametrize("name", EXPECTED)
def test_text_and_supervised_text(name: str) -> None:
    text, answers = EXPECTED[name]
    assert spelled(name, TURNS) == text
    assert supervised(name, TURNS) == answers


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("vicuna_v1", "v1"),
        ("v0_plain", "plain"),
        ("mistral_direct", "chatml_direct"),
        ("default", "v0"),
        ("llava_v0", "v0"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert TEMPLATES[alias] is TEMPLATES[name]


def test_unknown_template_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'v9'; known: v1, vicuna_v1"):
        get_template("v9")


def test_plain_is_image_and_caption_without_question_or_eos() -> None:
    turns = [("human", "Give a caption.\n<image>"), ("gpt", "a bus")]
    assert spelled("plain", turns, has_image=True) == "<image>a bus\n"
    assert supervised("plain", turns, has_image=True) == "a bus\n"
    assert spelled("plain", turns) == "a bus\n"  # text-only alignment of a language model


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (TURNS, "one question and one caption, got 4"),
        ([("human", "no placeholder"), ("gpt", "x")], "needs <image>"),
    ],
)
def test_plain_refuses_what_is_not_a_caption(turns: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(get_template("plain"), turns, has_image=True)


@pytest.mark.parametrize("name", [n for n in EXPECTED if n not in ("llava_llama_2", "v1")])
def test_leading_answer_is_dropped(name: str) -> None:
    assert spelled(name, [("gpt", "Hello"), *TURNS]) == EXPECTED[name][0]


def test_empty_message_is_the_role_alone() -> None:
    open_end = [("human", "q"), ("gpt", "")]
    assert spelled("v1", open_end) == f"{USER_SYSTEM} USER: q ASSISTANT:"
    assert supervised("v1", open_end) == ""
    middle = [("human", "q1"), ("gpt", ""), ("human", ""), ("gpt", "a2")]
    assert spelled("v1", middle) == f"{USER_SYSTEM} USER: q1 ASSISTANT:USER:ASSISTANT: a2</s>"
    assert supervised("v1", middle) == " a2</s>"
    assert spelled("mistral_instruct", middle) == "[INST] q1 [/INST] a2 </s>"
    assert spelled("v1", [("human", "q")]) == f"{USER_SYSTEM} USER: q "


@pytest.mark.parametrize("name", ["llava_llama_2", "mistral_instruct"])
def test_instruct_templates_need_a_first_question(name: str) -> None:
    with pytest.raises(DataError, match="first question is empty"):
        render(get_template(name), [("human", ""), ("gpt", "a")], has_image=False)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "no question"),
        ([("gpt", "a")], "no question"),
        ([("system", "s"), ("human", "q")], "turn 0 is from 'system'"),
        ([("human", "q"), ("human", "q")], "turn 1 is from 'human' where 'gpt' belongs"),
        ([("gpt", "a"), ("gpt", "a"), ("human", "q")], "turn 1 is from 'gpt' where 'human'"),
        ([*TURNS, ("gpt", "a")], "turn 4 is from 'gpt' where 'human' belongs"),
    ],
)
def test_bad_turns_are_named(turns: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_turns(turns)


@pytest.mark.parametrize(
    ("text", "placed"),
    [
        ("What?\n<image>", "<image>\nWhat?"),
        ("<image>\n<image>\n a  b \n", "<image>\na  b"),
        ("<image>", "<image>"),
        ("left <image> right", "<image>\nleft  right"),
        (" untouched ", " untouched "),
    ],
)
def test_place_image(text: str, placed: str) -> None:
    assert place_image(text) == placed


def test_pre_pass_only_for_records_with_image() -> None:
    turns = [("human", "What?\n<image>"), ("gpt", "a")]
    assert "USER: <image>\nWhat? ASSISTANT" in spelled("v1", turns, has_image=True)
    assert "USER: What?\n<image> ASSISTANT" in spelled("v1", turns, has_image=False)


texts = st.text(alphabet=st.sampled_from("ab \n<>/s:"), min_size=1, max_size=12)


@settings(deadline=None)  # a busy machine is not a failure
@given(st.sampled_from(list(EXPECTED)), st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_every_answer_is_supervised_and_no_question(name: str, rounds: list) -> None:
    turns = [turn for q, a in rounds for turn in (("human", q), ("gpt", a))]
    template = get_template(name)
    answers = [s.text for s in render(template, turns, False) if s.supervised]
    assert answers == [template.gpt.gap + a + template.gpt.close for _, a in rounds]
