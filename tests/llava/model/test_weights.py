"""What must not load: incomplete, damaged and foreign files, anything that runs code (P22)."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import RefusedError, StorageError, UsageError
from llava.files import write_json
from llava.model.checkpoint import load
from llava.model.sources import find_directory, make_config
from tests.llava.model.checks import Bomb

# ---- what must not load --------------------------------------------------------------------------


def test_nothing_loadable(tmp_path, saved):
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(UsageError, match="no model in this directory"):
        load(tmp_path)
    (saved / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="without weights"):
        load(saved)
    with pytest.raises(UsageError, match="no such model directory"):
        load(tmp_path / "absent")


def test_hub_name_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="no such directory, and the hub gave nothing"):
        find_directory("nobody/no-such-model-here")


def test_missing_and_unexpected_weights(saved):
    state = load_file(saved / "model.safetensors")
    tensor = state.pop("language_model.model.norm.weight")
    save_file(state, saved / "model.safetensors")
    with pytest.raises(UsageError, match=r"missing weights: model\.language_model\.norm\.weight"):
        load(saved)
    state["language_model.model.norm.weight"] = tensor
    state["language_model.model.extra.weight"] = tensor.clone()
    save_file(state, saved / "model.safetensors")
    with pytest.raises(UsageError, match=r"unexpected weights: model\.language_model\.extra"):
        load(saved)


def test_missing_tokenizer_and_preprocessor(saved, original):
    (saved / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match="no preprocessor_config.json in .*saved"):
        load(saved)
    (original / "tokenizer.model").unlink()
    with pytest.raises(UsageError, match="no tokenizer.model or tokenizer.json in .*some-model"):
        load(original)


def test_preprocessor_of_another_size(layouts, saved):
    crop = {"height": 56, "width": 56}
    layouts.edit_json(
        saved / "preprocessor_config.json", size={"shortest_edge": 56}, crop_size=crop
    )
    with pytest.raises(UsageError, match="makes images of 56 pixels, the vision tower takes 28"):
        load(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights(saved, name):
    good = saved / "model.safetensors"
    if name == "pytorch_model.bin":
        torch.save(load_file(good), saved / name)
        good.unlink()
    whole = (saved / name).read_bytes()
    for content, error in (
        (whole[: len(whole) // 2], StorageError),
        (b"", StorageError),
        (b"<html>not found</html>", StorageError),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", UsageError),
    ):
        (saved / name).write_bytes(content)
        with pytest.raises(error, match=name):
            load(saved)


def test_broken_configuration(saved):
    for content, message in (("{", "not JSON"), ("[]", "holds a list"), ("{}", "unknown model")):
        (saved / "config.json").write_text(content)
        with pytest.raises(UsageError, match=message):
            load(saved)


def test_index_may_not_leave_its_directory(saved, tmp_path):
    (saved / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    write_json(saved / "model.safetensors.index.json", index)
    with pytest.raises(RefusedError, match="outside its own directory"):
        load(saved)


# ---- nothing in a checkpoint is executed (P22) ---------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused(saved, tmp_path, legacy):
    canary = tmp_path / "canary"
    (saved / "model.safetensors").unlink()
    file = saved / "pytorch_model.bin"
    torch.save({"weight": Bomb(canary)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(RefusedError, match="could run code"):
        load(saved)
    file.write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(RefusedError, match="could run code"):
        load(saved)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bomb(canary)))  # the bomb is real
    assert canary.exists()


def test_code_in_a_projector_or_adapter_is_refused(layouts, original, parts, tmp_path):
    canary = tmp_path / "canary"
    for name, marker in (("mm_projector.bin", None), ("adapter_model.bin", "adapter_config.json")):
        folder = tmp_path / name.split(".")[0]
        layouts.write_original_config(parts, folder, tower="../clip")
        if marker:
            write_json(folder / marker, {"peft_type": "LORA", "r": 1, "lora_alpha": 1})
        torch.save(Bomb(canary), folder / name)
        with pytest.raises(RefusedError, match=name):
            load(folder, parts / "lm")
    assert not canary.exists()


CODE = "import os\nos.mkdir({canary!r})\nclass Evil: pass\n"


def test_code_beside_a_configuration_is_not_run(layouts, saved, tmp_path, logits_of, tiny):
    canary = tmp_path / "canary"
    (saved / "modeling_evil.py").write_text(CODE.format(canary=str(canary)))
    auto_map = {"AutoConfig": "modeling_evil.Evil", "AutoModel": "modeling_evil.Evil"}
    layouts.edit_json(saved / "config.json", auto_map=auto_map)
    layouts.edit_json(saved / "preprocessor_config.json", auto_map={"AutoImageProcessor": "x.Evil"})
    assert torch.equal(logits_of(load(saved).model), logits_of(tiny.model))
    layouts.edit_json(saved / "config.json", model_type="evil")
    with pytest.raises(RefusedError, match="auto_map.*never run"):
        load(saved)
    assert not canary.exists()


@pytest.mark.parametrize("key", ["_attn_implementation_internal", "attn_implementation"])
@pytest.mark.parametrize("part", ["", "text_config"])
def test_kernels_named_by_a_configuration_are_refused(saved, key, part):
    values = json.loads((saved / "config.json").read_text())
    (values[part] if part else values)[key] = "someone/evil-kernel"
    write_json(saved / "config.json", values)
    with pytest.raises(RefusedError, match="would download and run code"):
        load(saved)


def test_harmless_private_keys_are_dropped(layouts, saved):
    layouts.edit_json(
        saved / "config.json", _attn_implementation_internal="eager", _name_or_path="x/y"
    )
    assert load(saved).model.config._attn_implementation == "sdpa"


def test_a_configuration_that_contradicts_itself():
    where = Path("config.json")
    with pytest.raises(UsageError, match="config.json.*not a multiple"):
        make_config({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, where)
    with pytest.raises(UsageError, match="config.json"):
        make_config({"model_type": "llama", "hidden_size": "many"}, where)
    with pytest.raises(UsageError, match="quantised"):
        make_config({"model_type": "llama", "quantization_config": {"bits": 4}}, where)


def test_a_hub_repository_in_the_cache_is_found(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert (find_directory("some/model") / "config.json").read_text() == "{}"


def test_directories_are_found_from_the_checkpoint_first(tmp_path, monkeypatch):
    for folder in ("run/model", "run/tower", "tower", "cwd/tower", "run/clip-large"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    beside = tmp_path / "run/model"
    assert find_directory("../tower", beside).resolve() == tmp_path / "run/tower"
    assert find_directory("tower", beside).resolve() == tmp_path / "cwd/tower"
    assert find_directory("openai/clip-large", beside) == tmp_path / "run/clip-large"
    assert find_directory(tmp_path / "cwd", beside) == tmp_path / "cwd"
