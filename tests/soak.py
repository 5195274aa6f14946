"""Kills a run with SIGKILL at random moments, restarts it with the same command, and compares what
it leaves with the undisturbed run: metrics without times, rollouts, evaluations, weights.

    python tests/soak.py --processes 2 --kills 30   a random one is killed; torchrun ends the other
    python tests/soak.py --memory                   resident memory of the trainer along 500 steps

Prints one line a run. Exit status 1 if any differs.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from test_train import results  # noqa: E402

RUN = ("--questions 6 --group-size 4 --max-response 40 --eval-questions 20 --save-every 2 "
       "--lr 0.002 --steps").split()


def start(processes: int, steps: int, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               processes, ROOT / "train.py", "--out", out, *RUN, steps]
    return subprocess.Popen(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_one(torchrun: subprocess.Popen, chance: random.Random) -> None:
    """A training process: torchrun's child; itself if there is none yet."""
    pid = torchrun.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(chance.choice(children or [pid])), signal.SIGKILL)
    torchrun.wait()


def memory() -> None:
    """Prints the resident memory of the trainer after each 100 steps."""
    with tempfile.TemporaryDirectory() as folder:
        run, log, seen = start(1, 500, Path(folder)), Path(folder, "metrics.jsonl"), 0
        while run.poll() is None:
            time.sleep(0.1)
            steps = len(log.read_text().splitlines()) if log.exists() else 0
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            if steps >= seen + 100 and children:
                seen = steps // 100 * 100
                status = Path(f"/proc/{children[0]}/status").read_text()
                resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
                print(f"step {steps}: {resident:.1f} MiB resident", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("processes", 1), ("kills", 30), ("steps", 40), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    if args.memory:
        return memory()
    chance, begin, kills, different = random.Random(args.seed), time.time(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Path(folder, "undisturbed")
        start(args.processes, args.steps, undisturbed).wait()
        whole = time.time() - begin
        while kills < args.kills:
            out, before, done = Path(folder, f"after{kills}"), kills, False
            while not done:
                run = start(args.processes, args.steps, out)
                try:
                    done = run.wait(chance.uniform(0.1, 0.9) * whole) == 0
                except subprocess.TimeoutExpired:
                    kill_one(run, chance)
                    kills += 1
            same = results(out) == results(undisturbed)
            different += not same
            print(f"killed {kills - before} times: {'equal' if same else 'DIFFERENT'}", flush=True)
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
