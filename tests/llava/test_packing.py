"""Packed rows against rows of one sample: same losses and gradients, nothing across a border."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.data import Collator, ModelInput, expand_image
from llava.model.assemble import assemble
from llava.packing import PackingCollator, fill_rows
from llava.tokens import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Encoded
from llava.train.trainer import token_losses

N_IMAGE, IMAGE_ID, SIZE = 16, 3, 28  # of the tiny parts; id 3 occurs in no text below
LENGTHS = (9, 30, 5, 14, 22, 11)  # before the image is expanded
WITH_IMAGE = (0, 2, 3)
MAX_LENGTH = 44


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


def make_sample(row: int, max_length: int = MAX_LENGTH) -> ModelInput:
    """Random ids that are all supervised, the first one included, with an image at position 3."""
    generator = torch.Generator().manual_seed(row)
    ids = torch.randint(4, 300, (LENGTHS[row],), generator=generator)
    labels, pixels = ids.clone(), None
    if row in WITH_IMAGE:
        ids[3], labels[3] = IMAGE_TOKEN_INDEX, IGNORE_INDEX
        pixels = torch.randn(3, SIZE, SIZE, generator=generator)
    ids, labels = expand_image(Encoded(ids, labels), N_IMAGE, IMAGE_ID, max_length)
    return ModelInput(input_ids=ids, labels=labels, pixel_values=pixels)


SAMPLES = [make_sample(row) for row in range(len(LENGTHS))]
PLAIN = Collator(0, SIZE)


def samples_of(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each sample of a packed batch, padding left out, by a loop."""
    samples = []
    for row, positions in enumerate(batch["position_ids"].tolist()):
        for at, position in enumerate(positions):
            if position == 0:
                samples.append(([], []))
            assert position == len(samples[-1][0]), "positions do not count from the sample's start"
            for part, name in zip(samples[-1], ("input_ids", "labels"), strict=True):
                part.append(int(batch[name][row, at]))
    padding = ([0], [IGNORE_INDEX])
    n_padding = samples.count(padding)
    size = sum(len(sample["input_ids"]) for sample in SAMPLES)
    assert n_padding == batch["input_ids"].numel() - size
    return [sample for sample in samples if sample != padding]


@pytest.mark.parametrize("row_length", [MAX_LENGTH, None])
def test_rows_hold_whole_samples_and_their_images_in_order(row_length: int | None) -> None:
    batch = PackingCollator(PLAIN, row_length)(SAMPLES)
    assert "attention_mask" not in batch and "dummy_image" not in batch
    n_rows, width = batch["input_ids"].shape
    if row_length is None:
        assert n_rows == 1
    else:
        assert 1 < n_rows < len(SAMPLES) and width <= MAX_LENGTH
    expected = {}
    for row, sample in enumerate(SAMPLES):
        alone = PLAIN([sample])
        labels = [IGNORE_INDEX, *alone["labels"][0, 1:].tolist()]
        expected[row] = (alone["input_ids"][0].tolist(), labels)
    order = [next(k for k, v in expected.items() if v == s) for s in samples_of(batch)]
    assert sorted(order) == list(expected)
    images = [SAMPLES[row]["pixel_values"] for row in order if row in WITH_IMAGE]
    assert torch.equal(batch["pixel_values"], torch.stack(images))


def test_samples_are_cut_before_they_are_packed() -> None:
    short = [make_sample(row, 20) for row in range(len(LENGTHS))]
    batch = PackingCollator(PLAIN, row_length=None)(short)
    lengths = [min(20, n + (N_IMAGE - 1) * (i in WITH_IMAGE)) for i, n in enumerate(LENGTHS)]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert starts == [sum(lengths[:i]) for i in range(len(lengths))]


def test_text_alone_keeps_the_zero_image() -> None:
    batch = PackingCollator(PLAIN, MAX_LENGTH)([SAMPLES[1], SAMPLES[4]])
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
    loss = token_losses(model, dict(batch))[0].sum() / n_tokens
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("row_length", [MAX_LENGTH, None])
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
    parts: Path, attention: str, row_length: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    model = make_model(parts, dtype)
    model.set_attn_implementation(attention)

    def batch(collate: Collator | PackingCollator) -> dict[str, torch.Tensor]:
        made = collate(SAMPLES)
        return {**made, "pixel_values": made["pixel_values"].to(dtype)}

    expected_loss, expected = loss_and_gradients(model, batch(PLAIN))
    loss, packed = loss_and_gradients(model, batch(PackingCollator(PLAIN, row_length)))
    assert loss == pytest.approx(expected_loss, rel=1e-6)  # a float32 sum in any case
    assert packed.keys() == expected.keys() and any("projector" in name for name in packed)
    for name, gradient in expected.items():
        difference = (packed[name] - gradient).abs().max().item()
        assert difference <= tolerance * gradient.abs().max().item(), name


def test_no_sample_sees_another(parts: Path) -> None:
    """Each sample's loss alone is its loss in the row; other neighbours change no bit of it."""
    model = make_model(parts)

    def losses(samples: list[ModelInput]) -> list[float]:
        batch = PackingCollator(PLAIN, row_length=None)(samples)
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

    together = losses(SAMPLES)
    assert together == pytest.approx([losses([sample])[0] for sample in SAMPLES], rel=1e-5)
    other = [SAMPLES[0], {**SAMPLES[1], "input_ids": SAMPLES[1]["input_ids"].flip(0)}, *SAMPLES[2:]]
    changed = losses(other)
    assert [a == b for a, b in zip(together, changed, strict=True)] == [True, False] + [True] * 4
