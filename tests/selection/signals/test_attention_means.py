"""Blocks against the projections of the attention layers, collected whole and averaged by hand."""

import numpy as np
import pytest
import torch

from llava.images import open_image
from llava.vlm import load_vlm
from selection.pool.pool import Pool
from selection.signals.attention_means import Blocks, layers_read, prompt_length, unit_blocks
from selection.signals.base import Sample
from selection.signals.forward import Forward
from tests.tiny_models import BUILDERS, save_llava, save_pool


def prepared(proxy, folder, n):
    path, images = save_pool(folder, n)
    pool = Pool.open(path)
    for row in range(n):
        record = pool.record(row)
        image = open_image(images, record.image) if pool.has_image[row] else None
        yield Forward().prepare(proxy, Sample(row, pool.uid(row), record, image))


def batch_of(items):
    """The largest set of items that may share a batch, all with an image."""
    items = [item for item in items if item.extras]
    keys = [item.key for item in items]
    most = max(keys, key=keys.count)
    assert keys.count(most) > 2
    return [item for item in items if item.key == most]


def test_layers_are_the_released_ones_and_evenly_spaced():
    assert layers_read(24, 5) == [3, 7, 11, 15, 19]
    assert layers_read(32, 5) == [4, 10, 15, 20, 26]
    assert layers_read(2, 5) == [0, 1] and layers_read(1, 5) == [0]
    assert layers_read(8, 1) == [3]


def test_blocks_are_unit_after_tanh_and_zeros_stay():
    found = unit_blocks(torch.tensor([[0.5, -2.0], [0.0, 0.0]]))
    slow = np.tanh([0.5, -2.0]) / np.sqrt(np.tanh(0.5) ** 2 + np.tanh(2.0) ** 2)
    np.testing.assert_allclose(found, [slow, [0, 0]], rtol=1e-6)


@pytest.mark.parametrize("name", BUILDERS)
def test_columns_are_means_over_image_and_language_tokens(name, tmp_path):
    proxy = load_vlm(BUILDERS[name](tmp_path / "model"))
    kept, layers = {}, proxy.decoder.layers
    for i, layer in enumerate(layers):
        layer.self_attn.o_proj.register_forward_hook(
            lambda module, inputs, output, i=i: kept.__setitem__(i, output[0])
        )
    start, seen = prompt_length(proxy), set()
    for item in prepared(proxy, tmp_path / "pool", 4):
        with torch.inference_mode():
            found = Blocks().compute(proxy, [item])
        is_image = (item.input_ids == proxy.model.config.image_token_id).tolist()
        for column, wanted in (("vision", True), ("language", False)):
            slow = []
            for i in range(len(layers)):
                states = [
                    state.numpy()
                    for t, state in enumerate(kept[i][: len(is_image)])
                    if is_image[t] == wanted and (wanted or t >= start)
                ]
                mean = np.mean(states, axis=0) if states else np.zeros(proxy.hidden_size)
                block = np.tanh(mean)
                slow.append(block / max(np.linalg.norm(block), 1e-12))
            np.testing.assert_allclose(found[column][0], np.concatenate(slow), atol=1e-5)
        assert found["vision"].any() == any(is_image)
        seen.add(any(is_image))
        declared = {column.name: column for column in Blocks().columns(proxy)}
        for column, array in found.items():
            assert array.shape == (1, *declared[column].shape)
            assert array.dtype == declared[column].dtype
    assert seen == {True, False}


def test_the_prompt_ends_where_conversations_begin_to_differ(tmp_path):
    proxy = load_vlm(save_llava(tmp_path / "model"))
    start = prompt_length(proxy)
    items = list(prepared(proxy, tmp_path / "pool", 6))
    heads = {tuple(item.input_ids[: start - 1].tolist()) for item in items}
    assert len(heads) == 1 and start > 20
    assert len({tuple(item.input_ids[: start + 3].tolist()) for item in items}) > 1


@pytest.mark.bits
def test_together_is_one_pass_with_the_same_bits_and_no_hook_stays(tmp_path):
    proxy = load_vlm(save_llava(tmp_path / "model"))
    passes = []
    proxy.model.base_model.register_forward_hook(lambda *_: passes.append(1))
    items = batch_of(prepared(proxy, tmp_path / "pool", 24))
    with torch.inference_mode():
        together = Forward.compute_together([Forward(), Blocks(), Blocks(1)], proxy, items)
        assert len(passes) == 1
        for signal, found in zip([Forward(), Blocks(), Blocks(1)], together, strict=True):
            alone = signal.compute(proxy, items)
            assert alone.keys() == found.keys()
            for column, array in alone.items():
                assert array.tobytes() == found[column].tobytes()
    assert not any(layer.self_attn._forward_hooks for layer in proxy.decoder.layers)


@pytest.mark.bits
def test_a_row_does_not_depend_on_its_batch(tmp_path):
    proxy = load_vlm(save_llava(tmp_path / "model"))
    items = batch_of(prepared(proxy, tmp_path / "pool", 24))
    with torch.inference_mode():
        whole = Blocks().compute(proxy, items)
        for i, item in enumerate(items):
            for column, array in Blocks().compute(proxy, [item]).items():
                assert array[0].tobytes() == whole[column][i].tobytes()
