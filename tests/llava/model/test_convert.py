"""Converting and merging: bit-exact round trips, and what others load computes the same."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from llava.errors import RefusedError, StorageError, UsageError
from llava.files import write_json
from llava.model import export
from llava.model.__main__ import main
from llava.model.checkpoint import Checkpoint, Kind, load
from llava.model.convert import convert, merge
from llava.model.export import save
from llava.model.projector import LlavaWithProjector, fresh_projector
from llava.model.sources import read_weights
from llava.model.weights import original_name
from tests.llava.model.checks import Bomb, in_transformers, same

# ---- whole models --------------------------------------------------------------------------------


def test_original_to_hugging_face_and_back(layouts, tiny, original, parts, tmp_path, logits_of):
    torch.save(layouts.original_weights(tiny, tower=True), original / "pytorch_model.bin")
    convert(original, "hf", tmp_path / "hf")
    assert torch.equal(logits_of(in_transformers(tmp_path / "hf")), logits_of(tiny.model))
    convert(tmp_path / "hf", "original", tmp_path / "back", vision_tower=str(parts / "clip"))
    before = {k: v for k, v in read_weights(original).items() if "inv_freq" not in k}
    assert same(read_weights(tmp_path / "back"), before)
    for name in ("tokenizer.model", "llava.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_hugging_face_to_original_and_back(saved, parts, tmp_path, logits_of, tiny):
    convert(saved, "original", tmp_path / "original", vision_tower=str(parts / "clip"))
    assert Checkpoint.open(tmp_path / "original").kind is Kind.LLAVA_FULL
    names = set(read_weights(tmp_path / "original"))
    assert {original_name(name) for name in tiny.model.state_dict()} == names
    values = json.loads((tmp_path / "original/config.json").read_text())
    assert (values["model_type"], values["vocab_size"]) == ("llava_llama", 340)
    assert values["architectures"] == ["LlavaLlamaForCausalLM"]
    assert values["mm_projector_type"] == "mlp2x_gelu" and values["torch_dtype"] == "float32"
    assert (values["mm_vision_select_layer"], values["mm_vision_select_feature"]) == (-2, "patch")
    assert (tmp_path / "original" / values["mm_vision_tower"]).resolve() == parts / "clip"
    convert(tmp_path / "original", "hf", tmp_path / "again")
    # The rows after the vocabulary are the mean of it: dropped and made again.
    assert same(read_weights(tmp_path / "again"), read_weights(saved))
    assert torch.equal(logits_of(in_transformers(tmp_path / "again")), logits_of(tiny.model))
    assert json.loads((tmp_path / "again/llava.json").read_text()) == json.loads(
        (saved / "llava.json").read_text()
    )


def test_an_exported_original_needs_no_other_folder(saved, tmp_path, logits_of, tiny):
    convert(saved, "original", tmp_path / "o", vision_tower="nobody/gone-tower")
    loaded = load(tmp_path / "o")
    assert torch.equal(logits_of(loaded.model), logits_of(tiny.model))
    assert loaded.vision_tower == "nobody/gone-tower"


def test_words_that_hugging_face_adds_are_left_behind(saved, tmp_path):
    """Original LLaVA would grow its vocabulary by them, with random rows."""
    unk, image, pad = ({"content": word, "special": True} for word in ("<unk>", "<image>", "<pad>"))
    config = {
        "added_tokens_decoder": {"0": unk, "340": image, "341": pad},
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "pad_token": "<pad>",
        "legacy": False,
        "processor_class": "LlavaProcessor",
    }
    files = {
        "added_tokens.json": {"<image>": 340, "<pad>": 341},
        "special_tokens_map.json": {"bos_token": "<s>", "pad_token": pad, "image_token": image},
        "tokenizer.json": {"added_tokens": [image, pad]},
        "tokenizer_config.json": config,
    }
    for name, value in files.items():
        write_json(saved / name, value)
    convert(saved, "original", tmp_path / "o", vision_tower="nobody/tower")
    converted = {name: tmp_path / "o" / name for name in files}
    assert not converted["tokenizer.json"].exists()
    assert json.loads(converted["added_tokens.json"].read_text()) == {}
    special = {"bos_token": "<s>", "pad_token": "<unk>"}
    assert json.loads(converted["special_tokens_map.json"].read_text()) == special
    assert json.loads(converted["tokenizer_config.json"].read_text()) == {
        "added_tokens_decoder": {"0": unk},
        "legacy": False,
        "pad_token": "<unk>",
    }
    assert load(tmp_path / "o").tokenizer.vocab_size == 340
    convert(saved, "hf", tmp_path / "h")
    assert (tmp_path / "h/tokenizer_config.json").read_bytes() == (
        saved / "tokenizer_config.json"
    ).read_bytes()


def test_a_tower_without_a_name(saved, tmp_path):
    with pytest.raises(UsageError, match="not CLIP-L/336; give its .* --vision-tower"):
        convert(saved, "original", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_names_of_the_tower_move_with_the_checkpoint(original, tmp_path):
    (tmp_path / "deep").mkdir()
    convert(original, "original", tmp_path / "deep/copy")
    values = json.loads((tmp_path / "deep/copy/config.json").read_text())
    assert values["mm_vision_tower"] == "../../clip"


@pytest.mark.parametrize("source", ["saved", "original"])
def test_to_a_projector_alone(source, parts, tmp_path, request, logits_of, tiny):
    folder = request.getfixturevalue(source)
    convert(folder, "projector", tmp_path / "p", vision_tower=str(parts / "clip"))
    assert Checkpoint.open(tmp_path / "p").kind is Kind.PROJECTOR_ONLY
    stored = torch.load(tmp_path / "p/mm_projector.bin", weights_only=True)
    prefix = "model.mm_projector."
    assert set(stored) == {prefix + n for n in ("0.weight", "0.bias", "2.weight", "2.bias")}
    assert torch.equal(
        stored[prefix + "2.weight"], tiny.model.model.multi_modal_projector.linear_2.weight
    )
    merge(tmp_path / "p", parts / "lm", tmp_path / "whole")
    assert torch.equal(logits_of(in_transformers(tmp_path / "whole")), logits_of(tiny.model))


def test_dtype(saved, tmp_path):
    convert(saved, "hf", tmp_path / "half", dtype=torch.bfloat16)
    half, whole = read_weights(tmp_path / "half"), read_weights(saved)
    assert same(half, {name: tensor.bfloat16() for name, tensor in whole.items()})
    assert in_transformers(tmp_path / "half").config.dtype == torch.bfloat16


def test_in_shards(original, tmp_path, monkeypatch, logits_of, tiny):
    monkeypatch.setattr(export, "_SHARD_SIZE", "50KB")
    convert(original, "hf", tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits_of(in_transformers(tmp_path / "hf")), logits_of(tiny.model))


# ---- projectors that Hugging Face's LLaVA does not have ------------------------------------------


@pytest.fixture(params=["linear", "mlp1x_gelu", "mlp3x_gelu"])
def unusual(request, layouts, tiny, parts, original) -> tuple[str, Path]:
    """An original LLaVA with another type of projector."""
    state = layouts.original_weights(tiny, tower=False)
    state = {k: v for k, v in state.items() if "mm_projector" not in k}
    projector = fresh_projector(24, 32, torch.Generator().manual_seed(2), request.param)
    state.update({original_name(k): v for k, v in projector.items()})
    torch.save(state, original / "pytorch_model.bin")
    layouts.edit_json(original / "config.json", mm_projector_type=request.param)
    return request.param, original


def test_other_projectors_keep_the_original_layout(unusual, tmp_path, logits_of):
    kind, folder = unusual
    loaded = load(folder)
    assert isinstance(loaded.model, LlavaWithProjector)
    with pytest.raises(UsageError, match=f"type {kind}.*mlp2x_gelu only; use --to original"):
        convert(folder, "hf", tmp_path / "hf")
    convert(folder, "original", tmp_path / "copy")
    before = {k: v for k, v in read_weights(folder).items() if "inv_freq" not in k}
    after = {k: v for k, v in read_weights(tmp_path / "copy").items() if "vision" not in k}
    assert same(after, before)
    save(loaded, tmp_path / "saved")  # what a training writes: its rows are all kept
    again = load(tmp_path / "saved")
    assert same(again.model.state_dict(), loaded.model.state_dict())
    assert torch.equal(logits_of(again.model), logits_of(loaded.model))
    values = json.loads((tmp_path / "saved/config.json").read_text())
    assert (values["mm_projector_type"], values["vocab_size"]) == (kind, 384)


def test_a_projector_of_another_type_replaces_the_bases(unusual, saved, parts, tmp_path):
    _, folder = unusual
    convert(folder, "projector", tmp_path / "p")
    expected = load(folder).model.state_dict()
    assert same(load(tmp_path / "p", saved).model.state_dict(), expected)
    assert same(load(tmp_path / "p", parts / "lm").model.state_dict(), expected)


# ---- what is refused, and what a failure leaves --------------------------------------------------


def test_sources_that_do_not_fit_the_target(saved, trained, parts, tmp_path):
    _, folder = trained
    out = tmp_path / "out"
    for call, message in (
        (lambda: convert(parts / "lm", "hf", out), "language_model, without a vision tower"),
        (lambda: convert(saved, "hf-lora", out), "is hf_llava, no LoRA.*--to hf or original"),
        (lambda: merge(saved, parts / "lm", out), "is hf_llava, nothing to merge"),
        (lambda: convert(folder, "hf", out), "a LoRA; give the model .* with --model-base"),
        (lambda: merge(folder, folder, out), "is itself llava_lora; give a whole model"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    assert not list(tmp_path.glob("*out*"))


def test_a_folder_in_use_is_left_alone(saved, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="full: exists and is not empty"):
        convert(saved, "hf", tmp_path / "full")
    with pytest.raises(UsageError, match="not empty"):
        convert(saved, "hf", tmp_path / "full/notes.txt")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    convert(saved, "hf", tmp_path / "empty")
    assert same(read_weights(tmp_path / "empty"), read_weights(saved))


def test_a_disk_that_fills_up_leaves_nothing(saved, tmp_path, monkeypatch):
    def full(source, target):
        if Path(target).name == "config.json":
            raise OSError(28, "No space left on device")
        return replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="the disk is full"):
        convert(saved, "hf", tmp_path / "out")
    monkeypatch.undo()
    assert not list(tmp_path.glob("*out*"))
    (tmp_path / ".out.partial").mkdir()  # as a killed run leaves it
    (tmp_path / ".out.partial/model.safetensors").write_text("half")
    convert(saved, "hf", tmp_path / "out")
    assert not list(tmp_path.glob(".*"))
    assert same(read_weights(tmp_path / "out"), read_weights(saved))


def test_a_place_that_cannot_be_written(saved):
    with pytest.raises(StorageError, match="/proc/out: cannot write: .*on another disk or check"):
        convert(saved, "hf", "/proc/out")


def test_damaged_and_dangerous_sources(saved, tmp_path):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(StorageError, match="damaged or incomplete"):
        convert(saved, "hf", tmp_path / "out")
    (saved / "model.safetensors").unlink()
    torch.save({"weight": Bomb(tmp_path / "canary")}, saved / "pytorch_model.bin")
    with pytest.raises(RefusedError, match="could run code"):
        convert(saved, "original", tmp_path / "out")
    assert not (tmp_path / "canary").exists() and not (tmp_path / "out").exists()


def test_command_line(trained, parts, tmp_path, capsys):
    _, folder = trained
    base, out = str(parts / "lm"), str(tmp_path / "merged")
    main(["merge", str(folder), "--model-base", base, "--out", out, "--dtype", "bfloat16"])
    assert capsys.readouterr().out == f"wrote {out}\n"
    shutil.rmtree(out)
    main(["convert", str(folder), "--to", "hf", "--model-base", base, "--out", out])
    assert in_transformers(Path(out)).dtype == torch.float32
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(folder), "--to", "gguf", "--out", out])
    assert stopped.value.code == 2
    assert re.search(r"'gguf'.*hf.*original.*projector.*hf-lora.*lora", capsys.readouterr().err)
