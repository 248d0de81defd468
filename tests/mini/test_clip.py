"""The small world's CLIP: the shipped tower's eyes, a text side that learns, made once."""

import json

import pytest
import torch
import transformers as hf

from mini import SHIPPED, clip
from selection.pool.pool import Pool
from selection.signals.clip_models import ClipModel

COLOURS = ["red", "green", "blue", "white", "black", "yellow", "pink", "brown"]
N = 64


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures of one colour each, and a sentence that names it."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    records = []
    for row in range(N):
        colour = COLOURS[row % 8]
        Image.new("RGB", (96, 96), colour).save(folder / "images" / f"{row % 8}.png")
        turns = [("human", "<image>\nWhat colour?"), ("gpt", f"It is {colour}.")]
        turns = [{"from": role, "value": text} for role, text in turns]
        records.append({"id": row, "image": f"{row % 8}.png", "conversations": turns})
    (folder / "pool.json").write_text(json.dumps(records))
    argv = ["--data", folder, "--out", folder / "clip", "--vocabulary", "600"]
    argv += ["--epochs", "30", "--batch_size", "8"]
    clip.main(list(map(str, argv)))
    return folder, list(map(str, argv))


@pytest.fixture(scope="module")
def model(world):
    return ClipModel(world[0] / "clip", torch.float32, torch.device("cpu"))


@torch.no_grad()
def test_it_sees_with_the_shipped_tower(model):
    tower = hf.CLIPVisionModel.from_pretrained(SHIPPED / "clip", dtype=torch.float32)
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    seen = model.model.vision_model(pixel_values=pixels).pooler_output
    torch.testing.assert_close(seen, tower(pixel_values=pixels).pooler_output)


@torch.no_grad()
def test_the_right_text_is_nearest(world, model):
    pool = Pool.open(world[0] / "pool.json")
    records = [pool.record(row) for row in range(8)]
    texts = model.encode_texts([model.tokens(clip.text_of(record)) for record in records])
    images = [clip.open_image(world[0] / "images", record.image) for record in records]
    pictures = model.encode_images(torch.stack([model.pixels(image) for image in images]))
    assert (pictures @ texts.T).argmax(1).tolist() == list(range(8))


def test_the_text_is_cut_at_77_tokens_and_keeps_its_end(model):
    ids = model.tokens("red green " * 100)
    assert len(ids) == clip.MAX_LENGTH and ids[-1] == model.model.config.text_config.eos_token_id


def test_it_is_made_once_and_again_for_other_settings(world, capsys):
    folder, argv = world
    before = (folder / "clip" / "model.safetensors").stat().st_mtime_ns
    clip.main(argv)
    assert "already made" in capsys.readouterr().out
    assert (folder / "clip" / "model.safetensors").stat().st_mtime_ns == before
    clip.main([*argv, "--epochs", "1"])
    assert (folder / "clip" / "model.safetensors").stat().st_mtime_ns != before


def test_the_same_settings_give_the_same_weights(world, tmp_path):
    _, argv = world
    for name in ("a", "b"):
        clip.main([*argv, "--epochs", "1", "--out", str(tmp_path / name)])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
