"""What every command gives, as digests: recorded before a refactoring, compared after it.

    python benchmarks/same_results.py record before.json --clone /path/to/clone
    python benchmarks/same_results.py compare before.json after.json

Selects from the small world (`--limit 3000`, target tasks whole) with all methods and with every
preset, with the methods that train something of their own, trains 20 steps in four ways and asks
the proxy the questions of four benchmarks. The clone must have its environment and its small world
with proxy and CLIP. A command that is recorded already is not run again. The same processor gives
the same digests; another one may not (docs/Reliability.md, P5).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

WORLD = "playground/mini"
POOL = ["--pool", f"{WORLD}/pool.json", "--images", f"{WORLD}/images", "--limit", "3000"]
PROXY = ["--model", f"{WORLD}/proxy"]
TARGETS = ["--targets", f"{WORLD}/targets/targets.yaml"]
BUDGET = ["--budget", "0.2"]
SELECT = ["-m", "selection", "select"]
OUT = "outputs/same"
LAUNCHED = ("random", "ards", "mllm_selector", "icons", "less", "tive", "rds", "coido", "rho_loss")
TRAINED = {
    "lora_zero2": ("finetune_lora.sh", {}),
    "full_zero2": ("finetune_7b.sh", {}),
    "lora_alone": ("finetune_lora.sh", {"NPROC": "1", "ZERO": "none"}),
    "full_bf16": ("finetune_7b.sh", {"NPROC": "1", "ZERO": "none", "BF16": "True"}),
}


def stages() -> dict[str, tuple[list[str], dict[str, str], str]]:
    """Name of every stage: its command, its environment and the folder it writes."""
    found = {}
    all_flags = ["--limit", "3000", *BUDGET, "--out", f"{OUT}/all"]
    found["all"] = (["bash", "selection.sh", "all", *all_flags], {}, f"{OUT}/all")
    for method in LAUNCHED:
        out = f"{OUT}/launched-{method}"
        flags = [method, "--limit", "3000", *BUDGET, "--out", out]
        found[f"launched {method}"] = (["bash", "selection.sh", *flags], {}, out)
    presets = {
        "ards": ["--config", "mini/ards.yaml"],
        "d2_pruning": [],
        "icons": TARGETS,
        "tive": [],
    }
    for method, own in presets.items():
        for dtype in ("float32", "bfloat16"):
            out = f"{OUT}/preset-{method}-{dtype}"
            flags = [*own, *POOL, *PROXY, *BUDGET, "--preset", "as_released", "--dtype", dtype]
            command = ["PYTHON", *SELECT, method, *flags, "--out", out]
            found[f"preset {method} {dtype}"] = (command, {}, out)
    for name, (launcher, environment) in TRAINED.items():
        out, environment = f"{OUT}/train-{name}", dict(environment)
        flags = ["--max_steps", "20", "--bf16", environment.pop("BF16", "False")]
        environment |= {"DATA": f"{WORLD}/pool.json", "OUTPUT": out}
        found[f"train {name}"] = (["bash", launcher, *flags], environment, out)
    for benchmark in ("sqa", "mmbench", "pope", "textvqa"):
        out = f"{OUT}/eval-{benchmark}"
        environment = {"MODEL": f"{WORLD}/proxy", "OUTPUT": out}
        command = ["bash", f"scripts/v1_5/eval/{benchmark}.sh", "--limit", "40"]
        found[f"eval {benchmark}"] = (command, environment, out)
    return found


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every result in a folder; of score tables that of their columns."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "scores.parquet":
            table = pq.read_table(path)
            for column in ("uid", "source", "score", "rank", "chosen"):
                values = json.dumps(table[column].to_pylist()).encode()
                found[f"{name}:{column}"] = hashlib.sha256(values).hexdigest()
        elif path.name == "answers.jsonl":  # its answer ids are random
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            kept = [{k: v for k, v in line.items() if k != "answer_id"} for line in lines]
            found[name] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
        elif path.name in RESULTS or (path.suffix in (".npy", ".safetensors") and not _aside(path)):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


RESULTS = ("subset.json", "subset_rows.txt", "attacks.jsonl", "bad_samples.jsonl")


def _aside(path: Path) -> bool:
    return any(part.startswith(("checkpoint-", "store")) for part in path.parts)


def record(file: Path, clone: Path, only: list[str]) -> None:
    """Run what is not recorded yet."""
    python = str(clone / ".venv/bin/python")
    known = json.loads(file.read_text()) if file.exists() else {}
    for name, (command, environment, out) in stages().items():
        if name in known or (only and not any(word in name for word in only)):
            continue
        started = time.monotonic()
        words = [python if word == "PYTHON" else word for word in command]
        run = subprocess.run(
            words,
            cwd=clone,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
            capture_output=True,
            text=True,
        )
        if run.returncode:
            print(f"{name}: exit {run.returncode}\n{run.stderr[-3000:]}", file=sys.stderr)
            continue
        known[name] = digests(clone / out)
        file.write_text(json.dumps(known, indent=1))
        print(f"{name}: {len(known[name])} results, {time.monotonic() - started:.0f} s", flush=True)


def compare(before: Path, after: Path) -> int:
    """Print what differs; how many stages do."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    n_different = 0
    for name in [*old, *(name for name in new if name not in old)]:
        a, b = old.get(name), new.get(name)
        if a is None or b is None:
            print(f"{name}: only {'after' if a is None else 'before'}")
            n_different += 1
            continue
        different = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
        n_different += bool(different)
        print(f"{name}: {len(a)} results, {', '.join(different) or 'all equal'}")
    return n_different


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=["record", "compare"])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--clone", type=Path, default=Path.cwd())
    parser.add_argument("--only", nargs="*", default=[], help="words of the stages to run")
    given = parser.parse_args()
    if given.verb == "record":
        record(given.files[0].resolve(), given.clone.resolve(), given.only)
    else:
        sys.exit(compare(*given.files) != 0)


if __name__ == "__main__":
    main()
