"""What is computed does not depend on how many processes compute it, nor on their deaths. Real
processes, gloo, the toy's model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import assert_rounds_to, assert_same_completions, exact_gradient, exact_logprobs
from model import load_pretrained
from test_train import checkpoints, results

WORKER = Path(__file__).with_name("worker.py")
TIMEOUT = 240  # seconds; a deadlock is a failure, not a wait
# Roundings of the largest sum of absolute gradients: they pass through the model's layers and sums
# over its channels and the step's tokens. Below 20 were seen.
GRADIENT = 96
ROUNDED = {"loss", "nll", "entropy", "logprob_diff", "logprob_diff_max", "grad_norm"}


def torchrun(processes, *arguments, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               processes, "--max-restarts", restarts, WORKER, *arguments]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.terminate()  # torchrun, if it hangs, passes it on to its children
    assert process.returncode == 0, out[-3000:] + err[-3000:]


def arguments(out, *more):
    """From the third step on without replacement of what is not informative."""
    return ["--out", out, "--cache", out.parents[1] / "cache", "--eval-questions", 0, "--holdout",
            40, "--steps", 4, "--save-every", 1, "--keep", 4, "--lr", 0.002, "--questions", 7,
            "--group-size", 4, "--max-response", 40, "--max-rows", 10, "--grad-clip", 0.5,
            "--dynamic-from", 2, "--max-refills", 3, *more]


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    """A run of two processes, and what it recorded."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    torchrun(2, f"{out}.pt", "", "", *arguments(out))
    metrics, rollouts, *_ = results(out)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert all(row["informative"] > 0 for row in metrics) and rollouts.count("\n") > 4 * 7 * 4
    return out


@pytest.mark.parametrize("where", ["training:1:1", "writing:2:1", "renaming:4:0"])
def test_a_killed_process_loses_nothing(undisturbed, tmp_path, where):
    """One of two processes is killed with SIGKILL; torchrun starts both again; nothing tells the
    run from the other."""
    out = tmp_path / "run"
    torchrun(2, f"{out}.pt", "", where, *arguments(out), restarts=1)
    assert Path(f"{out}.pt.killed").exists()
    assert results(undisturbed) == results(out)


@pytest.mark.parametrize("processes, more", [
    (1, ["--micro-tokens", 150]), (3, []), (4, ["--shard-group", 2])])
def test_other_processes_shards_and_slices_go_on_with_it(toy, undisturbed, tmp_path, processes,
                                                         more):
    """From the checkpoint of the first step. Each step begins with equal weights and samples the
    same; log-probabilities are within what rounding does, the gradient is within a few epsilons of
    what it adds up."""
    out = shutil.copytree(undisturbed, tmp_path / "run")
    for step in (2, 3, 4):
        shutil.rmtree(checkpoints(out)[step])
    torchrun(processes, f"{out}.pt", f"{undisturbed}.pt", "", *arguments(out, *more))
    one, many = (torch.load(f"{folder}.pt", weights_only=False) for folder in (undisturbed, out))
    logged, relogged = results(undisturbed), results(out)
    assert sorted(many) == [1, 2, 3] and logged[1] == relogged[1]
    for name, weights in one[1]["weights"].items():  # as the checkpoint has them
        assert torch.equal(weights, many[1]["weights"][name])
    model = load_pretrained(toy / "base")
    for step, b in many.items():
        a = one[step]
        model.load_state_dict(a["weights"])
        assert a["groups"] == b["groups"] and a["sampled"].keys() == b["sampled"].keys()
        keys = sorted(a["sampled"])
        said = ([run["sampled"][key][1] for key in keys] for run in (a, b))
        prompts = [a["sampled"][key][0] for key in keys]
        assert_same_completions(model, prompts, *said, temperature=0.8, seed=0, keys=keys)
        rows = logged[0][step], relogged[0][step]
        check_step(model, a, rows[0])
        check_step(model, b, rows[1])
        assert rows[0].keys() == rows[1].keys()
        for key in rows[0].keys() - ROUNDED:  # sums of less than 64 float64 numbers, or equal
            assert rows[0][key] == pytest.approx(rows[1][key], rel=64 * 2**-52), key
        if step < 3:
            assert_moved_alike(a["weights"], one[step + 1]["weights"], many[step + 1]["weights"])


def check_step(model, done, metrics):
    """What a step measured and its gradient are those of plain forwards in float64 of what it was
    given."""
    total = sum(len(c.ids) for _, _, completions, *_ in done["groups"] for c in completions)
    texts = [(prompt, c.ids, a) for _, prompt, completions, rewards, advantages in done["groups"]
             for c, a in zip(completions, advantages) if len(set(rewards)) > 1]
    rows = [(prompt, ids, [-a / total] * len(ids)) for prompt, ids, a in texts]
    wanted, scale = exact_gradient(model, rows, 0.8)
    norm = sum((g ** 2).sum() for g in wanted.values()).sqrt().item()
    clipped = min(1, 0.5 / (norm + 1e-6))
    for name, exact in wanted.items():
        assert_rounds_to(done["gradient"][name], clipped * exact, GRADIENT, clipped * scale[name])
    largest = max(scale.values()).item()
    assert abs(metrics["grad_norm"] - norm) <= GRADIENT * 2**-23 * largest
    # the ratio is 1, so the loss is a sum of -advantage / total; of float32 numbers, by slice
    exact_loss = sum(-a * len(ids) for _, ids, a in texts) / total
    added = sum(abs(a) * len(ids) for _, ids, a in texts) / total
    assert abs(metrics["loss"] - exact_loss) <= 2**-23 * added * len(texts)
    exact, allowed = exact_logprobs(model, [(p, ids) for p, ids, _ in texts], 0.8)
    assert 0 < metrics["logprob_diff"] <= metrics["logprob_diff_max"] <= 2 * allowed  # of either
    entropies = torch.cat([-(logprobs.exp() * logprobs).sum(-1) for logprobs in exact])
    # log-probabilities off by d move an entropy by less than d (1 + entropy)
    assert abs(metrics["entropy"] - entropies.mean()) <= allowed * (1 + entropies.max())
    assert metrics["trained_tokens"] == len(entropies)


def assert_moved_alike(before, one, many):
    """AdamW moves a weight by about lr whatever its gradient's size, so only where the gradient is
    itself hardly more than rounding may two runs move it differently. Without its moments it would
    move nearly all by more than this."""
    moved, apart = (torch.cat([(one[name] - w[name]).abs().flatten() for name in one])
                    for w in (before, many))
    assert (moved > 2e-4).float().mean() > 0.5 and (apart > 2e-4).float().mean() < 1e-3
