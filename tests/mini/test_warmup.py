"""Warm-up on the fixture, really trained: what it is trained on, and when it is trained again."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from llava.errors import UsageError
from llava.model.assemble import assemble
from llava.model.checkpoint import load
from mini import SHIPPED
from mini.warmup import WarmupSettings, identity, main

FIXTURE = Path(__file__).parents[2] / "mini/fixture"
OPTIONS = ("--share", "0.1", "--batch_size", "3", "--questions", "4")


def run(data: Path, out: Path, *more: str) -> None:
    main(["--data", str(data), "--out", str(out), *OPTIONS, *more])


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A proxy from six samples, two steps."""
    folder = tmp_path_factory.mktemp("warmup")
    data = folder / "data"
    shutil.copytree(FIXTURE, data)
    run(data, folder / "proxy")
    return data, folder / "proxy"


def test_it_trains_on_its_share_of_the_pool_alone(warm):
    data, proxy = warm
    pool = json.loads((data / "pool.json").read_text())
    used = json.loads((proxy.parent / "warmup_samples.json").read_text())
    rows = sorted(random.Random(0).sample(range(60), 6))
    assert used == [pool[row] for row in rows]
    base = dict(assemble(*parts(), dtype=torch.float32).named_parameters())
    trained = dict(load(proxy, dtype=torch.float32).model.named_parameters())
    moved = {name for name, value in trained.items() if not torch.equal(value, base[name])}
    assert moved and not any("vision_tower" in name for name in moved)
    assert any("language_model" in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved)
    for name in moved:  # two steps at 2e-5: still the base
        assert (trained[name] - base[name]).abs().max() < 1e-3


def parts():
    return SHIPPED / "llama", SHIPPED / "clip", SHIPPED / "projector.safetensors"


def test_the_report_stays_with_the_proxy(warm, capsys):
    data, proxy = warm
    before = stamp(proxy)
    run(data, proxy)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{proxy}: already warmed up"
    names = [re.split(r" {2,}| \d", line)[0] for line in shown[1:]]
    assert names == ["mcq_en", "mcq_en, symbols QWER", "mcq_en, no picture"]
    assert all("(chance 25.0%" in line for line in shown[1:])
    assert stamp(proxy) == before


def stamp(proxy: Path) -> list[tuple[str, int]]:
    return sorted((path.name, path.stat().st_mtime_ns) for path in proxy.iterdir())


def settings(data: Path, **changes) -> WarmupSettings:
    return WarmupSettings(str(data), **changes)


def test_identity_is_pool_base_and_settings_but_no_place(warm, tmp_path):
    data, _ = warm
    first = identity(settings(data))
    json.dumps(first)
    elsewhere = shutil.copytree(data, tmp_path / "elsewhere")
    base = shutil.copytree(SHIPPED, tmp_path / "base")
    moved = settings(elsewhere, base=str(base), out=str(tmp_path / "out"))
    assert identity(moved) == first
    for change in ({"seed": 1}, {"share": 0.2}, {"epochs": 2.0}, {"learning_rate": 1e-5}):
        assert identity(settings(data, **change)) != first
    projector = base / "projector.safetensors"
    content = bytearray(projector.read_bytes())
    content[-1] ^= 1
    projector.write_bytes(content)
    assert identity(moved)["base"] != first["base"]
    pool = elsewhere / "pool.json"
    pool.write_text(pool.read_text().replace("fox", "Fox"))
    assert identity(moved)["pool"] != first["pool"]


@pytest.mark.parametrize("changed", ["pool", "settings"])
def test_another_pool_or_setting_trains_again(warm, tmp_path, capsys, changed):
    data, proxy = shutil.copytree(warm[0], tmp_path / "data"), tmp_path / "proxy"
    shutil.copytree(warm[1], proxy)
    (proxy / "left behind").write_text("of the earlier proxy")
    more = ["--seed", "1"] if changed == "settings" else []
    if changed == "pool":
        records = json.loads((data / "pool.json").read_text())
        (data / "pool.json").write_text(json.dumps(records[::-1]))
    run(data, proxy, *more)
    assert f"{proxy}: warmed up in" in capsys.readouterr().out
    assert not (proxy / "left behind").exists()
    assert weights(proxy) != weights(warm[1])


def weights(proxy: Path) -> bytes:
    return (proxy / "model.safetensors").read_bytes()


def test_what_cannot_be_is_told_in_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"pool.json: not there; run `python -m mini build` first"):
        run(tmp_path, tmp_path / "out")
    for share in ("0", "1.5"):
        with pytest.raises(UsageError, match=f"--share {share}.*above 0 to 1"):
            main(["--share", share])
