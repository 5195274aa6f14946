"""What is computed does not depend on how many processes compute it, nor on their folders. Real
processes, gloo, the toy's model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT
from model import load_pretrained

RPT = ("--holdout 40 --eval-questions 0 --steps 3 --save-every 1 --lr 0.002 --questions 7 "
       "--group-size 4 --max-response 40 --max-rows 10 --device cpu").split()
# Ratios of two float32 sums over the same numbers in other orders: at most a few thousand terms.
CLOSE = 2**-23 * 1000


def launch(processes: int, out: Path, *options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               processes, ROOT / "train.py", "--out", out, "--cache", out.parent / "cache", *options]
    return subprocess.Popen(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(processes: int, out: Path, *options) -> list[dict]:
    process = launch(processes, out, *options)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-2000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", [RPT, [*RPT, "--dynamic-from", "1"],
                                     "--recipe toy --stage ntp --steps 2 --questions 9".split()])
def test_two_processes_compute_what_one_does(options, tmp_path):
    one, two = (run(n, tmp_path / str(n), *options) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "nll", "entropy", "grad_norm", "trained_tokens"):
            if name in a:
                scale = max(1.0, abs(a[name]))
                assert abs(a[name] - b[name]) <= CLOSE * scale, name
    assert (tmp_path / "1/rollouts.jsonl").read_text() == (tmp_path / "2/rollouts.jsonl").read_text()
    whole, joined = (load_pretrained(tmp_path / n / "model").state_dict() for n in ("1", "2"))
    for name, weight in whole.items():  # AdamW moves a weight by at most lr a step
        assert weight.shape == joined[name].shape
    apart = torch.cat([(whole[n] - joined[n]).abs().flatten() for n in whole])
    assert (apart > 2e-4).float().mean() < 1e-3


def test_a_killed_process_loses_nothing(tmp_path):
    wanted = run(2, tmp_path / "whole", *RPT)
    out = tmp_path / "cut"
    process = launch(2, out, *RPT)
    while process.poll() is None:
        if list(out.glob("checkpoints/step-*")):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            break
    process.communicate(timeout=240)
    again = run(2, out, *RPT)
    for row in wanted + again:
        row.pop("seconds")
    assert again == wanted
    for name in ("rollouts.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_processes_that_do_not_share_a_folder_are_told_so_before_any_work(tmp_path):
    """Two folders stand in for two machines' own disks."""
    started = []
    for rank in range(2):
        (tmp_path / f"{rank}").mkdir()
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2",
                                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29671",
                                    "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "train.py"), *RPT, "--out", "run"]
        started.append(subprocess.Popen(command, cwd=tmp_path / f"{rank}", env=environment,
                                        stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=200)[1] for process in started]
    assert all(process.returncode for process in started)
    assert all("--out run: the processes see different folders" in text for text in said), said
    assert not (tmp_path / "0/run/metrics.jsonl").exists()
