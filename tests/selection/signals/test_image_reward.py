"""ImageReward: the published layout by plain formulas on its own names, and as a signal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from llava.errors import UsageError
from selection.extract.loop import extract_signal
from selection.pool.pool import Pool
from selection.settings import PoolSettings, ProxySettings
from selection.signals.image_reward import ImageReward
from selection.signals.image_reward_model import MEAN, STD, RewardModel
from tests.tiny_models import save_clip, save_pool

D, T, PATCH, SIDE, WORDS, BLOCKS = 128, 64, 7, 28, 420, 2  # widths of two heads and of one
N = 16


def published() -> dict[str, torch.Tensor]:
    """Random weights under the names of the published file."""
    rng = torch.Generator().manual_seed(0)
    state = {}

    def add(name: str, *shape: int) -> None:
        spread = 1.5 / math.sqrt(shape[-1])
        state[name] = torch.randn(shape, generator=rng) * (spread if len(shape) > 1 else 0.1)

    def linear(name: str, written: int, read: int) -> None:
        add(f"{name}.weight", written, read)
        add(f"{name}.bias", written)

    def norm(name: str, width: int) -> None:
        add(f"{name}.bias", width)
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=rng)

    see, read = "blip.visual_encoder", "blip.text_encoder"
    add(f"{see}.cls_token", 1, 1, D)
    add(f"{see}.pos_embed", 1, (SIDE // PATCH) ** 2 + 1, D)
    add(f"{see}.patch_embed.proj.weight", D, 3, PATCH, PATCH)
    add(f"{see}.patch_embed.proj.bias", D)
    norm(f"{see}.norm", D)
    for i in range(BLOCKS):
        for n in (1, 2):
            norm(f"{see}.blocks.{i}.norm{n}", D)
        for name, written, wide in (
            ("attn.qkv", 3 * D, D),
            ("attn.proj", D, D),
            ("mlp.fc1", 2 * D, D),
            ("mlp.fc2", D, 2 * D),
        ):
            linear(f"{see}.blocks.{i}.{name}", written, wide)
    add(f"{read}.embeddings.word_embeddings.weight", WORDS, T)
    add(f"{read}.embeddings.position_embeddings.weight", 40, T)
    state[f"{read}.embeddings.position_ids"] = torch.arange(40)[None]
    norm(f"{read}.embeddings.LayerNorm", T)
    for i in range(BLOCKS):
        layer = f"{read}.encoder.layer.{i}"
        for kind, width in (("attention", T), ("crossattention", D)):
            linear(f"{layer}.{kind}.self.query", T, T)
            linear(f"{layer}.{kind}.self.key", T, width)
            linear(f"{layer}.{kind}.self.value", T, width)
            linear(f"{layer}.{kind}.output.dense", T, T)
            norm(f"{layer}.{kind}.output.LayerNorm", T)
        linear(f"{layer}.intermediate.dense", 2 * T, T)
        linear(f"{layer}.output.dense", T, 2 * T)
        norm(f"{layer}.output.LayerNorm", T)
    head = {0: (T, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    for i, (wide, written) in head.items():
        linear(f"mlp.layers.{i}", written, wide)
    return state


def slow(state, pixels, ids, mask) -> float:
    """The reward of one image (3, H, W) and one text (L,), formula by formula."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q, k, v, heads, seen=None):
        q, k, v = (x.view(len(x), heads, -1).transpose(0, 1) for x in (q, k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    see, read = "blip.visual_encoder", "blip.text_encoder"
    weight, bias = (state[f"{see}.patch_embed.proj.{x}"] for x in ("weight", "bias"))
    patches = F.conv2d(pixels[None], weight, bias, stride=PATCH)[0].flatten(1).T
    x = torch.cat([state[f"{see}.cls_token"][0], patches]) + state[f"{see}.pos_embed"][0]
    for i in range(BLOCKS):
        block = f"{see}.blocks.{i}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v, D // 64))
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
        x = x + linear(f"{block}.mlp.fc2", hidden)
    image = norm(f"{see}.norm", x, 1e-6)
    x = state[f"{read}.embeddings.word_embeddings.weight"][ids]
    x = x + state[f"{read}.embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(f"{read}.embeddings.LayerNorm", x, 1e-12)
    for i in range(BLOCKS):
        layer = f"{read}.encoder.layer.{i}"
        both = ("attention", None, mask.bool()), ("crossattention", image, None)
        for kind, other, seen in both:
            of, name = (x if other is None else other), f"{layer}.{kind}"
            q, k, v = (
                linear(f"{name}.self.{part}", y)
                for part, y in (("query", x), ("key", of), ("value", of))
            )
            out = linear(f"{name}.output.dense", attend(q, k, v, T // 64, seen))
            x = norm(f"{name}.output.LayerNorm", out + x, 1e-12)
        out = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", x)))
        x = norm(f"{layer}.output.LayerNorm", out + x, 1e-12)
    x = x[0]
    for i in (0, 2, 4, 6, 7):
        x = linear(f"mlp.layers.{i}", x)
    return (x.item() - MEAN) / STD


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    torch.save(published(), folder / "ImageReward.pt")
    save_file(published(), folder / "reward.safetensors")
    save_clip(folder / "words")  # for its tokenizer
    save_pool(folder / "pool", N)
    return folder


def extract(place, store, **settings):
    path = place / "pool/pool.json"
    signal = ImageReward(str(place / "ImageReward.pt"), str(place / "words"))
    where = PoolSettings(str(path), str(place / "pool/images"))
    proxy = ProxySettings(store=str(store), device="cpu", **settings)
    return extract_signal(signal, np.arange(N), Pool.open(path), where, proxy)


@torch.no_grad()
@pytest.mark.parametrize("file", ["ImageReward.pt", "reward.safetensors"])
def test_equals_the_formulas_on_the_published_names(place, file):
    model = RewardModel(place / file, place / "words", torch.float32, torch.device("cpu"))
    rng = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=rng)
    ids = torch.randint(3, 400, (3, 12), generator=rng)
    mask = (torch.arange(12) < torch.tensor([[12], [5], [9]])).long()
    expected = [slow(published(), *sample) for sample in zip(pixels, ids, mask, strict=True)]
    found = model.model(pixels, ids, mask)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert np.std(expected) > 0.05


def test_a_sample_with_an_image_has_a_reward_whatever_its_batch(place, tmp_path):
    one, many = (extract(place, tmp_path / str(n), batch_size=n) for n in (1, 7))
    rewards = many.column("image_reward")
    np.testing.assert_array_equal(one.column("image_reward"), rewards)
    has_image = np.arange(N) % 4 != 0
    assert np.isfinite(rewards[has_image]).all() and len(np.unique(rewards[has_image])) > 5
    assert np.isnan(rewards[~has_image]).all() and many.bad == []


def test_another_file_is_one_clear_line(place, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"no weights")
    torch.save({"a": torch.zeros(2)}, tmp_path / "y.pt")
    for name in ("x.pt", "y.pt"):
        with pytest.raises(UsageError, match="not ImageReward's weights"):
            RewardModel(tmp_path / name, place / "words", torch.float32, torch.device("cpu"))
    with pytest.raises(UsageError, match="No such file"):
        ImageReward(str(tmp_path / "none")).identity()


def test_a_missing_tensor_is_never_filled_in(place, tmp_path):
    state = published()
    del state["mlp.layers.4.bias"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="head.4.bias"):
        RewardModel(tmp_path / "x.safetensors", place / "words", torch.float32, torch.device("cpu"))
