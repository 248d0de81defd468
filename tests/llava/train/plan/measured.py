"""Trains with each list of flags of a JSON file in turn and writes down what DeepSpeed holds.

`torchrun ... measured.py FILE`. For each run, bytes of this process's weights, gradients (ZeRO-3
only: at stage 2 they are gone after a step) and optimizer states.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from llava import ranks
from llava.train import __main__ as entry
from llava.train import zero
from llava.train.arguments import parse
from llava.train.trainer import LlavaTrainer


def n_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measured(trainer: LlavaTrainer) -> dict[str, int]:
    optimizer, parameters = trainer.deepspeed.optimizer, list(trainer.model.parameters())
    states = optimizer.optimizer.state.values()
    moments = n_bytes(t for state in states for t in state.values() if torch.is_tensor(t))
    if zero.stage(trainer.args) == 3:
        return {
            "weights": n_bytes(parameter.ds_tensor for parameter in parameters),
            "gradients": n_bytes([optimizer.grad_partitions_flat_buffer]),
            "optimizer": moments + n_bytes(optimizer.fp32_partitioned_groups_flat),
        }
    copies = n_bytes(optimizer.single_partition_of_fp32_groups)
    return {"weights": n_bytes(parameters), "optimizer": moments + copies}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    found = []
    for flags in json.loads(path.read_text()):
        arguments = parse(flags)
        zero.start(arguments.training)
        trainer, _ = entry.make_trainer(arguments, {})
        trainer.train()
        found.append(measured(trainer))
    if ranks.rank() == 0:
        path.with_suffix(".measured").write_text(json.dumps(found))
