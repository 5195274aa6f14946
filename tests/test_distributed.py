"""What is computed does not depend on how many processes compute it, nor on their deaths. Real processes, gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import (assert_rounds_to, assert_same_completions, exact_gradient, exact_logprobs,
                     tiny)
from model import load_pretrained

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
    """Three steps of one process."""
    out = tmp_path_factory.mktemp("steps") / "one.pt"
    torchrun(1, WORKER, "steps", out, 10**6, 0)
    return out


def policy_of(weights):
    """The worker's model with other weights."""
    vocabulary = len(weights["model.embed_tokens.weight"])
    model = tiny(vocab_size=vocabulary, tie_word_embeddings=True)
    model.load_state_dict(weights)
    return model


# micro_tokens: of one pass; group: processes that share one copy of the weights (0: all)
@pytest.mark.parametrize("processes, micro_tokens, group", [(2, 10**6, 0), (3, 10**6, 0), (4, 10**6, 2), (1, 300, 0),
                                                            (2, 150, 0)])
def test_processes_shards_and_micro_batches_change_nothing(three_steps, tmp_path, processes, micro_tokens, group):
    """Each step from bitwise equal weights: the same completions, rewards and counts; log-probabilities within what
    rounding does, the gradient within a few epsilons of what it adds up."""
    torchrun(processes, WORKER, "steps", tmp_path / "many.pt", micro_tokens, group, three_steps)
    one, many = (torch.load(file, weights_only=False) for file in (three_steps, tmp_path / "many.pt"))
    for step, (a, b) in enumerate(zip(one[:3], many[:3])):
        assert all(torch.equal(weight, b["weights"][name]) for name, weight in a["weights"].items())
        model, keys = policy_of(a["weights"]), sorted(a["sampled"])
        assert keys == sorted(b["sampled"]) and len(keys) >= 7
        prompts = [a["sampled"][key][0] for key in keys]
        assert prompts == [b["sampled"][key][0] for key in keys]
        assert_same_completions(model, prompts, *([run["sampled"][key][1] for key in keys] for run in (a, b)),
                                temperature=0.8, seed=3, keys=keys)
        assert a["groups"] == b["groups"] and a["groups"]  # b was given a's completions: from here on the same work
        check_step(model, a)
        check_step(model, b)
        # what is no rounding is equal
        rounded = {"loss", "entropy", "logprob_diff", "logprob_diff_max", "grad_norm"}
        assert a["metrics"].keys() == b["metrics"].keys() and a["metrics"]["informative"] > 0
        for key in a["metrics"].keys() - rounded - {"flops"}:
            assert a["metrics"][key] == b["metrics"][key], key
        assert_rounds_to(b["metrics"]["flops"], a["metrics"]["flops"], 32)  # at most so many groups, summed in float64
    for name, weight in one[3]["weights"].items():  # three steps of lr 0.001, and they were taken
        assert not torch.equal(weight, one[0]["weights"][name])


GRADIENT = 128  # roundings of the largest sum of absolute gradients of a parameter; 24 were seen


def check_step(model, done):
    """What a step measured and its gradient are those of plain forwards in float64 of what it was given."""
    metrics = done["metrics"]
    informative = [g for g in done["groups"] if len(set(g[3])) > 1]
    total = sum(len(c.ids) for _, _, completions, *_ in done["groups"] for c in completions)
    texts = [(prompt, c.ids, a) for _, prompt, completions, _, advantages in informative
             for c, a in zip(completions, advantages)]
    wanted, scale = exact_gradient(model, [(p, ids, [-a / total] * len(ids)) for p, ids, a in texts], 0.8)
    norm = sum((g ** 2).sum() for g in wanted.values()).sqrt().item()
    clipped = min(1, 0.5 / (norm + 1e-6))
    for name, exact in wanted.items():
        assert_rounds_to(done["gradient"][name], clipped * exact, GRADIENT, clipped * scale[name])
    largest = max(scale.values()).item()
    assert abs(metrics["grad_norm"] - norm) <= GRADIENT * 2**-23 * largest
    # the ratio is 1, so the loss is a sum of -advantage / total; of float32 numbers, by batch
    exact_loss = sum(-a * len(ids) for _, ids, a in texts) / total
    added = sum(abs(a) * len(ids) for _, ids, a in texts) / total
    assert abs(metrics["loss"] - exact_loss) <= 2**-23 * added * len(texts)
    exact, allowed = exact_logprobs(model, [(p, ids) for p, ids, _ in texts], 0.8)
    assert 0 < metrics["logprob_diff"] <= metrics["logprob_diff_max"] <= 2 * allowed  # the sampler's, the trainer's
    entropies = torch.cat([-(logprobs.exp() * logprobs).sum(-1) for logprobs in exact])
    # log-probabilities off by d move an entropy by less than d (1 + entropy)
    assert abs(metrics["entropy"] - entropies.mean()) <= allowed * (1 + entropies.max())
    assert metrics["trained_tokens"] == len(entropies)


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
def test_a_checkpoint_of_two_processes_resumes_on_others(toy, tmp_path, processes):
    """Weights come back bitwise, and a step from there, on the same completions, differs by rounding."""
    out, again, sampled = tmp_path / "run", tmp_path / "again", tmp_path / "sampled"
    torchrun(2, WORKER, "replay", sampled, *arguments(toy, out, "--steps", "3"))  # without a stop
    (tmp_path / "sampled.out").rename(sampled)
    torchrun(2, WORKER, "replay", sampled, *arguments(toy, again, "--steps", "2"))
    before = results(again)
    (again / "model").rename(tmp_path / "before")
    torchrun(processes, WORKER, "replay", sampled, *arguments(toy, again, "--steps", "2"))  # nothing is left to do
    assert_bitwise(before, results(again))
    torchrun(processes, WORKER, "replay", sampled, *arguments(toy, again, "--steps", "3"))

    model = load_pretrained(tmp_path / "before")
    ours, theirs = torch.load(sampled, weights_only=False), torch.load(f"{sampled}.out", weights_only=False)
    keys = [2 << 40 | n for n in range(6)]  # of the third step
    assert sorted(theirs) == keys
    prompts, groups = zip(*(ours[key] for key in keys))
    assert_same_completions(model, prompts, groups, [theirs[key][1] for key in keys], 0.8, 0, keys)

    want, got = results(out), results(again)
    assert want[1] == got[1] and want[0][:2] == got[0][:2]
    a, b = want[0][2], got[0][2]
    assert a.keys() == b.keys() and a["informative"] > 0
    for key in a.keys() - {"loss", "entropy", "logprob_diff", "logprob_diff_max", "grad_norm", "flops"}:
        assert a[key] == b[key], key
    moved = torch.cat([(want[2][name] - weight).abs().flatten() for name, weight in model.state_dict().items()])
    apart = torch.cat([(want[2][name] - got[2][name]).abs().flatten() for name in want[2]])
    # AdamW moves a weight by about lr whatever its gradient's size, so only where the gradient is itself hardly more
    # than rounding may two runs move it differently. Without its moments it would move nearly all by more than this.
    assert (moved > 0.002 / 10).float().mean() > 0.5 and (apart > 0.002 / 10).float().mean() < 1e-3
