"""CLIP and ImageReward in two processes, on a full disk, after damage and with broken numbers."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import StorageError
from llava.launch import process
from selection.extract.loop import extract_signal
from selection.pool.pool import Pool
from selection.settings import PoolSettings, ProxySettings
from selection.signals import image_reward
from selection.signals.clip import Clip, text_of
from selection.signals.clip_models import checkpoint_content, load_clip
from selection.signals.image_reward import ImageReward
from tests.extraction import as_rank, fork
from tests.faults import flip_bit, snapshot
from tests.selection.signals.test_image_reward import published
from tests.tiny_models import save_clip, save_pool

N = 40


class World:
    """A tiny CLIP, random weights of ImageReward and a pool with images."""

    def __init__(self, folder: Path) -> None:
        self.clip, self.reward = save_clip(folder / "clip"), folder / "reward.safetensors"
        save_file(published(), self.reward)
        self.path, self.images = save_pool(folder / "pool", N)
        self.pool = Pool.open(self.path)

    def signal(self, name: str, model: Path | None = None):
        if name == "clip":
            return Clip(str(model or self.clip))
        return ImageReward(str(model or self.reward), str(self.clip))

    def extract(self, name: str, store: Path, model: Path | None = None):
        settings = ProxySettings(store=str(store), device="cpu", block_size=16, max_bad=1.0)
        where = PoolSettings(str(self.path), str(self.images))
        signal, rows = self.signal(name, model), np.arange(N)
        return extract_signal(signal, rows, self.pool, where, settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module", params=["clip", "image_reward"])
def whole(request, world, tmp_path_factory):
    """The signal's name and the store that one undisturbed process writes."""
    store = tmp_path_factory.mktemp("whole")
    world.extract(request.param, store)
    return request.param, store


def test_two_processes_change_no_byte(world, whole, tmp_path):
    name, store = whole
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]

    def work(rank: int) -> None:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        as_rank(rank, 2, lambda: world.extract(name, tmp_path))

    pids = [fork(lambda rank=rank: work(rank)) for rank in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert snapshot(tmp_path) == snapshot(store)


def test_without_room_there_is_one_line_and_the_next_run_goes_on(world, whole, tmp_path, capfd):
    """CLIP's image features fit under the limit, the blocks that also hold text features do not."""
    name, store = whole

    def limited() -> None:
        most = {"clip": 2500, "image_reward": 350}[name]
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        try:
            process(lambda: world.extract(name, tmp_path))
        except SystemExit as end:
            os._exit(end.code)

    status = os.waitstatus_to_exitcode(os.waitpid(fork(limited), 0)[1])
    said = capfd.readouterr().err
    assert status == 74, said
    assert said.count("error:") == 1 and "raise it" in said and "Traceback" not in said
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("clip_images-*/block-*")}
    assert bool(kept) == (name == "clip")
    world.extract(name, tmp_path)
    assert snapshot(tmp_path) == snapshot(store)
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())


def test_damaged_image_features_are_never_scored(world, tmp_path):
    world.extract("clip", tmp_path / "whole")
    store = Path(shutil.copytree(tmp_path / "whole", tmp_path / "store"))
    (scored,) = store.glob("clip-*")
    (block,) = store.glob("clip_images-*/block-000001*")
    shutil.rmtree(scored)
    flip_bit(block, block.stat().st_size - 5)
    with pytest.raises(StorageError, match=block.name) as caught:
        world.extract("clip", store)
    assert caught.value.exit_code == 74
    other = block.with_name("block-000000.safetensors")
    before = other.stat().st_mtime_ns
    block.unlink()
    world.extract("clip", store)
    assert snapshot(store) == snapshot(tmp_path / "whole")
    assert other.stat().st_mtime_ns == before


def test_broken_numbers_of_clip_are_listed_and_harm_no_other(world, tmp_path):
    broken = Path(shutil.copytree(world.clip, tmp_path / "clip"))
    weights = load_file(broken / "model.safetensors")
    model = load_clip(str(broken), "float32", "cpu")
    texts = [set(model.tokens(text_of(world.pool.record(row))).tolist()) for row in range(N)]
    word = next(word for word in texts[0] if 0 < sum(word in text for text in texts) < N / 2)
    weights["text_model.embeddings.token_embedding.weight"][word] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    for cache in (load_clip, checkpoint_content):
        cache.cache_clear()
    found, whole = world.extract("clip", tmp_path, broken), world.extract("clip", tmp_path)
    bad = [note["row"] for note in found.bad]
    assert bad == [row for row in range(N) if word in texts[row]]
    assert all("text_features is not finite" in note["reason"] for note in found.bad)
    assert np.isnan(found.column("clip_score")[bad]).all()
    good = np.setdiff1d(np.arange(N), bad)
    for name in found.columns:
        np.testing.assert_array_equal(found.column(name)[good], whole.column(name)[good])


def test_a_broken_reward_is_listed_and_not_taken_for_a_sample_without_an_image(world, tmp_path):
    state = published()
    state["mlp.layers.7.bias"][:] = torch.nan
    save_file(state, tmp_path / "broken.safetensors")
    found = world.extract("image_reward", tmp_path / "store", tmp_path / "broken.safetensors")
    assert [note["row"] for note in found.bad] == np.flatnonzero(world.pool.has_image).tolist()


def test_weights_and_words_of_image_reward_are_its_identity_and_their_place_is_not(world, tmp_path):
    def identity() -> dict:
        for cache in (image_reward.file_content, image_reward.folder_content):
            cache.cache_clear()
        return ImageReward(str(weights), str(words)).identity()

    weights = Path(shutil.copy(world.reward, tmp_path / "elsewhere.safetensors"))
    words = Path(shutil.copytree(world.clip, tmp_path / "words"))
    same = world.signal("image_reward").identity()
    assert identity() == same
    for file in (weights, words / "tokenizer.json"):
        flip_bit(file, 100)
        assert identity() != same
        flip_bit(file, 100)
