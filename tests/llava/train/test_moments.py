"""Adam's moments as a real training left them, found again for each matrix of the adapter."""

from __future__ import annotations

import pytest
import torch

from llava.errors import UsageError
from llava.model.moments import OPTIMIZER, read_moments
from llava.vlm import load_vlm

FLAGS = {
    "lora_enable": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "max_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "lr_scheduler_type": "constant",
    "mm_projector_lr": 1e-3,
    "adam_beta2": 0.99,
}


@pytest.fixture
def trained(run, parts):
    """A checkpoint after one step of LoRA and projector, each in groups of its own."""
    return load_vlm(run("lora", **FLAGS) / "checkpoint-1", parts / "lm")


def test_every_matrix_gets_its_own(trained):
    """After one step from B = 0, B is -lr sign(m) nearly everywhere, and A has no gradient yet."""
    moments, scale = trained.moments, 2
    assert moments.betas == (0.9, 0.99) and moments.eps == 1e-8
    assert len(moments.first) == len(moments.second) == 2 * len(trained.adapter)
    for name, factors in trained.adapter.items():
        first, second = moments.first[f"{name}.lora_B"], moments.second[f"{name}.lora_B"]
        clear = first.abs() > 1e-6  # against eps, which is outside the root in training
        assert clear.float().mean() > 0.5
        torch.testing.assert_close(
            factors.up[clear] / scale, -1e-2 * first[clear].sign(), rtol=0.02, atol=0
        )
        torch.testing.assert_close(second, first.square())  # (1 - b2) / (1 - b1)^2 = 1
        assert not moments.first[f"{name}.lora_A"].any()


def test_what_cannot_be_read_is_one_line(trained, parts):
    path = trained.folder / OPTIMIZER
    state = torch.load(path, weights_only=True)
    fewer = dict(list(trained.adapter.items())[1:])
    with pytest.raises(UsageError, match="28 matrices.*has 26.*same checkpoint-N"):
        read_moments(trained.folder, fewer, trained.device)
    del state["param_groups"][0]["betas"]
    torch.save(state, path)
    with pytest.raises(UsageError, match="not of Adam"):
        read_moments(trained.folder, trained.adapter, trained.device)
    path.unlink()
    with pytest.raises(UsageError, match="optimizer.pt: no such file.*DeepSpeed"):
        read_moments(trained.folder, trained.adapter, trained.device)
    with pytest.raises(UsageError, match="no LoRA checkpoint"):
        _ = load_vlm(parts / "lm").moments
