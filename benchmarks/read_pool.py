"""Opening a LLaVA pool against `json.load`: time and peak memory, on a synthetic mix665k.

    python benchmarks/read_pool.py [--records 665298] [--repeats 3]

Writes a file of about 1.0 GB (as the real one) into a temporary folder and reads it in turn with
both, each time in a fresh process, file cache warm. `Pool.open` does more than `json.load`: it
also checks every record and computes sha256, uids and sources. Times are without imports; memory
is the process's peak and includes them (torch comes with the record checks), and counts the pages
of the mapped file. Two minutes; needs 6 GB of memory for `json.load`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# source: share of the mixture, image folder (None: text only), questions a record (from, to),
# words of an answer (from, to)
MIXTURE = {
    "llava_instruct": (0.24, "coco/train2017", (1, 5), (10, 130)),
    "vqav2": (0.14, "coco/train2017", (2, 12), (1, 3)),
    "aokvqa": (0.10, "coco/train2017", (1, 2), (1, 1)),
    "refcoco": (0.07, "coco/train2017", (3, 14), (3, 8)),
    "gqa": (0.11, "gqa/images", (8, 20), (1, 2)),
    "ocr_vqa": (0.12, "ocr_vqa/images", (3, 6), (2, 8)),
    "textcaps": (0.03, "textvqa/train_images", (1, 1), (10, 20)),
    "vg": (0.13, "vg/VG_100K", (6, 18), (3, 8)),
    "sharegpt": (0.06, None, (1, 10), (50, 300)),
}


def write_pool(path: Path, n_records: int) -> None:
    """A JSON list of `n_records` records, seeded, one a line."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5000)]
    shares = [entry[0] for entry in MIXTURE.values()]
    with path.open("w", encoding="utf-8") as file:
        for i, kind in enumerate(rng.choices(list(MIXTURE.values()), shares, k=n_records)):
            file.write("[\n" if i == 0 else ",\n")
            file.write(json.dumps(make_record(i, kind, words, rng)))
        file.write("\n]\n")


def make_record(i: int, kind: tuple, words: list[str], rng: random.Random) -> dict:
    """One record of a source of MIXTURE."""
    _, folder, n_questions, n_words = kind
    turns = []
    for question in range(rng.randint(*n_questions)):
        text = " ".join(rng.choices(words, k=9)) + "?"
        image = "<image>\n" if folder and question == 0 else ""
        answer = " ".join(rng.choices(words, k=rng.randint(*n_words)))
        turns += [{"from": "human", "value": image + text}, {"from": "gpt", "value": answer}]
    record = {"id": f"{i:012d}" if i % 3 else i, "conversations": turns}
    return {**record, "image": f"{folder}/{i:012d}.jpg"} if folder else {**record, "model": ""}


def measure(reader: str, path: str) -> None:
    """Read once in this process; print seconds, CPU seconds and peak bytes as JSON."""
    if reader == "pool":
        from selection.pool.pool import Pool
    begun, begun_cpu = time.perf_counter(), time.process_time()
    if reader == "pool":
        content = Pool.open(path)
    else:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"n": len(content), "seconds": seconds, "cpu": cpu, "peak": peak}))


def run(reader: str, path: Path) -> dict:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", reader, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def compare(path: Path, repeats: int) -> None:
    """Print the best of `repeats` of both readers, taken in turn, and their ratios."""
    results = {"json.load": [], "pool": []}
    for _ in range(repeats):
        for reader, found in results.items():
            found.append(run(reader, path))
    best = {
        reader: {key: min(result[key] for result in found) for key in found[0]}
        for reader, found in results.items()
    }
    print(f"{best['pool']['n']} records, {path.stat().st_size / 1e9:.2f} GB, best of {repeats}")
    print(f"{'':10} {'seconds':>8} {'CPU s':>8} {'peak GB':>8}")
    for reader, row in best.items():
        print(f"{reader:10} {row['seconds']:8.2f} {row['cpu']:8.2f} {row['peak'] / 1e9:8.2f}")
    time_ratio = best["json.load"]["seconds"] / best["pool"]["seconds"]
    cpu_ratio = best["json.load"]["cpu"] / best["pool"]["cpu"]
    memory_ratio = best["pool"]["peak"] / best["json.load"]["peak"]
    print(f"pool is {time_ratio:.2f} times as fast ({cpu_ratio:.2f} in CPU time; target 1.5)")
    print(f"and needs {memory_ratio:.2f} of the memory (target below 0.5)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=665_298, help="records of the file")
    parser.add_argument("--repeats", type=int, default=3, help="readings with each reader")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.json"
        write_pool(path, args.records)
        compare(path, args.repeats)


if __name__ == "__main__":
    main()
