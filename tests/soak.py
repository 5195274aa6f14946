"""Kills a run with SIGKILL at random moments, restarts it with the same command, and compares with
the undisturbed run.

    python tests/soak.py --processes 1 --kills 30
    python tests/soak.py --processes 2 --kills 30   a random one is killed; torchrun ends the other
    python tests/soak.py --memory                   no kills: resident memory over 500 steps

Prints one line a kill, and at the end what is equal: metrics (without times), rollouts, weights.
Exit status 1 if not.
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

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def command(processes: int, out: Path, steps: int) -> list[str]:
    launch = (["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
              if processes > 1 else [])
    return [sys.executable, *launch, str(ROOT / "train.py"), "--out", str(out), "--steps",
            str(steps), "--questions", "6", "--group-size", "4", "--max-response", "40",
            "--eval-questions", "20", "--save-every", "2", "--lr", "0.002"]


def workers(pid: int) -> list[int]:
    """The training processes: the children of torchrun, or the process itself."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] or [pid]


def results(out: Path) -> tuple:
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        row.pop("time")
    (weights,) = (out / "model").glob("*.safetensors")
    return metrics, (out / "rollouts.jsonl").read_text(), load_file(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(memory(Path(folder)) if args.memory else soak(args, Path(folder)))


def soak(args: argparse.Namespace, folder: Path) -> int:
    """Kills until there were enough kills, run after run; 1 if any run differs from the
    undisturbed one."""
    chance, begin = random.Random(args.seed), time.time()
    subprocess.run(command(args.processes, folder / "undisturbed", args.steps), check=True, **QUIET)
    whole, kills, runs, different = time.time() - begin, 0, 0, 0
    print(f"undisturbed: {args.steps} steps in {whole:.0f} s", flush=True)
    while kills < args.kills:
        out, done, here = folder / f"run{runs}", False, 0
        while not done:
            run = subprocess.Popen(command(args.processes, out, args.steps), **QUIET)
            try:
                run.wait(chance.uniform(0.1, 0.9) * whole if kills < args.kills else None)
                done = run.returncode == 0
            except subprocess.TimeoutExpired:
                os.kill(chance.choice(workers(run.pid)), signal.SIGKILL)
                run.wait()
                kills, here = kills + 1, here + 1
        runs += 1
        different += not alike(f"run {runs}, killed {here} times", args.steps,
                               results(folder / "undisturbed"), results(out))
    print(f"{args.processes} processes: {kills} kills in {runs} runs, "
          f"{runs - different} of them bitwise the undisturbed one")
    return int(different > 0)


def alike(title: str, steps: int, a: tuple, b: tuple) -> bool:
    """Prints what two runs have in common; whether it is everything."""
    same = {"metrics": a[0] == b[0], "rollouts": a[1] == b[1],
            "weights": all(torch.equal(a[2][name], b[2][name]) for name in a[2]),
            "every step once": [row["step"] for row in b[0]] == list(range(steps))}
    verdict = [f"{what} {'equal' if equal else 'DIFFERENT'}" for what, equal in same.items()]
    print(f"{title}: {', '.join(verdict)}", flush=True)
    return all(same.values())


def memory(folder: Path) -> int:
    """Resident memory of the trainer along 500 steps."""
    run = subprocess.Popen(command(1, folder / "long", 500), **QUIET)
    log, seen = folder / "long" / "metrics.jsonl", 0
    while run.poll() is None:
        time.sleep(0.1)
        steps = len(log.read_text().splitlines()) if log.exists() else 0
        if steps >= seen + 100:
            seen = steps // 100 * 100
            status = Path(f"/proc/{run.pid}/status").read_text()
            resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
            print(f"step {steps}: {resident:.1f} MiB resident", flush=True)
    return run.returncode


if __name__ == "__main__":
    main()
