"""Models without weights: LLaVA-1.5-7B's numbers on the meta device, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava.errors import UsageError
from llava.model.assemble import assemble
from llava.train.arguments import parse
from llava.train.plan.outline import Outline, load_outline, outline

VICUNA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
LORA = {"lora_enable": True, "lora_r": 128, "lora_alpha": 256}


@pytest.fixture
def seven(parts: Path, tmp_path: Path) -> Path:
    """Vicuna-7B and CLIP-L without weights: `vicuna/` has a tokenizer too, `llava/` is LLaVA's."""
    for name, config in (
        ("vicuna", VICUNA_7B),
        ("clip", CLIP_L_336),
        (
            "llava",
            {
                **VICUNA_7B,
                "model_type": "llava_llama",
                "mm_vision_tower": "elsewhere/clip",
                "mm_projector_type": "mlp2x_gelu",
            },
        ),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        if name != "clip":
            shutil.copy(parts / "lm" / "tokenizer.model", tmp_path / name)
    return tmp_path


def outlined(run, **changes) -> Outline:
    arguments = parse(run.flags("out", bf16=True, **changes))
    return outline(arguments, load_outline(arguments))


def test_llava_1_5_7b(run, seven):
    """The published numbers. The tiny vocabulary leaves the 32000 rows room for the image token."""
    model = outlined(run, model_name_or_path=seven / "vicuna", vision_tower=seven / "clip")
    assert model.n_parameters == 7_062_902_784
    assert model.parameters["projector"] == 20_979_712
    assert model.parameters["vision tower"] == 303_507_456 == model.n_frozen
    assert (model.n_image_tokens, model.tower.n_positions, model.vocabulary) == (576, 577, 32000)
    assert model.matrices["language model"].trained == 6_476_005_376  # norms, embedding apart

    parts = {"model_name_or_path": seven / "vicuna", "vision_tower": seven / "clip"}
    adapted = outlined(run, **parts, **LORA)
    assert adapted.trained["adapters"] == 319_815_680
    assert adapted.trained["projector"] == 20_979_712
    assert adapted.n_trained == adapted.exported == 340_795_392
    assert adapted.n_parameters == 7_062_902_784 + 319_815_680
    assert adapted.adapted == (6 * 4096 + 11008, 7 * 128)


def test_original_llava_brings_its_tower(run, seven):
    theirs = outlined(run, model_name_or_path=seven / "llava", vision_tower=None)
    ours = outlined(run, model_name_or_path=seven / "vicuna", vision_tower=seven / "clip")
    assert theirs == ours


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_same_parameters_as_the_model_with_weights(run, parts, kind):
    real = assemble(parts / "lm", parts / "clip", projector_type=kind, feature_strategy="full")
    model = outlined(run, mm_projector_type=kind, mm_vision_select_feature="cls_patch")
    assert model.n_parameters == sum(p.numel() for p in real.parameters())
    assert (model.n_image_tokens, model.hidden) == (17, real.config.text_config.hidden_size)


def test_quantised_parameters_are_those_with_an_adapter(run):
    model = outlined(run, lora_enable=True, bits=4)
    assert model.quantised == model.matrices["language model"].all


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "absent: neither a directory nor a model in the hub's cache"),
        ("nobody/nothing", "nobody/nothing: neither .* a plan downloads nothing"),
        (".", "no config.json of a language model or a whole LLaVA"),
        ("clip", "'clip_vision_model' is no language model"),
    ],
)
def test_no_model(run, seven, parts, name, message, monkeypatch):
    monkeypatch.chdir(seven)
    shutil.copy(parts / "lm" / "tokenizer.model", "clip")
    with pytest.raises(UsageError, match=message):
        outlined(run, model_name_or_path=name)
