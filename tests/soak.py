"""Kill a run with SIGKILL at random moments, start it again with the same command, and compare what
it leaves with a run that nobody disturbed: logs without times, and the exported model.

    python tests/soak.py --processes 2 --kills 30   kills a random process; torchrun ends the other
    python tests/soak.py --memory                   shows the trainer's resident memory in 500 steps

Prints one line a run. The exit status is 1 if any run differs.
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


def start(processes: int, steps: int, out: Path) -> subprocess.Popen:
    """Start a run under torchrun."""
    command = (f"-m torch.distributed.run --standalone --nproc-per-node {processes} "
               f"{ROOT}/train.py --out {out} --steps {steps} --questions 6 --group-size 4 "
               "--max-response 40 --eval-questions 20 --save-every 2 --lr 0.002")
    return subprocess.Popen([sys.executable, *command.split()], stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def children(pid: int) -> list[int]:
    """Return the processes that torchrun has started."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def show_memory(folder: Path) -> None:
    """Print the resident memory of the trainer after each 100 steps."""
    run, log, seen = start(1, 500, folder), folder / "metrics.jsonl", 0
    while run.poll() is None:
        time.sleep(0.1)
        steps = len(log.read_text().splitlines()) if log.exists() else 0
        if steps >= seen + 100:
            seen = steps
            for pid in children(run.pid):
                resident = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]
                print(f"step {steps}: {int(resident) / 1024:.1f} MiB resident")


def survive(out: Path, processes: int, steps: int, chance: random.Random, whole: float) -> int:
    """Start a run until it is done, killing it at random moments; returns the number of kills."""
    kills = 0
    while True:
        run = start(processes, steps, out)
        try:
            if run.wait(chance.uniform(0.1, 0.9) * whole) == 0:
                return kills
        except subprocess.TimeoutExpired:
            os.kill(chance.choice(children(run.pid) or [run.pid]), signal.SIGKILL)
            run.wait()
            kills += 1


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser()
    for name, default in (("processes", 1), ("kills", 30), ("steps", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            return show_memory(Path(folder))
        chance, begin, kills, different = random.Random(0), time.time(), 0, 0
        undisturbed = Path(folder, "undisturbed")
        start(args.processes, args.steps, undisturbed).wait()
        whole = time.time() - begin
        while kills < args.kills:
            out = Path(folder, f"after{kills}")
            more = survive(out, args.processes, args.steps, chance, whole)
            kills, same = kills + more, results(out) == results(undisturbed)
            different += not same
            print(f"killed {more} times: {'equal' if same else 'DIFFERENT'}")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
