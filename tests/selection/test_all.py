"""`all`: one pass of the proxy for all methods, subsets as from runs of their own, one report."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaModel

from llava.errors import UsageError
from selection.__main__ import main
from tests.extraction import N
from tests.tiny_models import save_llava, save_pool

ONE_PASS = ["el2n", "perplexity", "length", "semdedup", "self_sup", "coincide", "d2_pruning"]
GRADIENTS = ["icons", "tive"]  # of 5120 and 8192 numbers
METHODS = [*ONE_PASS, *GRADIENTS, "random", "rho_loss", "less"]


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    folder = tmp_path_factory.mktemp("every")
    pool, images = save_pool(folder / "pool", N)
    model = save_llava(folder / "model")
    return ["--pool", str(pool), "--images", str(images), "--model", str(model)]


@pytest.fixture
def n_seen():
    """How many samples went through any language model of this process."""
    seen = []

    def count(module, args, output):
        if isinstance(module, LlamaModel):
            seen.append(len(output.last_hidden_state))

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    yield lambda: sum(seen)
    hook.remove()


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    (folder / "coincide.yaml").write_text("temperature: 0.5\n")
    return folder


@pytest.fixture
def everything(where, settings, tmp_path):
    """The flags of a whole run of `all` and its folder."""
    flags = [*where, "--budget", "0.3", "--store", str(tmp_path / "store")]
    pool, images = save_pool(tmp_path / "target", 5)
    targets = tmp_path / "targets.yaml"
    targets.write_text(f"- {{name: kinds, data: {pool}, images: {images}}}\n")
    own = ["--methods", f"[{','.join(METHODS)}]", "--settings", str(settings)]
    own += ["--targets", str(targets)]
    return [*flags, *own, "--out", str(tmp_path / "all")], tmp_path / "all"


def test_one_pass_one_folder_a_method_and_one_report(
    everything, where, settings, n_seen, tmp_path, capsys
):
    argv, out = everything
    main(["all", *argv])
    assert n_seen() == 2 * N  # forward; forward and backward (the target's samples are copied)
    made = sorted(path.parent.name for path in out.glob("*/manifest.json"))
    assert made == sorted([*ONE_PASS, *GRADIENTS, "random"])
    printed = capsys.readouterr().out
    assert "not run: rho_loss: --holdout_model is missing" in printed
    assert "not run: less: " in printed and "moments" in printed
    report = printed.partition("seconds by stage")[2]
    rows = report.partition("signals of the proxy")[0].splitlines()
    lines = {row.split()[0]: row.split() for row in rows if row.split()}
    assert lines["coincide"][1] == str(round(0.3 * N))
    assert "share of each source" in report
    shared = json.loads((out / "compare" / "compare.json").read_text())
    assert len(shared["overlap"]) == 10 and np.allclose(np.diag(shared["overlap"]), 1)
    for name in ("el2n", "coincide", "tive"):  # as from a run of its own, with a store of its own
        alone = tmp_path / f"alone-{name}"
        config = ["--config", str(settings / "coincide.yaml")] if name == "coincide" else []
        flags = [*where, "--budget", "0.3", "--store", str(tmp_path / "other")]
        main(["select", name, *config, *flags, "--out", str(alone)])
        for file in ("subset.json", "scores.parquet"):
            assert (alone / file).read_bytes() == (out / name / file).read_bytes()
    manifest = json.loads((out / "random" / "manifest.json").read_text())
    assert manifest["proxy"] is None
    before = n_seen()
    main(["all", *argv])  # finished: nothing is computed again
    assert n_seen() == before


def test_without_a_proxy_what_needs_none_runs(where, tmp_path, capsys):
    flags = [*where[:4], "--methods", "[random,el2n]", "--out", str(tmp_path / "all")]
    main(["all", *flags, "--budget", "7"])
    assert [path.parent.name for path in tmp_path.glob("all/*/manifest.json")] == ["random"]
    assert "not run: el2n: --model is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--methods", "[rho_loss]"], "--holdout_model is missing"),
        (["--methods", "[random,nonsense]"], "nonsense"),
        (["--methods", "[random]", "--budget", "2.0"], "budget"),
        (["--methods", "[random]", "--targets", "absent"], "--targets absent"),
    ],
)
def test_when_nothing_can_run_the_reason_is_the_error(where, tmp_path, flags, reason):
    with pytest.raises(UsageError, match=reason):
        main(["all", *where[:4], "--out", str(tmp_path / "all"), *flags])
