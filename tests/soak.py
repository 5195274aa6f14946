"""Kills a run with SIGKILL at random moments, restarts it with the same command, and compares what
it leaves with the undisturbed run: metrics without times, rollouts, evaluations, weights.

    python tests/soak.py --processes 2 --kills 30   a random one is killed; torchrun ends the other

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("processes", 1), ("kills", 30), ("steps", 40), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
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
