"""What one wants to see at two in the morning: how far, how fast, how well, until when."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from llava.train import zero


class Meter:
    """Samples and tokens of all processes: since the last report, and since `start`."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin to count."""
        self.began = self.reported = time.monotonic()
        self.samples = self.tokens = 0
        self._samples = self._tokens = 0

    def add(self, samples: int, tokens: int) -> None:
        """Count one step's samples and positions; padding is no position."""
        self.samples += samples
        self.tokens += tokens

    def rates(self) -> dict[str, float]:
        """Per second since the last call."""
        now = time.monotonic()
        seconds = max(now - self.reported, 1e-9)
        rates = {
            "tokens_per_second": (self.tokens - self._tokens) / seconds,
            "samples_per_second": (self.samples - self._samples) / seconds,
        }
        self.reported, self._samples, self._tokens = now, self.samples, self.tokens
        return {name: round(rate, 3) for name, rate in rates.items()}

    @property
    def seconds(self) -> float:
        """Since `start`."""
        return max(time.monotonic() - self.began, 1e-9)


class Progress(TrainerCallback):
    """A bar on a terminal, else one line every `logging_steps`; a summary before and after."""

    def __init__(self, bar: bool, meter: Meter, n_samples: int) -> None:
        self.show_bar, self.meter, self.n_samples = bar, meter, n_samples
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.start()
        self.first = state.global_step
        if not state.is_world_process_zero:
            return
        for line in summary(args, state, kwargs["model"], self.n_samples):
            self._say(line)
        if self.show_bar:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self._say(
                f"step {state.global_step}/{state.max_steps}  held-out loss "
                f"{logs['eval_loss']:.4f}, mean of {logs['eval_tokens']:,} tokens"
            )
        if "loss" not in logs:
            return
        text = (
            f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  "
            f"grad {logs.get('grad_norm', float('nan')):.3f}  "
            f"{logs['tokens_per_second']:,.0f} tokens/s"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            self._say(
                f"step {state.global_step}/{state.max_steps}  {text}  "
                f"{logs['samples_per_second']:.1f} samples/s  {self._left(state)} left"
            )

    def _left(self, state: Any) -> timedelta:
        each = self.meter.seconds / max(state.global_step - self.first, 1)
        return _hours(each * (state.max_steps - state.global_step))

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        print(line, file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if state.is_world_process_zero and state.global_step > self.first:
            meter = self.meter
            self._say(
                f"{state.global_step - self.first} steps in {_hours(meter.seconds)}: "
                f"{meter.tokens / meter.seconds:,.0f} tokens/s, "
                f"{meter.samples / meter.seconds:.1f} samples/s"
            )


def summary(args: Any, state: Any, model: Any, n_samples: int) -> list[str]:
    """What is about to run, in three lines."""
    batch, parts, world = (
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.world_size,
    )
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    stage = f", ZeRO-{zero.stage(args)}" if zero.enabled(args) else ""
    lines = [
        f"{n_samples:,} samples, {state.max_steps:,} steps of {batch * parts * world} = {batch} "
        f"samples x {parts} accumulated x {world} processes",
        f"{trained:,} of {sum(size for size, _ in sizes):,} parameters are trained, "
        f"{args.compute_dtype} on {args.device.type}{stage}".replace("torch.", ""),
    ]
    if state.global_step:
        lines.append(f"goes on after step {state.global_step} of {state.max_steps}")
    return lines


def _hours(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))
