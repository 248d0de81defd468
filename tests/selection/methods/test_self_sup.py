"""Self-Sup prototypes: the cosine to the own prototype, and which end of it is kept."""

import numpy as np
import pytest
import torch

from llava.errors import UsageError
from selection.methods.base import stream
from selection.methods.self_sup import SelfSup, Settings, prototypicality
from selection.methods.semdedup import COLUMNS
from selection.vectors.kmeans import cluster_rows


def test_prototypicality_is_a_cosine():
    rng = np.random.default_rng(0)
    vectors, centre = rng.normal(size=(9, 5)), rng.normal(size=5)
    centre /= np.sqrt(sum(x * x for x in centre))
    slow = [
        sum(a * b for a, b in zip(v, centre, strict=True)) / np.sqrt(sum(a * a for a in v))
        for v in vectors
    ]
    found = prototypicality(torch.from_numpy(vectors).float(), torch.from_numpy(centre).float())
    np.testing.assert_allclose(found, slow, atol=1e-6)
    assert np.isnan(prototypicality(torch.zeros(1, 3), torch.ones(3))).all()


@pytest.mark.parametrize(("keep", "sign"), [("easy", 1), ("hard", -1)])
def test_scores_are_cosines_to_the_nearest_prototype(world, keep, sign):
    scored = world.run(SelfSup(Settings(n_clusters=2, keep=keep)), seed=2)
    context = world.context()
    keys = context.keys(stream(2, "self_sup", "score"))
    made = cluster_rows(context.readers["forward"], COLUMNS, np.ones(150, bool), keys, 2, 50)
    vectors = world.forward["last_state"].astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ made.centroids.T.astype(np.float64)
    assert cosines.shape == (150, 2)
    np.testing.assert_allclose(scored.scores, sign * cosines.max(axis=1), atol=1e-6)
    assert scored.artefacts["cluster_labels"].tolist() == cosines.argmax(axis=1).tolist()


def test_collapsed_clusters_and_few_samples(world, new_world):
    world.forward["last_state"][:] = world.forward["last_state"][3]
    np.testing.assert_allclose(world.run(SelfSup()).scores, 1, atol=1e-6)
    assert len(set(new_world("tiny", n=5).run(SelfSup()).scores)) == 5


@pytest.mark.parametrize("wrong", [{"n_clusters": 0}, {"n_iter": 0}])
def test_impossible_settings(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Settings(**wrong)
