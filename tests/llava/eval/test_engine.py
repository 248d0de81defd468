"""Both engines say what full forwards say, whatever shares a batch or a prefix."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from llava.errors import UsageError
from llava.eval.engine import ENGINES, open_engine
from llava.eval.question import Ask, Question, orders
from llava.vlm import load_vlm
from tests.oracles import oracle
from tests.tiny_models import BUILDERS, TEXT, VISION, save_llava, save_smolvlm

# Two ways of summing the same float32 products: 1e-5 is some thirty roundings of a logit near 4.
CLOSE = {"rtol": 0, "atol": 1e-5}
N_NEW = 4
RNG = np.random.default_rng(0)
PICTURES = [Image.fromarray(RNG.integers(0, 256, (40, 52, 3), np.uint8)) for _ in range(3)]
QUESTION = Question(
    "What colour is the square?",
    ("red", "green", "blue large", "yellow"),
    "Answer with the option's letter from the given choices directly.",
)
ASKS = [
    Ask(QUESTION.render(order, symbols), symbols)
    for symbols in ("ABCD", "QWER")
    for order in orders(4, "")[::6]
]
OPEN = [
    ([PICTURES[0]], Ask("What is it?")),
    ([], Ask("What is there beside two small ones? " * 3)),
    ([PICTURES[1]], Ask(f"{QUESTION.render()} red green blue", "ABCD")),
    ([PICTURES[2]], Ask("Is it small?")),
    ([], Ask("Is it small?")),
    ([PICTURES[0]], Ask("Is it red?")),
]


@pytest.fixture(scope="module", params=BUILDERS)
def vlm(request, tmp_path_factory):
    return load_vlm(BUILDERS[request.param](tmp_path_factory.mktemp(request.param) / "model"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return load_vlm(save_llava(tmp_path_factory.mktemp("llava") / "model"))


@torch.inference_mode()
def slow(vlm, images, ask: Ask) -> tuple[str, list[float], int]:
    """Text and logits by a full forward a token, without cache, batch or prefix."""
    prompt = vlm.prompt(ask.text, images)
    inputs, written, offered = vlm.image_inputs([prompt]), [], []
    while len(written) < N_NEW:
        ids = torch.cat([prompt.input_ids, torch.tensor(written, dtype=torch.int64)])[None]
        n = len(written)
        tokens = {k: torch.cat([t, t.new_zeros(n)])[None] for k, t in prompt.token_inputs.items()}
        logits = vlm.model(input_ids=ids, use_cache=False, **inputs, **tokens).logits[0, -1]
        offered = offered or [logits[vlm.first_token(symbol)].item() for symbol in ask.symbols]
        written.append(int(logits.argmax()))
        if written[-1] in vlm.stop_ids:
            break
    return vlm.decode([i for i in written if i not in vlm.stop_ids]).strip(), offered


def assert_same(replies, expected):
    assert [reply.text for reply in replies] == [text for text, _ in expected]
    for reply, (_, logits) in zip(replies, expected, strict=True):
        np.testing.assert_allclose(reply.logits, logits, **CLOSE)


@pytest.mark.parametrize("images", [PICTURES[:1], []])
@pytest.mark.parametrize("name", ENGINES)
def test_replies_are_those_of_full_forwards(vlm, name, images):
    session = open_engine(name, vlm, max_new_tokens=N_NEW).item(images, ASKS)
    replies = session.reply(ASKS)
    assert_same(replies, [slow(vlm, images, ask) for ask in ASKS])
    assert len({reply.text for reply in replies}) > 1  # the orders are told apart


@pytest.mark.parametrize("name", ENGINES)
def test_questions_about_different_pictures(vlm, name):
    replies = open_engine(name, vlm, max_new_tokens=N_NEW).reply_many(OPEN)
    assert_same(replies, [slow(vlm, images, ask) for images, ask in OPEN])


def test_several_pictures_of_one_question(llava):
    expected = [slow(llava, PICTURES, ask) for ask in ASKS]
    for name in ENGINES:
        session = open_engine(name, llava, max_new_tokens=N_NEW).item(PICTURES, ASKS)
        assert_same(session.reply(ASKS), expected)


def test_answers_do_not_depend_on_what_is_asked_together(vlm):
    engine = open_engine("shared", vlm, max_new_tokens=N_NEW)
    whole = [(r.text, r.logits) for r in engine.item(PICTURES[:1], ASKS).reply(ASKS)]
    session = engine.item(PICTURES[:1], ASKS)
    for some in ([3], [5, 0, 3], range(len(ASKS)), []):
        assert_same(session.reply([ASKS[i] for i in some]), [whole[i] for i in some])
    small = open_engine("shared", vlm, max_new_tokens=N_NEW, max_tokens=1)
    assert_same(small.item(PICTURES[:1], ASKS).reply(ASKS), whole)
    single = [(r.text, r.logits) for r in small.reply_many(OPEN)]
    assert_same(engine.reply_many(OPEN), single)


@contextmanager
def rows_of(module):
    """Records (rows, columns) of every pass through `module`."""
    seen = []

    def note(_, args, kwargs):
        inputs = [*args, *(kwargs.get(k) for k in ("pixel_values", "inputs_embeds", "input_ids"))]
        seen.append(tuple(next(x for x in inputs if x is not None).shape[:2]))

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


def test_the_prefix_runs_once_and_rows_leave_at_their_end(tmp_path):
    """Two of six orders have "red" first, and an answer of one token; the others say for two more
    what their own second option begins with."""

    def rule(question, options):
        return "A" if options["A"] == "red" else f"A C {options['B'][0].upper()}"

    vlm = oracle(rule, tmp_path / "parts")
    question = Question("Which?", ("red", "blue", "green"), QUESTION.suffix)
    asks = [Ask(question.render(order), "ABC") for order in orders(3, "")]
    session = open_engine("shared", vlm).item([], asks)
    with rows_of(vlm.decoder) as seen:
        replies = session.reply([*asks, *asks[:2]])
    prompts = [vlm.prompt(ask.text).input_ids.tolist() for ask in asks]
    n = seen[0][1]
    nodes = {tuple(ids[: k + 1]) for ids in prompts for k in range(n, len(ids))}
    assert seen == [(1, n), (1, len(nodes)), (1, 6), (1, 4), (1, 4)]
    assert session.n_tokens == sum(columns for _, columns in seen)
    assert [reply.text for reply in replies] == [
        "A",
        "A",
        "A C R",
        "A C G",
        "A C R",
        "A C B",
        "A",
        "A",
    ]


def test_the_picture_is_looked_at_once(llava):
    session = open_engine("shared", llava, max_new_tokens=1).item(PICTURES[:1], ASKS)
    with rows_of(llava.model.model.vision_tower) as pictures:
        session.reply(ASKS[:1])
        session.reply(ASKS)
    assert pictures == [(1, 3)]


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_asked_again_is_not_run_again(llava, name):
    session = open_engine(name, llava, max_new_tokens=1).item(PICTURES[:1], ASKS)
    first, second = session.reply(ASKS[:2])
    n_tokens = session.n_tokens
    with rows_of(llava.decoder) as seen:
        again = session.reply([ASKS[1], ASKS[0], ASKS[1]])
    assert seen == [] and session.n_tokens == n_tokens
    assert again[0] is again[2] is second and again[1] is first


def test_naive_processes_every_prompt_whole(llava):
    session = open_engine("naive", llava, max_new_tokens=2).item(PICTURES[:1], ASKS)
    with rows_of(llava.decoder) as seen:
        session.reply(ASKS[:3])
    assert session.n_tokens == sum(rows * columns for rows, columns in seen)
    assert [rows for rows, _ in seen] == [1] * len(seen)


def test_ends_of_different_length(llava):
    asks = [Ask(f"What is it? A. red {'B. blue ' * n}", "AB") for n in (1, 4, 2, 4, 1)]
    replies = open_engine("shared", llava, max_new_tokens=N_NEW).item([], asks).reply(asks)
    assert_same(replies, [slow(llava, [], ask) for ask in asks])
    assert replies[0] is replies[4]


@pytest.mark.parametrize("window", [20, 40])
def test_a_window_shorter_than_the_prefix(tmp_path, window):
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=28, patch_size=7),
        text_config=hf.MistralConfig(**TEXT, vocab_size=362, pad_token_id=0, sliding_window=window),
        image_token_id=360,
        image_seq_length=16,
    )
    folder = save_llava(tmp_path / "model")
    torch.manual_seed(0)
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    vlm = load_vlm(folder)
    expected = [slow(vlm, PICTURES[:1], ask) for ask in ASKS[:3]]
    for name in ENGINES:
        session = open_engine(name, vlm, max_new_tokens=N_NEW).item(PICTURES[:1], ASKS[:3])
        assert_same(session.reply(ASKS[:3]), expected)


def test_penalties_of_a_checkpoint_are_not_greedy(tmp_path):
    folder = save_smolvlm(tmp_path / "model")
    plain = load_vlm(folder)
    expected = [slow(plain, [], ask) for ask in ASKS[:2]]
    hf.GenerationConfig(
        repetition_penalty=3.0, do_sample=True, temperature=0.2, eos_token_id=2
    ).save_pretrained(folder)
    for name in ENGINES:
        engine = open_engine(name, load_vlm(folder), max_new_tokens=N_NEW)
        assert_same(engine.item([], ASKS[:2]).reply(ASKS[:2]), expected)


def test_unknown_engine():
    with pytest.raises(UsageError, match="unknown engine 'fast'; use shared or naive"):
        open_engine("fast", None)
