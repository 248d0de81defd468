"""Models of transformers from a configuration and weights: exactly those, or an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_zero3_state

from llava.errors import UsageError
from llava.model.weights import PROJECTOR, State, quiet_transformers


def build(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: State,
    dtype: torch.dtype,
    where: object,
) -> PreTrainedModel:
    """A `cls` in evaluation mode with exactly the weights in `state`.

    Raises UsageError naming the weights when one is missing, left over or of another shape.
    """
    if is_deepspeed_zero3_enabled():  # it shards while it builds, and checks nothing
        with set_zero3_state():
            skeleton(cls, config, state, where)
    with quiet_transformers():
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with a remedy
        )
    _check_shapes(info["mismatched_keys"], where)
    _check_names(info["missing_keys"], info["unexpected_keys"], where)
    return model


def skeleton(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: Mapping[str, torch.Tensor],
    where: object,
) -> PreTrainedModel:
    """The model that `build` would make, on the meta device: no weight is read.

    `state` gives names and shapes. Raises as `build` does.
    """
    with quiet_transformers(), torch.device("meta"):
        model = cls(config).eval()
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied = wanted.keys() - {name for name, _ in model.named_parameters()}
    shared = wanted.keys() & state.keys()
    shapes = ((name, state[name].shape, wanted[name]) for name in shared)
    _check_shapes([shape for shape in shapes if shape[1] != shape[2]], where)
    _check_names(wanted.keys() - state.keys() - tied, state.keys() - wanted.keys(), where)
    return model


def _check_shapes(mismatched: Iterable[tuple], where: object) -> None:
    for name, found, expected in sorted(mismatched):
        raise UsageError(
            f"{where}: {name} has shape {tuple(found)}, the model needs {tuple(expected)}; "
            + _shape_remedy(name)
        )


def _shape_remedy(name: str) -> str:
    if name.startswith(PROJECTOR):
        return "this projector belongs to another language model or vision tower"
    return "config.json and weights do not belong together"


def _check_names(missing: Iterable[str], unexpected: Iterable[str], where: object) -> None:
    for problem, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected))):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UsageError(
                f"{where}: {problem} weights: {', '.join(names[:3])}{more}; copy the checkpoint "
                "again, or its config.json is of another model"
            )
