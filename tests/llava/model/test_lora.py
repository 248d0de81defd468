"""LoRA: merged exactly once, in every layout, against explicit loops and against PEFT itself."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import UsageError
from llava.files import write_json
from llava.model import lora
from llava.model.assemble import assemble
from llava.model.checkpoint import Kind, load
from llava.model.export import save


def test_loads_what_was_trained(trained, parts, logits_of):
    model, folder = trained
    loaded = load(folder, parts / "lm")
    assert loaded.kind is Kind.LLAVA_LORA
    # The adapter adds s B A x to W x; merging rounds (W + s B A) x differently, nothing else.
    assert torch.allclose(logits_of(loaded.model), logits_of(model), atol=1e-4)
    plain = logits_of(assemble(parts / "lm", parts / "clip"))
    assert (logits_of(model) - plain).abs().max() > 0.1


def test_merged_exactly_once_by_explicit_sums(trained, parts):
    _, folder = trained
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    a, b = tensors[key.format("A")], tensors[key.format("B")]
    base = load(parts / "lm").model.model.layers[1].self_attn.q_proj.weight.detach()
    merged = load(folder, parts / "lm").model.model.language_model.layers[1].self_attn.q_proj.weight
    for i in range(0, 32, 5):
        for j in range(0, 32, 7):
            delta = sum(float(b[i, k]) * float(a[k, j]) for k in range(3)) * 12 / 3
            assert merged[i, j].item() == pytest.approx(float(base[i, j]) + delta, abs=1e-5)


def test_equals_pefts_own_merge(trained, parts):
    model, folder = trained
    loaded = load(folder, parts / "lm").model.state_dict()
    for name, tensor in model.merge_and_unload().state_dict().items():
        assert torch.allclose(loaded[name], tensor, atol=1e-5), name


def test_on_a_whole_llava_as_base(trained, parts, tmp_path, logits_of, tiny):
    model, folder = trained
    base = assemble(parts / "lm", parts / "clip")
    save(type(tiny)(**{**vars(tiny), "model": base}), tmp_path / "base")
    assert torch.allclose(
        logits_of(load(folder, tmp_path / "base").model), logits_of(model), atol=1e-4
    )


def test_reads_names_of_hugging_face(trained, parts, logits_of):
    _, folder = trained
    expected = logits_of(load(folder, parts / "lm").model)
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {
        re.sub(r"model\.model\.layers", "model.model.language_model.layers", k): v
        for k, v in tensors.items()
    }
    # The projector among the adapter, as PEFT's modules_to_save writes it.
    for name, tensor in torch.load(folder / lora.NON_LORA, weights_only=True).items():
        layer = {"0": "linear_1", "2": "linear_2"}[name.split(".")[-2]]
        renamed[f"base_model.model.model.multi_modal_projector.{layer}.{name.split('.')[-1]}"] = (
            tensor
        )
    save_file(renamed, folder / "adapter_model.safetensors")
    (folder / lora.NON_LORA).unlink()
    assert torch.equal(logits_of(load(folder, parts / "lm").model), expected)


def test_layout_is_llavas(trained):
    _, folder = trained
    names = set(load_file(folder / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight" in names
    assert not any("language_model" in n or "projector" in n for n in names)
    others = set(torch.load(folder / lora.NON_LORA, weights_only=True))
    prefix = "base_model.model.model.mm_projector."
    assert others == {prefix + n for n in ("0.weight", "0.bias", "2.weight", "2.bias")}
    config = json.loads((folder / lora.ADAPTER_CONFIG).read_text())
    leaves = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    assert sorted(config["target_modules"]) == sorted(leaves)


def test_adapts_the_language_model_only(trained):
    model, _ = trained
    adapted = {n.split(".lora_")[0] for n, _ in model.named_parameters() if "lora_" in n}
    assert len(adapted) == 2 * 7  # two layers of seven linear maps
    assert all(".language_model.layers." in name for name in adapted)
    with_same_leaf = [n for n, _ in model.named_modules() if n.endswith("q_proj")]
    assert any("vision_tower" in name for name in with_same_leaf)  # what leaf names would catch


def test_rank_stabilised_scale(trained, parts, logits_of):
    _, folder = trained
    config = json.loads((folder / lora.ADAPTER_CONFIG).read_text())
    expected = logits_of(load(folder, parts / "lm").model)
    # alpha / sqrt(r) with another alpha is the same scale.
    config.update(use_rslora=True, lora_alpha=12 / 3 * 3**0.5)
    write_json(folder / lora.ADAPTER_CONFIG, config)
    assert torch.allclose(logits_of(load(folder, parts / "lm").model), expected, atol=1e-4)


def test_needs_its_base(trained, parts, tmp_path):
    _, folder = trained
    with pytest.raises(
        UsageError, match=r"a LoRA; .*--model-base \(its adapter_config.json says lm"
    ):
        load(folder)
    with pytest.raises(UsageError, match="is itself llava_lora"):
        load(folder, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora cannot be merged"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern cannot be merged"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"r": "three"}, "must be numbers"),
    ],
)
def test_other_kinds_of_adapters(trained, parts, changes, message):
    _, folder = trained
    config = json.loads((folder / lora.ADAPTER_CONFIG).read_text())
    write_json(folder / lora.ADAPTER_CONFIG, {**config, **changes})
    with pytest.raises(UsageError, match=message):
        load(folder, parts / "lm")


def test_adapter_of_another_model(trained, parts):
    _, folder = trained
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    wrong = {**tensors, key.format("A"): torch.ones(3, 99)}
    save_file(wrong, path)
    with pytest.raises(UsageError, match=r"\(32, 99\).*\(32, 32\).*check --model-base"):
        load(folder, parts / "lm")
    save_file({k: v for k, v in tensors.items() if k != key.format("B")}, path)
    with pytest.raises(UsageError, match="half of the adapter"):
        load(folder, parts / "lm")
    more = {k.replace("layers.1", "layers.7"): v for k, v in tensors.items()}
    save_file(more, path)
    with pytest.raises(UsageError, match="layers.7.*does not have"):
        load(folder, parts / "lm")
    path.unlink()
    with pytest.raises(UsageError, match="without adapter_model"):
        load(folder, parts / "lm")
