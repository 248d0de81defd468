"""A mistake on the command line is one line that names the flag, the value and a remedy."""

import pytest
import yaml

from llava.errors import UsageError
from selection.settings import VerifySettings, parse_plain, parse_select

POOL = ["ards", "--pool", "p.json"]


def told(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_select([*POOL, *argv])
    message = str(caught.value)
    assert "\n" not in message and "typing" not in message and "<class" not in message
    assert message.endswith("; python -m selection select ards --help explains all flags")
    return message


def test_a_misspelt_flag_gets_the_nearest_one():
    assert told("--buget", "0.4").startswith("--buget: no such flag, did you mean --budget?")
    assert told("--buget=0.4").startswith("--buget: no such flag, did you mean --budget?")
    both = told("--buget=0.4", "--imagse", "x")
    assert "--budget?; --imagse: no such flag, did you mean --images?" in both
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
    config.write_text(yaml.safe_dump({"pool": "p.json", "budgte": "0.2"}))
    assert "budgte" in told("--config", str(config))
    config.write_text(yaml.safe_dump({"seed": "x"}))
    assert "x" in told("--config", str(config))
    assert "absent.yaml" in str(
        pytest.raises(UsageError, parse_select, [*POOL, "--config", "absent.yaml"]).value
    )
