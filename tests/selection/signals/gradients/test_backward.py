"""Gradients of a batch against torch.autograd.grad of one sample at a time, in a PEFT model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llava.errors import UsageError
from llava.images import open_image
from llava.tokens import IGNORE_INDEX
from llava.vlm import load_vlm
from llava.vlm.base import Prepared
from selection.extract.loop import buckets
from selection.pool.pool import Pool
from selection.signals.forward import Forward
from selection.signals.gradients.backward import (
    answer_gradient,
    fresh_adapter,
    outer_sums,
    sample_gradients,
)
from tests.lora_models import RANK, factors, save_lora
from tests.tiny_models import BUILDERS, save_llava, save_pool

N = 12
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def prepared(proxy, folder) -> list[Prepared]:
    """`N` samples of mixed length; three of them have no image."""
    path, images = save_pool(folder, N)
    pool = Pool.open(path)
    records = [pool.record(row) for row in range(N)]
    opened = [open_image(images, record.image) if record.image else None for record in records]
    return [proxy.prepare(*pair) for pair in zip(records, opened, strict=True)]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A proxy with a merged adapter, samples, and each sample's gradients by plain autograd."""
    folder = tmp_path_factory.mktemp("adapted")
    model = save_lora(save_llava(folder / "base"), folder / "lora")
    proxy = load_vlm(folder / "lora", folder / "base")
    items = prepared(proxy, folder / "pool")
    return proxy, items, [slow_gradients(model, proxy, item) for item in items]


def slow_gradients(model, proxy, item) -> dict[str, torch.Tensor]:
    """The definition: the model's own loss of one unpadded sample, the adapter not merged."""
    batch = proxy.collate([item], pad_to=len(item.input_ids))
    wanted = factors(model)
    loss = model(input_ids=batch.input_ids, labels=batch.labels, **batch.inputs).loss
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def fast_gradients(proxy, items, adapter=None) -> dict[str, torch.Tensor]:
    found = {}

    def use(name, gradients):
        assert name not in found and gradients.dtype == torch.float32
        found[name] = gradients.clone()

    sample_gradients(proxy, proxy.collate(items), adapter or proxy.adapter, use)
    return found


def of_size(size: int):
    """Batches that mix lengths, and so are padded; text-only samples apart, as in `extract`."""

    def split(items) -> list[list[int]]:
        shown = [i for i, item in enumerate(items) if item.extras]
        kinds = shown, [i for i in range(len(items)) if i not in shown]
        return [rows[i : i + size] for rows in kinds for i in range(0, len(rows), size)]

    return split


def bucketed(items) -> list[list[int]]:
    return buckets(dict(enumerate(items)))


BATCHES = {"1": of_size(1), "3": of_size(3), "8": of_size(8), "bucketed": bucketed}


@pytest.mark.parametrize("batches", BATCHES)
def test_equals_autograd_one_sample_at_a_time(adapted, batches):
    """For every kind of linear layer. q, k, v share an input, gate and up another."""
    proxy, items, slow = adapted
    assert {name.split(".")[-2] for name in slow[0]} == set(KINDS)
    for rows in BATCHES[batches](items):
        found = fast_gradients(proxy, [items[i] for i in rows])
        assert found.keys() == slow[0].keys()
        for position, i in enumerate(rows):
            for name, expected in slow[i].items():
                # Merged or not, sums of some hundred float32 products in another order.
                distance = (found[name][position] - expected).norm() / expected.norm()
                assert distance < 2e-5, (name, i, distance)


def test_one_backward_and_nothing_left_behind(adapted):
    """No hook and no gradient of a weight stays."""
    proxy, items, _ = adapted
    fast_gradients(proxy, items[1:3])
    assert not any(module._forward_hooks for module in proxy.decoder.modules())
    assert all(p.grad is None and not p.requires_grad for p in proxy.model.parameters())


def test_tied_inputs_are_held_once(adapted):
    """q, k and v keep one tensor, gate and up another, by reference."""
    proxy, items, _ = adapted
    held = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "selection.signals.gradients.backward._use_gradients",
            lambda name, factors, use, x, g: held.update({name: x.data_ptr()}),
        )
        fast_gradients(proxy, items[1:2])
    for layer in range(2):
        attention = {held[f"layers.{layer}.self_attn.{n}"] for n in ("q_proj", "k_proj", "v_proj")}
        mlp = {held[f"layers.{layer}.mlp.{n}"] for n in ("gate_proj", "up_proj")}
        assert len(attention) == len(mlp) == 1 and attention != mlp


def test_nan_of_one_sample_stays_with_it(adapted):
    proxy, items, slow = adapted
    pixels = torch.full_like(items[1].extras["pixel_values"], torch.nan)
    spoilt = replace(items[1], extras={"pixel_values": pixels})
    found = fast_gradients(proxy, [spoilt, items[2]])
    for name, expected in slow[2].items():
        assert found[name][0].isnan().any()
        assert (found[name][1] - expected).norm() / expected.norm() < 2e-5


def test_answer_gradient_is_autograds():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 9, 16, generator=generator, requires_grad=True)
    head = nn.Linear(16, 50)
    labels = torch.randint(50, (3, 9), generator=generator)
    labels[0, :7], labels[1, ::2], labels[2, 4:] = (IGNORE_INDEX,) * 3
    losses = [
        F.cross_entropy(head(h[:-1]), t[1:], ignore_index=IGNORE_INDEX)
        for h, t in zip(hidden, labels, strict=True)
    ]
    (slow,) = torch.autograd.grad(sum(losses), hidden)
    with torch.no_grad():
        found = answer_gradient(hidden, labels, head)
    torch.testing.assert_close(found, slow)
    assert (found[0, :6] == 0).all() and (found[:, -1] == 0).all()


@pytest.mark.bits
def test_answer_gradient_in_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(4, 40, 32, generator=generator), nn.Linear(32, 64)
    labels = torch.randint(64, (4, 40), generator=generator)
    with torch.no_grad():
        whole = answer_gradient(hidden, labels, head)
        monkeypatch.setattr("selection.signals.gradients.backward.ROW_CHUNK", 7)
        assert torch.equal(answer_gradient(hidden, labels, head), whole)


def test_outer_sums_are_float32_sums():
    """bfloat16 operands, 4096 products each: sums in bfloat16 would be off by some percent."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(2, 4096, n, generator=generator).to(torch.bfloat16) for n in (3, 5))
    slow = torch.einsum("btm,btn->bmn", left.double(), right.double())
    found = outer_sums(left, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), slow, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", BUILDERS)
def test_fresh_adapter_on_any_model(name, tmp_path):
    """Only B has a gradient: the layer's weight gradient seen through A. Also after inference."""
    proxy = load_vlm(BUILDERS[name](tmp_path / "model"))
    item = prepared(proxy, tmp_path / "pool")[1]
    with torch.inference_mode():
        Forward().compute(proxy, [item])
    adapter = fresh_adapter(proxy, rank=16, seed=3)
    found = fast_gradients(proxy, [item], adapter)
    linear = [n for n, m in proxy.decoder.named_modules() if isinstance(m, nn.Linear)]
    assert found.keys() == {f"{layer}.lora_B" for layer in linear}
    batch = proxy.collate([item], pad_to=len(item.input_ids))
    weights = {layer: proxy.decoder.get_submodule(layer).weight for layer in linear}
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = proxy.model(input_ids=batch.input_ids, labels=batch.labels, **batch.inputs).loss
    slow = torch.autograd.grad(loss, list(weights.values()))
    proxy.model.requires_grad_(False)
    for layer, gradient in zip(weights, slow, strict=True):
        expected = gradient @ adapter[layer].down.T
        distance = (found[f"{layer}.lora_B"][0] - expected).norm() / expected.norm()
        assert distance < 2e-5, layer


def test_fresh_adapter_is_a_function_of_its_seed(adapted):
    proxy = adapted[0]
    one, again, other = (fresh_adapter(proxy, 8, seed) for seed in (0, 0, 1))
    for name, (down, up) in one.items():
        assert up is None and down.shape[0] == 8
        assert torch.equal(down, again[name].down)
        assert not torch.equal(down, other[name].down)
        torch.testing.assert_close(down.norm(dim=1), torch.ones(8))


def test_adapter_is_read_in_the_models_order(adapted):
    proxy = adapted[0]
    linear = [n for n, m in proxy.decoder.named_modules() if isinstance(m, nn.Linear)]
    assert list(proxy.adapter) == linear
    assert all(f.down.shape[0] == f.up.shape[1] == RANK for f in proxy.adapter.values())


class Flat(nn.Module):
    """A layer whose linear map sees tokens of all samples in one row of rows."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x.flatten(0, 1)).view(*x.shape[:2], -1)


def test_layer_that_mixes_samples_is_refused(tmp_path):
    proxy = load_vlm(save_llava(tmp_path / "model"))
    mlp = proxy.decoder.layers[0].mlp
    mlp.up_proj = Flat(mlp.up_proj)
    item = prepared(proxy, tmp_path / "pool")[0]
    with pytest.raises(UsageError, match="up_proj.linear.*cannot be told apart"):
        fast_gradients(proxy, [item], fresh_adapter(proxy, 4, 0))
    assert not any(module._forward_hooks for module in proxy.decoder.modules())
