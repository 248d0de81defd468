"""All forward signals against the way released code gets them, and against a plain forward.

    python benchmarks/forward_signals.py [--quick] [--repeats 5]

    naive     eager attention, output_attentions=True, output_hidden_states=True and labels given,
              in one call, one sample at a time
    released  the same in two runs, as ARDS's scripts do it: one for the states, one for the loss
    plain     one forward of the decoder that returns its last states and nothing else
    signals   selection.signals.forward: last and attention-weighted state, mean state, answer loss,
              EL2N and AUM, of 60 answer tokens
    union     these and selection.signals.attention_means (five layers), in one pass

Random Llama of 12 layers x 1024 (--quick: 6 x 512), float32, one thread. Time is process CPU time,
the five in turn in one process, the smallest of the repeats; memory is the peak above the weights,
a fresh process each. Targets: naive / signals at least 1.5 (700 tokens) and 2 (1500) in time and 8
in memory, signals / plain at most 1.1 and union / signals at most 1.15 in time. Five minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava.records import Record
from llava.tokens import IGNORE_INDEX
from llava.vlm.base import Prepared, Vlm
from selection.signals.attention_means import Blocks
from selection.signals.forward import Forward

LENGTHS = (700, 1500)
N_ANSWER = 60
VOCABULARY = 32000


def make_model(quick: bool) -> LlamaForCausalLM:
    width, layers = (512, 6) if quick else (1024, 12)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def make_sample(length: int) -> Prepared:
    ids = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(length))
    labels = ids.clone()
    labels[:-N_ANSWER] = IGNORE_INDEX
    return Prepared(ids, labels)


class TextVlm(Vlm):
    """A language model; a record is the bytes of what is said in it."""

    def prepare(self, record: Record, image: None) -> Prepared:
        ids = torch.tensor(list(str(record.turns).encode()))
        return Prepared(ids, ids)


def make_calls(model: LlamaForCausalLM, length: int) -> dict[str, Callable[[], object]]:
    """Functions that run each variant once on one sample."""
    sample = make_sample(length)
    ids, labels = sample.input_ids[None], sample.labels[None]
    proxy = TextVlm(model, "random", 0, 4096)
    ours = model.config._attn_implementation

    def under(attention: str, labels: torch.Tensor | None, internals: bool) -> None:
        model.set_attn_implementation(attention)
        model(
            ids,
            labels=labels,
            output_attentions=internals,
            output_hidden_states=internals,
            use_cache=False,
        )
        model.set_attn_implementation(ours)

    def released() -> None:
        under("eager", None, True)
        under("sdpa", labels, False)

    return {
        "naive": lambda: under("eager", labels, True),
        "released": released,
        "plain": lambda: model.model(ids, use_cache=False),
        "signals": lambda: Forward().compute(proxy, [sample]),
        "union": lambda: Forward.compute_together([Forward(), Blocks()], proxy, [sample]),
    }


def seconds(model: LlamaForCausalLM, length: int, repeats: int) -> dict[str, float]:
    """Smallest CPU time of each variant, seconds; the variants take turns."""
    calls = make_calls(model, length)
    best = dict.fromkeys(calls, float("inf"))
    calls["plain"]()
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - started)
    return best


def peak(model: LlamaForCausalLM, length: int, variant: str) -> int:
    """Bytes of memory that one call takes above what the process held before."""
    make_calls(model, 64)["plain"]()  # libraries get their own buffers here
    call = make_calls(model, length)[variant]
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    call()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def report(length: int, quick: bool, repeats: int) -> None:
    found = seconds(make_model(quick), length, repeats)
    memory = {}
    for variant in found:
        command = [sys.executable, *sys.argv, "--peak", variant, str(length)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        memory[variant] = int(out.splitlines()[-1])
        print(f"{length:6}  {variant:8} {found[variant]:6.2f}   {memory[variant] / 2**20:8.0f}")
    print(
        f"{length:6}  naive / signals: time {found['naive'] / found['signals']:.2f}, memory "
        f"{memory['naive'] / memory['signals']:.1f};  released / signals: time "
        f"{found['released'] / found['signals']:.2f};  signals / plain: time "
        f"{found['signals'] / found['plain']:.2f};  union / signals: time "
        f"{found['union'] / found['signals']:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a model of a tenth of the size")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        if arguments.peak:
            variant, length = arguments.peak
            print(peak(make_model(arguments.quick), int(length), variant))
            return
        print("tokens  variant   CPU s   MiB above weights")
        for length in LENGTHS:
            report(length, arguments.quick, arguments.repeats)


if __name__ == "__main__":
    main()
