"""The shipped tokenizer keeps Llama's rules and has the small world's words whole."""

from pathlib import Path

import pytest

from llava.conversation import TEMPLATES
from llava.eval.question import SYMBOLS
from llava.tokens import load_tokenizer
from mini.concepts import Concepts, Emoji
from mini.make_base.tokenizer import SYMBOL_CHARACTERS, make_tokenizer, phrases

SHIPPED = Path(__file__).parents[3] / "mini/base/llama"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED)


def ids(tokenizer, text):
    return tokenizer.encode(text)[0]


def test_special_ids_are_llamas(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)


def test_symbols_are_one_token_with_and_without_space(tokenizer):
    assert set("".join(SYMBOLS.values())) <= set(SYMBOL_CHARACTERS)
    for symbol in SYMBOL_CHARACTERS:
        spaced, bare = ids(tokenizer, symbol), ids(tokenizer, f"\n{symbol}. x")[2:]
        assert len(spaced) == 1
        assert bare[0] != spaced[0]
        assert tokenizer.decode(bare[:1]) == symbol


def test_instructions_and_system_prompt_are_one_token(tokenizer):
    for text in phrases()[1:]:
        assert len(ids(tokenizer, f"\n{text}")) == 3  # dummy prefix, newline, the phrase
    assert len(ids(tokenizer, TEMPLATES["v1"].system + " ")) <= 2


@pytest.mark.parametrize("text", ["a  b", " x", "naïve 12 猫\n🦖", "don't", "Ω"])
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_digits_are_split_and_names_are_short(tokenizer):
    assert len(ids(tokenizer, "2048")) == 4
    for name in ("tropical fish", "pizza", "hot air balloon", "Brazil", "女靴"):
        assert len(ids(tokenizer, name)) == len(name.split())


def test_made_anew_for_other_concepts(tmp_path):
    emoji = Emoji("1", "zorgle wump", "佐格", ("quib",), (), "bings", "宾", "snarp", {})
    texts = ["the quick brown fox jumps over a lazy dog and runs away " * 3] * 40
    texts += ["zorgle wump quib snarp bings 佐格 宾"] * 5
    model = make_tokenizer(Concepts(emoji=(emoji,)), texts, n_learnt=360)
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = load_tokenizer(tmp_path)
    assert len(ids(tokenizer, "zorgle wump")) == 2
    assert len(ids(tokenizer, "佐格")) == 1
    assert tokenizer.decode(ids(tokenizer, "zap 7!")) == "zap 7!"
