"""A mistake on the command line is one line that names the flag, the value and a remedy."""

import pytest

from llava.errors import UsageError
from selection.cli import parse_plain, parse_select
from selection.settings import VerifySettings

POOL = ["ards", "--pool", "p.json"]


def told(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_select([*POOL, *argv])
    message = str(caught.value)
    assert "\n" not in message and "typing" not in message and "<class" not in message
    assert message.endswith("; python -m selection select ards --help explains all flags")
    return message


def test_a_misspelt_flag_gets_the_nearest_one():
    assert told("--buget", "0.4").startswith("--buget: no such flag (did you mean --budget?);")
    assert told("--buget=0.4").startswith("--buget: no such flag (did you mean --budget?);")
    both = told("--buget=0.4", "--imagse", "x")
    assert "--budget?); --imagse: no such flag (did you mean --images?)" in both
    assert told("--zzzzqqq", "1").startswith("--zzzzqqq: no such flag; ")
    assert told("0.4").startswith("0.4: belongs to no flag; ")


def test_a_wrong_value_is_shown_beside_what_is_expected():
    assert told("--seed", "x").startswith("--seed x: expected int; ")
    expected = "--vector lasttoken: expected one of ['attention', 'last_token']; "
    assert told("--vector", "lasttoken").startswith(expected)
    assert told("--clustering", "maybe").startswith("--clustering maybe: expected bool; ")


def test_what_is_missing_is_named():
    with pytest.raises(UsageError, match="^--pool is missing; python -m selection select random"):
        parse_select(["random"])
    with pytest.raises(UsageError, match="^--run is missing; python -m selection verify"):
        parse_plain("verify", "about", [], VerifySettings)


def test_files_are_told_like_flags(tmp_path):
    config = tmp_path / "config.yaml"
    for text, words in {
        "pool: p.json\nbudgte: 0.2": "--budgte: no such flag (did you mean --budget?)",
        "seed: x": "x",
        "image_roots: coco": "--image_roots coco: expected a list such as '[a,b]'",
    }.items():
        config.write_text(text)
        assert words in told("--config", str(config))
    for text in ("seed: [", "- seed", ""):
        config.write_text(text)
        with pytest.raises(UsageError, match=f"^--config {config}: .+") as caught:
            parse_select(["--config", str(config)])
        assert "\n" not in str(caught.value)
