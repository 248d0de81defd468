"""RHO-LOSS: a difference of two models' losses, and a refusal without the second model."""

import numpy as np
import pytest

from llava.errors import UsageError
from selection.methods.rho_loss import RhoLoss, Settings


def test_the_score_is_the_difference_of_the_losses(world):
    scores = world.run(RhoLoss()).scores
    pairs = zip(world.forward["nll_mean"], world.others["holdout"]["nll_mean"], strict=True)
    slow = [float(loss) - float(irreducible) for loss, irreducible in pairs]
    np.testing.assert_allclose(scores, slow, rtol=1e-6)


def test_a_sample_either_model_cannot_score_has_no_score(world):
    world.forward["nll_mean"][3] = np.nan
    world.others["holdout"]["nll_mean"][8] = np.nan
    assert np.flatnonzero(np.isnan(world.run(RhoLoss()).scores)).tolist() == [3, 8]


def test_the_second_model_is_named_or_asked_for():
    made = RhoLoss(Settings(holdout_model="m", holdout_base="b"))
    assert made.checkpoints() == {"holdout": ("m", "b")}
    with pytest.raises(UsageError, match="--holdout_model"):
        RhoLoss().checkpoints()
