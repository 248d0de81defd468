"""Converting and merging: bit-exact round trips, and what others load computes the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from llava.errors import RefusedError, StorageError, UsageError
from llava.model import export, lora
from llava.model.__main__ import main
from llava.model.assemble import assemble
from llava.model.checkpoint import Kind, inspect, load, save, wrap
from llava.model.convert import convert, merge
from llava.model.projector import LlavaWithProjector, fresh_projector
from llava.model.weights import original_name, read_weights, write_json


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def in_transformers(folder: Path) -> LlavaForConditionalGeneration:
    """The model as transformers itself loads it, with nothing missing and nothing left over."""
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.fixture
def base_llava(parts, tmp_path) -> Path:
    """Hugging Face's LLaVA of the untrained parts, with a projector that no LoRA has."""
    model = assemble(parts / "lm", parts / "clip", generator=torch.Generator().manual_seed(9))
    save(wrap(model, Kind.HF_LLAVA, [parts / "lm"], [parts / "clip"]), tmp_path / "base")
    return tmp_path / "base"


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
    assert inspect(tmp_path / "original") is Kind.LLAVA_FULL
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
    assert inspect(tmp_path / "p") is Kind.PROJECTOR_ONLY
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


# ---- LoRA ----------------------------------------------------------------------------------------


def test_merge_is_what_load_computes(trained, parts, tmp_path, logits_of):
    model, folder = trained
    merge(folder, parts / "lm", tmp_path / "merged")
    merged = in_transformers(tmp_path / "merged")
    assert same(merged.state_dict(), load(folder, parts / "lm").model.state_dict())
    # The adapter adds s B A x to W x; merging rounds (W + s B A) x differently, nothing else.
    assert torch.allclose(logits_of(merged), logits_of(model), atol=1e-4)


def test_a_merge_has_one_file_in_memory(trained, parts, tmp_path, monkeypatch):
    """Weights are merged when their file is written: never more of them than fit in one."""
    monkeypatch.setattr(export, "_SHARD_SIZE", "20KB")
    events: list[str] = []
    merged, written = lora.Merged.__getitem__, export.save_file

    def log_merge(self, name):
        events.append("merge" if name in self.factors else "read")
        return merged(self, name)

    def log_write(tensors, *args, **kwargs):
        events.append("write")
        return written(tensors, *args, **kwargs)

    monkeypatch.setattr(lora.Merged, "__getitem__", log_merge)
    monkeypatch.setattr(export, "save_file", log_write)
    merge(trained[1], parts / "lm", tmp_path / "merged")
    batches = "".join(e[0] for e in events).split("w")
    assert sum(batch.count("m") for batch in batches) == 14  # each adapted weight once
    assert max(batch.count("m") for batch in batches) < 7


def test_pefts_own_loading_of_llavas_layout(trained, parts, tmp_path):
    """On the language model alone, whose names LLaVA's LoRA has."""
    _, folder = trained
    merge(folder, parts / "lm", tmp_path / "merged")
    ids = torch.arange(3, 40)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)  # missing adapter keys are only a warning
        alone = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(parts / "lm"), folder)
        expected = in_transformers(tmp_path / "merged")(input_ids=ids).logits
        assert torch.allclose(alone.eval()(input_ids=ids).logits, expected[..., :340], atol=1e-4)
        plain = LlamaForCausalLM.from_pretrained(parts / "lm")(input_ids=ids).logits
    assert (plain - expected[..., :340]).abs().max() > 0.1


def test_pefts_own_loading_on_hugging_faces_llava(trained, parts, base_llava, tmp_path, logits_of):
    _, folder = trained
    convert(folder, "hf-lora", tmp_path / "peft", base=base_llava)
    merge(folder, parts / "lm", tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(in_transformers(base_llava), tmp_path / "peft").eval()
    expected = logits_of(in_transformers(tmp_path / "merged"))
    assert torch.allclose(logits_of(model), expected, atol=1e-4)
    assert (logits_of(in_transformers(base_llava)) - expected).abs().max() > 0.1
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == 14 and not any("vision_tower" in name for name in adapted)
    recorded = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert recorded["base_model_name_or_path"] == str(base_llava)


def test_a_lora_comes_back_bit_for_bit(trained, base_llava, tmp_path, parts):
    _, folder = trained
    write_json(folder / "llava.json", {"template": "v1", "model_max_length": 99})
    convert(folder, "hf-lora", tmp_path / "hf")
    convert(tmp_path / "hf", "lora", tmp_path / "back", base=base_llava, vision_tower="../clip")
    for name, reader in (
        ("adapter_model.safetensors", load_file),
        (lora.NON_LORA, lambda path: torch.load(path, weights_only=True)),
    ):
        assert same(reader(tmp_path / "back" / name), reader(folder / name))
    one, other = (
        json.loads((path / lora.ADAPTER_CONFIG).read_text()) for path in (folder, tmp_path / "back")
    )
    assert {**other, "base_model_name_or_path": "lm", "modules_to_save": None} == {
        **one,
        "modules_to_save": None,
    }
    (tmp_path / "back/config.json").write_text((folder / "config.json").read_text())
    again = load(tmp_path / "back", parts / "lm")
    assert same(again.model.state_dict(), load(folder, parts / "lm").model.state_dict())
    assert again.model_max_length == 99


def test_a_lora_keeps_its_own_configuration(trained, tmp_path):
    _, folder = trained
    (tmp_path / "deep").mkdir()
    convert(folder, "lora", tmp_path / "deep/copy")
    values = json.loads((tmp_path / "deep/copy/config.json").read_text())
    assert values == {"model_type": "llava_llama", "mm_vision_tower": "../../clip"}
    convert(folder, "hf-lora", tmp_path / "hf")
    with pytest.raises(UsageError, match="no config.json of LLaVA in it.*--model-base"):
        convert(tmp_path / "hf", "lora", tmp_path / "out")


def test_what_an_adapter_cannot_hold(trained, tmp_path):
    _, folder = trained
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    more = {
        k.replace("model.model.layers.1", "model.model.vision_tower.encoder.layers.1"): v
        for k, v in tensors.items()
    }
    save_file(more, path)
    with pytest.raises(UsageError, match="also trains model.vision_tower.*merge it instead"):
        convert(folder, "hf-lora", tmp_path / "out")
    save_file(tensors, path)
    torch.save(
        {
            "base_model.model.model.mm_projector.weight": torch.ones(32, 24),
            "base_model.model.model.mm_projector.bias": torch.ones(32),
        },
        folder / lora.NON_LORA,
    )
    with pytest.raises(UsageError, match="type linear; Hugging Face's LLaVA has mlp2x_gelu only"):
        convert(folder, "hf-lora", tmp_path / "out")


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


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


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
