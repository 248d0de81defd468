"""A small random LLaVA-1.5 with real JPEGs and samples of LLaVA-1.5's lengths, for benchmarks.

The proportions that decide a ratio are those of the real thing: 576 positions an image, text as
long as in the mixture, an output layer of some hundredths of the language model.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageFilter
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llava.model.assemble import assemble
from llava.model.checkpoint import DEFAULTS, Kind, wrap
from llava.model.export import save

N_IMAGE = 576
MAX_LENGTH = 2048
TEXT_ONLY = 0.061  # share of samples: ShareGPT's 40,688 of 665,298
N_JPEGS = 64
PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT: "
)
OVERHEAD = 39  # tokens of the template around a question and an answer


@dataclass(frozen=True)
class Mixture:
    """Lengths of `n` samples: `tokens` (n,) with the image, `has_image` (n,) bool."""

    tokens: np.ndarray
    has_image: np.ndarray

    @property
    def words(self) -> list[int]:
        """What the sampler sees of them: about the text's length, negative for text alone."""
        text = self.tokens - np.where(self.has_image, N_IMAGE, 0)
        return np.where(self.has_image, text, -text).tolist()


def make_mixture(n: int, seed: int = 0) -> Mixture:
    """LLaVA-1.5's mix of lengths, as assumed here.

    Text beside an image is log-normal: median 110 tokens, sigma 0.85, within 30..900. Text-only
    samples are ShareGPT's long conversations: median 1000, sigma 0.8, cut at 2048.
    """
    rng = np.random.default_rng(seed)
    has_image = rng.permutation(n) >= round(TEXT_ONLY * n)
    beside = np.clip(rng.lognormal(np.log(110), 0.85, n), 30, 900).astype(int) + N_IMAGE
    alone = np.clip(rng.lognormal(np.log(1000), 0.8, n), 60, MAX_LENGTH).astype(int)
    return Mixture(np.where(has_image, beside, alone), has_image)


def save_model(folder: Path, hidden_size: int, n_layers: int, n_tower_layers: int = 2) -> Path:
    """A llava-hf directory of random weights; the tower reads 336 pixels in 577 positions."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=sentencepiece.SentencePieceProcessor(model_proto=tokenizer).get_piece_size(),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=n_layers,
        num_attention_heads=hidden_size // 64,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "lm")
    (folder / "lm" / "tokenizer.model").write_bytes(tokenizer)
    tower = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=n_tower_layers,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    CLIPVisionModel(tower).save_pretrained(folder / "clip")
    CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    ).save_pretrained(folder / "clip")
    model = assemble(folder / "lm", folder / "clip", projector_type="mlp2x_gelu")
    loaded = wrap(model, Kind.HF_LLAVA, [folder / "lm"], [folder / "clip"], DEFAULTS)
    save(loaded, folder / "llava")
    return folder / "llava"


def single_tokens() -> list[str]:
    """A hundred and fifty words of two or three syllables, each one token."""
    syllables = [c + v for c in "bdfgklmnprst" for v in "aeiou"]
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(syllables, 2 + i % 2)) for i in range(150)]


def _tokenizer() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*single_tokens(), *PROMPT.split()] * 3),
        model_writer=model,
        vocab_size=1000,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def save_images(folder: Path, n: int = N_JPEGS, size: tuple[int, int] = (640, 480)) -> list[str]:
    """JPEGs with COCO's size and about its bytes (0.1 MB); their names."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        grain = np.asarray(
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).filter(
                ImageFilter.GaussianBlur(1)
            ),
            dtype=np.int16,
        )
        picture = np.clip(smooth + (grain - 128) // 2, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.jpg", quality=90)
    return [f"{i}.jpg" for i in range(n)]


def save_samples(folder: Path, mixture: Mixture) -> tuple[Path, Path]:
    """A LLaVA JSON of samples that long, and its image folder."""
    names = save_images(folder / "images")
    rng, words = np.random.default_rng(1), np.array(single_tokens())
    records = []
    for row, (tokens, has_image) in enumerate(zip(mixture.tokens, mixture.has_image, strict=True)):
        n_words = max(2, int(tokens) - OVERHEAD - (N_IMAGE if has_image else 0))
        text = rng.choice(words, n_words)
        question, answer = " ".join(text[: n_words // 2]), " ".join(text[n_words // 2 :])
        record = {"id": row, "conversations": []}
        if has_image:
            question = f"<image>\n{question}"
            record["image"] = names[row % len(names)]
        record["conversations"] = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer},
        ]
        records.append(record)
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path, folder / "images"
