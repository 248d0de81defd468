"""The stages of training on a tiny real model: which weights move, what is written, resuming."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.utils import is_flash_attn_2_available

from llava.errors import UsageError
from llava.model import lora
from llava.model.assemble import assemble
from llava.model.checkpoint import Kind, load
from llava.train import __main__ as entry
from llava.train.arguments import parse
from llava.train.stages import Exporter, load_model, prepare

TEXT_ONLY = {"vision_tower": None, "image_folder": None}


def history(folder: Path, key: str = "loss") -> list[float]:
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[key] for line in lines if key in line]


def moved(before, after) -> set[str]:
    """Which of tower, projector and language model differ."""
    parts = {}
    for name, tensor in after.state_dict().items():
        part = next(p for p in ("vision_tower", "projector", "") if p in name) or "language_model"
        same = torch.equal(tensor.float(), before.state_dict()[name].float())
        parts[part] = parts.get(part, True) and same
    return {part for part, same in parts.items() if not same}


def test_alignment_trains_the_projector_alone(run, parts, squares):
    out = run(
        "pre",
        tune_mm_mlp_adapter=True,
        version="plain",
        data_path=squares / "images.json",
        max_steps=30,
        logging_steps=5,
    )
    assert {"mm_projector.bin", "config.json"} <= {p.name for p in out.iterdir()}
    loaded = load(out, parts / "lm")
    assert loaded.kind is Kind.PROJECTOR_ONLY
    assert loaded.template_name == "plain" and loaded.image_processor.aspect_ratio == "square"
    start = assemble(parts / "lm", parts / "clip", generator=torch.Generator().manual_seed(42))
    assert moved(start, loaded.model) == {"projector"}
    assert history(out)[-1] < history(out)[0] - 0.5


def test_full_finetuning(run, parts):
    out = run("full", image_aspect_ratio="pad", max_steps=25, logging_steps=5)
    loaded = load(out)
    assert loaded.kind is Kind.HF_LLAVA and loaded.image_processor.aspect_ratio == "pad"
    start = assemble(parts / "lm", parts / "clip", generator=torch.Generator().manual_seed(42))
    assert moved(start, loaded.model) == {"projector", "language_model"}
    assert history(out)[-1] < 0.5 * history(out)[0]
    assert not list(out.glob("checkpoint-*"))  # save_strategy is "no"


def test_finetuning_goes_on_from_a_llava_and_a_projector(run, parts, squares):
    pre = run("pre", tune_mm_mlp_adapter=True, version="plain", data_path=squares / "images.json")
    projector = pre / "mm_projector.bin"
    still = run("still", pretrain_mm_mlp_adapter=projector, learning_rate=0)
    expected = torch.load(projector, weights_only=True)["model.mm_projector.0.weight"]
    kept = load(still).model.model.multi_modal_projector.linear_1.weight
    assert torch.equal(kept, expected)
    on = run("on", model_name_or_path=still, vision_tower=None)
    assert moved(load(still).model, load(on).model) == {"projector", "language_model"}


def test_lora(run, parts):
    out = run("lora", lora_enable=True, lora_r=4, lora_alpha=8, max_steps=12, logging_steps=3)
    loaded = load(out, parts / "lm")
    assert loaded.kind is Kind.LLAVA_LORA
    start = assemble(parts / "lm", parts / "clip", generator=torch.Generator().manual_seed(42))
    assert moved(start, loaded.model) == {"projector", "language_model"}
    changed = {
        name
        for name, tensor in loaded.model.state_dict().items()
        if not torch.equal(tensor, start.state_dict()[name])
    }
    assert not any("embed" in n or "norm" in n or "lm_head" in n for n in changed)
    assert history(out)[-1] < history(out)[0]


def test_merged_lora_is_the_model_that_was_trained(run, parts):
    """What the trainer had in memory and what a user loads compute the same loss."""
    arguments = parse(run.flags("lora", lora_enable=True, lora_r=4, lora_alpha=8))
    loaded = load_model(arguments)
    model = prepare(arguments, loaded)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    Exporter(arguments, loaded, model).final()
    batch = entry.make_collator(loaded)([entry.make_dataset(arguments, loaded)[1]])
    del batch["labels"]
    with torch.no_grad():
        trained = model.eval()(**batch).logits
        again = load(Path(arguments.training.output_dir), parts / "lm").model(**batch).logits
    assert torch.allclose(trained, again, atol=1e-4)


def test_llava_7b_adapts_as_many_parameters_as_llava_1_5():
    """r = 128 on the language model's linear maps, and the projector whole."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32064))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
        adapted = lora.attach(model, rank=128, alpha=256, dropout=0.05)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 319_815_680
    assert sum(p.numel() for p in model.model.multi_modal_projector.parameters()) == 20_979_712


def test_freezing_flags(run, parts):
    start = assemble(parts / "lm", parts / "clip", generator=torch.Generator().manual_seed(42))
    backbone = load(run("backbone", freeze_backbone=True)).model
    moved_names = {
        n for n, t in backbone.state_dict().items() if not t.equal(start.get_parameter(n))
    }
    assert all("projector" in name or name == "lm_head.weight" for name in moved_names)
    assert len(moved_names) == 5
    full = load(run("full", freeze_mm_mlp_adapter=True))
    assert moved(start, full.model) == {"language_model"}
    # The base model has no projector: what was not trained has to be written all the same.
    low = load(run("lora", freeze_mm_mlp_adapter=True, lora_enable=True), parts / "lm")
    assert moved(start, low.model) == {"language_model"}


def test_lora_with_biases(run, parts, squares, tmp_path):
    config = LlamaConfig.from_pretrained(parts / "lm", attention_bias=True)
    folder = tmp_path / "biased"
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(parts / "lm" / "tokenizer.model", folder)
    out = run(
        "lora",
        model_name_or_path=folder,
        data_path=squares / "text.json",
        lora_enable=True,
        lora_bias="lora_only",
        **TEXT_ONLY,
    )
    adapter = load_file(out / "adapter_model.safetensors")
    assert len([name for name in adapter if name.endswith("q_proj.base_layer.bias")]) == 2
    start, trained = load(folder).model.state_dict(), load(out, folder).model.state_dict()
    for name in start:
        adapted = "_proj" in name
        assert start[name].equal(trained[name]) != adapted, name
    with_peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), out)
    merged = with_peft.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[name], trained[name], atol=1e-6) for name in trained)


def test_attention_by_flag(run):
    loaded = load_model(parse(run.flags("x", attn_implementation="eager")))
    parts = loaded.model, loaded.model.model.language_model, loaded.model.model.vision_tower
    assert {part.config._attn_implementation for part in parts} == {"eager"}
    if not is_flash_attn_2_available():
        with pytest.raises(UsageError, match="flash_attention_2: .*; sdpa needs no package"):
            load_model(parse(run.flags("x", attn_implementation="flash_attention_2")))


def test_language_model_alone(run, squares):
    out = run("text", data_path=squares / "text.json", max_steps=20, logging_steps=5, **TEXT_ONLY)
    loaded = load(out)
    assert loaded.kind is Kind.LANGUAGE_MODEL and loaded.image_processor is None
    assert history(out)[-1] < 0.5 * history(out)[0]


def test_language_model_alone_with_lora(run, parts, squares):
    changes = {"data_path": squares / "text.json", "lora_enable": True, **TEXT_ONLY}
    out = run("text-lora", **changes)
    loaded = load(out, parts / "lm")
    assert loaded.kind is Kind.LLAVA_LORA and loaded.image_processor is None
    assert moved(load(parts / "lm").model, loaded.model) == {"language_model"}


@pytest.mark.parametrize("stage", [{}, {"lora_enable": True}])
def test_same_seed_same_bits(run, stage):
    def weights(output, **changes):
        out = run(output, group_by_modality_length=True, **stage, **changes)
        return {p.name: p.read_bytes() for p in out.glob("*.safetensors")}

    first = weights("a", max_steps=20)
    assert first == weights("b", max_steps=20)
    if not stage:
        assert first != weights("c", max_steps=20, seed=7)


def test_workers_change_nothing(run):
    out = [run(f"w{n}", dataloader_num_workers=n, max_steps=4) for n in (0, 2)]
    assert len({(folder / "model.safetensors").read_bytes() for folder in out}) == 1


@pytest.mark.parametrize(
    "stage",
    [
        {"group_by_modality_length": True, "bf16": True},
        {"lora_enable": True, "bf16": True, "group_by_modality_length": True},
        {"tune_mm_mlp_adapter": True, "version": "plain"},
    ],
)
def test_resumed_run_ends_with_the_same_bits(run, parts, squares, stage, monkeypatch):
    """24 rows make 6 steps an epoch: stopped in the second, it goes on where it was."""
    if stage.get("version") == "plain":
        stage = {**stage, "data_path": squares / "images.json"}
    common = {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "steps", "save_steps": 3}
    whole = run("whole", **common, **stage)
    restored = []
    original = Exporter.restore
    monkeypatch.setattr(Exporter, "restore", lambda *a: restored.append(a) or original(*a))
    resumed = whole.parent / "resumed"
    resumed.mkdir()
    last = sorted(whole.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))[-2]
    last.rename(resumed / last.name)
    run("resumed", **common, **stage)
    assert restored
    for file in [*whole.glob("*.safetensors"), *whole.glob("*.bin")]:
        assert (resumed / file.name).read_bytes() == file.read_bytes(), file.name
    # A checkpoint of a run is a model like any other.
    base = None if (whole / "model.safetensors").exists() else parts / "lm"
    assert load(resumed / last.name, base).model is not None


@pytest.mark.parametrize("stage", ["tune_mm_mlp_adapter", "lora_enable", None])
def test_bf16_keeps_trained_weights_in_float32(run, stage):
    arguments = parse(run.flags("x", bf16=True, **({stage: True} if stage else {})))
    loaded = load_model(arguments)
    model = prepare(arguments, loaded)
    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_bf16_is_what_is_stored(run):
    out = run("bf16", bf16=True, activation_checkpointing=True, logging_steps=1)
    assert load(out).model.dtype == torch.bfloat16 and math.isfinite(history(out)[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_folder": None}, "--image_folder is required"),
        ({"image_folder": "absent"}, "no such directory"),
        ({"vision_tower": None}, "has images; give --vision_tower"),
        ({"vision_tower": None, "tune_mm_mlp_adapter": True}, "needs --vision_tower"),
        ({"model_name_or_path": "absent"}, "absent: no such model directory"),
    ],
)
def test_inputs_that_do_not_fit(run, changes, message):
    with pytest.raises(UsageError, match=message):
        run("out", **changes)


def test_a_lora_is_no_start(run):
    out = run("lora", lora_enable=True, max_steps=1)
    with pytest.raises(UsageError, match="is llava_lora; give a language model or a whole LLaVA"):
        run("out", model_name_or_path=out)
