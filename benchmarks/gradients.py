"""Per-sample LoRA gradients, projected to 5120: this engine against the authors' way.

    python benchmarks/gradients.py [--quick] [--samples 8] [--repeats 2]

    authors    as LESS and ICONS do it: one sample at a time, torch.autograd.grad by the LoRA
               matrices, one flat vector, a dense Rademacher projection to 5120; one gradient for
               each generation of the matrix, and beside it sixteen (their kernel's most)
    ours       selection.signals.gradients.gradients, all samples in one batch, count-sketch
    plain      batched forward and backward of the same model that keep no gradient: the LoRA beside
               the weights and frozen, as it was trained
    merged     the same with the LoRA merged: the floor

Random Llama of 12 layers x 1024, LoRA r=64 on its seven linear maps (15.1 M numbers; --quick: 6 x
512, r=16), samples of 690 tokens of which 60 are answers, float32, one thread. Time is process CPU
time for a sample, the variants in turn, the smallest of the repeats. The dense matrix is generated
for 128 of its 5120 columns and the time multiplied by 40: the authors' code, too, works through
such blocks one after the other. Its signs come 64 from one hash, which is far cheaper than
torch.bernoulli_. Targets: authors / ours at least 4, ours / plain at most 1.15. A quarter of an
hour.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from forward_signals import N_ANSWER, VOCABULARY, make_model
from peft import PeftModel
from torch import nn

from llava.model import lora
from llava.model.lora import LowRank
from llava.tokens import IGNORE_INDEX
from llava.vlm.base import Batch, Prepared, StableRows, Vlm
from selection.signals.gradients.backward import answer_gradient, sample_gradients
from selection.signals.gradients.gradients import Gradients
from selection.signals.gradients.sketch import signs

LENGTH, DIM, COLUMNS, PER_CALL = 690, 5120, 128, 16
SCALE = 2  # alpha / r


class Adapted(Vlm):
    """A model whose merged adapter is at hand."""

    adapter: dict[str, LowRank] = {}


def make_pair(quick: bool) -> tuple[PeftModel, Adapted]:
    """The model with a random LoRA beside its weights, and with the same one merged."""
    rank = 16 if quick else 64
    beside = lora.attach(make_model(quick), rank=rank, alpha=SCALE * rank, dropout=0.0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in matrices(beside).values():
            parameter.normal_(std=0.02, generator=generator)
    found = {name: p.detach().clone() for name, p in matrices(beside).items()}
    proxy = Adapted(copy.deepcopy(beside).merge_and_unload(), "random", 0, 4096)
    layers = dict.fromkeys(name.rpartition(".")[0] for name in found)
    proxy.adapter = {
        layer: LowRank(*(SCALE * found[f"{layer}.lora_{half}"] for half in "AB"))
        for layer in layers
    }
    return beside, proxy


def matrices(model: PeftModel) -> dict[str, nn.Parameter]:
    """`layers.0.self_attn.q_proj.lora_A` and so on."""
    return {
        name.removeprefix("base_model.model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def make_samples(n: int) -> list[Prepared]:
    samples = []
    for seed in range(n):
        ids = torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(seed))
        labels = ids.clone()
        labels[:-N_ANSWER] = IGNORE_INDEX
        samples.append(Prepared(ids, labels))
    return samples


def one_at_a_time(model: PeftModel, samples: list[Prepared]) -> torch.Tensor:
    """Flat gradients (n, P), as collect_grads.py gathers them."""
    wanted = list(matrices(model).values())
    model.requires_grad_(False)
    for parameter in wanted:
        parameter.requires_grad_(True)
    rows = []
    for sample in samples:
        loss = model(input_ids=sample.input_ids[None], labels=sample.labels[None]).loss
        found = torch.autograd.grad(loss, wanted)
        rows.append(torch.cat([part.flatten() for part in found]))
    return torch.stack(rows)


def project_densely(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """Products of `rows` (n, P) with `columns` columns of signs, generated a piece at a time."""
    out, step = torch.zeros(len(rows), columns), 1 << 15
    for first in range(0, rows.shape[1], step):
        part = rows[:, first : first + step]
        n = part.shape[1]
        out += part @ signs("dense", first * columns, n * columns).view(n, columns)
    return out


def plain(model: nn.Module, proxy: Vlm, batch: Batch) -> None:
    """Forward and backward to the first layer's input, through frozen weights."""
    model.requires_grad_(False)
    states = proxy.model.get_input_embeddings()(batch.input_ids).requires_grad_()
    with StableRows():
        hidden = model(inputs_embeds=states, use_cache=False).last_hidden_state
    hidden.backward(answer_gradient(hidden.detach(), batch.labels, proxy.head))


def make_calls(
    beside: PeftModel, proxy: Adapted, samples: list[Prepared]
) -> dict[str, tuple[Callable[[], object], float]]:
    """What to time, and by what its time is to be divided to be that of one sample."""
    n, batch = len(samples), proxy.collate(samples)
    flat = torch.randn(PER_CALL, sum(p.numel() for p in matrices(beside).values()))
    share = COLUMNS / DIM
    return {
        "loop": (lambda: one_at_a_time(beside, samples[:2]), 2),
        "dense, 1": (lambda: project_densely(flat[:1], COLUMNS), share),
        "dense, 16": (lambda: project_densely(flat, COLUMNS), share * PER_CALL),
        "ours": (lambda: Gradients(dim=DIM).compute(proxy, samples), n),
        "collected": (
            lambda: sample_gradients(proxy, batch, proxy.adapter, lambda name, found: None),
            n,
        ),
        "plain": (lambda: plain(beside.base_model.model.model, proxy, batch), n),
        "merged": (lambda: plain(proxy.decoder, proxy, batch), n),
    }


def measure(calls: dict[str, tuple[Callable[[], object], float]], repeats: int) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, (call, divisor) in calls.items():
            started = time.process_time()
            call()
            best[name] = min(best[name], (time.process_time() - started) / divisor)
    return best


def check(beside: PeftModel, proxy: Adapted, samples: list[Prepared]) -> None:
    """Lengths of the gradients of both ways; stop when they differ.

    In float64: PyTorch's own float32 norm of 15 million numbers is off by 0.3 %.
    """
    slow = one_at_a_time(beside, samples[:2]).double().norm(dim=1).float()
    found = torch.from_numpy(Gradients(dim=DIM).compute(proxy, samples[:2])["norm"])
    torch.testing.assert_close(found, slow, rtol=1e-4, atol=0)


def report(found: dict[str, float]) -> None:
    authors = {name: found["loop"] + found[f"dense, {name}"] for name in ("1", "16")}
    print("CPU seconds a sample")
    print(f"authors, 1 a matrix   {authors['1']:7.2f}  ({_share(found, 'loop', 'dense, 1')})")
    print(f"authors, 16 a matrix  {authors['16']:7.2f}  ({_share(found, 'loop', 'dense, 16')})")
    thin = found["collected"] - found["merged"]
    sketch = found["ours"] - found["collected"]
    print(
        f"ours                  {found['ours']:7.2f}  (forward and backward {found['merged']:.2f}, "
        f"gradients {thin:.2f}, sketch and norms {sketch:.2f})"
    )
    print(
        f"plain                 {found['plain']:7.2f}\nmerged                {found['merged']:7.2f}"
    )
    print(
        f"authors / ours: {authors['1'] / found['ours']:.1f} (target 4), with 16 a matrix "
        f"{authors['16'] / found['ours']:.1f};  ours / plain: {found['ours'] / found['plain']:.2f} "
        f"(target 1.15);  ours / merged: {found['ours'] / found['merged']:.2f}"
    )


def _share(found: dict[str, float], loop: str, dense: str) -> str:
    return f"forward and backward {found[loop]:.2f}, projection {found[dense]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a model of a tenth of the size")
    parser.add_argument("--samples", type=int, default=8, help="in the batch")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    beside, proxy = make_pair(arguments.quick)
    samples = make_samples(arguments.samples)
    check(beside, proxy, samples)
    report(measure(make_calls(beside, proxy, samples), arguments.repeats))


if __name__ == "__main__":
    main()
