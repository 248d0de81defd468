"""What holds for every method in the folder, whatever it does; and that each law has teeth."""

from dataclasses import dataclass

import numpy as np
import pytest

from selection.methods import Method, find_methods
from selection.methods.base import Request, Scored, SecondStage
from selection.methods.contract import LAWS, broken_laws, main, same_bits
from selection.methods.made_up import make_world
from selection.signals.clip import Clip
from selection.signals.forward import Forward
from selection.signals.gradients.gradients import Gradients

VARIANTS = [
    pytest.param(method, settings, id=f"{name}-{variant}")
    for name, method in find_methods().items()
    for variant, settings in {"default": {}, **method.presets}.items()
]


@pytest.mark.parametrize(
    "law",
    [
        pytest.param(law, id=law.__name__, marks=pytest.mark.bits if law is same_bits else ())
        for law in LAWS
    ],
)
@pytest.mark.parametrize(("method", "settings"), VARIANTS)
def test_every_method_keeps_the_law(tmp_path, method, settings, law):
    law(make_world(tmp_path), method(method.Settings(**settings)))


class Keys(Method):
    """Keeps every law; the classes below break one each."""

    def score(self, context, rng):
        return Scored(context.keys(rng))


class Twice(Keys):
    """Chooses the first rows twice."""

    def select(self, context, scores, k):
        return np.repeat(np.arange(k), 2)[:k]


class Alike(Keys):
    """Cannot tell samples apart."""

    def score(self, context, rng):
        return Scored(np.zeros(len(context.pool)))


class Moody(Keys):
    """Scores otherwise every time."""

    def score(self, context, rng):
        return super().score(context, np.random.default_rng())


class Asking(Keys):
    """Asks for other rows every time."""

    def second_stage(self, context, rng):
        rows = np.random.default_rng().choice(len(context.pool), 5, replace=False)
        return SecondStage({"more": Request(Forward(), np.sort(rows))})


class Worldly(Keys):
    """Draws from the global generator."""

    def score(self, context, rng):
        return super().score(context, np.random.default_rng(np.random.randint(2**31)))


class Placed(Keys):
    """Scores by position."""

    def score(self, context, rng):
        return Scored(rng.random(len(context.pool)))


class Filling(Keys):
    """Invents a score where there is no signal."""

    def signals(self):
        return {"forward": Forward()}

    def score(self, context, rng):
        return Scored(np.nan_to_num(context.values("forward", "nll_mean")))


class Silent(Keys):
    """Does not say what its setting is."""

    @dataclass(frozen=True)
    class Settings:
        """One."""

        size: int = 3


class Crashing(Keys):
    """Has a bug."""

    def score(self, context, rng):
        return Scored(context.values("nothing", "there"))


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (Twice, "exact_subset"),
        (Alike, "finite_scores"),
        (Moody, "same_bits"),
        (Asking, "same_bits"),
        (Worldly, "no_global_state"),
        (Placed, "order_is_nothing"),
        (Filling, "bad_rows_stay_out"),
        (Silent, "told_settings"),
        (Crashing, "exact_subset"),
    ],
)
def test_each_law_is_broken_by_one_who_breaks_it(method, law):
    broken = {
        name.__name__: reason
        for name, (_, reason) in zip(LAWS, broken_laws(method, {"default": None}), strict=True)
        if reason
    }
    assert law in broken, broken
    if method is Crashing:
        assert "KeyError: 'nothing'" in broken[law] and "test_contract.py, line" in broken[law]


class Reading(Method):
    """Reads signals of several kinds under names of its own, of the pool and of target tasks."""

    def signals(self):
        kinds = {"states": Forward(), "other_states": Forward(), "pictures": Clip()}
        return {**kinds, "steps": Gradients(dim=16)}

    def target_signals(self):
        return {"states": Forward()}

    def second_stage(self, context, rng):
        usable = np.flatnonzero(~np.isnan(context.values("states", "nll_mean")))
        return SecondStage({"again": Request(Gradients(dim=8), usable[:9])})

    def score(self, context, rng):
        values = context.values("states", "attention_self") - context.values("steps", "norm")
        values += context.values("other_states", "nll_mean") != context.values("states", "nll_mean")
        values += context.readers["again"].column("gradient").shape[1] > 0
        target = context.tasks[1].readers["states"][1].column("mean_state").mean()
        shown = np.nan_to_num(context.values("pictures", "clip_score"))
        return Scored(values + shown + float(target))


def test_any_signal_of_the_project_is_made_up():
    assert not [reason for _, reason in broken_laws(Reading, {"default": None}) if reason]


def test_the_command_tells_law_by_law_and_ends_at_the_first_broken_one(capsys):
    here = f"{__file__}:"
    assert main([f"{here}Keys"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["holds"] * 7
    assert main([f"{here}Alike"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told[:2]] == ["holds", "broken"]
    assert told[2].strip() == ("default settings: 1 values for 150 samples: position would decide")
    assert main([f"{here}Silent", "--size", "4"]) == 1
    assert "given settings: without one: {'size'}" in capsys.readouterr().out
