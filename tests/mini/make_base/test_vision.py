"""Drawings are varied within bounds, and training is seeded."""

import io

import pytest
import torch
from PIL import Image, ImageDraw

from mini.make_base import vision
from mini.make_base.lessons import Thing


def png(colour, box):
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).rectangle(box, fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def drawings():
    colours = ("red", "green", "blue", "black")
    boxes = ((10, 10, 80, 40), (30, 5, 50, 90))
    shown = [
        (png(c, b), Thing(f"{c} bar{i}", "", "bar")) for c in colours for i, b in enumerate(boxes)
    ]
    pixels = torch.stack([vision.with_opacity(raw) for raw, _ in shown])
    return vision.Drawings(pixels, [thing for _, thing in shown])


def test_white_is_transparent_and_all_else_is_not(drawings):
    opacity = drawings.pixels[0, 3]
    assert opacity[20, 20] == 255
    assert opacity[90, 90] == 0


def test_plain_view_is_the_picture_as_clip_sees_it(drawings):
    shown = vision.plain(drawings.pixels[:1])
    expected = vision.normalised(drawings.pixels[:1, :3].float() / 255)
    assert torch.allclose(shown, expected, atol=1e-6)


def test_variation_is_within_range_seeded_and_strong(drawings):
    first, again, other = (
        vision.varied(drawings.pixels, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    low, high = vision.normalised(torch.zeros(3, 1, 1)), vision.normalised(torch.ones(3, 1, 1))
    assert torch.equal(first, again)
    assert (first >= low - 1e-5).all() and (first <= high + 1e-5).all()
    assert (first - other).abs().mean() > 0.2


def test_training_moves_the_tower_and_repeats_for_a_seed(drawings):
    untrained, first, again = (vision.train_tower(drawings, n, 0) for n in (0, 2, 2))
    pairs = zip(untrained.parameters(), first.parameters(), again.parameters(), strict=True)
    moved = []
    for start, one, two in pairs:
        assert torch.equal(one, two)
        moved.append(not torch.equal(start, one))
    assert sum(moved) > len(moved) / 2


@torch.no_grad()
def test_bank_begins_with_the_plain_views(drawings):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=96, patch_size=16,
    )  # fmt: skip
    tower = CLIPVisionModel(config).eval()
    bank = vision.feature_bank(tower, drawings, 2, torch.Generator().manual_seed(0))
    assert bank.shape == (2, 8, 36, 32)
    direct = tower(vision.plain(drawings.pixels), output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(bank[0].float(), direct[:, 1:], atol=5e-3)  # float16
