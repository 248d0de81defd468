"""Tiny real parts of a LLaVA: sentencepiece vocabularies, a Llama and a CLIP."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llava.tokens import load_tokenizer

TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT: What colour "
    "is the square? Answer with the option's letter from the given choices directly. red green "
    "blue yellow A. B. C. D. yes no circle triangle \n"
)
HIDDEN = 32
IMAGE_SIZE, PATCH_SIZE = 28, 7  # 16 image tokens


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `lm/` (Llama and vocabulary) and `clip/` (a whole CLIPModel)."""
    root = tmp_path_factory.mktemp("parts")
    _make_tokenizer(root / "lm")
    vocab_size = load_tokenizer(root / "lm").vocab_size
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _make_llama(root / "lm", vocab_size)
        _make_clip(root / "clip")
    return root


def _make_tokenizer(folder: Path) -> None:
    folder.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split(" ") * 3),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def _make_llama(folder: Path, vocab_size: int) -> None:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        initializer_range=0.2,  # large enough for wrong weights to show in the logits
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _make_clip(folder: Path) -> None:
    common = {
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
    }
    vision = {"hidden_size": 24, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, **common}
    text = {"hidden_size": 16, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, **common}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(folder)


WORDS = (
    "the a what is of in this image answer question USER ASSISTANT curious user human and "
    "intelligence assistant gives helpful detailed polite answers questions yes no red white bus"
).split()


@pytest.fixture(scope="session")
def tiny_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `tokenizer.model` of the Llama kind: BPE, byte fallback, every space kept."""
    folder = tmp_path_factory.mktemp("vocabulary")
    lines = [f"{a} {b}:  {a}, {b}. {i}" for i, (a, b) in enumerate(itertools.product(WORDS, WORDS))]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder
