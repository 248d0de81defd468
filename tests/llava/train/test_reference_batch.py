"""One whole batch against a slow reference: tokens, labels, padding, truncation and loss.

The reference follows docs/Data.md's account of LLaVA-1.5 by itself. It shares the vocabulary file,
the image processor (tested in test_images.py) and the weights with the code, and nothing else:
conversations are spelled out here, labels come from tokenising ever longer beginnings of the text,
image features are put in one position at a time, and the loss takes all logits in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from llava.images import ImageProcessor
from llava.train import __main__ as entry
from llava.train.arguments import parse
from llava.train.stages import load_model, prepare
from llava.train.trainer import LlavaTrainer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
N_IMAGE = 16  # positions of an image of the tiny tower
BOS, EOS, PAD, IGNORE = 1, 2, 0, -100
IMAGE = object()  # a position in front of expansion

Turns = list[tuple[str, str]]
CONVERSATIONS: list[tuple[Turns, str | None]] = [
    ([("<image>\nWhat is the colour?", "red")], "red.png"),
    ([("What is in the image?\n<image>", "a white  bus, and\n  two more")], "wide.png"),
    ([("Is the answer no?", "yes"), ("and  is\tthis?", "no"), ("What?", "the answer")], None),
    ([("<image>\nWhat?", "no"), ("Is it red?", "yes")], "tall.png"),
    ([("<image>\nWhat is the colour?", "the user " * 90)], "red.png"),  # cut after expansion
    ([("Wie heißt das? 这是什么 🙂", "日本語 é 🚌")], None),
]
ROLES = ("human", "gpt")
MAX_LENGTH = 190


def spelled(turns: Turns, has_image: bool) -> list[tuple[str, bool]]:
    """Template v1 as (text, supervised) pieces, with `<image>` moved to the front of its turn."""
    pieces = [(SYSTEM + " ", False)]
    for question, answer in turns:
        if has_image and "<image>" in question:
            question = "<image>\n" + question.replace("<image>", "").strip()
        pieces += [(f"USER: {question} ASSISTANT:", False), (f" {answer}</s>", True)]
    return pieces


def tokens(text: str, model: sentencepiece.SentencePieceProcessor) -> list[int]:
    """Ids of a chunk: the vocabulary's own leading space at its start, none behind `</s>`."""
    ids: list[int] = []
    for number, part in enumerate(text.split("</s>")):
        if number:
            ids.append(EOS)
        if number and part:
            ids += model.encode("\n" + part)[2:]  # a space and a line break, which never merge
        elif part:
            ids += model.encode(part)
    return ids


def ids_so_far(text: str, has_image: bool, model: sentencepiece.SentencePieceProcessor) -> list:
    """BOS and the ids of everything written so far; both sides of the image by themselves."""
    ids: list = [BOS]
    for number, chunk in enumerate(text.split("<image>") if has_image else [text]):
        if number:
            ids.append(IMAGE)
        ids += tokens(chunk, model)
    return ids


def encoded(
    turns: Turns, has_image: bool, model: sentencepiece.SentencePieceProcessor, limit: int
) -> tuple[list, list[int]]:
    """Ids with the image expanded, and labels, cut at `limit`."""
    text, ids, labels = "", [BOS], [IGNORE]
    for piece, supervised in spelled(turns, has_image):
        text += piece
        longer = ids_so_far(text.rstrip(" "), has_image, model)  # a space belongs to what follows
        assert longer[: len(ids)] == ids
        labels += [id_ if supervised and id_ is not IMAGE else IGNORE for id_ in longer[len(ids) :]]
        ids = longer
    expanded, expanded_labels = [], []
    for id_, label in zip(ids, labels, strict=True):
        n = N_IMAGE if id_ is IMAGE else 1
        expanded += [id_] * n
        expanded_labels += [label] * n
    return expanded[:limit], expanded_labels[:limit]


# ---- a model on either vocabulary ----------------------------------------------------------------


@pytest.fixture(params=["tiny", "llama"])
def vocabulary(request: pytest.FixtureRequest) -> Path:
    """Folder of a vocabulary: one made here, or Llama's own where it is present."""
    if request.param == "tiny":
        return request.getfixturevalue("tiny_vocabulary")
    return request.getfixturevalue("shared_data") / "llama_tokenizer"


@pytest.fixture
def trainer(
    vocabulary: Path, parts: Path, run: Callable[..., Path], tmp_path: Path
) -> LlavaTrainer:
    """The real trainer on `CONVERSATIONS`, in file order, as one batch."""
    _save_language_model(tmp_path / "lm", vocabulary)
    images = {"red": (30, 28), "wide": (60, 20), "tall": (11, 47)}
    for number, (name, size) in enumerate(images.items()):
        noise = torch.randint(0, 255, (size[1], size[0], 3), dtype=torch.uint8)
        Image.fromarray((noise // 2 + 40 * number).numpy()).save(tmp_path / f"{name}.png")
    records = []
    for turns, image in CONVERSATIONS:
        said = [{"from": f, "value": v} for turn in turns for f, v in zip(ROLES, turn, strict=True)]
        records.append({"conversations": said} | ({"image": image} if image else {}))
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = run.flags(
        "out",
        model_name_or_path=tmp_path / "lm",
        data_path=tmp_path / "data.json",
        image_folder=tmp_path,
        image_aspect_ratio="pad",
        mm_vision_select_layer=-2,
        mm_projector_type="mlp2x_gelu",
        model_max_length=MAX_LENGTH,
        per_device_train_batch_size=len(records),
        train_sampling_strategy="sequential",
    )
    arguments = parse(flags)
    loaded = load_model(arguments)
    return LlavaTrainer(
        model=prepare(arguments, loaded),
        args=arguments.training,
        train_dataset=entry.make_dataset(arguments, loaded),
        data_collator=entry.make_collator(loaded),
        export=lambda folder: None,
        restore=lambda folder: None,
    )


def _save_language_model(folder: Path, vocabulary: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(str(vocabulary / "tokenizer.model"))
    config = LlamaConfig(
        vocab_size=model.get_piece_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((vocabulary / "tokenizer.model").read_bytes())


def slow_loss(model: torch.nn.Module, rows: list[tuple[list, list[int]]], pixels: dict) -> float:
    """Mean over all supervised tokens, sample by sample, from all logits in float64."""
    model = model.double()
    table, language = model.get_input_embeddings().weight, model.model.language_model
    total, count = 0.0, 0
    for number, (ids, labels) in enumerate(rows):
        features = iter(())
        if number in pixels:
            tower = model.model.vision_tower(
                pixels[number][None].double(), output_hidden_states=True
            )
            hidden = tower.hidden_states[model.config.vision_feature_layer][0, 1:]
            features = iter(model.model.multi_modal_projector(hidden))
        embedded = torch.stack([next(features) if i is IMAGE else table[i] for i in ids])
        assert next(features, None) is None
        states = language(inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0]
        logits = states @ model.lm_head.weight.T
        for position, label in enumerate(labels[1:]):
            if label != IGNORE:
                row = logits[position]
                total += float(torch.logsumexp(row, 0) - row[label])
                count += 1
    return total / count


def test_batch_and_loss_equal_the_slow_reference(trainer: LlavaTrainer, tmp_path: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "lm" / "tokenizer.model"))
    expected = [
        encoded(turns, image is not None, pieces, MAX_LENGTH) for turns, image in CONVERSATIONS
    ]
    lengths = [len(ids) for ids, _ in expected]
    assert max(lengths) == MAX_LENGTH and lengths.count(MAX_LENGTH) == 1, lengths
    (batch,), n_tokens = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), 1, torch.device("cpu")
    )

    assert batch["input_ids"].shape == batch["labels"].shape == (len(expected), MAX_LENGTH)
    image_id = trainer.model.config.image_token_id
    for row, (ids, labels) in enumerate(expected):
        n_padding = MAX_LENGTH - len(ids)
        whole = [image_id if i is IMAGE else i for i in ids]
        assert batch["input_ids"][row].tolist() == whole + [PAD] * n_padding
        assert batch["labels"][row].tolist() == labels + [IGNORE] * n_padding
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * n_padding

    processor = ImageProcessor(28, aspect_ratio="pad")
    pixels = {
        row: processor(Image.open(tmp_path / image))
        for row, (_, image) in enumerate(CONVERSATIONS)
        if image
    }
    assert torch.equal(batch["pixel_values"], torch.stack(list(pixels.values())))

    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=n_tokens).item()
        assert n_tokens == sum(label != IGNORE for _, labels in expected for label in labels)
        # float32 against float64: some 1e-7 a token, and the mean of hundreds of them
        assert loss == pytest.approx(slow_loss(trainer.model, expected, pixels), rel=2e-6)
