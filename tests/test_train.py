"""train.py as a user meets it: the first command, resuming, signals, full disks, the stages,
arguments."""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from datetime import date
from pathlib import Path
from zlib import crc32

import pytest
import torch
import torch.distributed as dist

import model
import rpt
import train
from data import Tokenizer, load_corpus
from helpers import ROOT, assert_rounds_to, exact_gradient, tiny
from model import load_pretrained
from rpt import Method, Policy

SMALL = ("--steps 3 --questions 5 --group-size 4 --max-response 40 --holdout 40 --save-every 1 "
         "--eval-questions 6 ")


@pytest.fixture(scope="module")
def world(toy, tmp_path_factory):
    """The beginning of the toy's files, and a cache of entropies."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("corpus.jsonl", "answers.jsonl"):
        lines = (toy / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:200]))
    return folder


@pytest.fixture(scope="module")
def command(world):
    """Arguments of a small run on the small world."""
    def arguments(out, options=""):
        paths = f"--out {out} --cache {world} --recipe toy --corpus {world}/corpus.jsonl --answers="
        return f"{paths} {SMALL} {options}".split()
    return arguments


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train.main(command(out))
    return out


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def finished(whole, out):
    """A copy of the whole run."""
    return shutil.copytree(whole, out)


@pytest.fixture(autouse=True)
def leave_nothing_behind():
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if dist.is_initialized():
        dist.destroy_process_group()


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def results(out):
    """Everything that a run leaves except its times."""
    logs = [rows(out / name) for name in train.LOGS]
    for row in logs[0]:
        row.pop("seconds", None)
    return logs, {file.name: file.read_bytes() for file in (out / "model").iterdir()}


def checkpoints(out):
    return [int(place.name[5:]) for place in sorted(out.glob("checkpoints/step-*"))]


def coin(responses, *_):
    """A reward that any model can earn, for half of all responses."""
    return [float(crc32(response) % 2) for response in responses]


def step_that(act):
    """rpt_step, before which act(step, policy, optimizer) may return another reward."""
    def one_step(policy, optimizer, draw, step, method, reward, seed):
        reward = act(step, policy, optimizer) or reward
        return rpt.rpt_step(policy, optimizer, draw, step, method, reward, seed)
    return one_step


def ending(arguments, **how):
    """The exit code or sentence that ends a run."""
    try:
        train.main(arguments, **how)
    except SystemExit as stop:
        return stop.code


def refusal(*arguments, **how):
    """The one sentence that ends a run."""
    said = ending(*arguments, **how)
    assert said.startswith("train.py: error: ") and "\n" not in said
    return said


# ---- the first command


def test_the_first_command_leaves_its_table_logs_and_model(toy, out, capsys):
    train.main([*SMALL.split(), f"--out={out}", f"--cache={out.parent.parent}/cache"])
    said = capsys.readouterr().out
    for words in ("held-out in %", "answers in %", "choices in %", "step 0, standard",
                  "step 3, reasoning", "step 0, a rollout:", "step 2, a rollout:"):
        assert words in said
    metrics, rollouts, evals, records = (rows(out / name) for name in train.LOGS)
    assert [row["step"] for row in metrics] == [0, 1, 2] and metrics[0]["informative"]
    assert len(rollouts) == 3 * 5 and all(row["kept"] for row in rollouts)
    for row in rollouts:
        for response, said, ended, reward in zip(*(row[name] for name in (
                "responses", "predictions", "finished", "rewards"))):
            boxed, closed, _ = response.rpartition("\\boxed{")[2].partition("}")
            assert said == (boxed if closed and ended else None)
            assert reward == bool(said and row["truth"].startswith(said))
    for exam, split in (("held-out", "easy"), ("answers", "all"), ("choices", "all")):
        assert [(row["step"], row[exam][split]["questions"]) for row in evals] == [(0, 6), (3, 6)]
    assert len(records) == 2 * 3 * 6
    pairs = zip(*(load_pretrained(folder).parameters() for folder in (out / "model", toy / "base")))
    assert all(not torch.equal(p, q) for p, q in pairs)


def test_training_asks_its_region_and_evaluations_a_random_part_of_what_is_held_out(
        toy, world, command, out):
    corpus = load_corpus(world / "corpus.jsonl", Tokenizer(toy / "base"), 40, 0, 256)
    for region in ("solution", "all"):
        train.main(command(out / region, f"--region {region} --steps 1 --questions 60 "
                                         "--max-response 1"))
        asked, examined = (rows(out / region / name) for name in train.LOGS[1::2])
        assert not any(corpus.held[row["document"]] for row in asked)
        inside = [row["position"] >= corpus.given[row["document"]] for row in asked]
        assert all(inside) == (region == "solution") and any(inside)
        held, chosen = corpus.held.nonzero()[0], {row["document"] for row in examined}
        assert chosen <= set(held) and not chosen <= set(held[:20])


def test_metrics_are_of_everything_that_was_drawn():
    """A right, an unreadable, a half right and an unfinished response; and a group that was
    replaced."""
    records = [{"rewards": rewards, "predictions": ["A", None, "A", None], "tokens": [1, 2, 3, 4],
                "finished": [True, True, True, False], "entropy": 1.0}
               for rewards in ([1.0, 0.0, 0.5, 0.0], [0.0] * 4)]
    assert train.rollout_metrics(records) == pytest.approx({
        "reward": 1.5 / 8, "reasoning": 1.5 / 8, "length": 2.5, "finished": 3 / 4, "parsed": 1 / 2,
        "majority vote": 1 / 2, "pass@4": 1 / 2}, rel=1e-15)


# ---- going on

DEADLY = """
import os, sys, train
import torch.distributed.checkpoint as dcp
owner, name, call, *arguments = sys.argv[1:]
owner, calls = globals()[owner], []
original = getattr(owner, name)
def deadly(*args, **how):
    calls.append(original(*args, **how))
    if len(calls) == int(call):
        os.kill(os.getpid(), 9)
setattr(owner, name, deadly)
train.main(arguments)
"""


def test_a_killed_run_goes_on_bitwise(command, whole, out):
    """Killed between two logs of the second step, then before its checkpoint has its name."""
    for place in ("train log 5", "dcp save 1"):
        killed = subprocess.run([sys.executable, "-c", DEADLY, *place.split(), *command(out)],
                                cwd=ROOT, capture_output=True, timeout=200)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoints(out) == [1]
    train.main(command(out))
    assert results(out) == results(whole)


def test_a_checkpoint_that_precedes_the_first_update_goes_on_bitwise(command, tmp_path):
    seen = []

    def idle_at_first(step, _, optimizer):
        seen.append(optimizer)
        return coin if step else lambda responses, *_: [1.0] * len(responses)

    train.main(command(tmp_path / "once"), one_step=step_that(idle_at_first))
    for act in (lambda step, *how: step and 1 / 0 or idle_at_first(step, *how), idle_at_first):
        try:
            train.main(command(tmp_path / "twice"), one_step=step_that(act))
        except ZeroDivisionError:
            assert checkpoints(tmp_path / "twice") == [1]
    assert results(tmp_path / "once") == results(tmp_path / "twice")
    for optimizer in (seen[0], seen[-1]):  # two of the three steps were updates
        assert {float(moments["step"]) for moments in optimizer.state.values()} == {2}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves_it(command, whole, out, number):
    """The last step is saved too, although --save-every does not divide --steps."""
    stop = step_that(lambda step, *_: step == 1 and os.kill(os.getpid(), number))
    assert ending(command(out, "--save-every 100"), one_step=stop) == 128 + number
    assert checkpoints(out) == [2]
    train.main(command(out, "--save-every 100"))
    assert checkpoints(out) == [2, 3] and results(out) == results(whole)


def test_a_finished_run_prints_its_table_again_and_exports_only_after_more_steps(
        command, finished, capsys):
    def exported():
        return {file: (file.stat().st_mtime_ns, file.read_bytes())
                for file in (finished / "model").iterdir()}

    before = exported()
    train.main(command(finished))
    assert exported() == before and "step 3, reasoning" in capsys.readouterr().out
    train.main(command(finished, "--steps 4"))
    assert exported() != before and "step 4, reasoning" in capsys.readouterr().out


def test_evaluations_are_made_at_multiples_before_and_after(command, out):
    train.main(command(out, "--steps 5 --eval-every 2 --save-every 2"))
    assert [row["step"] for row in rows(out / "evals.jsonl")] == [0, 2, 4, 5]


def test_the_learning_rate_may_change_and_other_options_may_not(command, finished, world):
    rates = []
    train.main(command(finished, "--steps 4 --lr 0.25"), one_step=step_that(
        lambda step, _, optimizer: rates.extend(group["lr"] for group in optimizer.param_groups)))
    assert set(rates) == {0.25}
    other = world / "other.jsonl"
    other.write_text((world / "corpus.jsonl").read_text() + '{"text": "One line more."}\n')
    assert str(finished) in refusal(command(finished, f"--corpus {other}"))


def test_an_option_that_may_not_change_is_named_with_both_values(command, finished):
    said = refusal(command(finished, "--max-response 39"))
    assert "max" in said and "response" in said and "40" in said and "39" in said


@pytest.fixture
def timezone(monkeypatch):
    def move(name):
        monkeypatch.setenv("TZ", name)
        time.tzset()
        return date.today()
    yield move
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("stage", ["rpt", "ntp"])
def test_the_date_of_a_chat_template_is_that_of_the_first_start(toy, command, out, timezone,
                                                                stage):
    model = shutil.copytree(toy / "base", out.parent / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ strftime_now('%d %b %Y') }} " + config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    first = timezone("Etc/GMT+12")
    for steps in (1, 2):
        train.main(command(out, f"--stage {stage} --model {model} --steps {steps}"))
        exported = json.loads((out / "model/tokenizer_config.json").read_text())["chat_template"]
        assert exported.startswith("{{ '%s' }} " % first.strftime("%d %b %Y"))
        assert json.loads((out / "run.json").read_text())["date"] == first.isoformat()
        assert timezone("Etc/GMT-14") > first
        for name in ("README.md", ".DS_Store"):  # which are not the model
            (model / name).touch()


# ---- what goes wrong


@pytest.mark.parametrize("owner, name, place", [
    (torch, "save", "checkpoints/step-000000004"), (model, "save_torch_state_dict", "model")])
def test_a_full_disk_ends_a_run_and_leaves_what_was_complete(command, whole, finished, monkeypatch,
                                                             owner, name, place):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, full)
    said = refusal(command(finished, "--steps 4"))
    assert f"{finished}/{place}" in said and "No space left on device" in said
    assert not list(finished.rglob("unfinished"))
    assert 3 in checkpoints(finished) and load_pretrained(finished / "model")
    monkeypatch.undo()
    train.main(command(finished, "--steps 4"))
    assert checkpoints(finished) == [3, 4] and results(finished)[1] != results(whole)[1]


def test_a_full_disk_is_named_by_the_log_that_meets_it(command, out, monkeypatch):
    monkeypatch.setattr("eval.open", lambda file, mode: open(
        "/dev/full" if mode == "a" else file, mode), raising=False)
    said = refusal(command(out))
    assert f"{out}/records.jsonl cannot be written" in said and "No space left" in said


def test_a_folder_that_cannot_be_locked_is_named(command, out, monkeypatch):
    out.mkdir()
    with open(out / "lock", "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        said = refusal(command(out))
        assert f"{out}" in said and "another run" in said

    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    said = refusal(command(out))
    assert f"{out}" in said and "Function not implemented" in said


def test_three_steps_in_a_row_that_are_not_finite_end_a_run_that_a_lower_rate_may_save(
        command, out, monkeypatch):
    bad, now, original = {0, 1, 3, 4, 5}, [], rpt.policy_loss
    step = step_that(lambda step, *_: now.append(step))
    monkeypatch.setattr(rpt, "policy_loss", lambda *how: original(*how) * (
        float("nan") if now[-1] in bad else 1))
    arguments = command(out, "--steps 7 --eval-questions 0")
    said = refusal(arguments, reward=coin, one_step=step)
    assert "3 steps in a row" in said and "lower --lr" in said
    assert [row["skipped"] for row in rows(out / "metrics.jsonl")] == [1, 1, 0, 1, 1, 1]
    bad.clear()
    train.main([*arguments, "--lr", "1e-5"], reward=coin, one_step=step)
    assert [row["skipped"] for row in rows(out / "metrics.jsonl")] == [1, 1, 0, 1, 1, 0, 0]


def test_three_steps_in_a_row_without_an_informative_group_are_said_once_with_the_reason(
        command, out, capsys):
    """And a step of one's own need not return groups or say what was informative."""
    idle = {"informative": 0, "finished": 1.0, "parsed": 1.0, "reward": 0.5, "length": 1}
    wrong = idle | {"reward": 0.0}
    script = [idle, idle, {"informative": 1}, *[wrong] * 4, {},
              *[wrong | {"parsed": 0.0}] * 3, {},
              *[wrong | {"parsed": 0.0, "finished": 0.0}] * 3, {},
              *[idle | {"reward": 1.0}] * 3, {}, *[idle] * 3, {}]
    train.main(command(out, f"--steps {len(script)} --eval-questions 0 --save-every 100"),
               one_step=lambda policy, optimizer, draw, step, *_: ([], dict(script[step])))
    said = [line for line in capsys.readouterr().out.splitlines() if "nothing was learned" in line]
    for line, (step, reason) in zip(said, {
            5: "every prediction that can be read is wrong", 10: "no response boxes anything",
            14: "no response ends within --max-response", 18: "every reward is 1",
            22: "some groups are all right"
            }.items(), strict=True):
        assert line.startswith(f"step {step}: ") and reason in line


@pytest.mark.parametrize("error", [KeyError, ValueError])
def test_an_error_in_a_reward_of_ones_own_shows_its_traceback(command, out, error):
    def broken(*_):
        raise error("mine")

    with pytest.raises(error, match="mine"):
        train.main(command(out, "--eval-questions 0"), reward=broken)


def test_a_terminal_that_does_not_know_utf8_does_not_end_a_run(command, world, out, monkeypatch):
    corpus = world / "accents.jsonl"
    corpus.write_text("".join(f'{{"text": "\u00e9\u00e0 {n} \u00e9\u00e0"}}\n' for n in range(99)))
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "ascii"))
    train.main(command(out, f"--corpus {corpus} --region all --steps 1"))
    sys.stdout.flush()
    assert b"\\xe0" in sys.stdout.buffer.getvalue()


# ---- stages


def test_bfloat16_computes_on_float32_masters(toy, command, out):
    """The accelerator's way on a CPU: sharded masters, recomputed blocks, a bounded cache."""
    train.main(command(out, "--dtype bfloat16 --cache-tokens 400 --lr 1e-6 --eval-questions 0 "
                            "--checkpoint-activations"))
    # of a log-probability below 16, by both sides, from logits with 8 bits
    assert any(0 < row.get("logprob_diff", 0) < 2 * 16 * 2**-8
               for row in rows(out / "metrics.jsonl"))
    before, after = load_pretrained(toy / "base"), load_pretrained(out / "model")
    moved = torch.cat([(p - q).abs().flatten()
                       for p, q in zip(before.parameters(), after.parameters())])
    # three steps of 1e-6, which bfloat16 masters would lose; one of AdamW's is at most 10 times lr
    assert 0 < moved.max() < 3e-5 and (moved > 0).float().mean() > 0.3


def test_the_optimizer_and_the_blocks_are_as_asked_for(command, out):
    seen = {}

    def look(step, policy, optimizer):
        seen.update(optimizer.param_groups[0], kind=type(optimizer), recompute=[
            block.checkpoint_activations for block in policy.model.model.layers])

    options = "--steps 1 --lr 0.003 --weight-decay 0.07 --beta2 0.97 --eval-questions 0"
    for more, wanted in (("", False), (" --checkpoint-activations", True)):
        train.main(command(out / str(wanted), options + more), one_step=step_that(look))
        assert seen["recompute"] == [wanted] * 2
    assert seen["kind"] is torch.optim.AdamW and len(seen["params"]) > 10
    assert (seen["lr"], seen["betas"], seen["weight_decay"]) == (0.003, (0.9, 0.97), 0.07)


def test_one_next_token_step_is_the_mean_over_all_trained_tokens():
    """Also of sequences of which only an end is trained."""
    model, random = tiny(), torch.Generator().manual_seed(0)
    sequences = [(torch.randint(40, (n,), generator=random).tolist(), first)
                 for n, first in ((9, 1), (30, 20), (5, 1), (12, 3))]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, metrics = train.next_token_step(
        Policy(model, None), torch.optim.SGD(model.parameters(), lr=1.0), lambda *_: sequences, 0,
        Method(grad_clip=1e9, micro_tokens=40, updates=2))
    trained = 8 + 10 + 4 + 9
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    model.load_state_dict(before)
    exact, scale = exact_gradient(model, [
        (ids[:n], ids[n:], [-1 / trained] * len(ids[n:])) for ids, n in sequences])
    for name, got in moved.items():  # 128 roundings of the gradient, and one of the weight
        assert_rounds_to(got, exact[name], 128, scale[name] + before[name].abs().max() / 128)
    assert metrics["trained_tokens"] == trained


def test_next_token_training_lowers_its_loss(command, out):
    train.main(command(out, "--stage ntp --questions 99 --steps 4"))
    losses = [row["nll"] for row in rows(out / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_verifiable_rewards_train_on_some_problems_and_examine_others(toy, out):
    problems = rows(toy / "answers.jsonl")
    arguments = f"--recipe toy --stage rlvr --corpus {toy}/answers.jsonl --out {out} {SMALL}"
    train.main(arguments.split())
    _, rollouts, evals, records = (rows(out / name) for name in train.LOGS)
    for row in rollouts + records:
        assert row["truth"] == problems[row["document"]]["answer"]
        assert row["rewards"] == [p == row["truth"] for p in row["predictions"]]
    asked, examined = ({row["document"] for row in some} for some in (rollouts, records))
    assert examined and not asked & examined and evals[1].keys() == {"step", "held-out"}


@pytest.mark.parametrize("reward", ["first-token", "dense", "conditional-dense"])
def test_every_reward_trains(command, out, reward):
    train.main(command(out, f"--steps 1 --reward {reward} --eval-questions 0"))
    assert all(0 <= r <= 1 for row in rows(out / "rollouts.jsonl") for r in row["rewards"])


# ---- arguments


def test_every_option_is_documented():
    assert all(field.metadata["help"] for field in fields(train.Run))


@pytest.mark.parametrize("argument", (
    "--lr=nan --lr=inf --lr=0 --grad-clip=0 --questions=0 --questions=1.5 --group-size=1 --seed=-1 "
    "--temperature=-1 --steps=-1 --samples=0 --clip-low=-.1 --max-response=0 --steps=many "
    "--template=v9 --device=gpu --no-such-option=1 --model=m --temperature=0 "
    "--reward=answer").split())
def test_an_argument_out_of_its_range_is_a_usage_error(capsys, argument):
    with pytest.raises(SystemExit) as stop:
        train.parse([argument])
    assert stop.value.code == 2 and argument.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("options, words", [
    ("--max-response 100000", "positions"),
    pytest.param("--max-prompt 3", "template toy"),
    ("--model /nowhere", "/nowhere"), ("--corpus /nowhere", "/nowhere"),
    ("--min-entropy 99", "--min-entropy"), (f"--out {ROOT}/train.py/run", "train.py/run"),
    (f"--corpus {ROOT}/train.py", "train.py: no documents"), ("--date tomorrow", "tomorrow")])
def test_a_bad_argument_is_one_sentence_before_any_work(command, out, options, words):
    assert words in refusal(command(out, options))
    assert not list(out.glob("*.jsonl"))


def test_recipes_are_the_papers_a_small_models_and_the_toys(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["paper/recipes/length_budget.py"])
    assert train.parse([]).out == "runs/length_budget"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    run = train.parse("--recipe paper --model m --corpus c".split())
    names = ("questions group_size temperature max_prompt max_response lr weight_decay beta2 steps "
             "dynamic_from template out")
    assert [getattr(run, name) for name in names.split()] == [
        256, 8, 0.8, 4096, 8192, 1e-6, 0.01, 0.999, 1000, 500, "v0", "runs/paper"]
    for stage in ("rpt", "ntp", "rlvr"):
        run = train.parse(f"--stage {stage} --model m --corpus c".split())
        assert (run.recipe, run.lr, run.max_response) == ("small", 1e-5, 512)
    run = train.parse([])
    assert (run.recipe, Path(run.model), run.template) == ("toy", ROOT / "toy/base", "toy")


def test_shards_compute_in_the_dtype_and_are_summed_in_float32(monkeypatch):
    policies = []

    def note(module, mp_policy, **_):
        policies.append(mp_policy)
        module.set_gradient_divide_factor = lambda factor: policies.append(factor)
        module.set_force_sum_reduction_for_comms = policies.append

    monkeypatch.setattr(train, "fully_shard", note)
    monkeypatch.setattr(train, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 2)
    model = load_pretrained(train.TOY / "base")
    train.shard(model, torch.bfloat16, "cpu")
    groups = len(model.model.layers) + 1
    assert policies[1::3] == [1.0] * groups and policies[2::3] == [True] * groups
    for policy in policies[::3]:
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
