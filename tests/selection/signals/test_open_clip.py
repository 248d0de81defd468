"""CLIP checkpoints of open_clip: its own numbers one by one, and the contract of every CLIP.

open_clip needs a torchvision that works with this torch; where it does not import, what needs it is
skipped.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava.errors import RefusedError, UsageError
from selection.extract.loop import extract_signal
from selection.pool.pool import Pool
from selection.settings import PoolSettings, ProxySettings
from selection.signals.clip import Clip, text_of
from selection.signals.clip_models import OPEN_CLIP, ClipModel, checkpoint_content, load_clip
from tests.tiny_models import save_clip, save_pool

N = 40
VISION = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 7, "image_size": 28}
TEXT = {"layers": 2, "width": 64, "heads": 2}
MODELS = {
    # CLIP's own words and end token, which has the highest number
    "clip": {"text_cfg": {**TEXT, "context_length": 77, "vocab_size": 49408}},
    # as SigLIP: reads both ways, and its last position, which is padding
    "both ways": {
        "custom_text": True,
        "text_cfg": {
            **TEXT,
            "context_length": 20,
            "vocab_size": 420,
            "no_causal_mask": True,
            "pool_type": "last",
            "hf_tokenizer_name": "some/where",
        },
    },
}


class World:
    """A tiny random model in open_clip's own layout, and a pool with images."""

    def __init__(self, open_clip, folder: Path, config: dict) -> None:
        from open_clip.push_to_hf_hub import save_for_hf

        self.library, self.model, config = open_clip, folder / "model", {"embed_dim": 24, **config}
        config = {**config, "vision_cfg": VISION}
        torch.manual_seed(0)
        kind = open_clip.CustomTextCLIP if "custom_text" in config else open_clip.CLIP
        model = kind(**{key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")})
        for weight in model.parameters():
            weight.data *= 4  # so that different inputs give clearly different outputs
        open_clip.factory.set_model_preprocess_cfg(
            model, {"mean": (0.4, 0.5, 0.6), "std": (0.3,) * 3, "size": 28}
        )
        words = open_clip.tokenizer.HFTokenizer(str(save_clip(folder / "words")))
        save_for_hf(model, words, config, str(self.model), safe_serialization=True)
        self.path, self.images = save_pool(folder / "pool", N)
        self.pool = Pool.open(self.path)

    def extract(self, store: Path, **settings):
        proxy = ProxySettings(store=str(store), device="cpu", **settings)
        where = PoolSettings(str(self.path), str(self.images))
        return extract_signal(Clip(str(self.model)), np.arange(N), self.pool, where, proxy)


@pytest.fixture(scope="module", params=MODELS)
def world(request, tmp_path_factory):
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"open_clip does not import: {error}")
    return World(open_clip, tmp_path_factory.mktemp("world"), MODELS[request.param])


@pytest.fixture(scope="module")
def reader(world):
    return world.extract(world.model.parent / "store")


@torch.no_grad()
def test_equals_open_clip_one_sample_at_a_time(world, reader):
    name = f"local-dir:{world.model}"
    model, transform = world.library.create_model_from_pretrained(name)
    tokenizer = world.library.get_tokenizer(name)
    for row in range(N):
        record = world.pool.record(row)
        text = model.eval().encode_text(tokenizer([text_of(record)]), normalize=True)[0]
        image = torch.zeros(24)
        if record.image:
            pixels = transform(Image.open(world.images / record.image).convert("RGB"))
            image = model.encode_image(pixels[None], normalize=True)[0]
        expected = {"image_features": image, "text_features": text}
        expected["clip_score"] = image @ text if record.image else torch.nan
        for column, value in expected.items():
            found = reader.column(column)[row]
            np.testing.assert_allclose(found, value, atol=2e-6, err_msg=f"{column} {row}")
    assert reader.bad == []
    assert all(np.std(reader.column(name)[1::4], 0).max() > 0.05 for name in reader.columns)


@pytest.mark.bits
@pytest.mark.parametrize("how", [{"batch_size": 1}, {"batch_size": 5}, {"block_size": 7}], ids=str)
def test_the_same_bits_however_it_is_computed(world, reader, tmp_path, how):
    again = world.extract(tmp_path, **how)
    for name in reader.columns:
        np.testing.assert_array_equal(again.column(name), reader.column(name), err_msg=name)


def test_a_text_is_cut_at_the_models_length_and_never_at_random(world, tmp_path):
    model, text = load_clip(str(world.model), "float32", "cpu"), "red green blue " * 50
    ids = model.tokens(text)
    assert len(ids) == len(model.tokens("red")) == model.max_length
    drawing = Path(shutil.copytree(world.model, tmp_path / "drawing"))
    config = json.loads((drawing / OPEN_CLIP).read_text())
    assert config["model_cfg"]["text_cfg"]["context_length"] == model.max_length
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"reduction_mask": "shuffle"}
    (drawing / OPEN_CLIP).write_text(json.dumps(config))
    assert torch.equal(load_clip(str(drawing), "float32", "cpu").tokens(text), ids)


def test_the_store_knows_library_and_content(world, reader, tmp_path):
    proxy = reader.identity["proxy"]
    assert proxy["kind"] == "open_clip"
    assert world.library.__version__.startswith(proxy["open_clip"]) and proxy["torchvision"]
    moved = Path(shutil.copytree(world.model, tmp_path / "moved"))
    before = checkpoint_content(str(world.model))
    assert checkpoint_content(str(moved)) == before
    for file in moved.iterdir():
        checkpoint_content.cache_clear()
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert checkpoint_content(str(moved)) != before, file.name
        file.write_bytes(data)


def test_what_open_clip_would_make_up_or_refuses_is_one_clear_line(world, tmp_path):
    (weights,) = world.model.glob("*.safetensors")
    for i, data in enumerate((None, b"no weights")):
        broken = Path(shutil.copytree(world.model, tmp_path / str(i)))
        (broken / weights.name).unlink()
        if data:
            (broken / weights.name).write_bytes(data)
        with pytest.raises(UsageError, match="no CLIP with tokenizer"):
            load_clip(str(broken), "float32", "cpu")


# ---- without open_clip ---------------------------------------------------------------------------


def checkpoint(folder: Path, text: dict, vision: dict) -> str:
    config = {"model_cfg": {"embed_dim": 24, "text_cfg": text, "vision_cfg": vision}}
    (folder / OPEN_CLIP).write_text(json.dumps(config))
    return str(folder)


def test_without_the_library_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)  # as Python marks what cannot be imported
    name = checkpoint(tmp_path, TEXT, VISION)
    with pytest.raises(UsageError, match="pip install open_clip_torch.*torchvision") as error:
        load_clip(name, "float32", "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, vision, error, said",
    [
        ({"hf_model_name": "xlm-roberta-large"}, {}, UsageError, "would be downloaded"),
        ({}, {"timm_model_name": "hf-hub:some/where"}, UsageError, "would be downloaded"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, {}, RefusedError, "is code"),
    ],
    ids=["text tower", "vision tower", "tokenizer"],
)
def test_nothing_is_fetched_or_run_for_a_checkpoint(tmp_path, text, vision, error, said):
    with pytest.raises(error, match=said):
        load_clip(checkpoint(tmp_path, text, vision), "float32", "cpu")


def test_a_directory_with_both_configurations_is_read_by_transformers(tmp_path):
    folder = save_clip(tmp_path)
    (folder / OPEN_CLIP).write_text("{}")
    assert isinstance(load_clip(str(folder), "float32", "cpu"), ClipModel)
