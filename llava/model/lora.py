"""Low-rank adapters in LLaVA's own layout: which weights get one, reading, merging and saving.

A LoRA directory holds `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), plus
`non_lora_trainables.bin` with the projector. Names follow the original LLaVA, where the language
model is the root (`base_model.model.model.layers.0...`); names of Hugging Face's LLaVA, which put
`language_model.` in between, are read as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from llava.errors import UsageError
from llava.files import write_json, writing
from llava.model.projector import with_projector
from llava.model.sources import ADAPTER_CONFIG, NON_LORA, read_json
from llava.model.weights import (
    LANGUAGE,
    PROJECTOR,
    State,
    canonical_name,
    original_name,
    read_tensors,
)

Factors = tuple[torch.Tensor, torch.Tensor]
PREFIX = "base_model.model."
_WHOLE_LAYERS = r"model\.language_model\.layers\."
_FACTOR = re.compile(r"(.*)\.lora_([AB])(?:\.default)?\.weight")
# The language model's own layers, alone or inside a LLaVA; CLIP's layers have the same leaf names.
_LAYERS = r"model\.(?:language_model\.)?layers\.\d+\."
# Ways of adapting that change the formula W + s B A.
_UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "alora_invocation_tokens",
    "megatron_config",
)


def target_pattern(model: nn.Module) -> str:
    """Regular expression for the full names of the language model's linear layers, no lm_head."""
    inside = re.compile(_LAYERS + r"(?:.+\.)?([^.]+)")
    leaves = {
        match[1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (match := inside.fullmatch(name))
    }
    if not leaves:
        raise UsageError("LoRA: the language model has no linear layers named model.layers.*")
    return layer_pattern(leaves)


def layer_pattern(leaves: Iterable[str]) -> str:
    """Regular expression for the full names of these linear maps in the language model's layers."""
    return rf"{_LAYERS}(?:.+\.)?(?:{'|'.join(sorted(leaves))})"


def attach(
    model: PreTrainedModel, *, rank: int, alpha: float, dropout: float, bias: str = "none"
) -> PeftModel:
    """`model` with a fresh adapter on every linear layer of its language model; the rest frozen."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=bias,
        target_modules=target_pattern(model),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


class Merged(Mapping[str, torch.Tensor]):
    """The weights of a base model with a LoRA merged in, once, each when it is asked for.

    W + (alpha / r) B A in float32, rounded to W's dtype. `base` holds W under canonical names and
    `factors` B A as (A, B) by the same names.
    """

    def __init__(self, base: State, factors: dict[str, Factors], scale: float) -> None:
        self.base, self.factors, self.scale = base, factors, scale

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self.base[name]
        if name not in self.factors:
            return weight
        down, up = self.factors[name]
        return (weight.float() + self.scale * (up.float() @ down.float())).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def on(self, base: State) -> Merged:
        """The same adapter on `base`."""
        return Merged(base, self.factors, self.scale)


def unmerged(state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """`state` before its merge: tensors of the same names, shapes and types, at no cost."""
    return state.base if isinstance(state, Merged) else state


def merged(state: State, folder: Path) -> Merged:
    """Weights of a base model, under canonical names, with the LoRA in `folder`.

    Its other trained weights replace the base's. Raises UsageError if the adapter is of an
    unsupported kind or of another model.
    """
    factors, replaced = read(folder)
    projector = {k: v for k, v in replaced.items() if k.startswith(PROJECTOR)}
    base = {**(with_projector(state, projector) if projector else state), **replaced}
    result = Merged(base, factors, scale(folder))
    for name in sorted(factors):
        _check_fits(name, base, factors[name], folder)
        if not re.match(_WHOLE_LAYERS, name):  # embedding and output layer may still get rows
            base[name] = result[name]
            del factors[name]
    return result


def read(folder: Path) -> tuple[dict[str, Factors], State]:
    """Low-rank factors (A, B) by the weight they adapt, and the weights trained as a whole.

    Under canonical names, from the adapter and from non_lora_trainables.bin. Raises UsageError if
    one half of a pair is absent.
    """
    tensors = read_tensors(_adapter_file(folder))
    if (folder / NON_LORA).is_file():
        tensors.update(read_tensors(folder / NON_LORA))
    halves, replaced = _split(tensors)
    factors = {}
    for name in sorted({name for name, _ in halves}):
        down, up = halves.get((name, "A")), halves.get((name, "B"))
        if down is None or up is None:
            raise UsageError(f"{folder}: half of the adapter of {name} is missing; copy it again")
        factors[name] = down, up
    return factors, replaced


class LowRank(NamedTuple):
    """One layer's adapter: `down` s A (r, in) and `up` s B (out, r); None is a B of zeros.

    With y = (W + s B A) x, B enters the derivative of a loss by A only as s B, and A that by B only
    as s A.
    """

    down: torch.Tensor
    up: torch.Tensor | None


def low_rank(folder: Path, decoder: nn.Module) -> dict[str, LowRank]:
    """What the LoRA in `folder` adapts of the language model `decoder`, in its layers' order.

    By the layer's name in it (`layers.0.self_attn.q_proj`), in its dtype and on its device.
    """
    factors, s = read(folder)[0], scale(folder)
    adapted = {}
    for name, module in decoder.named_modules():
        pair = factors.get(f"{LANGUAGE}{name}.weight")
        if pair is not None and isinstance(module, nn.Linear):
            adapted[name] = LowRank(*((s * half.float()).to(module.weight) for half in pair))
    return adapted


def named_factors(factors: dict[str, Factors], rename: Callable[[str], str]) -> State:
    """PEFT's names of low-rank factors, where a weight's own name is `rename` of ours."""
    return {
        f"{PREFIX}{rename(name).removesuffix('.weight')}.lora_{half}.weight": tensor
        for name, pair in factors.items()
        for half, tensor in zip("AB", pair, strict=True)
    }


def _check_fits(name: str, state: State, factors: Factors, where: Path) -> None:
    if name not in state:
        raise UsageError(
            f"{where}: adapts {name}, which the base model does not have; it was trained on "
            "another model, check --model-base"
        )
    down, up = factors
    shape = tuple(state[name].shape)
    if (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
        raise UsageError(
            f"{where}: adapts {name} as ({up.shape[0]}, {down.shape[1]}), the base has "
            f"{shape}; it was trained on another model, check --model-base"
        )


def scale(folder: Path) -> float:
    """What B A is multiplied with; UsageError if the adapter's formula is another one."""
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UsageError(f"{path}: a {config.get('peft_type')!r} adapter; only LORA can be merged")
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if used:
        raise UsageError(f"{path}: {', '.join(used)} cannot be merged here; merge it with PEFT")
    try:
        rank, alpha = float(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: r and lora_alpha must be numbers") from error
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _adapter_file(folder: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"{folder}: {ADAPTER_CONFIG} without adapter_model.safetensors or .bin")


def bare_name(name: str) -> str:
    """`name` without what PEFT puts in front."""
    bare = re.sub(r"^base_model\.(?:model\.)?", "", name)
    return re.sub(r"^model\.model\.", "model.", bare)


def _split(tensors: State) -> tuple[dict[tuple[str, str], torch.Tensor], State]:
    """Low-rank factors by (weight adapted, "A" or "B"), and the tensors that replace a weight."""
    factors: dict[tuple[str, str], torch.Tensor] = {}
    replaced: State = {}
    for name, tensor in tensors.items():
        bare = bare_name(name)
        match = _FACTOR.fullmatch(bare)
        if match:
            factors[canonical_name(match[1] + ".weight"), match[2]] = tensor
        else:
            replaced[canonical_name(bare.replace(".base_layer.", "."))] = tensor
    return factors, replaced


def save(model: PeftModel, folder: Path, base: str, state: State | None = None) -> None:
    """Write adapter, its configuration and the other trained weights as LLaVA does.

    Args:
        base: recorded as the base model's name.
        state: what to write, under the names in `model`; None takes its trained weights.
    """
    if state is None:
        state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapter = {name: t for name, t in state.items() if _in_adapter(name, model)}
    named = {
        _original(name.replace(".default.", ".")): tensor.detach().cpu().contiguous()
        for name, tensor in adapter.items()
    }
    with writing(folder / "adapter_model.safetensors") as temp:
        save_file(named, temp, metadata={"format": "pt"})
    others = {k.removeprefix(PREFIX): t for k, t in state.items() if k not in adapter}
    save_projector(others, folder / NON_LORA, prefix=PREFIX)
    write_json(folder / ADAPTER_CONFIG, _adapter_config(model, base))


def _in_adapter(name: str, model: PeftModel) -> bool:
    """PEFT keeps the low-rank factors, and biases of the language model if it trains any."""
    return ".lora_" in name or (
        model.peft_config["default"].bias != "none"
        and name.endswith(".bias")
        and PROJECTOR not in name
    )


def save_projector(state: State, path: Path, prefix: str = "") -> None:
    """Write the trained weights in `state` under LLaVA's names: its `mm_projector.bin`."""
    named = {
        prefix + _original(name): tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
    }
    with writing(path) as temp, temp.open("wb") as file:
        torch.save(named, file)  # to an open file: a name would become part of the content


def _original(name: str) -> str:
    """LLaVA's name of a weight or adapter with Hugging Face's name."""
    prefix = PREFIX if name.startswith(PREFIX) else ""
    return prefix + original_name(name.removeprefix(prefix))


def _adapter_config(model: PeftModel, base: str) -> dict[str, Any]:
    config = model.peft_config["default"]
    leaves = re.search(r"\(\?:([^()]+)\)$", config.target_modules)[1].split("|")
    return {
        "base_model_name_or_path": base,
        "bias": config.bias,
        "inference_mode": True,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "peft_type": "LORA",
        "r": config.r,
        "target_modules": leaves,
        "task_type": "CAUSAL_LM",
    }
