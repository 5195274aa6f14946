"""train.py as a user meets it: arguments, errors, logs, resuming, signals, damaged checkpoints, the plan."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import train
from data import Tokenizer
from model import load_pretrained
from rpt import Method

ROOT = Path(train.__file__).parent
SMALL = ["--steps", "3", "--questions", "5", "--group-size", "4", "--max-response", "40", "--holdout", "40",
         "--select", "0.3", "--save-every", "1", "--lr", "0.002"]


def small(toy, out, *more):
    return ["--model", str(toy / "base" / "model"), "--corpus", str(toy / "corpus.jsonl"), "--out", str(out), *SMALL,
            *map(str, more)]


def results(out):
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        row.pop("time")
    return metrics, (out / "rollouts.jsonl").read_text(), load_file(next((out / "model").glob("*.safetensors")))


def assert_bitwise(a, b):
    assert a[0] == b[0] and a[1] == b[1]
    assert all(torch.equal(a[2][name], b[2][name]) for name in a[2])


def refused(capsys, *arguments):
    """The one sentence with which train.py refuses its arguments or inputs."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(map(str, arguments)))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "Traceback" not in error
    return error.splitlines()[-1] if "usage:" in error else error


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    train.main(small(toy, out))
    return out


# ---- a run and its folder


def test_a_run_leaves_its_metrics_rollouts_checkpoint_and_model(toy, run):
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [0, 1, 2]
    wanted = {"reward", "accuracy", "parsed", "truncated", "length", "length_max", "all_right", "all_wrong", "entropy",
              "grad_norm", "logprob_diff", "logprob_diff_max", "flops", "informative", "skipped", "time"}
    trained = next(row for row in metrics if row["informative"])
    assert wanted <= set(trained) and trained["logprob_diff_max"] < 1e-4
    assert {"seconds", "prefill", "decode", "train", "prefill_tokens_per_s", "decode_tokens_per_s",
            "train_tokens_per_s"} <= set(trained["time"])
    rollouts = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 3 * 5 * 4 and {row["step"] for row in rollouts} == {0, 1, 2}
    assert {"document", "position", "context", "truth", "response", "prediction", "reward", "advantage",
            "finished"} <= set(rollouts[0])
    model, tokenizer = load_pretrained(run / "model"), Tokenizer.from_dir(run / "model")
    base = load_pretrained(toy / "base" / "model")
    moved = [n for (n, p), q in zip(model.named_parameters(), base.parameters()) if not torch.equal(p, q)]
    assert len(moved) > 10 and tokenizer.encode("The ball") and len(list((run / "checkpoints").glob("step-*"))) == 2


def test_an_interrupted_run_goes_on_bitwise(toy, run, tmp_path):
    out = tmp_path / "run"
    train.main(small(toy, out, "--steps", 1))
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"step": 1, "half a li')  # what a kill leaves behind the last checkpoint
    with open(out / "rollouts.jsonl", "a") as log:
        log.write('{"step": 1}\n' * 3)
    train.main(small(toy, out))
    assert_bitwise(results(run), results(out))


def test_the_log_of_rollouts_can_be_bounded(toy, run, tmp_path):
    train.main(small(toy, tmp_path / "run", "--steps", 2, "--log-questions", 1))
    rows = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    assert rows == [line for line in (run / "rollouts.jsonl").read_text().splitlines()
                    if json.loads(line)["question"][1] == 0 and json.loads(line)["step"] < 2]


def test_a_finished_run_repeats_nothing(toy, run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    train.main(small(toy, out))
    assert_bitwise(results(run), results(out))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "state"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(toy, run, tmp_path, capsys, damage):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    file = next(newest.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-7])
    elif damage == "remove":
        file.unlink()
    else:
        (newest / "state.json").write_text("{")
    train.main(small(toy, out))
    said = capsys.readouterr()
    assert f"{newest.name} is damaged" in said.out + said.err and "going on after step 2" in said.out + said.err
    assert_bitwise(results(run), results(out))


def test_a_folder_is_one_configurations(toy, run, capsys):
    error = refused(capsys, *small(toy, run, "--lr", 0.5))
    assert "belongs to another configuration" in error and "lr was 0.002, now 0.5" in error


def test_a_folder_is_one_runs(toy, run, capsys):
    holder = open(run / "lock", "w")
    train.fcntl.flock(holder, train.fcntl.LOCK_EX | train.fcntl.LOCK_NB)
    assert "another run is writing" in refused(capsys, *small(toy, run))
    holder.close()


def test_a_read_only_folder_is_refused(toy, tmp_path, capsys):
    tmp_path.chmod(0o500)
    folder = Path("/sys") if os.geteuid() == 0 else tmp_path  # root may write everywhere but there
    said = refused(capsys, *small(toy, folder / "run"))
    assert str(folder / "run") in said and re.search("cannot be written|not permitted|denied|Read-only", said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_says_so(toy, tmp_path, number):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *small(toy, out, "--steps", 500, "--save-every", 1000)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(600):
        time.sleep(0.1)
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= 2:
            break
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and f"stopped by {number.name}" in said
    (checkpoint,) = (out / "checkpoints").glob("step-*")
    logged = (out / "metrics.jsonl").read_text().splitlines()
    assert len(logged) == json.loads((checkpoint / "state.json").read_text())["step"]


def test_three_steps_without_finite_numbers_stop_the_run(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(train.REWARDS, "prefix", lambda responses, question, policy: [float("nan")] * len(responses))
    error = refused(capsys, *small(toy, tmp_path / "run", "--steps", 10))
    assert "3 steps in a row" in error and "last good checkpoint" in error
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 2


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint_before(toy, run, tmp_path, capsys, monkeypatch):
    out, save = tmp_path / "run", dcp.save

    def full(*args, **kwargs):
        if len(list((out / "checkpoints").glob("step-*"))) == 2:
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(dcp, "save", full)
    assert "No space left on device" in refused(capsys, *small(toy, out))
    monkeypatch.undo()
    train.main(small(toy, out))
    assert_bitwise(results(run), results(out))


# ---- stages


def test_bfloat16_computes_on_float32_masters(toy, tmp_path):
    """The accelerator's way on one process of a CPU: sharded float32 masters, recomputed blocks, a bounded cache."""
    arguments = small(toy, tmp_path / "run", "--dtype", "bfloat16", "--cache-tokens", 400, "--checkpoint-activations",
                      "--lr", 1e-6)
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["skipped"] == 0 for row in rows) and any(0 < row.get("logprob_diff", 0) < 0.05 for row in rows)
    before, after = load_pretrained(toy / "base" / "model"), load_pretrained(tmp_path / "run" / "model")
    moved = torch.cat([(p - q).abs().flatten() for p, q in zip(before.parameters(), after.parameters())])
    # steps of 1e-6, which bfloat16 masters would lose
    assert 0 < moved.max() < 1e-5 and (moved > 0).float().mean() > 0.3


def test_next_token_prediction_lowers_its_loss_on_a_corpus(toy, tmp_path):
    train.main(small(toy, tmp_path / "run", "--stage", "ntp", "--steps", 24, "--questions", 16, "--lr", 0.005))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])


def test_verifiable_rewards_train_on_questions_and_answers(toy, tmp_path):
    train.main(["--model", str(toy / "base" / "model"), "--corpus", str(toy / "answers.jsonl"),
                "--out", str(tmp_path / "run"), *SMALL, "--stage", "rlvr"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert any(row["reward"] == 1 for row in rows) and any(row["reward"] == 0 for row in rows)
    assert all(row["context"].rstrip().endswith("Where is the ball?") for row in rows)


@pytest.mark.parametrize("reward", ["first-token", "dense", "conditional-dense", "format"])
def test_every_reward_trains(toy, tmp_path, reward):
    train.main(small(toy, tmp_path / "run", "--steps", 1, "--reward", reward))
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert all(0 <= row["reward"] <= 1 for row in rows)


def test_held_out_documents_are_never_asked_about(toy, run):
    held = {d.id for d in train.data.split_holdout(train.read_corpus(toy / "corpus.jsonl"), 40, 0)[1]}
    asked = {json.loads(line)["document"] for line in (run / "rollouts.jsonl").read_text().splitlines()}
    assert asked and not asked & held


# ---- arguments and bad input


def test_every_option_has_a_line_of_documentation_and_recipes_name_only_options():
    known = {f.name for kind in (train.Run, Method, train.Plan) for f in dataclasses.fields(kind)}
    assert all(f.metadata["help"] for kind in (train.Run, Method, train.Plan) for f in dataclasses.fields(kind))
    for defaults in (*train.RECIPES.values(), *train.STAGES.values(), train.TOY_BASE):
        assert set(defaults) <= known
    assert set(train.FREE) <= known


def test_the_papers_recipe_has_the_papers_numbers():
    run, method, _ = train.parse(["--recipe", "paper", "--model", "m", "--corpus", "c"])
    assert (method.questions, method.group_size, method.temperature, method.max_prompt, method.max_response) == (
        256, 8, 0.8, 4096, 8192)
    assert (run.lr, run.weight_decay, run.beta2, run.steps, method.dynamic_from, method.template) == (
        1e-6, 0.01, 0.999, 1000, 500, "v0")


@pytest.mark.parametrize("arguments, words", [
    (["--group-size", 1], "at least 2"), (["--no-such-option", 1], "unrecognized arguments"),
    (["--steps", "many"], "invalid int"), (["--steps", 0], "--steps 0"), (["--temperature", 0], "--temperature"),
    (["--template", "v9"], "v9"), (["--reward", "nice"], "invalid choice"), (["--questions", "-3"], "--questions -3"),
    (["--max-refills", -1], "--max-refills -1"), (["--decay", "nan"], "--decay nan"),
    (["--stage", "rlvr", "--reward", "gain"], "no next token")])
def test_a_bad_argument_is_one_sentence(toy, tmp_path, capsys, arguments, words):
    assert words in refused(capsys, *small(toy, tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()


def bad_corpus(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("content, words", [
    (None, "no such corpus"), (b'{"text": "fine enough"}\n{"text": oops}\n', "line 2: not JSON"),
    (b'{"text": "caf\xe9"}', "line 1: byte 13 is not UTF-8"), (b'{"text": " "}', "line 1: empty document"),
    (b"", "no documents"),
    (b'{"text": "ab"}\n' * 50, "no document is longer"), (b'[1, 2]', "expected a JSON object"),
    (b'{"text": "The ball is under A."}\n', "leaves none to train on")])
def test_a_bad_corpus_is_one_sentence(toy, tmp_path, capsys, content, words):
    corpus = tmp_path / "corpus.jsonl"
    if content is not None:
        corpus.write_bytes(content)
    error = refused(capsys, *small(toy, tmp_path / "run"), "--corpus", corpus, "--min-context", 4)
    assert words in error and "\n" not in error.strip()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_no_position_above_the_threshold_is_one_error(toy, tmp_path, capsys):
    assert "no position is left" in refused(capsys, *small(toy, tmp_path / "run"), "--select", 50)


def damaged_model(toy, folder, damage):
    shutil.copytree(toy / "base" / "model", folder)
    weights = next(folder.glob("*.safetensors"))
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "absurd header":
        weights.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif damage == "no end token":
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "generation_config.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(
            config | {"vocab_size": 100} if damage == "small vocabulary" else {
                k: v for k, v in config.items() if k != "hidden_size"}))
    return folder


@pytest.mark.parametrize("damage, words", [
    ("no config", "no config.json"), ("no weights", "no weights"), ("truncated", "truncated or corrupt"),
    ("absurd header", "truncated or corrupt"), ("no tokenizer", "no tokenizer.json"), ("no end token", "no end token"),
    ("small vocabulary", "vocabulary only 100"), ("no hidden_size", "hidden_size")])
def test_a_bad_model_is_one_sentence(toy, tmp_path, capsys, damage, words):
    error = refused(capsys, *small(toy, tmp_path / "run"), "--model", damaged_model(toy, tmp_path / "model", damage))
    assert words in error and "\n" not in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_hub_id_without_network_is_one_sentence(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "nor available from the hub" in refused(
        capsys, *small(toy, tmp_path / "run"), "--model", "nobody/no-such-model")
    assert "no such model directory" in refused(capsys, *small(toy, tmp_path / "run"), "--model", tmp_path / "nowhere")


# ---- the plan


def test_the_plan_counts_the_bytes_of_the_shards(capsys):
    config = ROOT / "paper" / "configs" / "r1-distill-qwen-14b"
    train.main(["--recipe", "paper", "--model", str(config), "--plan", "--processes", "8", "--memory", "80"])
    said = capsys.readouterr().out
    weights = float(re.search(r"master weights ([\d.]+)", said)[1])
    assert weights == pytest.approx(14.77e9 * 4 / 8 / 1e9, rel=0.01)  # 14.77 billion parameters, published
    assert float(re.search(r"rollout weights ([\d.]+)", said)[1]) == pytest.approx(29.5, rel=0.01)
    assert "DOES NOT FIT as it is: --cache-tokens" in said
    tokens = re.search(r"--cache-tokens (\d+) makes", said)[1]
    train.main(["--recipe", "paper", "--model", str(config), "--plan", "--processes", "8", "--memory", "80",
                "--cache-tokens", tokens])
    assert "DOES NOT FIT" not in capsys.readouterr().out
    train.main(["--recipe", "paper", "--model", str(config), "--plan", "--processes", "1", "--memory", "192"])
    assert "DOES NOT FIT: weights and optimizer leave no room" in capsys.readouterr().out
