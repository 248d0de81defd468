"""The columns of `Gradients` against autograd, and the store's promises for them."""

from __future__ import annotations

import copy
import os
import random
import signal as signals
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from llava.errors import DataError, UsageError
from llava.images import open_image
from llava.vlm import load_vlm
from selection.extract.loop import store_key
from selection.signals.base import Sample
from selection.signals.gradients.gradients import Gradients, noise_like
from selection.signals.gradients.sketch import PROJECTIONS
from tests.extraction import (
    N,
    World,
    assert_closer_than_rounding,
    assert_same,
    columns,
    fork,
)
from tests.faults import snapshot
from tests.lora_models import factors, save_lora
from tests.tiny_models import BUILDERS, save_llava, save_pool

SMALL = Gradients(dim=256, rank=8)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A world whose proxy has an adapter, and the model that its checkpoint was saved from."""
    folder = tmp_path_factory.mktemp("adapted")
    model = save_lora(save_llava(folder / "base"), folder / "lora")
    pool = save_pool(folder / "pool", 16)
    return World(folder / "lora", *pool, base=folder / "base"), model


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    return world.extract(tmp_path_factory.mktemp("reference"), SMALL, batch_size=4, block_size=6)


def sample(world, row) -> Sample:
    record = world.pool.record(row)
    image = open_image(world.images, record.image) if record.image else None
    return Sample(row, world.pool.uid(row), record, image)


def slow_gradient(model, world, item) -> dict[str, torch.Tensor]:
    batch = world.proxy.collate([item], pad_to=len(item.input_ids))
    wanted = factors(model)
    loss = model(input_ids=batch.input_ids, labels=batch.labels, **batch.inputs).loss
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def flat(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in gradient.values()])


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_columns_are_their_definitions(adapted, projection):
    world, model = adapted
    signal = Gradients(dim=128, projection=projection, seed=5)
    item = signal.prepare(world.proxy, sample(world, 1))
    found = signal.compute(world.proxy, [item])
    slow = slow_gradient(model, world, item)
    np.testing.assert_allclose(found["norm"], flat(slow).norm(), rtol=1e-5)
    parts = [PROJECTIONS[projection](g[None], name, 128, 5)[0] for name, g in slow.items()]
    expected = sum(parts) / flat(slow).norm()
    # Half precision: 2^-11 of a number of about 1/sqrt(128), and rounding of the gradient.
    np.testing.assert_allclose(found["gradient"][0], expected, rtol=1e-3, atol=1e-5)
    for column in signal.columns(world.proxy):
        assert found[column.name].shape == (1, *column.shape)
        assert found[column.name].dtype == column.dtype


def test_products_estimate_cosines(adapted, tmp_path):
    world, model = adapted
    stored = world.extract(tmp_path, Gradients(dim=4096)).column("gradient").astype(np.float64)
    items = [world.proxy.prepare(*_pair(sample(world, row))) for row in range(8)]
    slow = [flat(slow_gradient(model, world, item)) for item in items]
    exact = torch.stack([g / g.norm() for g in slow])
    error = stored[:8] @ stored[:8].T - (exact @ exact.T).numpy()
    # The standard deviation of an estimate is at most sqrt(2 / dim) = 0.022 for equal gradients.
    assert np.abs(error).max() < 4 * np.sqrt(2 / 4096)
    assert np.sqrt(np.mean(error**2)) < np.sqrt(2 / 4096)


def _pair(given: Sample):
    return given.record, given.image


# ---- Adam ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stepped(adapted):
    """The adapted world's checkpoint with an optimizer.pt of two earlier steps of AdamW."""
    world, model = adapted
    wanted = factors(model)
    optimizer = torch.optim.AdamW(list(wanted.values()), lr=0.0, betas=(0.8, 0.95), eps=1e-6)
    for row in (1, 2):
        item = world.proxy.prepare(*_pair(sample(world, row)))
        for name, gradient in slow_gradient(model, world, item).items():
            wanted[name].grad = gradient
        optimizer.step()
    torch.save(optimizer.state_dict(), world.model / "optimizer.pt")
    return replace(world), model, optimizer


def test_adam_is_the_step_of_one_sample_alone(stepped):
    """m' and v' as the optimizer itself has them after a step on the sample; eps in the root."""
    world, model, optimizer = stepped
    wanted = factors(model)
    before = copy.deepcopy(optimizer.state_dict())
    for row in (3, 4):  # each from the same moments
        item = world.proxy.prepare(*_pair(sample(world, row)))
        found = {}
        Gradients(kind="adam").compute_each(world.proxy, [item], found.__setitem__)
        optimizer.load_state_dict(copy.deepcopy(before))
        for name, gradient in slow_gradient(model, world, item).items():
            wanted[name].grad = gradient
        optimizer.step()
        for name, parameter in wanted.items():
            state = optimizer.state[parameter]
            expected = state["exp_avg"] / (state["exp_avg_sq"] + 1e-6).sqrt()
            distance = (found[name][0] - expected).norm() / expected.norm()
            assert distance < 1e-4, name  # the root enlarges rounding where v is small


def test_adams_steps_and_the_gradients_come_out_of_one_backward(stepped):
    world, signals = stepped[0], [Gradients(64, kind="adam"), Gradients(64)]
    item = world.proxy.prepare(*_pair(sample(world, 3)))
    found = Gradients.compute_together(signals, world.proxy, [item])
    for signal, mine in zip(signals, found, strict=True):
        for name, array in signal.compute(world.proxy, [item]).items():
            assert array.tobytes() == mine[name].tobytes()
    assert found[0]["norm"] != found[1]["norm"]


def test_optimizer_state_is_part_of_the_identity(stepped):
    world, rows = stepped[0], np.arange(3)
    adam, plain = (Gradients(kind=kind) for kind in ("adam", "sgd"))
    identities = [store_key(s, world.proxy, world.pool, rows).identity for s in (adam, plain)]
    path = world.model / "optimizer.pt"
    content = torch.load(path, weights_only=True)
    content["state"][0]["exp_avg"] += 1
    torch.save(content, path)
    other = load_vlm(world.model, world.base)
    assert store_key(adam, other, world.pool, rows).identity not in identities
    assert store_key(plain, other, world.pool, rows).identity == identities[1]


def test_adam_needs_a_lora_and_its_optimizer(world):
    item = Gradients().prepare(world.proxy, sample(world, 1))
    with pytest.raises(UsageError, match="no LoRA checkpoint"):
        Gradients(kind="adam").compute(world.proxy, [item])


# ---- settings ------------------------------------------------------------------------------------


def test_noise_takes_the_place_of_the_pixels_alone(adapted):
    world, _ = adapted
    noisy = Gradients(image="noise", seed=1)
    for row in (0, 1):  # text-only, and with an image
        clean = Gradients().prepare(world.proxy, sample(world, row))
        found, again = (noisy.prepare(world.proxy, sample(world, row)) for _ in range(2))
        assert torch.equal(found.input_ids, clean.input_ids)
        assert found.extras.keys() == clean.extras.keys() == ({"pixel_values"} if row else set())
    pixels = found.extras["pixel_values"]
    assert torch.equal(pixels, again.extras["pixel_values"])
    assert pixels.shape == clean.extras["pixel_values"].shape
    assert not torch.equal(pixels, clean.extras["pixel_values"])


def test_noise_is_normal_and_of_its_sample_and_seed():
    like = torch.zeros(1, 3, 64, 64)
    found = noise_like(like, "a", 0)
    assert abs(found.mean()) < 4 / 110 and abs(found.std() - 1) < 4 / 156  # of 12288 numbers
    others = [noise_like(like, "b", 0), noise_like(like, "a", 1)]
    assert all(abs((found * other).mean()) < 4 / 110 for other in others)


def test_every_setting_is_part_of_the_identity(adapted):
    world, _ = adapted
    changes = [
        {"dim": 64},
        {"projection": "rademacher"},
        {"seed": 1},
        {"image": "noise"},
        {"rank": 4},
    ]
    rows = np.arange(3)
    made = [Gradients(), *(replace(Gradients(), **change) for change in changes)]
    found = [store_key(signal, world.proxy, world.pool, rows).identity for signal in made]
    assert all(one not in found[:i] for i, one in enumerate(found))


def test_what_changes_the_gradient_itself_shares_no_backward():
    of = [{"dim": 64}, {"projection": "two_sided"}, {"kind": "adam"}]
    assert {replace(Gradients(), **change).pass_over() for change in of} == {
        Gradients().pass_over()
    }
    for change in ({"image": "noise"}, {"seed": 1}, {"rank": 4}):
        assert replace(Gradients(), **change).pass_over() != Gradients().pass_over()


@pytest.mark.parametrize("change", [{"dim": 0}, {"rank": 0}, {"projection": "count-sketch"}])
def test_settings_that_cannot_be(change):
    with pytest.raises(UsageError, match=next(iter(change))):
        Gradients(**change)


def test_sample_without_an_answer_is_refused(adapted):
    world, _ = adapted
    given = sample(world, 0)
    del given.record.conversations[1:]
    with pytest.raises(DataError, match="no answer token"):
        SMALL.prepare(world.proxy, given)


# ---- the store's promises ------------------------------------------------------------------------


@pytest.mark.bits
@pytest.mark.parametrize("name", BUILDERS)
def test_no_bit_depends_on_batches_or_blocks(name, tmp_path):
    """Bitwise on the CPU in float32, for text-only and image samples of mixed lengths."""
    world = World(BUILDERS[name](tmp_path / "model"), *save_pool(tmp_path / "pool", 12))
    _check_batches(world, SMALL, tmp_path)


@pytest.mark.bits
def test_no_bit_of_an_adapter_depends_on_batches(adapted, tmp_path):
    _check_batches(adapted[0], Gradients(dim=512), tmp_path)


def _check_batches(world, signal, folder):
    alone = world.extract(folder / "1", signal, batch_size=1, block_size=24)
    assert not alone.bad
    for batch_size, block_size in [(3, 7), (8, 24)]:
        options = {"batch_size": batch_size, "block_size": block_size}
        assert_same(alone, world.extract(folder / f"{batch_size}", signal, **options))


@pytest.mark.bits
def test_bfloat16_depends_on_batches_and_threads_by_less_than_it_rounds(
    world, reference, tmp_path, set_threads
):
    narrow = World(world.model, world.pool_path, world.images, dtype="bfloat16")
    alone = narrow.extract(tmp_path / "1", SMALL, batch_size=1)
    for batch_size, n_threads in [(3, 1), (8, 2)]:
        set_threads(n_threads)
        store = tmp_path / f"{batch_size}-{n_threads}"
        together = narrow.extract(store, SMALL, batch_size=batch_size)
        assert_closer_than_rounding(together, alone, reference)


def test_two_ranks_change_no_byte(world, reference, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, *world.command(tmp_path, "gradients")]
    subprocess.run(command, check=True, capture_output=True)
    (folder,) = tmp_path.iterdir()
    assert snapshot(folder) == snapshot(reference.folder)


@dataclass(frozen=True)
class Slow(Gradients):
    """Takes 0.05 s a batch more, so that a kill comes before the end on any machine."""

    def compute(self, proxy, items):
        time.sleep(0.05)
        return super().compute(proxy, items)


def test_kill_and_resume_changes_no_byte(world, tmp_path):
    moments, store = random.Random(0), tmp_path / "killed"
    for _ in range(5):  # 1 s at most, of the 2 s that 40 batches take
        slow = Slow(dim=256, rank=8)
        pid = fork(lambda: world.extract(store, slow, batch_size=1, block_size=2))  # noqa: B023
        time.sleep(moments.uniform(0.0, 0.2))
        os.kill(pid, signals.SIGKILL)
        os.waitpid(pid, 0)
    assert not list(store.glob("*/manifest.json"))
    uninterrupted = world.extract(tmp_path / "whole", SMALL, block_size=2)
    assert snapshot(world.extract(store, SMALL, block_size=2).folder) == snapshot(
        uninterrupted.folder
    )


def test_only_damaged_blocks_are_computed_again(world, reference, tmp_path):
    store, seen = tmp_path / "store", []
    folder = world.extract(store, SMALL, block_size=6).folder
    block = folder / "block-000002.safetensors"
    os.truncate(block, block.stat().st_size - 1)

    @dataclass(frozen=True)
    class Counting(Gradients):
        def compute(self, proxy, items):
            seen.extend(items)
            return super().compute(proxy, items)

    world.extract(store, Counting(dim=256, rank=8), block_size=6)
    assert len(seen) == 6
    assert snapshot(folder) == snapshot(reference.folder)


def test_out_of_memory_halves_the_batch(world, reference, tmp_path):
    """The hooks of the attempt that failed are gone, too."""

    @dataclass(frozen=True)
    class Half(Gradients):
        def compute_each(self, proxy, items, use):
            def small(name, gradient):
                if sum(item.n_tokens for item in items) > 700:
                    torch.empty(2**60)  # 8 exabytes, in the middle of a backward
                use(name, gradient)

            super().compute_each(proxy, items, small)

    found = world.extract(tmp_path, Half(dim=256, rank=8), batch_size=32, block_size=6)
    assert not found.bad
    assert_same(reference, found)


def test_non_finite_gradient_is_listed(world, reference, tmp_path):
    """A word whose embedding is NaN: the samples that hold it are quarantined, and no others."""
    token = int(world.proxy.loaded.tokenizer.encode("triangle")[0][-1])
    weight = world.proxy.model.get_input_embeddings().weight
    kept = weight.detach().clone()
    weight[token] = torch.nan
    try:
        found = world.extract(tmp_path, SMALL, block_size=6)
    finally:
        weight.copy_(kept)
    bad = [note["row"] for note in found.bad]
    assert 0 < len(bad) < N
    assert all("gradient is not finite in float16" in note["reason"] for note in found.bad)
    assert np.isnan(found.column("norm")[bad]).all()
    assert_same(reference, found, [row for row in range(N) if row not in bad])


def test_bfloat16_is_near_float32(adapted, tmp_path):
    """Sums are float32 and norms float64; what is left is bfloat16's own 2^-9 a product."""
    world, _ = adapted
    signal, rows = Gradients(dim=512), np.arange(8)
    exact = columns(world.extract(tmp_path / "float32", signal, rows))
    lower = replace(world)
    lower.proxy = load_vlm(world.model, world.base, dtype="bfloat16")
    found = columns(lower.extract(tmp_path / "bfloat16", signal, rows))
    np.testing.assert_allclose(found["norm"], exact["norm"], rtol=0.1)
    pair = exact["gradient"].astype(np.float64), found["gradient"].astype(np.float64)
    cosines = (pair[0] * pair[1]).sum(1) / np.prod([np.linalg.norm(g, axis=1) for g in pair], 0)
    assert np.median(cosines) > 0.98
