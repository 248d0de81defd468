"""Training with a projector that Hugging Face's LLaVA does not have."""

from __future__ import annotations

import json
import shutil

import torch

from llava.model.checkpoint import Kind, load


def test_full_training_is_written_in_llavas_layout_and_resumes_to_the_same_bits(run):
    flags = {"mm_projector_type": "linear", "save_strategy": "steps", "save_steps": 2}
    whole, part = (run(name, max_steps=4, **flags) for name in ("whole", "part"))
    loaded = load(whole)
    assert loaded.kind is Kind.LLAVA_FULL
    values = json.loads((whole / "config.json").read_text())
    assert values["mm_projector_type"] == "linear"
    assert (whole / values["mm_vision_tower"]).resolve().name == "clip"
    shutil.rmtree(part / "checkpoint-4")
    (part / "model.safetensors").unlink()
    again = load(run("part", max_steps=4, **flags)).model.state_dict()
    expected = loaded.model.state_dict()
    assert all(torch.equal(again[name], expected[name]) for name in expected)
