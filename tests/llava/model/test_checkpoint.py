"""Every layout of a LLaVA checkpoint computes the same; damaged, foreign and malicious ones do not
load. Also that what is saved is read by transformers itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2Config,
)

from llava.errors import StorageError, UsageError
from llava.files import write_json
from llava.model import export
from llava.model.checkpoint import Checkpoint, Kind, load, wrap
from llava.model.export import save
from tests.lora_models import save_lora

# From the classic names in a saved folder to the other layouts of Hugging Face's LLaVA.
HF_LAYOUTS = {
    "classic": [],
    "4.52 in memory": [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model", "model.language_model"),
        (r"^(vision_tower|multi_modal_projector)", r"model.\1"),
    ],
    "5 in memory": [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model", "model.language_model"),
        (r"^vision_tower\.vision_model", "model.vision_tower"),
        (r"^multi_modal_projector", "model.multi_modal_projector"),
    ],
    "5 on disk": [(r"^vision_tower\.vision_model", "vision_tower")],
}


@pytest.mark.parametrize("layout", HF_LAYOUTS)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_hugging_face_layouts(layouts, tiny, saved, logits_of, layout, suffix):
    state = layouts.rename(load_file(saved / "model.safetensors"), *HF_LAYOUTS[layout])
    (saved / "model.safetensors").unlink()
    if suffix == "bin":
        torch.save(state, saved / "pytorch_model.bin")
    else:
        save_file(state, saved / "model.safetensors")
    loaded = load(saved)
    assert loaded.kind is Kind.HF_LLAVA
    assert torch.equal(logits_of(loaded.model), logits_of(tiny.model))


def test_saved_by_transformers_itself(tiny, saved, logits_of):
    (saved / "model.safetensors").unlink()
    tiny.model.save_pretrained(saved)
    assert torch.equal(logits_of(load(saved).model), logits_of(tiny.model))


def test_transformers_loads_what_is_saved(tiny, saved, logits_of):
    model, info = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits_of(model), logits_of(tiny.model))
    # What transformers 4 looks for: all towers under vision_model, and the rope base.
    names = load_file(saved / "model.safetensors").keys()
    assert {n.split(".")[1] for n in names if n.startswith("vision_tower")} == {"vision_model"}
    assert json.loads((saved / "config.json").read_text())["text_config"]["rope_theta"] == 10000.0
    assert type(AutoModel.from_pretrained(saved)).__name__ == "LlavaModel"


def test_settings_survive(tiny, tmp_path):
    tiny.template_name, tiny.model_max_length = "plain", 77
    tiny.image_processor = type(tiny.image_processor)(28, aspect_ratio="square")
    save(tiny, tmp_path)
    loaded = load(tmp_path)
    for field in ("template_name", "model_max_length", "image_processor", "tokenizer_files"):
        assert getattr(loaded, field) == getattr(tiny, field), field
    assert (loaded.image_token_id, loaded.n_image_tokens) == (340, 16)
    assert loaded.tokenizer.encode("the square") == tiny.tokenizer.encode("the square")


def test_dtype(tiny, tmp_path):
    save(tiny, tmp_path, torch.bfloat16)
    assert load(tmp_path).model.dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32).model.dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards(tiny, tmp_path, logits_of, monkeypatch):
    monkeypatch.setattr(export, "_SHARD_SIZE", "50KB")
    save(tiny, tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits_of(load(tmp_path).model), logits_of(tiny.model))
    shards[0].unlink()
    with pytest.raises(UsageError, match=f"{shards[0].name} is missing"):
        load(tmp_path)


# ---- original LLaVA ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
@pytest.mark.parametrize("tower", [False, True])
def test_original_full(layouts, tiny, original, parts, logits_of, model_type, tower):
    layouts.edit_json(original / "config.json", model_type=model_type)
    torch.save(layouts.original_weights(tiny, tower), original / "pytorch_model.bin")
    loaded = load(original)
    assert loaded.kind is Kind.LLAVA_FULL
    assert torch.equal(logits_of(loaded.model), logits_of(tiny.model))
    assert (loaded.image_token_id, loaded.model_max_length) == (340, 200)
    assert loaded.image_processor.aspect_ratio == "pad"


def test_original_with_its_own_tower_keeps_it(layouts, tiny, original, logits_of):
    state = layouts.original_weights(tiny, tower=True)
    name = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"
    state[name] = state[name] + 1
    torch.save(state, original / "pytorch_model.bin")
    assert not torch.allclose(logits_of(load(original).model), logits_of(tiny.model))


def test_original_shards_of_pickles(layouts, tiny, original, logits_of):
    state = layouts.original_weights(tiny, tower=False)
    (original / "pytorch_model.bin").unlink()
    names = sorted(state)
    weight_map = {}
    for part, chosen in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-0000{part + 1}-of-00002.bin"
        torch.save({n: state[n] for n in chosen}, original / file)
        weight_map.update(dict.fromkeys(chosen, file))
    write_json(original / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    assert torch.equal(logits_of(load(original).model), logits_of(tiny.model))


def test_import_and_export(original, tmp_path, logits_of):
    loaded = load(original)
    save(loaded, tmp_path / "exported")
    again = load(tmp_path / "exported")
    assert again.kind is Kind.HF_LLAVA
    assert torch.equal(logits_of(again.model), logits_of(loaded.model))


def test_tower_that_is_not_there(original):
    shutil.rmtree(original.parent / "clip")
    with pytest.raises(UsageError, match="vision tower was not found.*put it beside"):
        load(original)


def test_projector_only(layouts, tiny, parts, original, tmp_path, logits_of):
    folder = tmp_path / "anything"
    layouts.write_original_config(parts, folder, tower="../clip")
    state = layouts.original_weights(tiny, tower=False)
    projector = {k: v for k, v in state.items() if "mm_projector" in k}
    torch.save(projector, folder / "mm_projector.bin")
    assert Checkpoint.open(folder).kind is Kind.PROJECTOR_ONLY
    with pytest.raises(UsageError, match="--model-base"):
        load(folder)
    assert torch.equal(logits_of(load(folder, parts / "lm").model), logits_of(tiny.model))
    doubled = {k: 2 * v for k, v in projector.items()}
    torch.save(doubled, folder / "mm_projector.bin")
    on_llava = logits_of(load(folder, original).model)  # the base's own projector is replaced
    assert torch.equal(on_llava, logits_of(load(folder, parts / "lm").model))
    assert not torch.allclose(on_llava, logits_of(tiny.model))
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match="mm_vision_tower"):
        load(folder, parts / "lm")


def test_language_model(parts, tmp_path):
    loaded = load(parts / "lm")
    assert loaded.kind is Kind.LANGUAGE_MODEL
    assert loaded.image_processor is None and loaded.image_token_id is None
    save(loaded, tmp_path)
    again = load(tmp_path)
    assert again.kind is Kind.LANGUAGE_MODEL
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)


def test_names_of_directories_mean_nothing(saved, parts, tmp_path):
    shutil.copytree(parts / "lm", tmp_path / "llava-v1.5-7b-lora")
    assert Checkpoint.open(tmp_path / "llava-v1.5-7b-lora").kind is Kind.LANGUAGE_MODEL
    saved.rename(tmp_path / "vicuna")
    assert Checkpoint.open(tmp_path / "vicuna").kind is Kind.HF_LLAVA


def test_other_vision_language_models(tmp_path):
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text.update(num_attention_heads=2, num_key_value_heads=2)
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16}
    vision.update(num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    config = LlavaNextConfig(text_config=text, vision_config=vision, image_token_index=60)
    LlavaNextForConditionalGeneration(config).save_pretrained(tmp_path)
    assert Checkpoint.open(tmp_path).kind is Kind.HF_OTHER
    with pytest.raises(UsageError, match="no LLaVA-1.5"):
        load(tmp_path)


def test_outline_is_what_load_gives_without_its_weights(saved, original, parts):
    save_lora(original, original.parent / "lora")
    for path, base in ((saved, None), (original, None), (original.parent / "lora", original)):
        checkpoint = Checkpoint.open(path, base)
        outline, weights = checkpoint.outline()
        loaded = checkpoint.load()
        assert {p.device.type for p in outline.model.parameters()} == {"meta"}
        state = loaded.model.state_dict()
        assert {n: p.shape for n, p in outline.model.state_dict().items()} == {
            n: p.shape for n, p in state.items()
        }
        assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())
        for field in ("image_processor", "n_image_tokens", "tokenizer_files", "vision_tower"):
            assert getattr(outline, field) == getattr(loaded, field), field


def test_a_checkpoint_is_looked_at_once(original, parts, logits_of):
    """What was found and told at first use holds, whatever becomes of the names afterwards."""
    checkpoint = Checkpoint.open(original, original.parent / "elsewhere")
    assert checkpoint.kind is Kind.LLAVA_FULL and checkpoint.tower.name == "clip"
    before = logits_of(checkpoint.load().model)  # a whole model asks for no base
    write_json(original / "config.json", {"model_type": "another"})
    assert torch.equal(logits_of(checkpoint.load().model), before)
    with pytest.raises(UsageError, match="elsewhere: no such model directory"):
        checkpoint.fingerprint()


# ---- fingerprint ---------------------------------------------------------------------------------


def fingerprint(path: Path, base: Path | None = None) -> str:
    return Checkpoint.open(path, base).fingerprint()


def test_fingerprint_is_of_contents(saved, tmp_path):
    before = fingerprint(saved)
    shutil.copytree(saved, tmp_path / "deep" / "other name")
    assert fingerprint(tmp_path / "deep" / "other name") == before
    (saved / "README.md").write_text("no effect")
    assert fingerprint(saved) == before
    for name in (
        "model.safetensors",
        "config.json",
        "tokenizer.model",
        "llava.json",
        "preprocessor_config.json",
    ):
        content = (saved / name).read_bytes()
        end = b"\n\n" if name.endswith("json") else bytes([content[-1] ^ 1])
        (saved / name).write_bytes(content[:-1] + end)
        changed = fingerprint(saved)
        assert changed != before, name
        before = changed


def test_fingerprint_covers_how_others_spell_a_conversation(saved):
    seen = {fingerprint(saved)}
    for name in ("chat_template.jinja", "processor_config.json", "vocab.json", "merges.txt"):
        (saved / name).write_text("{}")
        seen.add(fingerprint(saved))
    assert len(seen) == 5


def test_fingerprint_covers_tower_and_base(layouts, original, parts, tmp_path):
    folder = tmp_path / "projector"
    layouts.write_original_config(parts, folder, tower="../clip")
    torch.save({}, folder / "mm_projector.bin")
    shutil.copytree(parts / "lm", tmp_path / "lm")
    seen = {fingerprint(folder), fingerprint(folder, tmp_path / "lm")}
    assert len(seen) == 2
    layouts.edit_json(tmp_path / "lm/config.json", rms_norm_eps=1e-5)
    seen.add(fingerprint(folder, tmp_path / "lm"))
    assert len(seen) == 3
    layouts.edit_json(tmp_path / "clip/preprocessor_config.json", rescale_factor=1.0)
    seen.add(fingerprint(folder, tmp_path / "lm"))
    assert len(seen) == 4


# ---- writing -------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_no_model(tiny, tmp_path, monkeypatch):
    def full(source, target):
        if Path(target).name == "llava.json":
            raise OSError(28, "No space left on device")
        return replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="llava.json: cannot write: the disk is full"):
        save(tiny, tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.tmp"))  # no temporary file stays
    with pytest.raises(UsageError, match="weights without config.json"):
        load(tmp_path)


def test_qwen_as_language_model(parts, tmp_path, logits_of):
    """A language model that is no Llama keeps its own architecture through assemble and save."""
    from transformers import Qwen2ForCausalLM

    from llava.model.assemble import assemble

    config = Qwen2Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=5e5,
        initializer_range=0.2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "lm")
    shutil.copy(parts / "lm/tokenizer.model", tmp_path / "lm")
    model = assemble(tmp_path / "lm", parts / "clip")
    assert model.config.text_config.vocab_size == 512  # it had room
    loaded = wrap(model, Kind.HF_LLAVA, [tmp_path / "lm"], [parts / "clip"])
    save(loaded, tmp_path / "saved")
    assert torch.equal(logits_of(load(tmp_path / "saved").model), logits_of(model))
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["text_config"]["rope_theta"] == 5e5
