"""Adam's moments of a LoRA's matrices, from the optimizer state beside a training checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from llava.errors import UsageError
from llava.model.lora import LowRank
from llava.model.weights import read_pickle

OPTIMIZER = "optimizer.pt"


@dataclass(frozen=True)
class Moments:
    """`first` and `second`: float32 tensors by matrix, `layers.0.self_attn.q_proj.lora_A`, ..."""

    first: Mapping[str, torch.Tensor]
    second: Mapping[str, torch.Tensor]
    betas: tuple[float, float]
    eps: float
    digest: str
    """xxh3-128 of the file"""


def read_moments(folder: Path, adapter: Mapping[str, LowRank], device: torch.device) -> Moments:
    """The moments of the matrices of `adapter`, which stands in the model's order.

    The file numbers parameters in that order and names none. Raises UsageError if there is no such
    file (DeepSpeed writes others) or it is not of Adam or not of this adapter.
    """
    path = folder / OPTIMIZER
    if not path.is_file():
        raise UsageError(
            f"{path}: no such file; Adam's moments are read from a checkpoint-N of a LoRA training "
            "without DeepSpeed, give that as --model"
        )
    content = read_pickle(path)
    group = content["param_groups"][0]
    if "betas" not in group:
        raise UsageError(f"{path}: not of Adam; train with --optim adamw_torch")

    # The adapter's matrices are told from other trained weights, which may stand between them, by
    # their shapes.
    names = [f"{name}.lora_{half}" for name in adapter for half in "AB"]
    shapes = [tuple(t.shape) for factors in adapter.values() for t in (factors.down, factors.up)]
    order = itertools.chain(*(group["params"] for group in content["param_groups"]))
    states = [content["state"][i] for i in order if i in content["state"]]
    states = [s for s in states if "exp_avg" in s and tuple(s["exp_avg"].shape) in set(shapes)]
    if [tuple(state["exp_avg"].shape) for state in states] != shapes:
        raise UsageError(
            f"{path}: holds Adam's moments of {len(states)} matrices shaped like the adapter's, "
            f"which has {len(shapes)}; copy both from the same checkpoint-N"
        )
    return Moments(
        first=_by_name(names, states, "exp_avg", device),
        second=_by_name(names, states, "exp_avg_sq", device),
        betas=tuple(group["betas"]),
        eps=group["eps"],
        digest=xxhash.xxh3_128_hexdigest(path.read_bytes()),
    )


def _by_name(
    names: list[str], states: list[Mapping], key: str, device: torch.device
) -> dict[str, torch.Tensor]:
    return {n: state[key].float().to(device) for n, state in zip(names, states, strict=True)}
