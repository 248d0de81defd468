"""A plan as a page that one can read: sections with their assumption under them."""

from __future__ import annotations

import json
import math
import sys

from rich.console import Console
from rich.table import Table

from llava.train.arguments import Arguments
from llava.train.plan.plan import Plan, PlanFlags, as_dict, make_plan
from llava.train.plan.remedy import NOTHING, Fit

_GIB = 2**30
_PARTS = {  # of memory, in words
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "buffers": "communication buffers",
    "working_copies": "weights cast or gathered",
    "activations": "activations",
    "recomputed": "one layer recomputed",
    "logits": "logits and loss",
    "step": "optimizer step's temporaries",
}
_FLOPS = {
    "language_model": "language model",
    "adapters": "adapters",
    "attention": "attention, quadratic part",
    "output_layer": "output layer",
    "projector": "projector",
    "vision_tower": "vision tower, forward",
    "recomputed": "recomputed for checkpointing",
}


def print_plan(arguments: Arguments, own: PlanFlags) -> None:
    """Make the plan of a run and print it to stdout."""
    plan = make_plan(arguments, own)
    if own.as_json:
        json.dump(as_dict(plan), sys.stdout, indent=2)
        print()
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for title, rows, note in (
        ("Run", _run_rows(plan, arguments), plan.notes["steps"]),
        ("Samples", _sample_rows(plan), plan.notes["tokens"]),
        ("Memory of each GPU", _memory_rows(plan), plan.notes["memory"]),
    ):
        _print_section(console, title, rows, note)
    _print_gpus(console, plan)
    _print_section(console, "Computation", _flops_rows(plan), plan.notes["flops"])
    _print_section(console, "Disk", _disk_rows(plan), plan.notes["disk"])


def _print_section(console: Console, title: str, rows: list[tuple[str, ...]], note: str) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=28)
    table.add_column(justify="right", min_width=14)
    table.add_column()
    for name, value, *more in rows:
        table.add_row(f"  {name}", value, *more)
    console.print(f"[bold]{title}[/bold]")
    console.print(table)
    console.print(f"  [dim]{note}[/dim]\n")


def _run_rows(plan: Plan, arguments: Arguments) -> list[tuple[str, ...]]:
    setup, steps, model = plan.setup, plan.steps, plan.model
    precision = str(arguments.training.compute_dtype).removeprefix("torch.")
    zero = f"ZeRO-{setup.zero_stage}" if setup.zero_stage else "no DeepSpeed"
    offload = " with offload" if setup.offload_optimizer or setup.offload_parameters else ""
    shape = f"{setup.batch_size} x {setup.accumulation} accumulated x {setup.world_size} GPUs"
    trained = ", ".join(f"{part} {n:,}" for part, n in model.trained.items() if n)
    checkpointing = ", gradient checkpointing" if setup.checkpointing else ""
    return [
        ("model", f"{model.n_parameters:,}", f"parameters ({arguments.model.model_name_or_path})"),
        ("trained", f"{model.n_trained:,}", f"{plan.stage}: {trained}"),
        ("computed in", precision, f"{zero}{offload}{checkpointing}"),
        ("global batch", f"{steps.global_batch:,}", shape),
        ("steps an epoch", f"{steps.per_epoch:,}"),
        (
            "steps in all",
            f"{steps.total:,}",
            f"{steps.epochs:.3g} epoch" + "s" * (steps.epochs != 1),
        ),
    ]


def _sample_rows(plan: Plan) -> list[tuple[str, ...]]:
    steps, lengths = plan.steps, plan.lengths
    n_text = steps.n_samples - steps.n_with_image
    spread = ", ".join(f"{name} {n:,}" for name, n in lengths.percentiles.items())
    with_grouping, without = lengths.padding_share_grouped, lengths.padding_share_random
    return [
        ("samples", f"{steps.n_samples:,}", f"{steps.n_with_image:,} with image, {n_text:,} text"),
        ("tokens a sample", f"{lengths.mean:,.1f}", spread),
        ("tokens of the run", _short(plan.tokens), f"{round(plan.tokens):,}"),
        ("supervised", f"{lengths.supervised_share:.1%}", "of the tokens"),
        ("truncated", f"{lengths.truncated_share:.1%}", "of the samples"),
        (
            "padding",
            f"{lengths.padding_share:.1%}",
            f"of the positions; {with_grouping:.1%} with --group_by_modality_length, "
            f"{without:.1%} in random order",
        ),
    ]


def _memory_rows(plan: Plan) -> list[tuple[str, ...]]:
    setup, largest, values = plan.setup, plan.largest, vars(plan.memory)
    rows = [(name, _gib(values[key])) for key, name in _PARTS.items() if values[key]]
    shape = f"{largest.n_rows} rows of {largest.length} positions"
    rows.append(("[bold]peak[/bold]", f"[bold]{_gib(plan.memory.peak)}[/bold]", shape))
    if plan.memory.host:
        total = plan.memory.host * setup.world_size
        rows.append(("on the host", _gib(plan.memory.host), f"per GPU, {_gib(total)} in all"))
    return rows


def _print_gpus(console: Console, plan: Plan) -> None:
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for title, justify in (("GPU", "left"), ("usable", "right"), ("needed", "right")):
        table.add_column(title, justify=justify)
    table.add_column("hours", justify="right")
    table.add_column("fits", no_wrap=False)
    for fit in plan.fits:
        table.add_row(
            fit.device,
            _gib(fit.usable),
            _gib(fit.peak),
            _hours(plan.hours[fit.device]),
            _answer(fit),
        )
    console.print(f"[bold]{plan.setup.world_size} GPUs of one kind[/bold]")
    console.print(table)
    console.print(f"  [dim]{plan.notes['gpus']}[/dim]\n")


def _answer(found: Fit) -> str:
    if found.fits:
        answer = "yes"
        if found.advice:
            answer = f"yes, but {_gib(found.worst)} if all rows are of maximum length; for those:"
    else:
        answer = "[red]no[/red]; with:" if found.advice != NOTHING else "[red]no[/red]:"
    needs_fp16 = "" if found.computes else " (has no bf16: --fp16 True instead)"
    return f"{answer} {found.advice}".strip() + needs_fp16


def _flops_rows(plan: Plan) -> list[tuple[str, ...]]:
    values, total = vars(plan.flops), plan.flops.total
    rows = [
        (name, _short(values[key]), f"{values[key] / total:.1%}")
        for key, name in _FLOPS.items()
        if values[key]
    ]
    return [*rows, ("[bold]in all[/bold]", f"[bold]{_short(total)}[/bold]", "FLOPs of the run")]


def _disk_rows(plan: Plan) -> list[tuple[str, ...]]:
    disk = plan.disk
    rows = [("final model", _gib(disk.final))]
    if disk.n_checkpoints:
        what = f"{_gib(disk.model)} the model, {_gib(disk.resume)} to go on from it"
        rows.append(("a checkpoint", _gib(disk.checkpoint), what))
        rows.append(("checkpoints kept", f"{disk.n_checkpoints:,}"))
    return [*rows, ("[bold]at most[/bold]", f"[bold]{_gib(disk.total)}[/bold]")]


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / _GIB:,.1f} GiB" if n_bytes >= _GIB else f"{n_bytes / 2**20:,.1f} MiB"


def _short(number: float) -> str:
    """Three digits and a power of ten that has a name."""
    for power, name in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "K")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {name}"
    return f"{number:.3g}"


def _hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 0.1 else f"{math.ceil(value * 60)} min"
