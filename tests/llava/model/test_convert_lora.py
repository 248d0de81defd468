"""LoRA merged and converted: what PEFT itself loads computes what our merge does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llava.errors import UsageError
from llava.files import write_json
from llava.model import export, lora
from llava.model.assemble import assemble
from llava.model.checkpoint import Kind, load, wrap
from llava.model.convert import convert, merge
from llava.model.export import save
from tests.llava.model.checks import in_transformers, same


@pytest.fixture
def base_llava(parts, tmp_path) -> Path:
    """Hugging Face's LLaVA of the untrained parts, with a projector that no LoRA has."""
    model = assemble(parts / "lm", parts / "clip", generator=torch.Generator().manual_seed(9))
    save(wrap(model, Kind.HF_LLAVA, [parts / "lm"], [parts / "clip"]), tmp_path / "base")
    return tmp_path / "base"


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
    with model.disable_adapter():  # the base keeps its own projector
        assert torch.equal(logits_of(model), logits_of(in_transformers(base_llava)))
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
