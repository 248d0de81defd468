"""Projectors of every type: against LLaVA's layers written out, and under its names in files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from llava.errors import UsageError
from llava.files import write_json
from llava.model import lora
from llava.model.assemble import assemble
from llava.model.checkpoint import Kind, load, wrap
from llava.model.export import original_config
from llava.model.projector import (
    LlavaWithProjector,
    fresh_projector,
    layer_prefixes,
    read_projector,
    type_of,
)
from llava.model.weights import original_name

TYPES = ("linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu")


def original_projector(kind: str, seed: int = 5) -> dict[str, torch.Tensor]:
    """A projector 24 -> 32 under the names of LLaVA's files."""
    state = fresh_projector(24, 32, torch.Generator().manual_seed(seed), kind)
    return {original_name(name): tensor for name, tensor in state.items()}


def project(state: dict[str, torch.Tensor], kind: str, x: torch.Tensor) -> torch.Tensor:
    """LLaVA's builder by hand: Linear, then (GELU, Linear) N - 1 times, in one Sequential."""
    prefix = "model.mm_projector."
    if kind == "linear":
        return F.linear(x, state[prefix + "weight"], state[prefix + "bias"])
    for number in range(int(kind[3])):
        layer = f"{prefix}{2 * number}."
        x = F.linear(F.gelu(x) if number else x, state[layer + "weight"], state[layer + "bias"])
    return x


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_computes_what_llavas_layers_do(parts, tmp_path, logits_of, kind):
    state = original_projector(kind)
    torch.save(state, tmp_path / "mm_projector.bin")
    model = assemble(parts / "lm", parts / "clip", tmp_path / "mm_projector.bin")
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    # One float32 product per layer on each side.
    assert torch.allclose(model.model.multi_modal_projector(x), project(state, kind, x), atol=1e-5)
    assert isinstance(model, LlavaWithProjector) == (kind != "mlp2x_gelu")
    assert type_of(model.config) == kind
    assert torch.isfinite(logits_of(model)).all()


def test_names_are_llavas():
    names = {kind: sorted(original_projector(kind)) for kind in TYPES}
    assert names["linear"] == ["model.mm_projector.bias", "model.mm_projector.weight"]
    three = [f"model.mm_projector.{i}.{part}" for i in (0, 2, 4) for part in ("bias", "weight")]
    assert names["mlp3x_gelu"] == three
    assert names["mlp1x_gelu"] == three[:2]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model.", "module.model."])
def test_reads_mm_projector_with_any_prefix(tmp_path, prefix, kind):
    state = fresh_projector(24, 32, torch.Generator().manual_seed(5), kind)
    named = {prefix + k.removeprefix("model."): v for k, v in original_projector(kind).items()}
    torch.save(named, tmp_path / "mm_projector.bin")
    save_file(state, tmp_path / "projector.safetensors")
    for name in ("mm_projector.bin", "projector.safetensors"):
        read = read_projector(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


def test_a_fresh_projector_of_any_type(parts):
    model = assemble(parts / "lm", parts / "clip", projector_type="mlp3x_gelu")
    expected = fresh_projector(24, 32, torch.Generator().manual_seed(0), "mlp3x_gelu")
    drawn = dict(model.model.multi_modal_projector.named_parameters())
    assert {f"model.multi_modal_projector.{k}" for k in drawn} == expected.keys()
    assert torch.equal(
        drawn["linear_3.bias"], expected["model.multi_modal_projector.linear_3.bias"]
    )


@pytest.mark.parametrize("kind", ["identity", "mlp0x_gelu", "mlp2x", "resampler"])
def test_other_types_are_refused(parts, kind):
    with pytest.raises(UsageError, match=f"mm_projector_type {kind}.*choose linear or mlpNx_gelu"):
        layer_prefixes(kind)
    with pytest.raises(UsageError, match="not supported"):
        assemble(parts / "lm", parts / "clip", projector_type=kind)


def test_a_projector_of_another_type_than_the_flag_says(parts, tmp_path):
    torch.save(original_projector("mlp2x_gelu"), tmp_path / "p.bin")
    with pytest.raises(UsageError, match="mlp2x_gelu, not linear; pass --mm_projector_type mlp2x"):
        assemble(parts / "lm", parts / "clip", tmp_path / "p.bin", projector_type="linear")


def test_a_projector_of_another_size_or_kind_is_refused(parts, tmp_path):
    path = tmp_path / "mm_projector.bin"
    wide = fresh_projector(24, 48, torch.Generator())
    torch.save({k.replace("multi_modal_projector", "m"): v for k, v in wide.items()}, path)
    with pytest.raises(UsageError, match="no projector of type linear or mlpNx_gelu.*: none"):
        assemble(parts / "lm", parts / "clip", path)
    half = {k: v for k, v in original_projector("mlp2x_gelu").items() if ".0." not in k}
    torch.save(half, path)
    with pytest.raises(UsageError, match="in it: linear_2.bias, linear_2.weight"):
        assemble(parts / "lm", parts / "clip", path)
    torch.save({"model.mm_projector.1.weight": torch.ones(24)}, path)  # some other Sequential
    with pytest.raises(UsageError, match="no projector of type"):
        assemble(parts / "lm", parts / "clip", path)
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(UsageError, match="wide.*24 features to 48.*gives 24.*takes 32"):
        assemble(parts / "lm", parts / "clip", tmp_path / "wide.safetensors")


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu"])
def test_a_lora_with_another_projector(parts, tmp_path, logits_of, kind):
    model = assemble(parts / "lm", parts / "clip", projector_type=kind)
    loaded = wrap(model, Kind.HF_LLAVA, [parts / "lm"], [parts / "clip"])
    loaded.vision_tower = str(parts / "clip")
    trained = lora.attach(model, rank=2, alpha=4, dropout=0.0)
    model.model.multi_modal_projector.requires_grad_(True)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data += 0.1
    lora.save(trained, tmp_path, base="lm")
    write_json(tmp_path / "config.json", original_config(loaded, tmp_path))
    others = torch.load(tmp_path / lora.NON_LORA, weights_only=True)
    assert set(others) == {f"base_model.model.{name}" for name in original_projector(kind)}
    again = load(tmp_path, parts / "lm")  # lora_B is still zero: the base, but for the projector
    assert torch.equal(logits_of(again.model), logits_of(trained.eval()))
    assert type_of(again.model.config) == kind
