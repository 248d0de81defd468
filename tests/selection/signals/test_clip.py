"""CLIP features: what transformers computes one by one; once per distinct image; resumable."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from llava.errors import DataError, UsageError
from selection.extract.cost import print_cost
from selection.extract.loop import extract_signal
from selection.methods.base import Request
from selection.pool.pool import Pool
from selection.settings import PoolSettings, ProxySettings
from selection.signals import clip_models
from selection.signals.clip import Clip, distinct_images, image_owner, text_of
from selection.store.store import StoreWriter
from tests.extraction import fork
from tests.faults import snapshot
from tests.tiny_models import save_clip, save_pool

N = 40


class World:
    """A tiny CLIP and a pool in which every image is shown by two samples."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, save_clip(folder / "clip")
        path, self.images = save_pool(folder / "pool", N)
        records = json.loads(path.read_text())
        for record in records[N // 2 :]:
            if "image" in record:  # 20 rows earlier stands a record of the same kind
                record["image"] = f"{record['id'] - N // 2}.png"
        path.write_text(json.dumps(records))
        self.records, self.path, self.pool = records, path, Pool.open(path)

    def extract(self, store: Path, rows=None, **settings):
        rows = np.arange(len(self.pool)) if rows is None else rows
        proxy = ProxySettings(store=str(store), device="cpu", max_bad=1.0, **settings)
        where = PoolSettings(str(self.path), str(self.images))
        return extract_signal(Clip(str(self.model)), rows, self.pool, where, proxy)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reader(world):
    return world.extract(world.folder / "store")


def slow(world) -> dict[str, np.ndarray]:
    """One sample at a time, straight from transformers."""
    model = transformers.CLIPModel.from_pretrained(world.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.model)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(world.model)
    images, texts = [], []
    for record in world.records:
        turns = [
            f"{'USER' if t['from'] == 'human' else 'ASSISTANT'}: "
            + t["value"].replace("<image>", "").strip()
            for t in record["conversations"]
        ]
        inputs = tokenizer(" ".join(turns), truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            texts.append(model.get_text_features(**inputs).pooler_output[0])
            image = torch.zeros(24)
            if "image" in record:
                pixels = processor(
                    Image.open(world.images / record["image"]).convert("RGB"), return_tensors="pt"
                )
                image = model.get_image_features(**pixels).pooler_output[0]
            images.append(image)
    images, texts = (
        torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy() for rows in (images, texts)
    )
    scores = (images * texts).sum(1)
    scores[[("image" not in record) for record in world.records]] = np.nan
    return {"image_features": images, "text_features": texts, "clip_score": scores}


def test_equals_transformers_one_sample_at_a_time(world, reader):
    for name, expected in slow(world).items():
        np.testing.assert_allclose(reader.column(name), expected, atol=2e-6, err_msg=name)


def test_text_only_samples_have_a_zero_image_and_no_score(world, reader):
    text_only = ~world.pool.has_image
    assert text_only.sum() == N // 4
    assert (reader.column("image_features")[text_only] == 0).all()
    assert np.isnan(reader.column("clip_score")[text_only]).all()
    assert np.isfinite(reader.column("clip_score")[~text_only]).all()
    assert reader.bad == []
    np.testing.assert_allclose(np.linalg.norm(reader.column("text_features"), axis=1), 1, rtol=1e-6)


def test_each_distinct_image_is_decoded_and_encoded_once(world, tmp_path, monkeypatch):
    opened, encoded = [], []
    real_open, real_encode = Image.open, clip_models.ClipModel.encode_images
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(1) or real_open(*a, **k))
    monkeypatch.setattr(
        clip_models.ClipModel,
        "encode_images",
        lambda self, p: encoded.append(len(p)) or real_encode(self, p),
    )
    world.extract(tmp_path)
    assert len(opened) == sum(encoded) == 15  # 30 samples with an image, two to each
    world.extract(tmp_path)
    assert sum(encoded) == 15


@pytest.mark.bits
@pytest.mark.parametrize(
    "how", [{"batch_size": 1}, {"batch_size": 5}, {"block_size": 7}, {"num_workers": 2}], ids=str
)
def test_the_same_bits_however_it_is_computed(world, reader, tmp_path, how):
    again = world.extract(tmp_path, **how)
    for name in reader.columns:
        np.testing.assert_array_equal(again.column(name), reader.column(name), err_msg=name)


@pytest.mark.bits
def test_some_rows_have_the_bits_they_have_among_all(world, reader, tmp_path):
    part = world.extract(tmp_path, rows=np.array([3, 21, 23]))
    assert part.rows.tolist() == [3, 21, 23]
    for name in reader.columns:
        np.testing.assert_array_equal(part.column(name), reader.column(name)[[3, 21, 23]])


@pytest.mark.parametrize("blocks", [1, 3, 5])  # of the images there are 3, then 6 of the samples
def test_a_killed_run_goes_on_to_the_same_bytes(world, tmp_path, blocks):
    def killed_after() -> None:
        written, real = [], StoreWriter.write_block

        def write(self, *args):
            real(self, *args)
            written.append(self)
            if len(written) == blocks:
                os.kill(os.getpid(), signal.SIGKILL)

        StoreWriter.write_block = write
        world.extract(tmp_path / "killed", block_size=7)

    _, status = os.waitpid(fork(killed_after), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    world.extract(tmp_path / "killed", block_size=7)
    world.extract(tmp_path / "whole", block_size=7)
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")


def test_an_unreadable_image_is_listed_for_every_sample_that_shows_it(world, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(world.images, images)
    (images / "3.png").write_bytes(b"no picture")
    where = PoolSettings(str(world.path), str(images))
    settings = ProxySettings(store=str(tmp_path / "store"), device="cpu", max_bad=0.06)

    def extract(settings):
        rows = np.arange(N)
        return extract_signal(Clip(str(world.model)), rows, world.pool, where, settings)

    reader = extract(settings)
    assert [note["row"] for note in reader.bad] == [3, 23]
    assert all("3.png" in note["reason"] for note in reader.bad)
    assert np.isnan(reader.column("clip_score")[[3, 23]]).all()
    with pytest.raises(DataError, match="2 samples cannot be scored"):
        extract(ProxySettings(store=str(tmp_path / "strict"), device="cpu", max_bad=0.0))


def test_a_pool_without_images(world, tmp_path):
    text_only = [record for record in world.records if "image" not in record]
    (tmp_path / "pool.json").write_text(json.dumps(text_only))
    pool = Pool.open(tmp_path / "pool.json")
    settings = ProxySettings(store=str(tmp_path / "store"), device="cpu")
    where = PoolSettings(str(pool.path))
    reader = extract_signal(Clip(str(world.model)), np.arange(len(pool)), pool, where, settings)
    assert np.isnan(reader.column("clip_score")).all() and len(reader) == len(text_only)


def test_distinct_images_and_their_owners(world):
    firsts = distinct_images(world.pool, np.arange(N))
    assert firsts.tolist() == [row for row in range(N // 2) if row % 4]
    owner = image_owner(world.pool, firsts)
    for row, record in enumerate(world.records):
        if "image" in record:
            assert world.records[firsts[owner[row]]]["image"] == record["image"]
        else:
            assert owner[row] == -1
    assert distinct_images(world.pool, np.array([22, 3, 2])).tolist() == [22, 3]


def test_the_text_is_the_whole_conversation_without_the_placeholder(world):
    turns = world.records[1]["conversations"]
    text = text_of(world.pool.record(1))
    assert "<image>" not in text and "\n" not in text
    assert text.startswith(f"USER: {turns[0]['value'].split()[1]}")
    assert f"ASSISTANT: {turns[1]['value']}" in text and turns[-1]["value"] in text


def test_another_checkpoint_is_another_store_and_its_place_is_not(world, tmp_path):
    moved = shutil.copytree(world.model, tmp_path / "moved")
    same, other = Clip(str(world.model)).identity(), Clip(str(moved)).identity()
    assert same == other
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"logit_scale_init_value": 1.0}))
    clip_models.checkpoint_content.cache_clear()
    assert Clip(str(moved)).identity() != same


def test_the_cost_is_estimated_without_computing_the_images(world, tmp_path, capsys):
    signal, settings = Clip(str(world.model)), ProxySettings(store=str(tmp_path), device="cpu")
    where = PoolSettings(str(world.path), str(world.images))
    model = signal.open_model(world.pool, {}, ProxySettings(device="cpu"))
    print_cost("clip", Request(signal, np.arange(N)), world.pool, where, settings, model)
    assert f"clip: {N} samples" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_no_clip_is_one_clear_line(tmp_path):
    with pytest.raises(UsageError, match="no such model directory"):
        Clip(str(tmp_path / "none")).identity()
    (tmp_path / "config.json").write_text("{}")
    clip_models.load_clip.cache_clear()
    with pytest.raises(UsageError, match="no CLIP with tokenizer"):
        clip_models.load_clip(str(tmp_path), "auto", "cpu")
