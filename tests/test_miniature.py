"""The miniature's bookkeeping without its runs; what FLOPs and a plan count."""

import importlib.util
import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers import ROOT, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Tokenizer
from model import ModelConfig
from paper import flops, miniature, plan


def test_every_command_is_one_that_train_understands():
    for line in miniature.RUNS.values():
        module, *words = line.split()
        assert importlib.util.find_spec(module)
        run = train.parse([*words, "--seed", "0", "--out", "here"])
        assert run.holdout == (0 if run.stage == "rlvr" or "lessons" in line else 500)
    for line in miniature.EXAMS.values():
        train.parse(f"--model m --steps 0 {miniature.ASKED} {line}".split())


def test_every_part_is_built_after_what_it_needs():
    built = set()
    for names in miniature.ORDER:
        for name in names:
            needs = set(re.findall("@/([a-z-]+)/model", miniature.RUNS.get(name, "")))
            assert needs | ({"rpt"} if name in miniature.CONTROLS else set()) <= built
        built |= set(names)
    assert built == {"base", *miniature.RUNS}


def test_controls_take_the_compute_of_rpt_and_what_is_finished_is_not_done_again(
        tmp_path, monkeypatch):
    said = []

    def command(folder, line):
        said.append(line)
        if line.startswith("eval"):
            (folder / "sft" / "part").mkdir(parents=True)
    monkeypatch.setattr(miniature, "command", command)
    monkeypatch.setattr(miniature, "spend", lambda folder: np.full(
        *((10, 300.0) if folder.name == "rpt" else (2, 10.0))))
    for _ in range(2):
        miniature.match_compute(tmp_path, "sft")
        (tmp_path / "sft" / "metrics.jsonl").touch()
    steps = [int(line.split()[-1]) for line in said if line.startswith("train")]
    assert steps == [2, *(round(300 * share) for share in miniature.SHARES)] and len(said) == 9


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # qwen3: 4 heads of 12 are not 32 channels
def test_a_forward_pass_takes_the_operations_that_torch_counts(family):
    model, tokens = tiny(family), 10
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.logits(model(torch.zeros(1, tokens, dtype=torch.long)))
    # what is masked is computed there, so each token attends to all
    assert flops.forward(model.config, tokens, tokens) == counter.get_total_flops()


def test_a_run_takes_the_operations_of_each_token_it_samples_and_trains(toy, tmp_path):
    config = json.loads((toy / "base" / "config.json").read_text())
    (tmp_path / "c.txt").write_text(text := "The ball is under A.")

    def run_that(**options):
        run = train.Run(model=str(toy / "base"), corpus=str(tmp_path / "c.txt"), **options)
        (tmp_path / "run.json").write_text(json.dumps(asdict(run)))
        return flops.spend(tmp_path)

    def texts(*lengths, prompt=0):  # half of its own column counts for a token
        return sum(flops.forward(ModelConfig.from_dict(config), 1, prompt + n + 0.5)
                   for length in lengths for n in range(length))

    row = {"step": 1, "prompt_tokens": 7, "tokens": [3, 5], "rewards": [0, 1], "kept": True}
    rows = [row, row | {"kept": False}, row | {"rewards": [1, 1]}, row | {"step": 0}]
    (tmp_path / "metrics.jsonl").write_text("{}\n" * 2)
    trained = texts(len(Tokenizer(toy / "base").encode(text)) + 1)  # and the end token
    assert run_that(stage="ntp", holdout=0, questions=3) == pytest.approx([9 * trained] * 2)
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    once = texts(7) + texts(3, 5, prompt=7)
    assert run_that(updates=2) == pytest.approx([7 * once, 9 * once])


def test_the_plan_counts_the_bytes_of_the_shards(capsys):
    def planned(options):
        model = ROOT / "paper/configs/r1-distill-qwen-14b"
        plan.main(["--recipe", "paper", "--model", str(model), *options.split()])
        return capsys.readouterr().out

    said = planned("")
    assert "master weights 7.4" in said and "rollout weights 29.5" in said  # 14.77 billion / 8
    tokens = re.search(r"--cache-tokens \d+ (?=makes)", said)[0]
    assert "DOES NOT FIT" not in planned(tokens)
    for too_little in ("--processes 1 --memory 192", "--memory 62"):  # for one group's cache
        assert "leave no room" in planned(too_little)
    assert " of 0 tokens" not in planned("--max-rows 4")
