"""`--bits 4` and `8`: what is quantised, that it trains, and that its results are usable.

Run where bitsandbytes is installed (`pip install bitsandbytes`); a CPU is enough.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from llava.errors import UsageError
from llava.model.assemble import assemble
from llava.model.checkpoint import load
from llava.model.projector import read_projector
from llava.tokens import IGNORE_INDEX
from llava.train import __main__ as entry
from llava.train import quantize
from llava.train.arguments import parse
from llava.train.stages import load_model, prepare
from llava.train.trainer import token_losses

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8}


def test_absent_package_is_told_before_anything_is_read(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="--bits 4: bitsandbytes is not installed; pip install"):
        run("out", bits=4, model_name_or_path="absent", **LORA)


@needs_package
def test_zero3_cannot_split_quantised_weights(run, monkeypatch):
    flags = parse(run.flags("out", bits=8, **LORA)).training
    monkeypatch.setattr(quantize.zero, "stage", lambda flags: 3)
    with pytest.raises(UsageError, match="--bits 8: ZeRO-3 cannot split .* scripts/zero2.json"):
        quantize.check(flags)


@needs_package
@pytest.mark.parametrize(
    ("kind", "error"),
    # Of a normal weight: 4 bits keep about one digit, 8 bits (127 steps of a row) two.
    [
        ({"bits": 4}, 0.15),
        ({"bits": 4, "quant_type": "fp4", "double_quant": False}, 0.2),
        ({"bits": 8}, 0.02),
    ],
)
def test_products_are_those_of_the_whole_weights(run, kind, error):
    flags = parse(run.flags("out", **kind, **LORA)).training
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(128, 96)
    layer.weight.data = torch.randn(96, 128, generator=generator)
    few = quantize.quantised(layer, flags)
    inputs = torch.randn(16, 128, generator=generator, requires_grad=True)
    expected = layer(inputs)
    distance = (few(inputs) - expected).norm() / expected.norm()
    assert 0 < distance < error
    (wanted,) = torch.autograd.grad(expected.sum(), inputs)
    (found,) = torch.autograd.grad(few(inputs).sum(), inputs)
    assert 0 < (found - wanted).norm() / wanted.norm() < error
    assert not few.weight.requires_grad and few.weight.dtype in (torch.uint8, torch.int8)


@pytest.fixture
def projector(run, squares) -> Path:
    """An `mm_projector.bin` that differs from a fresh one."""
    flags = {"tune_mm_mlp_adapter": True, "version": "plain", "data_path": squares / "images.json"}
    return run("pre", **flags, max_steps=2) / "mm_projector.bin"


@needs_package
@pytest.mark.parametrize("bits", [4, 8])
def test_only_the_language_models_layers_are_quantised(run, parts, projector, bits):
    changes = {"bits": bits, "bf16": True, "pretrain_mm_mlp_adapter": projector, **LORA}
    arguments = parse(run.flags("out", **changes))
    loaded = load_model(arguments)
    model = prepare(arguments, loaded)
    whole = assemble(parts / "lm", parts / "clip", projector).state_dict()
    found = loaded.model.named_parameters()
    kinds = {name.replace(".base_layer", ""): parameter for name, parameter in found}
    for name, parameter in kinds.items():
        if "lora_" in name or "multi_modal_projector" in name:
            assert (parameter.dtype, parameter.requires_grad) == (torch.float32, True), name
        elif "layers" in name and "proj" in name and "vision_tower" not in name:
            assert parameter.dtype == (torch.uint8 if bits == 4 else torch.int8), name
        elif "norm" in name and "vision_tower" not in name:
            assert parameter.dtype == torch.float32, name
        else:
            assert parameter.dtype == torch.bfloat16, name
    for name, tensor in read_projector(projector).items():
        assert torch.equal(kinds[name].data, tensor.bfloat16().float()), name
    assert torch.equal(kinds["lm_head.weight"], whole["lm_head.weight"].bfloat16())
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2 * 7


@needs_package
@pytest.mark.parametrize(("bits", "lost"), [(4, 0.15), (8, 0.02)])
def test_trains_evaluates_resumes_and_loads(run, parts, squares, bits, lost):
    """With bfloat16 and recomputation; the two runs end with the same bits."""
    flags = {
        "bits": bits,
        "bf16": True,
        "gradient_checkpointing": True,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 6,
        "eval_data_path": squares / "mixed.json",
        "eval_strategy": "steps",
        "eval_steps": 3,
        **LORA,
    }
    whole = run("whole", max_steps=12, **flags)
    log = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in log if "loss" in line]
    held_out = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert losses == sorted(losses, reverse=True) and held_out == sorted(held_out, reverse=True)
    resumed = whole.parent / "resumed"
    resumed.mkdir()
    (whole / "checkpoint-6").rename(resumed / "checkpoint-6")
    run("resumed", max_steps=12, **flags)
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    # The adapters do about as well on the whole weights, which they have not been trained on.
    trained = load(whole, parts / "lm", dtype=torch.float32)
    assert whole_loss(trained, run) == pytest.approx(held_out[-1], rel=lost)
    assert held_out[-1] < 0.9 * whole_loss(load_model(parse(run.flags("x"))), run)


def whole_loss(loaded, run) -> float:
    """Mean loss of a supervised token of `mixed.json`."""
    dataset = entry.make_dataset(parse(run.flags("x")), loaded)
    batch = entry.make_collator(loaded)([dataset[row] for row in range(len(dataset))])
    n_tokens = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    with torch.no_grad():
        return token_losses(loaded.model.eval(), batch)[0].sum().item() / n_tokens
