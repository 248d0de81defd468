import math

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralModel

from llava.errors import UsageError
from llava.images import open_image
from llava.vlm import load_vlm
from llava.vlm.attention import LastRow, last_row
from selection.pool.pool import Pool
from tests.tiny_models import BUILDERS, save_pool


def slow_row(query, key, last, scaling, visible):
    """The definition, one head and one key at a time: mean over heads of softmax(q k / sqrt d)."""
    n_heads, groups = query.shape[0], key.shape[0]
    row = [0.0] * key.shape[1]
    for head in range(n_heads):
        k = key[head // (n_heads // groups)]
        logits = {
            t: sum(float(a) * float(b) for a, b in zip(query[head, last], k[t], strict=True))
            for t in range(key.shape[1])
            if visible(t)
        }
        weights = {t: math.exp(logit * scaling) for t, logit in logits.items()}
        for t, weight in weights.items():
            row[t] += weight / sum(weights.values()) / n_heads
    return row


def tensors(n_queries, n_keys, heads=4, groups=2, batch=3, width=5):
    generator = torch.Generator().manual_seed(n_queries)
    query = torch.randn(batch, heads, n_queries, width, generator=generator)
    return query, torch.randn(batch, groups, n_keys, width, generator=generator)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_row_is_the_definition(groups, window):
    query, key = tensors(9, 9, groups=groups)
    last = torch.tensor([8, 0, 5])
    found = last_row(query, key, last, 0.3, window=window)
    for b, own in enumerate(last.tolist()):
        first = 0 if window is None else own - window + 1
        row = slow_row(query[b], key[b], own, 0.3, lambda t: first <= t <= own)  # noqa: B023
        torch.testing.assert_close(found[b].tolist(), row, atol=1e-6, rtol=1e-5)


def test_positions_after_the_last_token_get_exactly_nothing():
    query, key = tensors(9, 9)
    found = last_row(query, key, torch.tensor([3, 3, 3]), 0.3)
    assert (found[:, 4:] == 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(3))


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_row_of_a_mask_that_the_model_made(additive, heads):
    query, key = tensors(6, 6)
    mask = torch.ones(3, heads, 6, 6, dtype=torch.bool).tril()
    mask[1, :, :, 2] = False
    given = torch.where(mask, 0.0, -torch.inf) if additive else mask
    found = last_row(query, key, torch.full((3,), 5), 0.3, given)
    assert found[1, 2] == 0
    row = slow_row(query[1], key[1], 5, 0.3, lambda t: t != 2)
    torch.testing.assert_close(found[1].tolist(), row, atol=1e-6, rtol=1e-5)


def test_row_over_a_cached_prefix():
    """Of 9 keys the first 5 come from a cache: query 2 is position 7."""
    query, key = tensors(4, 9)
    found = last_row(query, key, torch.tensor([2, 0, 3]), 0.3)
    row = slow_row(query[0], key[0], 2, 0.3, lambda t: t <= 7)
    torch.testing.assert_close(found[0].tolist(), row, atol=1e-6, rtol=1e-5)


@pytest.mark.bits
def test_batch_does_not_change_a_bit():
    query, key = tensors(64, 64, heads=8, groups=4, batch=7, width=16)
    last = torch.randint(64, (7,), generator=torch.Generator().manual_seed(1))
    whole = last_row(query, key, last, 0.25)
    for b in range(7):
        one = slice(b, b + 1)
        assert torch.equal(whole[one], last_row(query[one], key[one], last[one], 0.25))


@pytest.mark.parametrize("name", BUILDERS)
def test_models_give_what_eager_attention_gives(name, tmp_path):
    """Right-padded, without a mask, against one sample at a time with output_attentions=True."""
    proxy = load_vlm(BUILDERS[name](tmp_path / "model"))
    path, images = save_pool(tmp_path / "pool", 4)
    pool = Pool.open(path)
    items = []
    for row in (0, 1, 2):
        record = pool.record(row)
        image = open_image(images, record.image) if pool.has_image[row] else None
        items.append(proxy.prepare(record, image))
    with torch.inference_mode():
        ours = [proxy.forward(proxy.collate([item], pad_to=item.n_tokens + 16)) for item in items]
        proxy.decoder.set_attn_implementation("eager")
        for item, out in zip(items, ours, strict=True):
            length = len(item.input_ids)
            batch = proxy.collate([item], pad_to=length)
            slow = proxy.model.base_model(
                input_ids=batch.input_ids,
                use_cache=False,
                output_attentions=True,
                output_hidden_states=True,
                **batch.inputs,
            )
            row = slow.attentions[-1][0].mean(0)[-1]
            torch.testing.assert_close(out.attention[0, :length], row, atol=1e-5, rtol=0)
            hidden = slow.hidden_states[-1][0]
            torch.testing.assert_close(out.hidden[0, :length], hidden, atol=1e-4, rtol=1e-4)


def test_sliding_window_of_the_model_is_kept(tmp_path):
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        sliding_window=6,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = MistralModel(config).eval()
    ids = torch.randint(50, (2, 20))
    with torch.inference_mode():
        with LastRow(model) as recorder:
            recorder.last = torch.tensor([19, 11])
            model(input_ids=ids, use_cache=False)
        model.set_attn_implementation("eager")
        slow = model(input_ids=ids, output_attentions=True).attentions[-1].mean(1)
    assert (recorder.row[0, :14] == 0).all()
    assert (recorder.row[1, 12:] == 0).all()
    torch.testing.assert_close(recorder.row[0], slow[0, 19], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(recorder.row[1], slow[1, 11], atol=1e-6, rtol=1e-5)


def test_nothing_is_recorded_outside_the_context():
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=20,
    )
    model = MistralModel(config).eval()
    ids = torch.arange(8)[None]
    before = model(input_ids=ids).last_hidden_state
    recorder = LastRow(model)
    assert torch.equal(model(input_ids=ids).last_hidden_state, before)
    assert recorder.row is None


def test_decoder_of_another_shape_is_refused():
    with pytest.raises(UsageError, match="self_attn"):
        LastRow(nn.Linear(2, 2))
