"""Finished runs of tiny real models on the small world's fixture."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llava.eval.run import Evaluation
from llava.eval.settings import RunSettings
from llava.eval.tasks import find_task
from tests.tiny_models import save_llava

FIXTURE = Path(__file__).parents[3] / "mini" / "fixture" / "eval"


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run a benchmark: its name, the model's (one/m, two/m: other weights, or twin: those of
    one/m), flags. Returns the run folder."""
    root = tmp_path_factory.mktemp("asked")
    one = save_llava(_made(root / "models" / "one" / "m"))
    shutil.copytree(one, root / "models" / "twin")
    two = shutil.copytree(one, root / "models" / "two" / "m")
    weights = load_file(two / "model.safetensors")
    save_file({name: 0.9 * value for name, value in weights.items()}, two / "model.safetensors")

    def ask(benchmark: str, model: str = "one/m", **flags: object) -> Path:
        name = "-".join([benchmark, model.replace("/", "-"), *map(str, flags.values())])
        fixed = {"max_new_tokens": 2, "limit": 3, "out": str(root / name)}
        data = str(FIXTURE / find_task(benchmark).folder)
        where = {"benchmark": benchmark, "data": data, "model": str(root / "models" / model)}
        return Evaluation(RunSettings(**where, **fixed | flags)).execute()

    return ask


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
