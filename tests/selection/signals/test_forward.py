import math

import numpy as np
import pytest
import torch

from llava.errors import DataError
from llava.images import open_image
from llava.tokens import IGNORE_INDEX
from llava.vlm import load_vlm
from selection.pool.pool import Pool
from selection.signals.base import Sample
from selection.signals.forward import Forward, pooled_states, supervised_positions, token_scores
from tests.tiny_models import BUILDERS, save_llava, save_pool


def slow_scores(logits: list[float], target: int) -> tuple[float, float, float]:
    """NLL, EL2N and AUM of one token by their definitions."""
    top = max(logits)
    exp = [math.exp(x - top) for x in logits]
    p = [x / sum(exp) for x in exp]
    errors = [(q - (v == target)) ** 2 for v, q in enumerate(p)]
    others = [q for v, q in enumerate(p) if v != target]
    nll = math.log(sum(exp)) + top - logits[target]
    return nll, math.sqrt(sum(errors)), p[target] - max(others)


@pytest.mark.parametrize(
    ("vocabulary_chunk", "row_chunk"), [(1000, 100), (7, 100), (50, 3), (1, 1)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_token_scores_are_their_definitions(vocabulary_chunk, row_chunk, bias):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(11, 8, generator=generator)
    weight = torch.randn(50, 8, generator=generator)
    added = torch.randn(50, generator=generator) if bias else None
    targets = torch.randint(50, (11,), generator=generator)
    found = token_scores(states, targets, weight, added, vocabulary_chunk, row_chunk)
    logits = states.double() @ weight.double().T + (added.double() if bias else 0)
    slow = [slow_scores(r.tolist(), int(t)) for r, t in zip(logits, targets, strict=True)]
    for name, column in zip(("nll", "el2n", "aum"), zip(*slow, strict=True), strict=True):
        # float32 logits of size about 8 are exact to 1e-6; the sums add a few of those.
        np.testing.assert_allclose(getattr(found, name), column, atol=2e-5, rtol=1e-5)


def test_token_scores_of_certain_and_huge_logits():
    """Certain and right: 0, 0, 1. Certain and wrong: 2000 nats, sqrt 2, -1. Nothing overflows."""
    weight = torch.tensor([[1000.0], [-1000.0], [0.0]])
    found = token_scores(torch.ones(2, 1), torch.tensor([0, 1]), weight, vocabulary_chunk=2)
    np.testing.assert_allclose(found.nll, [0, 2000])
    np.testing.assert_allclose(found.el2n, [0, math.sqrt(2)], atol=1e-6)
    np.testing.assert_allclose(found.aum, [1, -1], atol=1e-6)


@pytest.mark.bits
def test_row_of_token_scores_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 48, generator=generator) for n in (130, 777))
    targets = torch.randint(777, (130,), generator=generator)
    whole = token_scores(states, targets, weight)
    for part in (slice(0, 1), slice(1, 4), slice(4, 50), slice(50, 130)):
        alone = token_scores(states[part], targets[part], weight)
        for column, one in zip(whole, alone, strict=True):
            assert torch.equal(column[part], one)


def test_no_tokens_no_scores():
    empty = token_scores(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.ones(9, 4))
    assert [len(column) for column in empty] == [0, 0, 0]


def test_supervised_positions_are_one_before_their_label():
    labels = torch.full((2, 6), IGNORE_INDEX)
    labels[0, 3], labels[1, 0], labels[1, 5] = 7, 8, 9  # nothing predicts position 0
    sample, position = supervised_positions(labels)
    assert list(zip(sample.tolist(), position.tolist(), strict=True)) == [(0, 2), (1, 4)]


def test_pooled_states_are_the_slides_formulas():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 10, 4, generator=generator)
    last = torch.tensor([9, 0, 5])
    attention = torch.rand(3, 10, generator=generator)
    last_state, weighted, mean = pooled_states(hidden, attention, last)
    for b, end in enumerate(last.tolist()):
        assert torch.equal(last_state[b], hidden[b, end])
        slow = sum((attention[b, t] * hidden[b, t] for t in range(end)), torch.zeros(4))
        torch.testing.assert_close(weighted[b], slow)
        torch.testing.assert_close(mean[b], hidden[b, : end + 1].mean(0))


@pytest.mark.parametrize("name", BUILDERS)
def test_columns_against_a_plain_forward_with_labels(name, tmp_path):
    proxy = load_vlm(BUILDERS[name](tmp_path / "model"))
    path, images = save_pool(tmp_path / "pool", 3)
    pool = Pool.open(path)
    for row in (0, 1):
        record = pool.record(row)
        image = open_image(images, record.image) if pool.has_image[row] else None
        item = Forward().prepare(proxy, Sample(row, pool.uid(row), record, image))
        batch = proxy.collate([item], pad_to=len(item.input_ids))
        with torch.inference_mode():
            found = Forward().compute(proxy, [item])
            slow = proxy.model(input_ids=batch.input_ids, labels=batch.labels, **batch.inputs)
        supervised = int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
        assert found["n_tokens"] == supervised > 0
        np.testing.assert_allclose(found["nll_mean"], slow.loss, rtol=1e-5)
        np.testing.assert_allclose(found["nll_sum"], slow.loss * supervised, rtol=1e-5)
        tokens = [
            slow_scores(slow.logits[0, t].double().tolist(), int(batch.labels[0, t + 1]))
            for t in range(batch.labels.shape[1] - 1)
            if batch.labels[0, t + 1] != IGNORE_INDEX
        ]
        np.testing.assert_allclose(found["el2n"][0], np.mean([x[1] for x in tokens]), rtol=1e-4)
        np.testing.assert_allclose(
            found["aum"][0], np.mean([x[2] for x in tokens]), rtol=1e-4, atol=1e-6
        )
        declared = {column.name: column for column in Forward().columns(proxy)}
        assert found.keys() == declared.keys()
        for column, array in found.items():
            assert array.shape == (1, *declared[column].shape)
            assert array.dtype == declared[column].dtype


def test_renormalised_attention_state_is_recoverable(tmp_path):
    """attention_state / (1 - attention_self) weighs the earlier tokens with weights of sum 1."""
    proxy = load_vlm(save_llava(tmp_path / "model"))
    path, _ = save_pool(tmp_path / "pool", 1)
    item = proxy.prepare(Pool.open(path).record(0), None)
    with torch.inference_mode():
        found = Forward().compute(proxy, [item])
        out = proxy.forward(proxy.collate([item]))
    row = out.attention[0, : len(item.input_ids) - 1]
    expected = (row / row.sum()) @ out.hidden[0, : len(row)]
    recovered = found["attention_state"][0] / (1 - found["attention_self"][0])
    np.testing.assert_allclose(recovered, expected, rtol=1e-4, atol=1e-5)


def test_sample_without_an_answer_is_refused(tmp_path):
    proxy = load_vlm(save_llava(tmp_path / "model"))
    record = Pool.open(save_pool(tmp_path / "pool", 1)[0]).record(0)
    del record.conversations[1:]
    with pytest.raises(DataError, match="no answer token"):
        Forward().prepare(proxy, Sample(0, "", record, None))


def test_half_precision_is_stored_as_float16(tmp_path):
    proxy = load_vlm(save_llava(tmp_path / "model"), dtype="bfloat16")
    item = proxy.prepare(Pool.open(save_pool(tmp_path / "pool", 1)[0]).record(0), None)
    with torch.inference_mode():
        found = Forward().compute(proxy, [item])
    assert {name: array.dtype.name for name, array in found.items()} == {
        **dict.fromkeys(("last_state", "attention_state", "mean_state"), "float16"),
        **dict.fromkeys(("attention_self", "nll_sum", "nll_mean", "el2n", "aum"), "float32"),
        "n_tokens": "int32",
    }
