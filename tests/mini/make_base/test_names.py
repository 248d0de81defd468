"""Words and projector learnt over features tell drawings apart, in the dimensions agreed on."""

import pytest
import torch
import torch.nn.functional as F

from mini.make_base.lessons import Thing
from mini.make_base.names import learn_names
from mini.make_base.wiring import CONST, CONST_VALUE, FIRST_WORD, IMAGE, IMAGE_VALUE, N_PICTURE

N, HIDDEN = 12, 192


@pytest.fixture(scope="module")
def learnt():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(N, 1, 20, generator=generator)
    noise = torch.randn(3, N, 4, 20, generator=generator)
    bank = (5 + centres + 0.3 * noise).half()
    things = [Thing(f"name{i}", "", "kind") for i in range(N)]
    return bank, learn_names(bank, things, HIDDEN, 200, 0)


@torch.no_grad()
def test_a_drawing_lands_nearest_its_own_word(learnt):
    bank, (words, projector) = learnt
    seen = projector(bank[0].float()).mean(1)[:, FIRST_WORD : FIRST_WORD + N_PICTURE]
    vectors = torch.stack([words[f"name{i}"] for i in range(N)])
    assert (F.normalize(seen, dim=1) @ vectors.T).argmax(1).tolist() == list(range(N))


@torch.no_grad()
def test_image_positions_are_marked_and_write_nothing_else(learnt):
    bank, (_, projector) = learnt
    out = projector(bank[0].float())
    assert torch.allclose(out[..., CONST], torch.tensor(CONST_VALUE))
    assert torch.allclose(out[..., IMAGE], torch.tensor(IMAGE_VALUE))
    assert (out[..., FIRST_WORD + N_PICTURE :] == 0).all()


def test_words_are_unit_vectors_without_the_kinds(learnt):
    _, (words, _) = learnt
    assert set(words) == {f"name{i}" for i in range(N)}
    for vector in words.values():
        assert vector.norm() == pytest.approx(1, abs=1e-5)
