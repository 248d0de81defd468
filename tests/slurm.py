"""SLURM on one machine, for the tests: `srun` and `scontrol` in a folder for PATH.

What a real 22.05 was seen to do: `srun` runs the command once a node, hands USR1 on to every
process of the step (loader processes included), and ends with its tasks' highest exit code.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

SRUN = """
import os, signal, subprocess, sys
import psutil

words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
tasks = [
    subprocess.Popen(words, env={**os.environ, "SLURM_NODEID": str(node)})
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
]

def forward(number, frame):
    for process in psutil.Process().children(recursive=True):
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            pass

signal.signal(signal.SIGUSR1, forward)
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
import os, sys
from pathlib import Path

if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost")
else:
    with Path(__file__).with_name("scontrol.log").open("a") as log:
        print(*sys.argv[1:], file=log)
"""


def install(folder: Path, nodes: int, job: int = 7) -> dict[str, str]:
    """Write the commands into `folder`; what SLURM puts into the environment of a batch script."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = folder / name
        path.write_text(f"#!{sys.executable}{text}")
        path.chmod(0o755)
    return {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
        "SLURM_GPUS_ON_NODE": "1",
    }
