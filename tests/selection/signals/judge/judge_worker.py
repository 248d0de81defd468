"""One run of the judge, for test_judge.py: `judge_worker.py POOL STORE URL [AGAIN]`."""

from __future__ import annotations

import sys

import numpy as np

from llava.launch import process
from selection.extract.loop import extract_signal
from selection.pool.pool import Pool
from selection.settings import PoolSettings, ProxySettings
from selection.signals.judge.judge import Judge

path, store, url, *again = sys.argv[1:]


def main() -> None:
    pool = Pool.open(path)
    signal = Judge(
        judge_url=url,
        judge_cache=f"{store}/judge.sqlite",
        judge_concurrency=3,
        judge_again=again[0] if again else "nothing",
    )
    proxy = ProxySettings(store=store, device="cpu", block_size=5)
    extract_signal(signal, np.arange(len(pool)), pool, PoolSettings(path), proxy)


process(main)
