"""`python -m mini clip`: the small world's CLIP, what reads pictures and text for CoIDO and others.

The shipped vision tower has lost its text side. Here a small text tower learns, by CLIP's own
contrast, which conversation of the pool goes with which picture; the vision tower stays as it is.
Two minutes. Wrong captions of the pool are learnt from too, as CLIP's own are.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
import xxhash
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from llava.errors import UsageError
from llava.files import atomic_write, make_folder
from llava.flags import Parser
from llava.images import open_image
from llava.model.sources import quiet_transformers
from mini import SHIPPED
from selection.pool.pool import Pool
from selection.signals.clip import distinct_images, image_owner, text_of

MAX_LENGTH = 77
_MARKS = ("<|unknown|>", "<|endoftext|>", "<|startoftext|>")  # 2 as the end has another meaning
_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
}


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """What the text tower learns from, and how."""

    data: str = "playground/mini"
    """folder that `python -m mini build` filled"""
    tower: str = str(SHIPPED / "clip")
    """folder of the vision tower"""
    out: str = "playground/mini/clip"
    """folder for the CLIP checkpoint"""
    vocabulary: int = 3000
    """words that the text tower knows, the most frequent ones"""
    epochs: int = 2
    """passes over the pool's pictures with their conversations"""
    batch_size: int = 128
    """pairs a step; each text is told from so many pictures"""
    learning_rate: float = 1e-3
    """peak; linear decay"""
    seed: int = 0
    """seed of the weights and of the training order"""


def main(args: Sequence[str]) -> None:
    """Parse and train, or say that this very CLIP is there."""
    parser = Parser(prog="python -m mini clip", description=__doc__.splitlines()[0])
    parser.add_class_arguments(ClipSettings)
    settings = ClipSettings(**parser.parse_args(list(args)).as_dict())
    pool_file = Path(settings.data) / "pool.json"
    if not pool_file.is_file():
        raise UsageError(f"{pool_file}: not there; run `python -m mini build` first")
    pool = Pool.open(pool_file)
    done, made_from = Path(settings.out) / "clip.json", identity(settings, pool)
    if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["made_from"] == made_from:
        print(f"{settings.out}: already made")
        return
    shutil.rmtree(settings.out, ignore_errors=True)
    make_folder(settings.out)
    started = time.monotonic()
    accuracy = make_clip(settings, pool)
    print(
        f"{settings.out}: made in {time.monotonic() - started:.0f} s; finds the text of "
        f"{accuracy:.0%} of the pictures among {settings.batch_size}"
    )
    atomic_write(done, json.dumps({"made_from": made_from}, indent=1).encode())


def identity(settings: ClipSettings, pool: Pool) -> dict[str, Any]:
    """What decides the checkpoint: pool, tower and settings."""
    chosen = dataclasses.asdict(settings)
    for place in ("data", "tower", "out"):
        del chosen[place]
    tower = (Path(settings.tower) / "model.safetensors").read_bytes()
    return {"pool": pool.sha256, "tower": xxhash.xxh3_128_hexdigest(tower), "settings": chosen}


@quiet_transformers()
def make_clip(settings: ClipSettings, pool: Pool) -> float:
    """Train and save; returns how often the last epoch's pictures found their text."""
    rows = np.flatnonzero(pool.has_image)
    texts = [text_of(pool.record(row)) for row in rows.tolist()]
    tokenizer = word_tokenizer(texts, settings.vocabulary)
    ids = [torch.tensor(x) for x in tokenizer(texts, truncation=True)["input_ids"]]
    processor = hf.CLIPImageProcessorPil.from_pretrained(settings.tower, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = assembled(settings.tower, tokenizer)
    firsts = distinct_images(pool, rows)
    pictures = seen(model, processor, pool, firsts, Path(settings.data) / "images")
    accuracy = train(model, pictures[image_owner(pool, firsts)[rows]], ids, settings)
    model.save_pretrained(settings.out)
    tokenizer.save_pretrained(settings.out)
    processor.save_pretrained(settings.out)
    return accuracy


def word_tokenizer(texts: Sequence[str], size: int) -> hf.PreTrainedTokenizerFast:
    """Whole words in lower case: training pieces does not give the same ones every time."""
    words = pre_tokenizers.Whitespace()
    counts = Counter(word for text in texts for word, _ in words.pre_tokenize_str(text.lower()))
    known = sorted(counts, key=lambda word: (-counts[word], word))[: size - len(_MARKS)]
    vocabulary = {word: i for i, word in enumerate([*_MARKS, *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_MARKS[0]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), words
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_MARKS[2]} $A {_MARKS[1]}",
        special_tokens=[(mark, vocabulary[mark]) for mark in _MARKS],
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        **dict(zip(("unk_token", "eos_token", "bos_token"), _MARKS, strict=True)),
    )


def assembled(tower: str | Path, tokenizer: hf.PreTrainedTokenizerFast) -> hf.CLIPModel:
    """The vision tower with an untrained text tower; only the tower's own weights are frozen."""
    vision = hf.CLIPVisionModel.from_pretrained(tower, dtype=torch.float32, local_files_only=True)
    marks = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos")}
    config = hf.CLIPConfig(
        text_config={**_TEXT, **marks, "vocab_size": len(tokenizer), "pad_token_id": None},
        vision_config=vision.config.to_dict(),
        projection_dim=vision.config.projection_dim,
    )
    model = hf.CLIPModel(config)
    state = vision.state_dict()
    prefix = "" if all(name.startswith("vision_model.") for name in state) else "vision_model."
    model.load_state_dict({prefix + name: value for name, value in state.items()}, strict=False)
    model.vision_model.requires_grad_(False)
    return model


@torch.no_grad()
def seen(
    model: hf.CLIPModel,
    processor: hf.CLIPImageProcessorPil,
    pool: Pool,
    rows: np.ndarray,
    folder: Path,
) -> torch.Tensor:
    """What the frozen tower makes of the images of `rows` (u,), before projection: (u, D)."""
    parts = []
    for chunk in np.array_split(rows, -(-len(rows) // 128)):
        images = [open_image(folder, pool.record(row).image) for row in chunk.tolist()]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        parts.append(model.vision_model(pixel_values=pixels).pooler_output)
    return torch.cat(parts)


def train(
    model: hf.CLIPModel, pictures: torch.Tensor, ids: list[torch.Tensor], settings: ClipSettings
) -> float:
    """Contrast `pictures` (n, D) with the texts of the same places; accuracy of the last epoch."""
    n, size = len(ids), min(settings.batch_size, len(ids))
    steps = settings.epochs * (n // size)
    generator = torch.Generator().manual_seed(settings.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (steps + 1))
    for _ in range(settings.epochs):
        hits, order = [], torch.randperm(n, generator=generator)
        for batch in order[: n // size * size].view(-1, size):
            logits = similarity(model, pictures[batch], [ids[i] for i in batch.tolist()])
            right = torch.arange(size)
            loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            hits.append((logits.argmax(1) == right).float().mean().item())
    return float(np.mean(hits))


def similarity(
    model: hf.CLIPModel, pictures: torch.Tensor, ids: list[torch.Tensor]
) -> torch.Tensor:
    """Scaled cosines (B, B) of pictures, before projection (B, D), with texts."""
    end = model.config.text_config.eos_token_id
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=end)
    texts = model.get_text_features(padded).pooler_output
    texts, shown = (
        F.normalize(texts, dim=-1),
        F.normalize(model.visual_projection(pictures), dim=-1),
    )
    return shown @ texts.T * model.logit_scale.exp().clamp(max=100)
