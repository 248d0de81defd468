"""Perturbed copies against one full forward each, for every kind of sample and architecture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from llava.errors import DataError, UsageError
from llava.records import Record, Turn
from llava.tokens import IGNORE_INDEX
from llava.vlm import load_vlm
from llava.vlm.base import Prepared
from selection.pool.pool import Pool
from selection.signals.base import Sample
from selection.signals.forward import Forward, forward_columns
from selection.signals.perturb import diffuse, perturbations
from selection.signals.perturbed import (
    KIND_CHOICE,
    KIND_IMAGE,
    KIND_NONE,
    LOSSES,
    STATES,
    Perturbed,
)
from tests.extraction import extract
from tests.tiny_models import BUILDERS, save_smolvlm

EN = "Answer with the option's letter from the given choices directly."
COLOURS = "A. red\nB. green\nC. blue"
CHOICE = [("human", f"<image>\nWhat colour?\n{COLOURS}\n{EN}"), ("gpt", "C")]
DIALOGUE = [
    ("gpt", "Hello"),
    ("human", "<image>\nDescribe it."),
    ("gpt", "There is a large triangle"),
    *[("human", f"What colour?\n{COLOURS}\nD. yellow\n{EN}"), ("gpt", "A")],
    *[("human", "Is it red?"), ("gpt", "no")],
    *[("human", f"Is it?\nA. yes\nB. no\n{EN}"), ("gpt", "B")],
]
CAPTION = [("human", "<image>\nDescribe it."), ("gpt", "There is a large triangle")]
TEXT = [("human", "Describe red."), ("gpt", "yes")]
MODELS = {**BUILDERS, "idefics3": lambda folder: save_smolvlm(folder, "Idefics3")}
# Float32 sums in two orders, over answers with a loss near 7 and states near 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=MODELS)
def any_proxy(request, tmp_path_factory):
    return load_vlm(MODELS[request.param](tmp_path_factory.mktemp("model") / request.param))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return load_vlm(BUILDERS["llava"](tmp_path_factory.mktemp("model") / "llava"))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def picture(seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (30, 45, 3), np.uint8)
    return Image.fromarray(values)


def sample(turns, uid: str = "u", image: Image.Image | None = None) -> Sample:
    record = Record([Turn(*turn) for turn in turns], image=image and "x.png")
    return Sample(0, uid, record, image)


def values(signal: Perturbed, proxy, *samples: Sample) -> dict[str, np.ndarray]:
    return signal.compute(proxy, [signal.prepare(proxy, each) for each in samples])


def full_forward(proxy, prepared: Prepared) -> dict[str, np.ndarray]:
    batch = proxy.collate([prepared])
    found = forward_columns(proxy, batch, proxy.forward(batch))
    return {name: tensor[0].numpy() for name, tensor in found.items()}


def reference(proxy, turns, image, **settings) -> list[dict[str, np.ndarray]]:
    """Columns of `Forward` for the clean sample and for every copy, one full forward each."""
    copies = [turns, *(copy.turns for copy in perturbations(turns, "u", **settings))]
    return [
        full_forward(proxy, proxy.prepare(sample(copy, image=image).record, image))
        for copy in copies
    ]


@pytest.mark.parametrize("turns", [CHOICE, DIALOGUE], ids=["one turn", "dialogue"])
def test_choice_equals_one_full_forward_an_order(any_proxy, turns):
    image = picture()
    found = values(Perturbed(), any_proxy, sample(turns, image=image))
    clean, *copies = reference(any_proxy, turns[turns[0][0] == "gpt" :], image)
    losses = np.array([copy["nll_mean"] for copy in copies])
    worst = int(np.argmax(np.abs(losses - clean["nll_mean"])))
    assert found["kind"] == KIND_CHOICE and found["n_orders"] == len(copies)
    assert found["order"] == worst
    np.testing.assert_allclose(found["loss_clean"][0], clean["nll_mean"], **CLOSE)
    np.testing.assert_allclose(found["loss_perturbed"][0], losses[worst], **CLOSE)
    np.testing.assert_allclose(found["gap"][0], np.ptp([clean["nll_mean"], losses[worst]]), **CLOSE)
    for name in (*STATES, "attention_self"):
        np.testing.assert_allclose(found[name][0], copies[worst][name], **CLOSE)


def test_noise_equals_one_full_forward_of_each(any_proxy):
    image = picture()
    found = values(Perturbed(diffusion_step=600, seed=3), any_proxy, sample(CAPTION, image=image))
    record = sample(CAPTION, image=image).record
    clean = full_forward(any_proxy, any_proxy.prepare(record, image))
    noisy = full_forward(any_proxy, any_proxy.prepare(record, diffuse(image, "u", 600, 3)))
    assert found["kind"] == KIND_IMAGE and found["n_orders"] == found["n_failed"] == 0
    assert found["order"] == found["first_failed"] == -1
    assert found["loss_clean"][0] == clean["nll_mean"]
    assert found["loss_perturbed"][0] == noisy["nll_mean"]
    assert found["gap"][0] == abs(clean["nll_mean"] - noisy["nll_mean"]) > 0
    for name in (*STATES, "attention_self"):
        np.testing.assert_array_equal(found[name][0], noisy[name])


@pytest.mark.parametrize("turns,image", [(TEXT, None), (TEXT, picture())])
def test_what_cannot_be_perturbed(llava, turns, image):
    """Text alone, and an image that no turn refers to and the model is never shown."""
    found = values(Perturbed(), llava, sample(turns, image=image))
    assert found["kind"] == KIND_NONE
    assert all(np.isnan(found[name]).all() for name in LOSSES)
    assert not found["last_state"].any()


def test_choice_without_an_image_is_perturbed(llava):
    turns = [("human", CHOICE[0][1].removeprefix("<image>\n")), CHOICE[1]]
    assert values(Perturbed(), llava, sample(turns))["kind"] == KIND_CHOICE


def test_failures_are_counted_on_the_option_answers_alone(llava):
    """A head fitted to write the right symbols for two orders: not all are failures."""
    turns = [
        *[("human", "<image>\nIs it?\nA. yes\nB. no"), ("gpt", "B")],
        *[("human", "Describe it."), ("gpt", "red")],
        *[("human", "What?\nA. red\nB. blue\nC. no"), ("gpt", "C")],
    ]
    shown, signal = sample(turns, image=picture()), Perturbed()
    before = values(signal, llava, shown)
    assert before["n_failed"] == before["n_orders"] == 6 and before["first_failed"] == 0
    states, targets = [], []
    for copy in perturbations(turns, "u"):
        item = llava.prepare(sample(copy.turns, image=picture()).record, picture())
        hidden = llava.forward(llava.collate([item])).hidden[0]
        given = item.labels != IGNORE_INDEX
        answer = (given[1:] & ~given[:-1]).cumsum(0)  # 1, 2, 3
        at = torch.nonzero(given[1:] & (answer != 2))[:, 0]
        states.append(hidden[at])
        targets.append(item.labels[at + 1])
    fitted = [0, 4]
    ids = torch.cat([targets[k] for k in fitted])
    wanted = torch.nn.functional.one_hot(ids, len(llava.head.weight)).float()
    weight = (torch.linalg.pinv(torch.cat([states[k] for k in fitted])) @ wanted).T
    greedy = [(x @ weight.T).argmax(1) for x in states]
    failed = [k for k in range(6) if not torch.equal(greedy[k], targets[k])]
    assert failed and not set(failed) & set(fitted)
    old = llava.head.weight.data.clone()
    llava.head.weight.data.copy_(weight)
    found = values(signal, llava, shown)
    llava.head.weight.data.copy_(old)
    assert found["n_failed"] == len(failed) and found["first_failed"] == failed[0]


def test_answers_that_are_cut_off_are_not_judged(llava):
    """DIALOGUE is longer than the model's 256 positions: its last question is not read."""
    item = Perturbed().prepare(llava, sample(DIALOGUE, image=picture()))
    assert item.answers == (1, 3)
    assert all(len(version.input_ids) == 256 for version in item.versions)
    assert Perturbed().compute(llava, [item])["n_failed"] == 24


def test_equal_gaps_take_the_first_order(llava):
    """Two options with one text: orders come in pairs that read the same."""
    turns = [("human", f"<image>\nWhich?\nA. red\nB. red\nC. blue\nD. no\n{EN}"), ("gpt", "C")]
    found = values(Perturbed(), llava, sample(turns, image=picture()))
    texts = [copy.turns for copy in perturbations(turns, "u")]
    assert len(set(texts)) == 12
    order = int(found["order"][0])
    assert order == texts.index(texts[order])


def test_kept_letters_and_a_single_order(llava):
    image = picture()
    kept = values(Perturbed(symbols=None, max_orders=1), llava, sample(CHOICE, image=image))
    assert kept["gap"] == 0 and kept["n_orders"] == 1  # the only copy is the sample itself
    symbols = values(Perturbed(permute=False), llava, sample(CHOICE, image=image))
    clean, copy = reference(llava, CHOICE, image, permute=False)
    gap = abs(clean["nll_mean"] - copy["nll_mean"])
    np.testing.assert_allclose(symbols["gap"][0], gap, **CLOSE)


def test_rewriting_equals_preparing(any_proxy):
    image = picture()
    clean = any_proxy.prepare(sample(CHOICE, image=image).record, image)
    other = sample(DIALOGUE[1:], image=image).record
    again, fresh = any_proxy.rewrite(clean, other, image), any_proxy.prepare(other, image)
    assert torch.equal(again.input_ids, fresh.input_ids) and torch.equal(again.labels, fresh.labels)
    assert again.key == fresh.key
    for name, tensor in fresh.extras.items():
        assert torch.equal(again.extras[name], tensor)


@pytest.fixture
def pool(tmp_path):
    """Two samples of each kind, in mixed order, and their images."""
    kinds = [CHOICE, CAPTION, TEXT, DIALOGUE, CAPTION, TEXT, CHOICE]
    records = []
    for row, turns in enumerate(kinds):
        record = {"id": row, "conversations": [{"from": r, "value": text} for r, text in turns]}
        if turns is not TEXT:
            record["image"] = f"{row}.png"
            picture(row).save(tmp_path / record["image"])
        records.append(record)
    (tmp_path / "pool.json").write_text(json.dumps(records))
    return Pool.open(tmp_path / "pool.json")


def columns(reader) -> dict[str, bytes]:
    return {name: reader.column(name).tobytes() for name in reader.columns}


def test_rows_do_not_depend_on_their_batch(llava, pool, tmp_path):
    rows = np.arange(len(pool))
    run = [Perturbed(), llava, pool]
    one = extract(*run, rows, tmp_path / "a", tmp_path, batch_size=1, progress=False)
    many = extract(
        *run, rows, tmp_path / "b", tmp_path, batch_size=9, num_workers=1, progress=False
    )
    alone = extract(*run, rows[4:5], tmp_path / "c", tmp_path, progress=False)
    assert columns(one) == columns(many)
    assert one.column("kind").tolist() == [1, 2, 0, 1, 2, 0, 1]
    assert not one.bad and np.isnan(one.column("gap")).tolist() == [False, False, True] * 2 + [
        False
    ]
    for name in one.columns:
        assert one.column(name)[4].tobytes() == alone.column(name)[0].tobytes()


def test_clean_loss_is_the_forward_signals(llava, pool, tmp_path):
    rows = np.arange(len(pool))
    found = extract(Perturbed(), llava, pool, rows, tmp_path, tmp_path, progress=False)
    forward = extract(Forward(), llava, pool, rows, tmp_path, tmp_path, progress=False)
    shown = found.column("kind") != KIND_NONE
    np.testing.assert_allclose(
        found.column("loss_clean")[shown], forward.column("nll_mean")[shown], **CLOSE
    )


def test_a_failed_loss_is_listed_and_not_taken_for_inapplicable(llava, pool, tmp_path):
    """The head overflows; the states are fine and text-only samples have no loss (P18)."""
    old = llava.head.weight.data.clone()
    llava.head.weight.data.fill_(torch.inf)
    run = [Perturbed(), llava, pool, np.arange(len(pool)), tmp_path, tmp_path]
    with pytest.raises(DataError, match="gap|loss_clean"):
        extract(*run, progress=False)
    reader = extract(*run, max_bad=1.0, progress=False)
    llava.head.weight.data.copy_(old)
    assert [bad["row"] for bad in reader.bad] == [0, 1, 3, 4, 6]


def test_settings_are_checked_and_identify_the_store():
    for wrong in (
        {"symbols": "abc"},
        {"symbols": None, "permute": False},
        {"max_orders": 0},
        {"diffusion_step": 1000},
    ):
        with pytest.raises(UsageError):
            Perturbed(**wrong)
    settings = [{}, {"symbols": "snvf"}, {"max_orders": 6}, {"diffusion_step": 1}, {"seed": 1}]
    assert len({json.dumps(Perturbed(**each).identity()) for each in settings}) == len(settings)


def test_half_precision_states_are_stored_as_float16(tmp_path_factory):
    folder = BUILDERS["llava"](tmp_path_factory.mktemp("model") / "llava")
    proxy = load_vlm(folder, dtype="bfloat16")
    found = values(Perturbed(), proxy, sample(CHOICE, image=picture()))
    assert found["last_state"].dtype == np.float16 and np.isfinite(found["gap"]).all()
