"""Flags, YAML and presets: one set of names, and an error for every wrong one."""

from __future__ import annotations

import pytest
import yaml

from llava.errors import UsageError
from selection.cli import parse_select as parse
from selection.methods import find_methods

POOL = ["--pool", "pool.json"]


def parse_select(argv):
    """What is to be done; whether only its cost is asked for has a test of its own."""
    return parse(argv)[0]


def test_defaults_are_the_papers():
    run = parse_select(["ards", *POOL])
    settings = run.method.settings
    assert (settings.vector, settings.aggregate, settings.similarity) == (
        "attention",
        "weighted_sum",
        "mean",
    )
    assert settings.subgroup_size == 50 and settings.clustering and settings.perturbation
    assert run.select.budget == "0.3"


def test_hyphens_underscores_and_bare_switches_are_the_same():
    first, dry = parse(["random", *POOL, "--dry-run", "--model-base", "a-b", "--force-new"])
    second, _ = parse(
        ["random", *POOL, "--dry_run=true", "--model_base=a-b", "--force_new", "true"]
    )
    assert (first.pool, first.proxy, first.select) == (second.pool, second.proxy, second.select)
    assert dry and first.select.force_new and first.proxy.model_base == "a-b"
    assert parse(["random", *POOL])[1] is False


def test_flag_over_file_over_preset_over_default(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"method": "ards", "pool": "p.json", "n_clusters": 3}))
    preset = parse_select(["ards", *POOL, "--preset", "as_released"])
    assert preset.method.settings.similarity == "max"
    run = parse_select(["--config", str(config), "--preset", "as_released", "--seed", "5"])
    assert run.method.settings.n_clusters == 3 and run.method.settings.similarity == "max"
    assert run.pool.pool == "p.json" and run.select.seed == 5
    over = parse_select(["ards", "--config", str(config), "--n_clusters", "4"])
    assert over.method.settings.n_clusters == 4


def test_dump_is_read_back_unchanged(tmp_path):
    run = parse_select(["ards", *POOL, "--budget", "5000", "--preset", "as_released"])
    path = tmp_path / "config.yaml"
    path.write_text(run.config(tmp_path / "out"))
    again = parse_select(["--config", str(path)])
    assert again.config(tmp_path / "out") == run.config(tmp_path / "out")
    assert again.method.settings == run.method.settings
    assert again.select.budget == "5000"


def test_wrong_names_are_refused(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'random'"):
        parse_select(["randm", *POOL])
    with pytest.raises(UsageError, match="did you mean 'as_released'"):
        parse_select(["ards", *POOL, "--preset", "as_relased"])
    with pytest.raises(UsageError, match="name a method"):
        parse_select(POOL)
    with pytest.raises(UsageError, match="cannot be read"):
        parse_select(["--config", str(tmp_path / "absent.yaml")])
    config = tmp_path / "config.yaml"
    config.write_text("method: random\npool: p.json\nbudgte: 0.2\n")
    with pytest.raises(UsageError, match="budgte"):
        parse_select(["--config", str(config)])
    config.write_text("method: random\npool: p.json\n")
    with pytest.raises(UsageError, match="is for method 'random'"):
        parse_select(["ards", "--config", str(config)])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("batch_size", 0),
        ("max_tokens", 0),
        ("block_size", -1),
        ("num_workers", -2),
        ("max_bad", 1.5),
        ("max_bad", "nan"),
    ],
)
def test_numbers_that_cannot_be_are_refused(flag, value):
    with pytest.raises(UsageError, match=f"--{flag} {value}"):
        parse_select(["random", *POOL, f"--{flag}={value}"])


def test_help_explains_every_group_and_flag(capsys):
    for name in find_methods():
        with pytest.raises(SystemExit):
            parse_select([name, "--help"])
        shown = capsys.readouterr().out
        assert "Settings(" not in shown  # a dataclass's own text where a sentence belongs
        flags = [line for line in shown.splitlines() if line.startswith("  --")]
        assert len(flags) > 15


def test_print_config_prints_yaml(capsys):
    with pytest.raises(SystemExit):
        parse_select(["random", *POOL, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["pool"] == "pool.json"
