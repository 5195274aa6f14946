"""The cold start teaches a form and the model's own guesses; then the chain on real text."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from data import TEMPLATES, Question, Tokenizer
from helpers import ROOT, assert_rounds_to, plain_logits, tiny
from paper.recipes import cold_start, mixed_sft
from paper.recipes.cold_start import KEEP, TAIL, ColdStart, annotation, guess, on_track
from rpt import Policy
from test_rpt import METHOD
from test_train import rows

ROUNDINGS = 20  # of a loss or norm: sums over layers, tokens and vocabulary err by .3 to 4


@pytest.fixture(scope="module")
def tokenizer(toy):
    return Tokenizer.from_dir(toy / "base")


@pytest.fixture
def start(tokenizer):
    """A cold start whose annotator is one tiny model, and a policy that is another."""
    start = object.__new__(ColdStart)
    start.annotator, start.steps, start.peak = tiny(vocab_size=len(tokenizer), seed=1), 4, 0.01
    return start, Policy(tiny(vocab_size=len(tokenizer)), tokenizer)


def questions(tokenizer, truth=b" A"):
    texts = ["The ball is under A. 1 C A. The ball is now under", "The ball is under D. 2 D"]
    return [Question(tuple(tokenizer.encode(text)), (truth,), n, 0) for n, text in enumerate(texts)]


def randoms():
    return [np.random.default_rng(n) for n in range(2)]


def test_the_loss_is_the_forms_tokens_and_two_divergences_from_the_annotator(start, tokenizer):
    cold, policy = start
    loss, figures = cold.imitate(policy, questions(tokenizer), randoms(), METHOD)
    form, at_guess, kept = [], [], []
    for question, random in zip(questions(tokenizer), randoms()):
        context = question.context
        places = random.integers(0, len(context), KEEP)
        ours = plain_logits(cold.annotator, context).log_softmax(-1).detach()
        braces = [(b.count(b"{"), b.count(b"}"))
                  for b in map(tokenizer.token_bytes, range(len(tokenizer)))]
        special = [id for id, (opened, closed) in enumerate(braces)
                   if id in tokenizer.special.values() or opened != closed]
        likely = ours[-1].clone()
        likely[special] = -torch.inf
        likely = likely.log_softmax(-1)
        tail = int(random.choice(TAIL))
        answer = annotation(tokenizer, context[-tail:], guess(random, likely.exp()))
        head = tokenizer.chat(TEMPLATES[METHOD.template], context)
        front = next(n for n in range(len(head)) if head[n:n + len(context)] == [*context])
        theirs = plain_logits(policy.model, head + answer).log_softmax(-1)
        for n, id in enumerate(answer):
            if n != tail:
                form.append(-theirs[len(head) - 1 + n, id])
        at = theirs[len(head) - 1 + tail]
        at_guess.append(torch.where(likely.isfinite(), likely.exp() * (likely - at), 0).sum())
        kept += [(ours[n].exp() * (ours[n] - theirs[front + n])).sum() for n in places]
    want = sum(form) / len(form) + (sum(at_guess) / 2 + sum(kept) / len(kept)) / 2
    assert_rounds_to(loss, want, ROUNDINGS)
    assert figures[4] == len(form)


def test_the_learning_rate_rises_stays_and_falls(start, tokenizer, monkeypatch):
    cold, policy = start
    cold.steps, cold.peak, rates = 20, 0.01, []
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    monkeypatch.setattr(cold_start, "look", lambda *_: ([], 0.0))
    for step in range(20):
        cold(policy, optimizer, lambda *_: questions(tokenizer), step, METHOD, None, 0)
        rates.append(optimizer.param_groups[0]["lr"])
    want = [0.01 * min(1, (step + 1) / 5, (20 - step) / 8) for step in range(20)]
    assert rates == pytest.approx(want, rel=4 * np.finfo(float).eps)


def test_two_processes_learn_what_one_does(toy, tmp_path):
    """The first step's loss and gradient, of five questions: two processes have uneven shares."""
    shared = ["--model", toy / "base", "--corpus", toy / "corpus.jsonl", "--dtype", "float32",
              "--cache", tmp_path / "cache", "--questions", 5, "--group-size", 2, "--steps", 1,
              "--holdout", 40, "--device", "cpu"]
    first = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        subprocess.run(list(map(str, [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            processes, "-m", "paper.recipes.cold_start", "--out", out, *shared])), check=True,
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
        first.append(rows(out / "metrics.jsonl")[0])
    one, two = first
    assert one["trained_tokens"] == two["trained_tokens"]
    for name in ("loss", "grad_norm", "nll"):
        assert_rounds_to(torch.tensor(two[name]), torch.tensor(one[name]).double(), ROUNDINGS)


def test_the_truth_is_never_looked_at(start, tokenizer):
    cold, policy = start
    losses = [cold.imitate(policy, questions(tokenizer, truth), randoms(), METHOD)[0]
              for truth in (b" A", b" Z")]
    assert losses[0] == losses[1]


def test_an_annotation_is_the_end_of_the_context_and_a_boxed_guess(tokenizer):
    context, token = tokenizer.encode("The ball is under A. 1 C A."), tokenizer.encode(" B")[0]
    ids = annotation(tokenizer, context[-5:], token)
    assert tokenizer.bytes_of(ids[:-1]) == b" 1 C A. B</think>\n\n\\boxed{ B}"
    assert ids[-1] in tokenizer.eos_ids and ids[6] == tokenizer.special["</think>"]
    assert on_track(tokenizer, context, ids)
    assert not on_track(tokenizer, context[:-1], ids) and not on_track(tokenizer, context, ids[6:])


def test_a_guess_follows_its_distribution():
    random, p = np.random.default_rng(0), torch.tensor([0.5, 0.0, 0.2, 0.3])
    counts = np.bincount([guess(random, p) for _ in range(4000)], minlength=4)
    assert counts[1] == 0
    assert np.all(np.abs(counts / 4000 - p.numpy()) <= 4 * np.sqrt(0.25 / 4000))


@pytest.mark.parametrize(("template", "greeting"), [
    ("{% if messages[0]['role'] != 'system' %}<|im_start|>You are a friend to all who ask.\n"
     "{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}", True),
    ("{% for m in messages %}{{ m['content'] }}{% endfor %}", False)])
def test_a_templates_own_greeting_goes(toy, tokenizer, tmp_path, template, greeting):
    source = tmp_path / "model"
    source.mkdir()
    for file in (toy / "base").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    found = cold_start.without_greeting(source, tmp_path / "start")
    assert found == (tmp_path / "start" if greeting else source)
    text = Tokenizer.from_dir(found).chat("Hello")
    assert b"friend" not in tokenizer.bytes_of(text)
    assert evaluation.load_pretrained(found).config == evaluation.load_pretrained(source).config


@pytest.fixture
def corpus(tmp_path):
    """The README's paragraphs."""
    file = tmp_path / "corpus.jsonl"
    lines = (ROOT / "README.md").read_text().split("\n\n")
    texts = [{"text": line} for line in lines if len(line) > 40]
    file.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return file


def test_mixed_rows_are_the_training_documents_and_annotations_of_their_positions(
        toy, corpus, tmp_path, capsys):
    shared = ["--cache", str(tmp_path / "cache"), "--dtype", "float32", "--device", "cpu"]
    mixed_sft.main(["--model", str(toy / "base"), "--corpus", str(corpus), "--holdout", "12",
                    "--out", str(tmp_path / "mixed"), "--region", "all", *shared])
    file = tmp_path / "mixed" / "rows.jsonl"
    texts = [row["text"] for row in rows(file) if "text" in row]
    answered = [row for row in rows(file) if "prompt" in row]
    there = [row["text"] for row in rows(corpus)]
    assert len(texts) == len(answered) == len(there) - 12
    assert texts == [text for text in there if text in texts]
    for row in answered:
        context = row["prompt"].removeprefix("Next token?\n")
        assert any(text.startswith(context) for text in texts)
        thought, boxed = row["response"].removesuffix("}").split("</think>\n\n\\boxed{")
        assert thought.endswith(boxed) and context.endswith(thought.removesuffix(boxed))
    train.main(["--stage", "ntp", "--model", str(toy / "base"), "--corpus", str(file), "--steps",
                "1", "--holdout", "0", "--max-prompt", "384", "--out", str(tmp_path / "run"),
                *shared])
    assert rows(tmp_path / "run" / "metrics.jsonl")[0]["loss"] > 0


def test_a_model_that_is_not_there_is_one_sentence(corpus, tmp_path, capsys):
    for recipe in (cold_start, mixed_sft):
        with pytest.raises(SystemExit):
            recipe.main(["--model", str(tmp_path / "nowhere" / "x"), "--corpus", str(corpus),
                         "--out", str(tmp_path / "run")])
        assert "no such model directory" in capsys.readouterr().err


def test_the_chain_of_cold_start_run_and_evaluation_on_real_text(toy, corpus, tmp_path, capsys):
    shared = ["--corpus", str(corpus), "--cache", str(tmp_path / "cache"), "--holdout", "12",
              "--region", "all", "--dtype", "float32", "--questions", "8", "--group-size", "4"]
    cold = tmp_path / "cold"
    cold_start.main(["--model", str(toy / "base"), "--out", str(cold), "--steps", "200",
                     "--lr", "0.003", *shared])
    looks = [row for row in rows(cold / "metrics.jsonl") if "on_track" in row]
    assert looks[-1]["parsed"] > 0.5 and looks[-1]["loss"] < looks[0]["loss"]
    run = tmp_path / "run"
    train.main(["--model", str(cold / "model"), "--proxy", str(toy / "base"), "--out", str(run),
                "--steps", "3", "--template", "toy", "--max-context", "112", "--max-response", "32",
                "--max-prompt", "256", "--eval-questions", "20", *shared])
    before, after = rows(run / "evals.jsonl")
    assert before["held-out"]["easy"]["parsed"][0] > 0.3 and after["step"] == 3
    capsys.readouterr()
    evaluation.main([str(run), "--questions", "10", "--samples", "2"])
    assert "reasoning" in capsys.readouterr().out
