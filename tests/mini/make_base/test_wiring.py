"""The wired heads attend where their names say, and choose the option that was named before."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mini.make_base.wiring import CONST, FLAG, wire

BOS, SYMBOLS, STRUCTURE, WORDS = 1, range(10, 17), range(2, 30), range(30, 200)


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=192,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
        rope_theta=1e6,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    wire(model, SYMBOLS, BOS, STRUCTURE, torch.Generator().manual_seed(0))
    return model


def question(words, gold):
    """`<s> gold . A w B w C w D w :`, options of two tokens each."""
    ids = [BOS, gold, 2]
    for symbol, word in zip(SYMBOLS, words, strict=False):
        ids += [symbol, 3, word, 4]
    return torch.tensor([[*ids, 5]])


@torch.no_grad()
def run(model, ids):
    return model(input_ids=ids, output_attentions=True, output_hidden_states=True)


def test_first_head_looks_at_the_previous_token(model):
    attention = run(model, question([40, 50, 60, 70], 60)).attentions[0][0, 0]
    positions = torch.arange(2, len(attention))  # BOS is no word: it has no CONST to be found by
    found = attention[positions].argmax(1)
    # With a slow rotary base a few symbols, whose own key is strong, are taken for their follower.
    assert (found == positions - 1).float().mean() > 0.8


def test_second_head_looks_at_the_nearest_symbol(model):
    ids = question([40, 50, 60, 70], 60)
    attention = run(model, ids).attentions[0][0, 1]
    for start in range(3, 19, 4):  # each option's symbol, dot and word
        assert (attention[start : start + 3].argmax(1) == start).all()


def test_a_word_seen_before_raises_the_flag(model):
    ids = question([40, 50, 60, 70], 60)
    flags = run(model, ids).hidden_states[2][0, :, FLAG]
    words = flags[5:19:4]
    assert words.argmax() == 2
    assert words[2] > words[[0, 1, 3]].max() + 0.02


def test_mover_names_the_flagged_option_far_above_chance(model):
    generator = torch.Generator().manual_seed(1)
    right = 0
    for _ in range(60):
        words = (30 + torch.randperm(170, generator=generator)[:4]).tolist()
        gold = int(torch.randint(4, (1,), generator=generator))
        out = run(model, question(words, words[gold]))
        attention = out.attentions[2][0, 0, -1]
        right += int(attention[3:19].view(4, 4).sum(1).argmax()) == gold
    assert right >= 45  # 15 by chance


def test_wiring_repeats_for_a_seed_and_leaves_bos_apart(model):
    rows = model.get_input_embeddings().weight
    assert rows[BOS, CONST] == 0
    assert (rows[2:, CONST] > 0).all()
    before = rows.clone()
    wire(model, SYMBOLS, BOS, STRUCTURE, torch.Generator().manual_seed(0))
    assert torch.equal(before, rows)
