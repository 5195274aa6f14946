"""What is computed does not depend on how many processes compute it, nor on their folders. Real
processes, gloo, the toy's model."""

import os
import subprocess
import sys
import time
from functools import cache
from itertools import chain
from multiprocessing import get_context

import pytest
import torch

import train
from helpers import ROOT, assert_rounds_to, exact_gradient
from model import all_gather, load_pretrained, rank_and_world
from paper.report import read_rows
from rpt import next_token_step, rpt_step
from test_rpt import GRADIENT, METHOD, descent

RPT = ("--eval-questions 0 --steps 3 --save-every 1 --lr 0.002 --questions 7 "
       "--group-size 4 --max-response 40 --max-rows 10 --grad-clip 1e9 --device cpu "
       "--dynamic-from 1").split()  # step 0 is usual RPT
NTP = "--stage ntp --steps 2 --questions 9 --grad-clip 1e9 --device cpu".split()


def record_steps(file, options):
    """Run train.main and write to `file` the weights before each step, the gradient that the
    optimizer saw, and what was learned from."""
    steps, stage = [], rpt_step if "ntp" not in options else next_token_step

    def whole(tensors):
        return {name: getattr(x, "full_tensor", lambda: x)().clone() for name, x in tensors}

    def one_step(policy, optimizer, draw, step, *how):
        named, gradient = list(policy.model.named_parameters()), {}
        note = optimizer.register_step_pre_hook(
            lambda *_: gradient.update(whole((name, p.grad) for name, p in named)))
        weights = whole((name, p.detach()) for name, p in named)
        groups, metrics = stage(policy, optimizer, draw, step, *how)
        note.remove()
        kept = sorted(chain(*all_gather([g for g in groups if g.kept])), key=lambda g: g.number)
        steps.append((weights, gradient, kept or draw(step, 0)))
        if rank_and_world()[0] == 0:
            torch.save(steps, file)
        return groups, metrics

    train.main(options, one_step=one_step)


def toy_options(out):
    """The toy's options with a run's folder and, beside it, entropies and a short corpus."""
    corpus = out.parent / "corpus.jsonl"
    lines = (ROOT / "toy/corpus.jsonl").read_text().splitlines(keepends=True)
    corpus.write_text("".join(lines[:400]))
    return (f"--recipe toy --corpus {corpus} --holdout 40 --cache {out.parent}/cache "
            f"--out {out}").split()


def told(rank):
    """What torchrun tells one of two processes."""
    return {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": f"{20000 + os.getpid() % 9999}"}


def take_part(environment, function, arguments):
    os.environ.update(environment)
    function(*arguments)


def start(function, *arguments):
    """Call a function in two processes; returns these."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["train"])  # what both import is imported once
    parts = [context.Process(target=take_part, args=(told(n), function, arguments), daemon=True)
             for n in range(2)]
    for part in parts:
        part.start()
    return parts


def ends(parts):
    """Wait for the processes; returns how they ended."""
    for part in parts:
        part.join(240)
    return [part.exitcode for part in parts]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A function that makes a run, but only once, and returns its folder, which has steps.pt."""
    @cache
    def once(processes, *options):
        out = tmp_path_factory.mktemp("run")
        how = out / "steps.pt", [*options, *toy_options(out)]
        if processes == 1:  # this one
            record_steps(*how)
        else:
            assert ends(start(record_steps, *how)) == [0, 0]
        return out
    return once


@pytest.mark.parametrize("options", [RPT, NTP, [*RPT, "--dtype", "bfloat16"]])
def test_two_processes_compute_what_one_does(options, recorded, toy):
    """Both step by the float64 gradient of plain forwards, each from its own weights.

    A gradient in bfloat16 errs by a few of its own, larger roundings, because sums are float32.
    """
    model = load_pretrained(toy / "base")
    allowed = GRADIENT if "bfloat16" not in options else 2**16 * GRADIENT / 8
    one, two = recorded(1, *options), recorded(2, *options)
    for out in (one, two):
        for (weights, gradient, learned), row in zip(
                torch.load(out / "steps.pt", weights_only=False), read_rows(out / "metrics.jsonl"),
                strict=True):
            model.load_state_dict(weights)
            if "ntp" in options:
                tokens = sum(len(ids) - first for ids, first in learned)
                rows, temperature = [(ids[:first], ids[first:], [-1 / tokens] * len(ids[first:]))
                                     for ids, first in learned], 1.0
            else:
                rows, temperature = descent(model, learned, METHOD)[0], METHOD.temperature
            assert row["trained_tokens"] == sum(len(ids) for _, ids, _ in rows)
            exact, scale = exact_gradient(model, rows, temperature)
            for name in exact:
                assert_rounds_to(gradient[name], exact[name], allowed, scale[name])
    if "bfloat16" not in options:
        assert (one / "rollouts.jsonl").read_text() == (two / "rollouts.jsonl").read_text()


def test_a_killed_process_loses_nothing(recorded):
    whole = recorded(2, *RPT)
    out = whole.parent / "cut"  # with the same entropies
    how = train.main, [*RPT, *toy_options(out)]
    parts = start(*how)
    while parts[1].is_alive() and not list(out.glob("checkpoints/step-*")):
        time.sleep(0.01)
    parts[1].kill()
    assert all(ends(parts))  # the other one fails at once
    assert ends(start(*how)) == [0, 0]
    wanted, again = read_rows(whole / "metrics.jsonl"), read_rows(out / "metrics.jsonl")
    for row in wanted + again:
        row.pop("seconds")
    assert again == wanted
    for name in ("rollouts.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_processes_that_do_not_share_a_folder_are_told_so_before_any_work(tmp_path):
    """Two folders stand in for two machines' own disks."""
    started = []
    for rank in range(2):
        (tmp_path / f"{rank}").mkdir()
        command = [sys.executable, ROOT / "train.py", *RPT, "--out", "run"]
        started.append(subprocess.Popen(command, cwd=tmp_path / f"{rank}", text=True,
                                        env=os.environ | told(rank), stderr=subprocess.PIPE))
    said = [process.communicate(timeout=200)[1] for process in started]
    assert all(process.returncode for process in started)
    assert all("--out run: the processes see different folders" in text for text in said), said
    assert not (tmp_path / "0/run/metrics.jsonl").exists()
