"""train.py as a user meets it: the first command, arguments, errors, logs, resuming, signals,
damaged checkpoints, the stages."""

import contextlib
import fcntl
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import data
import rpt
import train
from data import Question, Tokenizer, load_corpus
from helpers import ROOT, assert_rounds_to, exact_gradient, tiny
from model import load_pretrained
from rpt import Completion, Group, Method, Policy
from worker import coin


@pytest.fixture(scope="module")
def run(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.main(command(out))
    (out / "said").write_text(said.getvalue())
    return out


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def results(out):
    """Everything a run leaves but its times, comparable."""
    metrics = rows(out / "metrics.jsonl")
    for row in metrics:
        row.pop("time")
    (weights,) = (out / "model").rglob("*.safetensors")  # one file, and no parts left over
    logs = [(out / name).read_text() for name in ("rollouts.jsonl", "evals.jsonl")]
    bits = {name: t.view(torch.int32).tolist() for name, t in load_file(weights).items()}
    return metrics, *logs, bits


def checkpoints(out):
    """Where they are, by their steps."""
    return {int(place.name[5:]): place for place in out.glob("checkpoints/step-*")}


def refused(capsys, arguments):
    """The one sentence with which train.py refuses its arguments or inputs."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(map(str, arguments)))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "Traceback" not in error
    return error.splitlines()[-1]


# ---- the first command


def test_the_first_command_leaves_its_table_metrics_rollouts_evaluations_and_model(toy, run):
    said = (run / "said").read_text()
    for words in ("held-out in %", "answers in %", "choices in %", "step 0, standard",
                  "step 3, reasoning", "a rollout:", f"model written to {run}/model"):
        assert words in said
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert all(row["groups"] == 5 and row["responses"] == 20 for row in metrics)
    speeds = {"prefill_tokens_per_s", "decode_tokens_per_s", "train_tokens_per_s", "rollout"}
    assert speeds <= metrics[0]["time"].keys() and any(row["informative"] for row in metrics)
    rollouts = rows(run / "rollouts.jsonl")
    assert len(rollouts) == 3 * 5 * 4 and all(row["kept"] for row in rollouts)
    for row in rollouts:
        boxed = row["response"].rpartition("\\boxed{")[2].partition("}")
        assert not row["finished"] or row["prediction"] == (boxed[0] if boxed[1] else None)
        right = row["prediction"] and row["truth"].startswith(row["prediction"])
        assert row["reward"] in (0, 1) and (not row["reward"] or right)
    before, after = rows(run / "evals.jsonl")
    assert (before["step"], after["step"]) == (0, 3)
    for exam, split in (("held-out", "easy"), ("answers", "all"), ("choices", "all")):
        assert before[exam][split]["questions"] == 6 and len(after[exam][split]["reasoning"]) == 3
    model, base = (load_pretrained(folder) for folder in (run / "model", toy / "base"))
    pairs = zip(model.parameters(), base.parameters())
    assert all(not torch.equal(p, q) for p, q in pairs)


def test_held_out_documents_are_never_asked_about(toy, command, run):
    corpus = load_corpus(toy / "corpus.jsonl", Tokenizer.from_dir(toy / "base"),
                         Path(command(run)[3]), 40, 0)
    asked = {row["document"] for row in rows(run / "rollouts.jsonl")}
    assert asked and all(corpus.split[document] == data.TRAIN for document in asked)


def test_metrics_are_of_all_that_was_drawn(toy):
    """A right, a wrong, a half right and an unfinished response; one group that was replaced."""
    said = [Completion([1] * n, [0.0] * n, n < 4) for n in (1, 2, 3, 4)]
    boxed = b"</think>\\boxed{A}"
    texts, earned = [boxed, b"", boxed, boxed], [1.0, 0.0, 0.5, 0.0]
    groups = [Group((0, n), Question((), (), 0, 0), [1], said, texts, rewards, [0.0] * 4, kept)
              for n, (rewards, kept) in enumerate([(earned, True), ([0.0] * 4, False)])]
    got = train.rollout_metrics(train.rollout_rows(groups, Tokenizer.from_dir(toy / "base")), 4)
    assert got == pytest.approx({
        "reward": 1.5 / 8, "accuracy": 1 / 8, "length": 2.5, "truncated": 1 / 4, "parsed": 1 / 2,
        "kept": 1 / 2, "all_right": 0, "all_wrong": 1 / 2, "groups": 2, "responses": 8,
        "length_max": 4, "informative_expected": (1 - 0.25**4 - 0.75**4) / 2}, rel=1e-15)


# ---- going on


@pytest.fixture
def stopped(run, tmp_path):
    """A copy of the run as if it had been killed in its second step."""
    out = shutil.copytree(run, tmp_path / "stopped")
    for step in (2, 3):
        shutil.rmtree(checkpoints(out)[step])
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"step": 1, "half a li')
    return out


def test_an_interrupted_or_finished_run_goes_on_bitwise(command, run, stopped):
    for _ in range(2):
        train.main(command(stopped))
        assert results(run) == results(stopped)


def test_a_deleted_log_begins_again_where_the_run_does(command, run, stopped):
    (stopped / "metrics.jsonl").unlink()
    train.main(command(stopped))
    assert [row["step"] for row in rows(stopped / "metrics.jsonl")] == [1, 2]


def spoil(checkpoint, damage):
    file = next(checkpoint.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-7])
    elif damage == "remove":
        file.unlink()
    else:
        (checkpoint / "state.json").write_text("{")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "state"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(command, run, tmp_path, capsys,
                                                                   damage):
    out = shutil.copytree(run, tmp_path / "run")
    spoil(checkpoints(out)[3], damage)
    train.main(command(out, "--keep", 1))
    said = capsys.readouterr().out
    assert "step-000000003 is damaged" in said and "going on after step 2" in said
    assert results(run) == results(out)
    assert list(checkpoints(out)) == [3]  # the good one
    assert len(list((out / "checkpoints").glob("damaged-*"))) == 1


def test_without_an_intact_checkpoint_nothing_is_begun_anew(command, stopped, capsys):
    spoil(checkpoints(stopped)[1], "flip")
    logged = (stopped / "metrics.jsonl").read_text()
    for _ in range(2):  # and it stays so
        assert "no checkpoint is intact" in refused(capsys, command(stopped))
        assert (stopped / "metrics.jsonl").read_text() == logged


def test_a_folder_is_one_configurations_and_one_runs(command, stopped, capsys):
    error = refused(capsys, command(stopped, "--lr", 0.5))
    assert "belongs to another configuration (lr was 0.0005, now 0.5)" in error
    with open(stopped / "lock", "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "another run is writing" in refused(capsys, command(stopped))


def test_a_folder_without_a_finished_step_belongs_to_nobody(command, tmp_path, capsys):
    def broken(*_):
        raise OSError("the disk is gone")

    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        train.main(command(out), one_step=broken)
    train.main(command(out, "--lr", 0.5, "--steps", 1))
    assert len(rows(out / "evals.jsonl")) == 2


def test_identity_is_content_and_not_where_it_stands(toy, command, run, stopped, tmp_path, capsys,
                                                     monkeypatch):
    world = shutil.copytree(toy, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    names = "--model", "elsewhere/base", "--corpus", "elsewhere/corpus.jsonl", "--recipe", "toy"
    out, read, original = stopped.rename(tmp_path / "moved"), [], train.fingerprint
    monkeypatch.setattr(train, "fingerprint", lambda *of: read.extend(of) or original(*of))
    train.main(command("moved", *names))
    assert results(run) == results(out)
    assert read.count(Path("elsewhere/base")) == 1  # the weights, though they are the proxy's too
    (weights,) = (world / "base").glob("*.safetensors")
    save_file({name: t + 1 for name, t in load_file(weights).items()}, weights)
    assert "the content of the model is another one" in refused(capsys, command(out, *names))
    with open(world / "corpus.jsonl", "a") as corpus:
        corpus.write('{"problem": "The ball is under A.", "solution": "It is under A."}\n')
    error = refused(capsys, command(out, *names, "--model", toy / "base", "--proxy", toy / "base"))
    assert "(the content of the corpus is another one)" in error


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint_before(command, run, stopped, capsys,
                                                                   monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp, "save", full)
    assert "No space left on device" in refused(capsys, command(stopped))
    monkeypatch.undo()
    train.main(command(stopped))
    assert results(run) == results(stopped)


# ---- what goes wrong on the way


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_says_so(command, run, tmp_path, capsys,
                                                                number):
    def step(policy, optimizer, draw, step, *how):
        if step == 1:
            os.kill(os.getpid(), number)
        return rpt.rpt_step(policy, optimizer, draw, step, *how)

    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train.main(command(out, "--save-every", 100), one_step=step)
    assert stop.value.code == 128 + number
    assert f"stopped by {number.name} after step 1" in capsys.readouterr().out
    assert list(checkpoints(out)) == [2]
    train.main(command(out, "--save-every", 100))
    assert results(run) == results(out)


def test_the_third_signal_acts_at_once(command, tmp_path):
    def step(*_):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step went on")

    with pytest.raises(SystemExit, match="interrupted; the same command goes on") as stop:
        train.main(command(tmp_path / "run", "--eval-questions", 0), one_step=step)
    assert stop.value.code not in (0, None)


def test_an_interrupted_measurement_is_one_sentence(command, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.evaluation, "corpus_entropy", interrupted)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
        train.main(command(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("*.jsonl"))


@pytest.mark.parametrize("on_cpu", [False, True])
def test_out_of_memory_says_what_to_lower(command, tmp_path, monkeypatch, on_cpu):
    def full(*_):
        if on_cpu:
            torch.empty(2**60, device="cpu")
        raise torch.OutOfMemoryError("Tried to allocate 8 GiB\nand so on")

    monkeypatch.setattr(rpt, "policy_loss", full)
    with pytest.raises(SystemExit, match=r"allocate .*\): set or lower --micro-tokens"):
        train.main(command(tmp_path / "run"), reward=coin)


def test_three_steps_without_finite_numbers_stop_a_run_however_often_it_is_started(
        command, tmp_path, capsys):
    def nans(responses, question, policy):
        return [float("nan")] * len(responses)

    out = tmp_path / "run"
    train.main(command(out, "--steps", 2), reward=nans)
    with pytest.raises(SystemExit) as stop:
        train.main(command(out, "--steps", 9), reward=nans)
    assert stop.value.code == 2 and "3 steps in a row" in capsys.readouterr().err
    assert [row["skipped"] for row in rows(out / "metrics.jsonl")] == [1, 1]


def test_that_nothing_is_learned_is_said_once_however_often_a_run_is_started(
        command, tmp_path, capsys):
    for steps in (2, 5):
        train.main(command(tmp_path / "run", "--steps", steps, "--eval-questions", 0),
                   reward=lambda responses, question, policy: [1.0] * len(responses))
    train.main(command(tmp_path / "run", "--steps", 5, "--eval-questions", 0))
    warnings = [row.get("warning", "") for row in rows(tmp_path / "run" / "metrics.jsonl")]
    assert "every response is right" in warnings[2] and not any(warnings[:2] + warnings[3:])
    said = capsys.readouterr().out
    assert said.count("no group was informative for 3 steps") == 1
    assert said.count("all its steps are done; after a change of the code") == 1


def test_the_table_passes_over_steps_that_do_not_sample(command, tmp_path, capsys):
    def now_and_then(policy, optimizer, draw, step, *how):
        groups, metrics = rpt.rpt_step(policy, optimizer, draw, step, *how)
        return groups if step == 1 else [], metrics

    train.main(command(tmp_path / "run", "--steps", 3, "--eval-questions", 0),
               reward=coin, one_step=now_and_then)
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in table] == ["step", "reward", "length"]
    assert [len(line.split()) for line in table] == [2, 2, 2] and table[0].split()[1] == "1"


@pytest.mark.parametrize("figures, words", [
    ({"parsed": 0}, "no response holds a prediction"), ({"truncated": 1}, "no response ends"),
    ({}, "rewards of each group are equal")])
def test_the_warning_gives_the_likely_reason(figures, words):
    usual = {"parsed": 0.5, "truncated": 0.5, "all_right": 0}
    if figures.get("truncated") == 1:
        usual["parsed"] = 0  # what does not end is not read
    assert words in train.nothing_learned(usual | figures)


# ---- stages


def test_bfloat16_computes_on_float32_masters(toy, command, tmp_path):
    """The accelerator's way on one process of a CPU: sharded float32 masters, recomputed blocks, a
    bounded cache."""
    out = tmp_path / "run"
    arguments = command(out, "--dtype", "bfloat16", "--cache-tokens", 400, "--lr", 1e-6,
                        "--checkpoint-activations", "--eval-questions", 0)
    done = subprocess.run([sys.executable, ROOT / "train.py", *arguments], capture_output=True,
                          text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = rows(out / "metrics.jsonl")
    assert all(row["skipped"] == 0 for row in metrics)
    # of a log-probability below 16, by both sides, from logits with 8 bits
    assert any(0 < row.get("logprob_diff", 0) < 2 * 16 * 2**-8 for row in metrics)
    before, after = load_pretrained(toy / "base"), load_pretrained(out / "model")
    moved = torch.cat([(p - q).abs().flatten()
                       for p, q in zip(before.parameters(), after.parameters())])
    # three steps of 1e-6, which bfloat16 masters would lose; one of AdamW's is at most 10 times lr
    assert 0 < moved.max() < 3e-5 and (moved > 0).float().mean() > 0.3


def test_one_next_token_step_is_the_mean_over_all_trained_tokens():
    """Also of sequences of which only an end is trained."""
    model, random = tiny(), torch.Generator().manual_seed(0)
    sequences = [(torch.randint(40, (n,), generator=random).tolist(), first)
                 for n, first in ((9, 1), (30, 20), (5, 1), (12, 3))]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, metrics = train.next_token_step(
        Policy(model, None), torch.optim.SGD(model.parameters(), lr=1.0), lambda *_: sequences, 0,
        Method(grad_clip=1e9, micro_tokens=40))
    trained = 8 + 10 + 4 + 9
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    model.load_state_dict(before)
    wanted = [(ids[:first], ids[first:], [-1 / trained] * (len(ids) - first))
              for ids, first in sequences]
    exact, scale = exact_gradient(model, wanted)
    for name, got in moved.items():  # 128 roundings of the gradient, and one of the weight
        size = scale[name] + before[name].abs().max() / 128
        assert_rounds_to(got, exact[name], 128, size)
    assert metrics["trained_tokens"] == trained


def test_next_token_training_lowers_its_loss_and_measures_perplexity(toy, command, tmp_path):
    corpus, out = tmp_path / "few.jsonl", tmp_path / "run"
    lines = (toy / "corpus.jsonl").read_text().splitlines(keepends=True)
    corpus.write_text("".join(lines[:60]))
    train.main(command(out, "--stage", "ntp", "--corpus", corpus, "--model", toy / "base",
                       "--recipe", "toy", "--holdout", 20, "--questions", 40, "--steps", 4))
    assert [len(row["perplexity"]) for row in rows(out / "evals.jsonl")] == [3, 3]
    losses = [row["loss"] for row in rows(out / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_verifiable_rewards_train_on_questions_and_show_the_expected_answer(toy, command, tmp_path):
    out = tmp_path / "run"
    corpus = toy / "answers.jsonl"
    train.main(command(out, "--stage", "rlvr", "--recipe", "toy", "--corpus", corpus))
    rollouts = rows(out / "rollouts.jsonl")
    answers = {row["problem"][-20:]: row["answer"] for row in rows(toy / "answers.jsonl")}
    assert {row["reward"] for row in rollouts} == {0, 1}
    assert all(row["context"].endswith(tuple(answers)) for row in rollouts)
    assert all((row["prediction"] == row["truth"]) == (row["reward"] == 1) for row in rollouts)
    assert rows(out / "evals.jsonl")[1]["held-out"]["all"]["questions"] == 6


@pytest.mark.parametrize("reward", ["first-token", "dense", "conditional-dense", "format"])
def test_every_reward_trains(command, tmp_path, reward):
    train.main(command(tmp_path / "run", "--steps", 1, "--reward", reward, "--eval-questions", 0))
    assert all(0 <= row["reward"] <= 1 for row in rows(tmp_path / "run" / "rollouts.jsonl"))


def test_the_optimizer_is_the_adamw_that_was_asked_for(command, tmp_path):
    seen = {}

    def step(policy, optimizer, *how):
        seen.update(optimizer.param_groups[0], kind=type(optimizer))
        return rpt.rpt_step(policy, optimizer, *how)

    train.main(command(tmp_path / "run", "--steps", 1, "--lr", 0.003, "--weight-decay", 0.07,
                       "--beta2", 0.97, "--eval-questions", 0), one_step=step)
    assert seen["kind"] is torch.optim.AdamW and len(seen["params"]) > 10
    assert (seen["lr"], seen["betas"], seen["weight_decay"]) == (0.003, (0.9, 0.97), 0.07)


# ---- arguments and bad input

NUMBERS = [field for field in fields(train.Run) if field.type in (int, float)]


def test_every_option_is_documented_every_number_has_a_limit_and_recipes_name_only_options():
    known = {field.name: field.metadata for field in fields(train.Run)}
    assert all(metadata["help"] for metadata in known.values())
    assert all({"at_least", "above"} & field.metadata.keys() for field in NUMBERS)
    for defaults in (*train.RECIPES.values(), *train.STAGES.values()):
        assert defaults.keys() <= known.keys()
    assert set(train.FREE) <= known.keys()


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_a_number_out_of_its_range_is_refused_before_any_work(command, tmp_path, capsys, field):
    limits, step = field.metadata, 1 if field.type is int else 1e-9
    bad = [math.nan, math.inf] if field.type is float else []
    bad += [limits["at_least"] - step] if "at_least" in limits else [limits["above"]]
    bad += [limits["at_most"] + step] if "at_most" in limits else []
    for value in map(field.type, bad):
        option = "--" + field.name.replace("_", "-")
        assert f"{option} {value}: must be" in refused(
            capsys, command(tmp_path / "run", f"{option}={value}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--no-such-option", 1], "unrecognized arguments"), (["--steps", "many"], "invalid int"),
    (["--template", "v9"], "invalid choice"), (["--device", "gpu"], "--device gpu"),
    (["--filter", "top", "--filter-value", 1.1], "--filter-value 1.1"),
    (["--stage", "rlvr", "--reward", "dense"], "no next token"),
    (["--reward", "answer"], "no answer"), (["--max-context", 2, "--min-context", 3], "below"),
    (["--max-response", 10**6], "positions"), (["--max-prompt", 3], "template toy"),
    (["--model", "m", "--corpus="], "--corpus is missing"), (["--model="], "--model is missing"),
    (["--shard-group", 2], "does not divide the 1"),
    (["--recipe", "toy", "--model", "/nowhere"], "no such model"),
    (["--choices", ROOT / "toy" / "corpus.jsonl"], "expected question, options"),
    (["--answers", ROOT / "toy" / "corpus.jsonl"], "has no `answer`"),
    (["--out", ROOT / "train.py" / "run"], "Not a directory")])
def test_a_bad_argument_is_one_sentence_before_any_work(command, tmp_path, capsys, arguments,
                                                        words):
    nothing = command(tmp_path / "run", "--cache", tmp_path / "cache")
    assert words in refused(capsys, [*nothing, *arguments])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content, words", [
    ('{"text": "fine enough"}\n{"text": oops}\n', "line 2: not JSON"),
    ('{"text": "ab"}\n' * 50, "document"), ('{"text": "The ball."}\n', "leaves no document")])
def test_a_bad_corpus_is_one_sentence_and_leaves_no_logs(command, tmp_path, capsys, content, words):
    (tmp_path / "corpus.jsonl").write_text(content)
    arguments = "--recipe", "toy", "--corpus", tmp_path / "corpus.jsonl", "--min-context", 4
    assert words in refused(capsys, command(tmp_path / "run", *arguments))
    assert not list((tmp_path / "run").glob("*.jsonl"))


def test_a_model_with_fewer_tokens_than_its_tokenizer_is_refused(toy, command, tmp_path, capsys):
    folder = shutil.copytree(toy / "base", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    arguments = command(tmp_path / "run", "--recipe", "toy", "--model", folder)
    assert "vocabulary only 100" in refused(capsys, arguments)


def test_recipes_are_the_papers_a_small_models_and_the_toys(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["paper/recipes/length_budget.py"])
    assert train.parse([]).out == "runs/length_budget"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    run = train.parse(["--recipe", "paper", "--model", "m", "--corpus", "c"])
    assert (run.questions, run.group_size, run.temperature, run.max_prompt,
            run.max_response) == (256, 8, 0.8, 4096, 8192)
    assert (run.lr, run.weight_decay, run.beta2, run.steps, run.dynamic_from, run.template,
            run.out) == (1e-6, 0.01, 0.999, 1000, 500, "v0", "runs/paper")
    for stage, named in itertools.product(("rpt", "ntp", "rlvr"), ("--model", "--corpus")):
        others = {"--model": "--corpus", "--corpus": "--model"}[named]
        run = train.parse(["--stage", stage, named, "m", others, "c"])
        assert (run.recipe, run.lr, run.max_response) == ("small", 1e-5, 512)
    run = train.parse([])
    assert (run.recipe, Path(run.model), run.template) == ("toy", ROOT / "toy/base", "toy")
