"""Kills a run with SIGKILL at random moments, restarts it with the same command, and compares with the undisturbed run.

    python tests/soak.py --processes 1 --kills 30
    python tests/soak.py --processes 2 --kills 30        a random process of the two is killed; torchrun ends the other

Prints one line a kill, and at the end what is equal: metrics (without times), rollouts, weights. Exit status 1 if not.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from helpers import ROOT, weak_base


def command(processes: int, folder: Path, out: Path, steps: int) -> list[str]:
    launch = (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
              if processes > 1 else [])
    return [sys.executable, *launch, str(ROOT / "train.py"), "--model", str(folder / "base" / "model"), "--corpus",
            str(folder / "corpus.jsonl"), "--out", str(out), "--steps", str(steps), "--questions", "6",
            "--group-size", "4", "--max-response", "40", "--holdout", "40", "--select", "0.3", "--save-every", "2",
            "--lr", "0.002"]


def workers(pid: int) -> list[int]:
    """The training processes: the children of torchrun, or the process itself."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] or [pid]


def results(out: Path) -> tuple:
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        row.pop("time")
    return metrics, (out / "rollouts.jsonl").read_text(), load_file(next((out / "model").glob("*.safetensors")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, chance = Path(tempfile.mkdtemp()), random.Random(args.seed)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    os.environ["OMP_NUM_THREADS"] = "1"
    weak_base(folder)
    begin = time.time()
    subprocess.run(command(args.processes, folder, folder / "undisturbed", args.steps), check=True, **quiet)
    whole, kills = time.time() - begin, 0
    print(f"undisturbed: {args.steps} steps in {whole:.0f} s")
    while True:
        run = subprocess.Popen(command(args.processes, folder, folder / "killed", args.steps), **quiet)
        patience = chance.uniform(0.2, 0.6) * whole if kills < args.kills else None
        try:
            if run.wait(patience) == 0:
                break
            print(f"ended by itself with status {run.returncode}")
        except subprocess.TimeoutExpired:
            os.kill(chance.choice(workers(run.pid)), signal.SIGKILL)
            run.wait()
            kills += 1
            log = folder / "killed" / "metrics.jsonl"
            logged = len(log.read_text().splitlines()) if log.exists() else 0
            print(f"kill {kills} after {patience:.1f} s, {logged} steps logged")
    a, b = results(folder / "undisturbed"), results(folder / "killed")
    same = {"metrics": a[0] == b[0], "rollouts": a[1] == b[1],
            "weights": all(torch.equal(a[2][n], b[2][n]) for n in a[2]),
            "every step once": [row["step"] for row in b[0]] == list(range(args.steps))}
    print(f"{args.processes} processes, {kills} kills: "
          + ", ".join(f"{k} {'equal' if v else 'DIFFERENT'}" for k, v in same.items()))
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
