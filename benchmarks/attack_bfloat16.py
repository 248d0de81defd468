"""How often bfloat16 changes an answer under attack: against float32, and with the batch.

    python benchmarks/attack_bfloat16.py [--model DIR] [--data DIR] [--items 100]

The first questions of a SEED-Bench (default: the small world's and its warmed-up model), all orders
of their options under A.. and Q.., greedy answers. A pair of ways to compute them differs in
`answers` (of all, each a question in one order) and in `items` (whether every order is right).

    whole    shared engine, all orders of a question in one batch
    single   shared engine, one order a batch
    naive    naive engine
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from llava.eval.engine import open_engine
from llava.eval.pictures import Pictures
from llava.eval.question import LETTERS, SYMBOLS, Ask, orders
from llava.eval.tasks import find_task
from llava.eval.tasks.base import Item
from llava.vlm import load_vlm

WAYS = {
    "whole": ("shared", {}),
    "single": ("shared", {"max_tokens": 1}),
    "naive": ("naive", {}),
}
PAIRS = (
    ("float32 whole", "float32 naive"),
    ("bfloat16 whole", "float32 whole"),
    ("bfloat16 whole", "bfloat16 single"),
    ("bfloat16 whole", "bfloat16 naive"),
)


def answers(way: str, model: Path, items: list[Item], pictures: Pictures) -> list[np.ndarray]:
    """Positions read from the exact answers, -1 for none: (2, O) for each item."""
    dtype, name = way.split()
    engine, settings = WAYS[name]
    opened = open_engine(engine, load_vlm(model, dtype=dtype), max_new_tokens=8, **settings)
    found = []
    for item in items:
        n = len(item.question.options)
        asks = [
            Ask(item.question.render(order, symbols), symbols[:n])
            for symbols in (LETTERS, SYMBOLS["qwer"])
            for order in orders(n, str(item.id))
        ]
        replies = opened.item(pictures.open(item), asks).reply(asks)
        read = [
            a.symbols.find(r.text) if len(r.text) == 1 else -1
            for a, r in zip(asks, replies, strict=True)
        ]
        found.append(np.array(read).reshape(2, -1))
    return found


def worst(item: Item, chosen: np.ndarray) -> np.ndarray:
    """Whether every order is right, under either set of symbols, (2,)."""
    shown = np.array(orders(len(item.question.options), str(item.id)))
    return ((shown == item.gold).argmax(1) == chosen).all(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("playground/mini/proxy"))
    parser.add_argument("--data", type=Path, default=Path("playground/mini/eval/seed_bench"))
    parser.add_argument("--items", type=int, default=100)
    args = parser.parse_args()
    items = find_task("seed").read(args.data)[: args.items]
    pictures = Pictures(args.data)
    found = {}
    for way in dict.fromkeys(way for pair in PAIRS for way in pair):
        found[way] = answers(way, args.model, items, pictures)
    n_answers = sum(chosen.size for chosen in found[PAIRS[0][0]])
    print(f"{len(items)} questions, {n_answers:,} answers")
    print(f"{'':34}{'answers':>9}{'items':>8}   that differ, %")
    for a, b in PAIRS:
        changed = sum(int((x != y).sum()) for x, y in zip(found[a], found[b], strict=True))
        pairs = zip(items, found[a], found[b], strict=True)
        n_items = sum(int((worst(i, x) != worst(i, y)).sum()) for i, x, y in pairs)
        share = 100 * changed / n_answers, 50 * n_items / len(items)
        print(f"{a:>16} / {b:15}{share[0]:9.2f}{share[1]:8.2f}")


if __name__ == "__main__":
    main()
