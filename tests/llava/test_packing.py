"""Packed rows against rows of one sample: same losses and gradients, nothing across a border."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.data import Collator
from llava.model.assemble import assemble
from llava.packing import PackingCollator, fill_rows
from llava.tokens import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.train.trainer import supervised_loss

N_IMAGE, IMAGE_ID, SIZE = 16, 3, 28  # of the tiny parts; id 3 occurs in no text below
LENGTHS = (9, 30, 5, 14, 22, 11)  # before the image is expanded
WITH_IMAGE = (0, 2, 3)


# ---- which samples share a row -------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(40, 100))
def test_every_sample_in_one_row_that_holds_it(lengths: list[int], capacity: int) -> None:
    rows = fill_rows(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= capacity
    assert len(rows) * max(filled) <= len(lengths) * max(lengths)  # never more than unpacked
    assert rows == fill_rows(lengths, capacity)


def test_rows_are_few_when_that_saves_padding_and_short_when_not() -> None:
    assert fill_rows([10, 3, 7, 5, 5], 12) == [[0], [2, 1], [3, 4]]
    assert fill_rows([8, 8, 8, 8], 32) == [[0], [1], [2], [3]]
    assert fill_rows([5], 5) == [[0]]
    with pytest.raises(ValueError, match="a sample of 6 positions in rows of 5"):
        fill_rows([1, 6], 5)


# ---- batches -------------------------------------------------------------------------------------


def make_item(row: int) -> dict[str, torch.Tensor | None]:
    """Random ids that are all supervised, the first one included, with an image at position 3."""
    generator = torch.Generator().manual_seed(row)
    ids = torch.randint(4, 300, (LENGTHS[row],), generator=generator)
    labels = ids.clone()
    if row not in WITH_IMAGE:
        return {"input_ids": ids, "labels": labels, "pixel_values": None}
    ids[3], labels[3] = IMAGE_TOKEN_INDEX, IGNORE_INDEX
    pixels = torch.randn(3, SIZE, SIZE, generator=generator)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


ITEMS = [make_item(row) for row in range(len(LENGTHS))]
PLAIN = Collator(0, IMAGE_ID, N_IMAGE, 44, SIZE)


def samples(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each sample of a packed batch, padding left out, by a loop."""
    found = []
    for row, positions in enumerate(batch["position_ids"].tolist()):
        for at, position in enumerate(positions):
            if position == 0:
                found.append(([], []))
            assert position == len(found[-1][0]), "positions do not count from the sample's start"
            for part, name in zip(found[-1], ("input_ids", "labels"), strict=True):
                part.append(int(batch[name][row, at]))
    padding = ([0], [IGNORE_INDEX])
    n_padding = found.count(padding)
    size = sum(len(i["input_ids"]) + (N_IMAGE - 1) * (i["pixel_values"] is not None) for i in ITEMS)
    assert n_padding == batch["input_ids"].numel() - size
    return [sample for sample in found if sample != padding]


@pytest.mark.parametrize("single_row", [False, True])
def test_rows_hold_whole_samples_and_their_images_in_order(single_row: bool) -> None:
    batch = PackingCollator(PLAIN, single_row)(ITEMS)
    assert "attention_mask" not in batch and "dummy_image" not in batch
    n_rows, width = batch["input_ids"].shape
    assert (n_rows == 1) if single_row else (1 < n_rows < len(ITEMS) and width <= 44)
    expected = {}
    for row, item in enumerate(ITEMS):
        alone = PLAIN([item])
        labels = [IGNORE_INDEX, *alone["labels"][0, 1:].tolist()]
        expected[row] = (alone["input_ids"][0].tolist(), labels)
    order = [next(k for k, v in expected.items() if v == s) for s in samples(batch)]
    assert sorted(order) == list(expected)
    images = [ITEMS[row]["pixel_values"] for row in order if row in WITH_IMAGE]
    assert torch.equal(batch["pixel_values"], torch.stack(images))


def test_samples_are_cut_before_they_are_packed() -> None:
    short = Collator(0, IMAGE_ID, N_IMAGE, 20, SIZE)
    batch = PackingCollator(short, single_row=True)(ITEMS)
    lengths = [min(20, n + (N_IMAGE - 1) * (i in WITH_IMAGE)) for i, n in enumerate(LENGTHS)]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert starts == [sum(lengths[:i]) for i in range(len(lengths))]


def test_text_alone_keeps_the_zero_image() -> None:
    batch = PackingCollator(PLAIN, single_row=False)([ITEMS[1], ITEMS[4]])
    assert batch["dummy_image"] and not batch["pixel_values"].any()


# ---- the model on packed rows --------------------------------------------------------------------


def make_model(parts: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = assemble(parts / "lm", parts / "clip", dtype=dtype)
    model.config.image_token_id = IMAGE_ID
    model.model.vision_tower.requires_grad_(False)  # as in training
    return model


def loss_and_gradients(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    n_tokens = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    model.zero_grad()
    loss = supervised_loss(model, dict(batch), n_tokens)
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("single_row", [False, True])
@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    # Sums over some hundred positions run in another order: some eps of a tensor's largest entry.
    # In float64, where only Llama's norms still compute in float32, they agree five digits further.
    [
        ("sdpa", torch.float32, 1e-5),
        ("eager", torch.float32, 1e-5),
        ("sdpa", torch.float64, 1e-10),
    ],
)
def test_loss_and_gradients_equal_unpacked(
    parts: Path, attention: str, single_row: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model = make_model(parts, dtype)
    model.set_attn_implementation(attention)

    def batch(collate: Collator | PackingCollator) -> dict[str, torch.Tensor]:
        made = collate(ITEMS)
        return {**made, "pixel_values": made["pixel_values"].to(dtype)}

    expected_loss, expected = loss_and_gradients(model, batch(PLAIN))
    loss, found = loss_and_gradients(model, batch(PackingCollator(PLAIN, single_row)))
    assert loss == pytest.approx(expected_loss, rel=1e-6)  # a float32 sum in any case
    assert found.keys() == expected.keys() and any("projector" in name for name in found)
    for name, gradient in expected.items():
        difference = (found[name] - gradient).abs().max().item()
        assert difference <= tolerance * gradient.abs().max().item(), name


def test_no_sample_sees_another(parts: Path) -> None:
    """Each sample's loss alone is its loss in the row; other neighbours change no bit of it."""
    model = make_model(parts)

    def losses(items: list[dict[str, torch.Tensor | None]]) -> list[float]:
        batch = PackingCollator(PLAIN, single_row=True)(items)
        labels = batch.pop("labels")[0]
        if batch.pop("dummy_image", False):
            del batch["pixel_values"]
        logits = model(**batch, use_cache=False).logits[0]
        starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), len(labels)]
        return [
            torch.nn.functional.cross_entropy(
                logits[begin : end - 1], labels[begin + 1 : end], reduction="sum"
            ).item()
            for begin, end in zip(starts, starts[1:], strict=False)
        ]

    together = losses(ITEMS)
    assert together == pytest.approx([losses([item])[0] for item in ITEMS], rel=1e-5)
    other = [ITEMS[0], {**ITEMS[1], "input_ids": ITEMS[1]["input_ids"].flip(0)}, *ITEMS[2:]]
    changed = losses(other)
    assert [a == b for a, b in zip(together, changed, strict=True)] == [True, False] + [True] * 4
