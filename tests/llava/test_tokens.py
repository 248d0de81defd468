"""Ids equal to the slow tokenizer's, labels by construction; the optional golden conversations."""

from __future__ import annotations

import json
import pickle
import random
import re
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch

from llava.conversation import IMAGE_TOKEN, Segment, get_template
from llava.errors import DataError, UsageError
from llava.tokens import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    Encoded,
    SentencePieceTokenizer,
    Tokenizer,
    encode_conversation,
    load_tokenizer,
    tokenize,
)

ATOMS = [
    *[" ", "  ", "   ", "\n", "\t", "\r\n", "</s>", "<s>", "<unk>", "▁", "▁▁", "<image>", "<pad>"],
    *["USER:", "ASSISTANT: ", "[INST]", "word", "Hello", "a", "3.14", ".", "...", "<", "/s>", "s>"],
    *[
        "🙂",
        "👩‍👩‍👧",
        "✈️",
        "中文",
        "\u00a0",
        "\u200b",
        "\ufeff",
        "ﬁ",
        "ＡＢＣ",
        "é",
        "e\u0301",
        "\x00",
        "\u3000",
    ],
    *["<0x0A>", "def f(x):\n    return", "\U0010ffff", "<|im_end|>", " the"],
]


def random_texts(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(ATOMS, k=rng.randint(0, 12))) for _ in range(n)]


@pytest.fixture(scope="module")
def tiny(tiny_vocabulary: Path) -> Tokenizer:
    return load_tokenizer(tiny_vocabulary)


@pytest.fixture(scope="module")
def llama(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "llama_tokenizer")


def slow_ids(model: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """The slow `legacy=False` Llama tokenizer in a few lines, on the unchanged model.

    Behind a newline no dummy prefix is added, so that newline's own ids are cut off again.
    """
    newline = model.encode("\n")
    pieces = [p for p in re.split("(<unk>|<s>|</s>)", text.replace("▁", " ")) if p]
    ids = []
    for index, piece in enumerate(pieces):
        if piece in ("<unk>", "<s>", "</s>"):
            ids.append(model.piece_to_id(piece))
        else:
            ids += model.encode("\n" + " " * (index == 0) + piece)[len(newline) :]
    return ids


def check_ids_and_spans(folder: Path, n: int) -> None:
    tokenizer = load_tokenizer(folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in random_texts(n, seed=1):
        ids, spans = tokenizer.encode(text)
        assert ids == slow_ids(model, text), repr(text)
        assert {i for begin, end in spans for i in range(begin, end)} == set(range(len(text)))
        assert all(begin < end for begin, end in spans) and spans == sorted(spans)
        for id_, (begin, end) in zip(ids, spans, strict=True):
            if not model.is_byte(id_) and begin > 0:
                assert text[begin:end].replace(" ", "▁") == model.id_to_piece(id_)


def test_ids_and_spans_tiny(tiny_vocabulary: Path) -> None:
    check_ids_and_spans(tiny_vocabulary, 1000)


def test_ids_and_spans_llama(shared_data: Path) -> None:
    check_ids_and_spans(shared_data / "llama_tokenizer", 3000)


def test_no_leading_space_is_lost_with_a_model_that_strips_them(tmp_path: Path) -> None:
    """Sentencepiece trains models that strip and merge spaces unless told otherwise."""
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["a b ab ba aab bba"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=270,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids, spans = tokenizer.encode("ab</s> ab</s>ab")
    pieces = [model.id_to_piece(i) for i in ids]
    assert pieces == ["▁ab", "</s>", "▁ab", "</s>", "ab"]
    assert spans == [(0, 2), (2, 6), (6, 9), (9, 13), (13, 15)]


@pytest.mark.parametrize("name", ["v1", "llava_llama_2", "mistral_instruct", "plain"])
def test_golden_conversations(name: str, shared_data: Path, llama: Tokenizer) -> None:
    compared = 0
    for record in json.loads((shared_data / "golden_conversations.json").read_text()):
        if name not in record["expected"]:
            continue
        expected = record["expected"][name]
        turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        encoded = encode_conversation(turns, record["image"], get_template(name), llama)
        assert encoded.input_ids.tolist() == expected["input_ids"], record["name"]
        if expected.get("fully_masked_by_reference"):
            assert positions(encoded), record["name"]  # the reference lost this sample; we do not
        else:
            assert positions(encoded) == expected["supervised"], record["name"]
        compared += 1
    assert compared >= 5


def positions(encoded: Encoded) -> list[int]:
    return (encoded.labels != IGNORE_INDEX).nonzero().flatten().tolist()


def test_two_turns_by_hand(llama: Tokenizer) -> None:
    turns = [("human", "What?\n<image>"), ("gpt", "White and red"), ("human", "x"), ("gpt", "No")]
    encoded = encode_conversation(turns, True, get_template("v1"), llama)
    ids = encoded.input_ids.tolist()
    assert ids[0] == 1 and ids[32:38] == [1001, 29901, 29871, IMAGE_TOKEN_INDEX, 29871, 13]
    supervised = encoded.labels[encoded.labels != IGNORE_INDEX].tolist()
    assert supervised == [8037, 322, 2654, 2, 1939, 2]
    assert ids[ids.index(2) + 1] == 11889  # `USER` after `</s>` is one token


@pytest.mark.parametrize("answer", ["\nline", "中文", "  two", "🙂 fly", "a</s>b", "ASSISTANT: x"])
@pytest.mark.parametrize("name", ["v1", "llava_llama_2", "mistral_instruct", "mpt", "v0"])
def test_supervised_ids_spell_the_answers(name: str, answer: str, tiny: Tokenizer) -> None:
    """From the token of the space after the role to the closing, nothing before or after."""
    template = get_template(name)
    turns = [("human", "q 🙂"), ("gpt", answer), ("human", "中"), ("gpt", "red")]
    encoded = encode_conversation(turns, False, template, tiny)
    assert torch.equal(encoded.labels[positions(encoded)], encoded.input_ids[positions(encoded)])
    close = template.gpt.close.replace("</s>", "")
    spelled = tiny.decode(encoded.input_ids[positions(encoded)].tolist())
    gap = template.gpt.gap
    expected = gap + answer.replace("</s>", "") + close + gap + "red" + close
    assert spelled == expected.removeprefix(" ")


def test_plain_supervises_all_after_the_image(tiny: Tokenizer) -> None:
    for caption in ("red bus", "\nbus", "中", ""):
        turns = [("human", "<image>"), ("gpt", caption)]
        encoded = encode_conversation(turns, True, get_template("plain"), tiny)
        assert encoded.input_ids[:2].tolist() == [tiny.bos_id, IMAGE_TOKEN_INDEX]
        assert positions(encoded) == list(range(2, len(encoded.input_ids)))
        assert tiny.eos_id not in encoded.input_ids.tolist()


def test_segments_only_decide_labels(tiny: Tokenizer) -> None:
    text = "a  bus\n🙂中 USER: red</s>USER: no"
    whole = tokenize([Segment(text, True)], tiny, 0)
    assert positions(whole) == list(range(1, len(whole.input_ids)))
    for cut in range(len(text) + 1):
        before = tokenize([Segment(text[:cut], True), Segment(text[cut:], 0)], tiny, False)
        after = tokenize([Segment(text[:cut], 0), Segment(text[cut:], True)], tiny, False)
        assert torch.equal(before.input_ids, whole.input_ids)
        assert set(positions(before)) | set(positions(after)) == set(positions(whole))
        # A token that stands for characters on both sides is supervised both times.
        shared = set(positions(before)) & set(positions(after))
        straddling = [b < cut < e for b, e in tiny.encode(text)[1]]
        assert shared == {i + 1 for i, straddles in enumerate(straddling) if straddles}


def test_image_token_is_text_in_text_only_records(tiny: Tokenizer) -> None:
    turns = [("human", f"say {IMAGE_TOKEN}"), ("gpt", f"{IMAGE_TOKEN} ok")]
    encoded = encode_conversation(turns, False, get_template("v1"), tiny)
    assert IMAGE_TOKEN_INDEX not in encoded.input_ids.tolist()
    assert tiny.decode(encoded.input_ids.tolist()).count(IMAGE_TOKEN) == 2


def test_two_turns_with_placeholder_are_refused(tiny: Tokenizer) -> None:
    turns = [("human", "<image>"), ("gpt", "a"), ("human", "<image>"), ("gpt", "b")]
    with pytest.raises(DataError, match="2 turns hold <image>"):
        encode_conversation(turns, True, get_template("v1"), tiny)
    encode_conversation(turns, False, get_template("v1"), tiny)
    same_turn = [("human", "<image> or <image>?"), ("gpt", "a")]
    ids = encode_conversation(same_turn, True, get_template("v1"), tiny).input_ids.tolist()
    assert ids.count(IMAGE_TOKEN_INDEX) == 1


def test_decode_inverts_encode(tiny: Tokenizer) -> None:
    for text in random_texts(300, seed=2):
        clean = re.sub("<unk>|<s>|</s>|▁", "", text)
        ids = [tiny.bos_id, IMAGE_TOKEN_INDEX, *tiny.encode(clean)[0], tiny.eos_id, 10**6]
        assert tiny.decode(ids) == clean


def test_added_tokens_but_for_image_and_padding(tiny_vocabulary: Path, tmp_path: Path) -> None:
    model = (tiny_vocabulary / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    added = {
        "400": {"content": "<|im_end|>"},
        "401": {"content": "<image>"},
        "402": {"content": "<pad>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("red<|im_end|>red")[0].count(400) == 1
    assert max(tokenizer.encode("<image> <pad>")[0]) < 400
    assert tokenizer.vocab_size == 401
    assert tokenizer.fingerprint() != load_tokenizer(tiny_vocabulary).fingerprint()


def test_survives_pickling_to_a_worker(tiny: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tiny))
    assert copy.encode("</s>red  bus🙂") == tiny.encode("</s>red  bus🙂")
    assert copy.fingerprint() == tiny.fingerprint()


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A GPT-2-like `tokenizer.json` with ChatML tokens, no BOS, and `<image>` as an added token."""
    folder = tmp_path_factory.mktemp("bytelevel")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the user and the assistant"] * 50, trainer)
    tokenizer.add_special_tokens([IMAGE_TOKEN])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|pad|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def test_tokenizer_json(byte_level: Tokenizer) -> None:
    assert byte_level.bos_id is None and byte_level.eos_id == 1 and byte_level.pad_id == 2
    turns = [
        ("human", "q 🙂\n<image>"),
        ("gpt", "中 the assistant 🙂"),
        ("human", "é"),
        ("gpt", "b"),
    ]
    encoded = encode_conversation(turns, True, get_template("chatml_direct"), byte_level)
    ids = encoded.input_ids
    assert (ids == IMAGE_TOKEN_INDEX).sum() == 1 and ids[0] == 0
    spelled = byte_level.decode(encoded.labels[positions(encoded)].tolist())
    assert spelled == "中 the assistant 🙂b"
    assert ids[positions(encoded)].tolist().count(byte_level.eos_id) == 2
    text_only = byte_level.encode("a <image>")[0]
    assert byte_level.decode(text_only) == "a <image>" and max(text_only) < byte_level.vocab_size


def test_tokenizer_json_with_bos_from_its_own_template(tmp_path: Path) -> None:
    words = {"<s>": 0, "</s>": 1, "red": 2, "<unk>": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    encoded = tokenize([Segment("red red", True)], loaded, 0)
    assert encoded.input_ids.tolist() == [0, 2, 2]
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (0, 1, 4)


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer.model or tokenizer.json"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_bytes(b"garbage")
        with pytest.raises(UsageError, match="not a readable tokenizer"):
            load_tokenizer(tmp_path / name)


def test_model_class_is_sentencepiece_when_both_exist(tiny_vocabulary: Path) -> None:
    assert isinstance(load_tokenizer(tiny_vocabulary), SentencePieceTokenizer)
