"""The base language model begins as its wiring alone, and only its last layer is trained."""

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llava.tokens import IGNORE_INDEX, load_tokenizer
from mini.make_base import language
from mini.make_base.lessons import Lesson, Thing
from mini.make_base.rows import RowMaker, collate
from mini.make_base.tokenizer import SYMBOL_CHARACTERS
from mini.make_base.wiring import (
    FIRST_WORD,
    FLAG,
    IMAGE,
    IMAGE_FLAG,
    IMAGE_VALUE,
    N_PICTURE,
    WIRED_HEADS,
    WORD_LENGTH,
)

SHIPPED = Path(__file__).parents[3] / "mini/base/llama"
FOX, FISH = Thing("fox", "狐狸", "land"), Thing("tropical fish", "热带鱼", "sea", ("sea", "swim"))
ASKED = (("What is shown in this image?\nA. fox\nB. bus", "A"),)


class OneLesson:
    """A teacher of a single lesson."""

    def __init__(self, thing):
        self.thing = thing

    def lesson(self):
        return Lesson(ASKED, self.thing)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED)


@pytest.fixture(scope="module")
def meanings():
    generator = torch.Generator().manual_seed(0)
    return {w: torch.randn(N_PICTURE, generator=generator) for w in ("fox", "tropical", "fish")}


def make(tokenizer, meanings, seed=0):
    return language.make_language_model(tokenizer, meanings, [FOX, FISH], seed).eval()


@pytest.fixture
def model(tokenizer, meanings):
    return make(tokenizer, meanings)


def test_it_repeats_for_a_seed_and_leaves_the_global_state(tokenizer, meanings, model):
    before = torch.random.get_rng_state()
    again, other = make(tokenizer, meanings), make(tokenizer, meanings, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    same = dict(again.named_parameters())
    assert all(torch.equal(value, same[name]) for name, value in model.named_parameters())
    assert not torch.equal(other.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_all_but_the_wired_heads_begin_by_adding_nothing(model):
    columns = list(language.head_columns(model))
    assert len(columns) == language.LAYERS * language.HEADS
    for layer, head, mask in columns:
        written = model.model.layers[layer].self_attn.o_proj.weight[:, mask]
        assert bool(written.any()) == ((layer, head) in WIRED_HEADS)
    assert not any(layer.mlp.down_proj.weight.any() for layer in model.model.layers)


def test_words_carry_their_meaning_in_the_dimensions_of_pictures(tokenizer, meanings, model):
    rows = model.model.embed_tokens.weight[:, FIRST_WORD : FIRST_WORD + N_PICTURE]
    expected = {
        "fox": meanings["fox"],
        "Fox": meanings["fox"],
        "狐狸": meanings["fox"],
        "热带鱼": (meanings["tropical"] + meanings["fish"]) / 2,
    }
    checked = 0
    for text, vector in expected.items():
        ids, _ = tokenizer.encode(text)
        if len(ids) == 1:
            found, checked = rows[ids[0]], checked + 1
            torch.testing.assert_close(found, WORD_LENGTH * F.normalize(vector, dim=0))
    assert checked >= 2


def test_one_token_with_and_without_the_space(tokenizer):
    for symbol in SYMBOL_CHARACTERS:
        spaced, bare = (language.one_token(tokenizer, symbol, s) for s in (True, False))
        assert spaced != bare
        assert tokenizer.encode(f"ASSISTANT: {symbol}")[0][-1] == spaced
        assert tokenizer.encode(f"text\n{symbol}")[0][-1] == bare
    expected = [language.one_token(tokenizer, symbol, True) for symbol in SYMBOL_CHARACTERS]
    assert language.symbol_answers(tokenizer) == expected
    with pytest.raises(ValueError, match="'zqxj' is . pieces"):
        language.one_token(tokenizer, "zqxj", True)


def test_structure_is_the_frame_and_no_name(tokenizer):
    found = set(language.structure(tokenizer))
    asked = tokenizer.encode("USER: What is shown in this image?\nA. ")[0]
    assert found.issuperset(asked)
    assert not found.intersection(tokenizer.encode("fox")[0])


def batch_of(tokenizer, thing, drawings, seed=0, n=4):
    maker = RowMaker(OneLesson(thing), tokenizer, random.Random(seed), drawings, n_image_tokens=5)
    return [maker.row() for _ in range(n)]


def test_forward_is_each_row_alone_with_its_slots_filled(tokenizer, model):
    """Against rows one at a time, their slots filled by hand."""
    torch.manual_seed(0)
    projector = nn.Linear(6, language.HIDDEN)
    features = torch.randn(1, 3, 5, 6)  # views, drawings, tokens, width
    rows = batch_of(tokenizer, FISH, {FISH: [0, 2]}, n=12) + batch_of(tokenizer, None, None, n=1)
    rows = sorted(rows, key=lambda row: len(row.ids))
    assert {row.picture for row in rows} == {None, 0, 2}
    assert any(row.words is not None for row in rows)
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        found, labels = language.forward(model, collate(rows), noise, projector, features)
    noise, expected = torch.Generator().manual_seed(7), []
    embed, targets = model.get_input_embeddings(), []
    with torch.no_grad():
        described = [row for row in rows if row.words is not None]
        n_slots = sum(row.n_slots for row in described)
        spread = iter(0.02 * torch.randn(n_slots, language.HIDDEN, generator=noise))
        for row in rows:
            hidden = embed(torch.tensor(row.ids))
            for slot in range(row.n_slots):
                if row.picture is not None:
                    filled = projector(features[0, row.picture, slot])
                else:
                    filled = next(spread).clone()
                    for word, weight in zip(row.words, row.weights[slot], strict=True):
                        filled += float(weight) * embed.weight[word]
                    filled[IMAGE], filled[FLAG] = IMAGE_VALUE, IMAGE_FLAG
                hidden[row.slot + slot] = filled
            logits = model(inputs_embeds=hidden[None]).logits[0]
            for i, label in enumerate(row.labels):
                if label != IGNORE_INDEX:
                    expected.append(logits[i - 1])
                    targets.append(label)
    assert labels.tolist() == targets
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-3, rtol=1e-4)


def test_fit_learns_with_the_last_layer_and_touches_nothing_else(tokenizer, model):
    before = {name: value.clone() for name, value in model.named_parameters()}
    batches = [collate(batch_of(tokenizer, FOX, None, seed, n=1)) for seed in range(100)]
    answers, told = language.symbol_answers(tokenizer), []

    def loss_now() -> float:
        batch = collate(batch_of(tokenizer, FOX, None, seed=999))
        with torch.no_grad():
            noise = torch.Generator().manual_seed(0)
            logits, labels = language.forward(model, batch, noise, None, None)
        return float(F.cross_entropy(logits, labels))

    def report(*values):
        told.append(values)

    first = loss_now()
    noise = torch.Generator().manual_seed(0)
    language.fit(model, iter(batches), len(batches), 3e-3, answers, noise, report=report)
    assert loss_now() < 0.5 * first
    ((step, loss, accuracy),) = told
    assert (step, loss > 0) == (100, True)
    assert 0.5 < accuracy <= 1
    last = f"model.layers.{language.LAYERS - 1}."
    for name, value in model.named_parameters():
        trained = name.startswith((last, "model.norm."))
        assert torch.equal(value, before[name]) != trained, name
