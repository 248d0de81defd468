"""A tiny LLaVA and the question every loading test asks: does it compute the same?"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch import nn

from llava.files import write_json
from llava.model import lora
from llava.model.assemble import assemble
from llava.model.checkpoint import Kind, Loaded, wrap
from llava.model.export import save

N_TEXT_ROWS = 340  # of the tiny vocabulary; the image id is the next


@pytest.fixture
def tiny(parts: Path) -> Loaded:
    """Freshly assembled from `parts`, projector from seed 0."""
    model = assemble(parts / "lm", parts / "clip")
    return wrap(model, Kind.HF_LLAVA, [parts / "lm"], [parts / "clip"])


@pytest.fixture(scope="session")
def logits_of() -> Callable[[torch.nn.Module], torch.Tensor]:
    """Logits (1, 26, 340) of a fixed picture and question, for the ids that text has."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 28, 28, generator=generator)
    text = torch.randint(3, N_TEXT_ROWS, (10,), generator=generator)
    ids = torch.cat([text[:4], torch.full((16,), N_TEXT_ROWS), text[4:]])[None]

    def compute(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels.to(model.dtype)).logits
        return logits[..., :N_TEXT_ROWS].float()

    compute.ids, compute.pixels = ids, pixels
    return compute


@pytest.fixture
def saved(tiny: Loaded, tmp_path: Path) -> Path:
    """The tiny LLaVA in this project's own layout."""
    save(tiny, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def original(tiny, parts, tmp_path) -> Path:
    """liuhaotian/llava-v1.5-7b in small: one .bin, no CLIP weights, the tower next to it."""
    shutil.copytree(parts / "clip", tmp_path / "clip")
    folder = tmp_path / "some-model"
    write_original_config(parts, folder)
    torch.save(original_weights(tiny, tower=False), folder / "pytorch_model.bin")
    shutil.copy(parts / "lm/tokenizer.model", folder)
    return folder


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Make every adapter and trained weight differ from its start (lora_B begins as zeros)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def trained(tiny, parts, tmp_path) -> tuple[PeftModel, Path]:
    """A LoRA of the tiny LLaVA in LLaVA's layout, with the model that wrote it."""
    model = lora.attach(tiny.model, rank=3, alpha=12, dropout=0.0)
    tiny.model.model.multi_modal_projector.requires_grad_(True)
    randomise(model)
    folder = tmp_path / "adapter"
    lora.save(model, folder, base="lm")
    shutil.copytree(parts / "clip", tmp_path / "clip")
    write_json(folder / "config.json", {"model_type": "llava_llama", "mm_vision_tower": "../clip"})
    return model.eval(), folder


@pytest.fixture(scope="session")
def layouts() -> SimpleNamespace:
    """What tests need to write a checkpoint as other programs do."""
    return SimpleNamespace(
        rename=rename,
        edit_json=edit_json,
        original_weights=original_weights,
        write_original_config=write_original_config,
    )


def rename(state, *rules):
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor.contiguous()
    return renamed


def edit_json(path: Path, **changes) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def original_weights(tiny, tower: bool):
    """The names of the original code; vocabulary without the image and padding rows."""
    state = rename(
        tiny.model.state_dict(),
        (r"^model\.language_model\.", "model."),
        (r"multi_modal_projector\.linear_1", "mm_projector.0"),
        (r"multi_modal_projector\.linear_2", "mm_projector.2"),
        (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:N_TEXT_ROWS].clone()
    if not tower:
        state = {k: v for k, v in state.items() if "vision_tower" not in k}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of older versions
    return state


def write_original_config(parts: Path, folder: Path, tower: str = "clip", **changes) -> None:
    folder.mkdir(exist_ok=True)
    values = json.loads((parts / "lm/config.json").read_text())
    values.update(
        architectures=["LlavaLlamaForCausalLM"],
        model_type="llava",  # as published, though it is not transformers' own type of that name
        mm_vision_tower=tower,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_use_im_start_end=False,
        image_aspect_ratio="pad",
        tokenizer_model_max_length=200,
        **changes,
    )
    write_json(folder / "config.json", values)
