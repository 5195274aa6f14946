"""What is computed does not depend on how many processes compute it, nor on their deaths. Real processes, gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("worker.py")
TIMEOUT = 240  # seconds; a deadlock is a failure, not a wait


def torchrun(processes, *arguments, restarts=0, check=True):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               "--max-restarts", str(restarts), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = process.communicate(timeout=TIMEOUT)
    finally:
        process.terminate()  # torchrun, if it hangs, passes it on to its children
    done = subprocess.CompletedProcess(command, process.returncode, *said)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    folder, done = tmp_path_factory.mktemp("steps"), {}

    def run(*how):  # processes, tokens of a micro-batch, processes that share one copy of the weights (0: all)
        if how not in done:
            out = folder / f"{len(done)}.pt"
            torchrun(how[0], WORKER, "steps", out, *how[1:])
            done[how] = torch.load(out, weights_only=False)
        return done[how]

    return run


@pytest.mark.parametrize("processes, micro_tokens, group", [(2, 10**6, 0), (3, 10**6, 0), (4, 10**6, 2), (1, 300, 0),
                                                            (2, 150, 0)])
def test_processes_shards_and_micro_batches_change_nothing(three_steps, processes, micro_tokens, group):
    """Rollouts are equal token by token; metrics, gradient norms and weights after three steps within rounding."""
    one, many = three_steps(1, 10**6, 0), three_steps(processes, micro_tokens, group)
    assert one["rollouts"] == many["rollouts"] and any(step for step in one["rollouts"])
    for a, b in zip(one["metrics"], many["metrics"]):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key
    assert any(m["informative"] > 0 for m in one["metrics"])
    for name, weight in one["weights"].items():  # AdamW's first steps divide by |gradient|: rounding is 1e-3 of a step
        torch.testing.assert_close(weight, many["weights"][name], rtol=1e-4, atol=2e-5)


# ---- train.py: killed, restarted, resharded

ARGUMENTS = ["--steps", "4", "--questions", "6", "--group-size", "4", "--max-response", "40", "--holdout", "40",
             "--save-every", "1", "--keep", "2", "--select", "0.3", "--lr", "0.002"]


def arguments(toy, out, *more):
    return ["--model", toy / "base" / "model", "--corpus", toy / "corpus.jsonl", "--out", out, *ARGUMENTS, *more]


def results(out):
    """Everything a run leaves but its times: metrics, rollouts, weights."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        row.pop("time")
    (file,) = (out / "model").rglob("*.safetensors")  # one file, and no parts left over
    return metrics, (out / "rollouts.jsonl").read_text(), load_file(file)


def assert_bitwise(a, b):
    assert a[0] == b[0] and a[1] == b[1]
    assert a[2].keys() == b[2].keys() and all(torch.equal(a[2][name], b[2][name]) for name in a[2])


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    torchrun(2, WORKER, "crash", "rollout", 0, 0, out.parent / "never", *arguments(toy, out))
    metrics, rollouts, _ = results(out)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3] and sum(row["informative"] for row in metrics) > 0
    assert len(rollouts.splitlines()) == 4 * 6 * 4
    return out


@pytest.mark.parametrize("where, call", [
    ("rollout", 3), ("training", 1), ("writing", 2), ("renaming", 4), ("logging", 5)])
def test_a_killed_process_loses_nothing(toy, undisturbed, tmp_path, where, call):
    """One of two processes is killed with SIGKILL; torchrun starts both again; nothing tells the run from the other."""
    rank = 0 if where in ("renaming", "logging") else 1
    torchrun(2, WORKER, "crash", where, call, rank, tmp_path / "killed", *arguments(toy, tmp_path / "run"), restarts=1)
    assert (tmp_path / "killed").exists()
    assert_bitwise(results(undisturbed), results(tmp_path / "run"))


def test_a_process_out_of_memory_says_what_to_lower_and_the_same_command_goes_on(toy, undisturbed, tmp_path):
    run = (WORKER, "crash", "memory", 1, 1, tmp_path / "once", *arguments(toy, tmp_path / "run"))
    failed = torchrun(2, *run, check=False)
    assert failed.returncode and "out of memory (Tried to allocate 8 GiB): lower --micro-tokens" in failed.stderr
    torchrun(2, *run)
    assert_bitwise(results(undisturbed), results(tmp_path / "run"))


@pytest.mark.parametrize("processes", [1, 3])
def test_a_checkpoint_of_two_processes_resumes_on_others(toy, undisturbed, tmp_path, processes):
    out = tmp_path / "run"
    never = (WORKER, "crash", "rollout", 0, 0, tmp_path / "never")
    torchrun(2, *never, *arguments(toy, out, "--steps", "2"))
    torchrun(processes, *never, *arguments(toy, out))
    want, got = results(undisturbed), results(out)
    for a, b in zip(want[0], got[0]):
        for key in ("reward", "length", "informative", "loss"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-3, abs=1e-5)
    for name in want[2]:
        torch.testing.assert_close(want[2][name], got[2][name], rtol=1e-3, atol=1e-4)
