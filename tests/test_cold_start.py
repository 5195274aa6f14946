"""The cold start teaches a form and the model's own guesses; then the chain on real text."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_rounds_to, plain_logits, tiny
from test_rpt import METHOD

import train
from data import TEMPLATES, Question, Tokenizer
from paper.recipes import cold_start, mixed_sft
from paper.recipes.cold_start import KEEP, TAIL, annotation, imitate
from rpt import Policy

ROUNDINGS = 20  # of a loss or norm: sums over layers, tokens and vocabulary err by .3 to 4


@pytest.fixture(scope="module")
def tokenizer(toy):
    return Tokenizer(toy / "base")


@pytest.fixture
def models(tokenizer):
    """An annotator, and a policy that is another model."""
    annotator, model = (tiny(vocab_size=len(tokenizer), seed=seed) for seed in (1, 0))
    return annotator, Policy(model, tokenizer)


@pytest.fixture
def corpus(tmp_path):
    """The README's paragraphs."""
    texts = [text for text in (ROOT / "README.md").read_text().split("\n\n") if len(text) > 40]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return tmp_path / "corpus.jsonl"


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def questions(tokenizer, truth=b" A"):
    texts = ["The ball is under A. 1 C A. The ball is now under", "The ball is under D. 2 D"]
    return [Question(tuple(tokenizer.encode(text)), (truth,), n, 0) for n, text in enumerate(texts)]


def randoms():
    return [np.random.default_rng(n) for n in range(2)]


@pytest.mark.parametrize("max_prompt", [128, 24])  # 24: a context loses its beginning
def test_the_loss_is_of_the_form_and_of_two_divergences_whatever_the_truth(models, tokenizer,
                                                                       monkeypatch, max_prompt):
    monkeypatch.setattr(tokenizer, "bos", [7])  # the annotator's texts begin with it
    (annotator, policy), form, at_guess, kept = models, [], [], []
    method = replace(METHOD, max_prompt=max_prompt)
    loss, figures = imitate(annotator, policy, questions(tokenizer), randoms(), method)
    assert loss == imitate(annotator, policy, questions(tokenizer, b" Z"), randoms(), method)[0]
    shell = tokenizer.chat(TEMPLATES["toy"], [-1])
    room, front = max_prompt + 1 - len(shell), shell.index(-1)
    braces = [bytes.count(b"{") - bytes.count(b"}")
              for bytes in map(tokenizer.token_bytes, range(len(tokenizer)))]
    cannot = [id for id, open in enumerate(braces) if open or id in tokenizer.special.values()]
    for question, random in zip(questions(tokenizer), randoms()):
        context = question.context[-room:]
        places, tail = random.integers(0, len(context), KEEP), int(random.choice(TAIL))
        ours = plain_logits(annotator, [7, *context])[1:].detach()
        likely = ours[-1].index_fill(0, torch.tensor(cannot), -torch.inf).log_softmax(-1)
        guess = int(np.searchsorted(likely.exp().numpy().cumsum(), random.random()))
        answer = annotation(tokenizer, context[-tail:], guess)
        prompt = tokenizer.chat(TEMPLATES["toy"], context)
        theirs = plain_logits(policy.model, prompt + answer).log_softmax(-1)
        form += [-theirs[len(prompt) - 1 + n, id] for n, id in enumerate(answer) if n != tail]
        at = theirs[len(prompt) - 1 + tail]
        at_guess.append(torch.where(likely.isfinite(), likely.exp() * (likely - at), 0).sum())
        ours = ours.log_softmax(-1)
        kept += [(ours[n].exp() * (ours[n] - theirs[front + n])).sum() for n in places]
    want = sum(form) / len(form) + (sum(at_guess) / 2 + sum(kept) / len(kept)) / 2
    assert_rounds_to(loss, want, ROUNDINGS)
    assert figures[0, 4] == len(form)


def test_an_annotation_is_the_end_of_the_context_and_a_boxed_guess(tokenizer):
    context, token = tokenizer.encode("The ball is under A. 1 C A."), tokenizer.encode(" B")[0]
    ids = annotation(tokenizer, context[-5:], token)
    assert tokenizer.bytes_of(ids[:-1]) == b" 1 C A. B</think>\n\n\\boxed{ B}"
    assert ids[-1] in tokenizer.eos_ids and ids[6] == tokenizer.special["</think>"]


def test_the_learning_rate_rises_stays_and_falls(models, tokenizer, monkeypatch):
    annotator, policy = models
    monkeypatch.setattr(cold_start, "load_annotator", lambda *_: annotator)
    monkeypatch.setattr(cold_start, "rollout", lambda *_: [])
    optimizer, rates = torch.optim.SGD(policy.model.parameters(), lr=1.0), []
    run = train.Run(steps=20, lr=0.01, max_prompt=128, template="toy")
    for step in range(20):
        cold_start.one_step(policy, optimizer, lambda *_: questions(tokenizer), step, run, None, 0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01 * min(1, (n + 1) / 5, (20 - n) / 8) for n in range(20)])


def test_two_processes_learn_what_one_does(toy, corpus, tmp_path):
    """The first step's loss and gradient, of five questions: two processes have uneven shares."""
    options = (f"--model {toy}/base --corpus {corpus} --dtype float32 --cache {tmp_path} --device "
               f"cpu --questions 5 --group-size 2 --steps 1 --holdout 5 --out {tmp_path}/")
    runs = [subprocess.Popen(
        [sys.executable, *f"-m torch.distributed.run --standalone --nproc-per-node {processes} -m "
         f"paper.recipes.cold_start {options}{processes}".split()], cwd=ROOT) for processes in "12"]
    assert [run.wait() for run in runs] == [0, 0]
    one, two = (rows(tmp_path / processes / "metrics.jsonl")[0] for processes in "12")
    assert one["trained_tokens"] == two["trained_tokens"]
    for name in ("loss", "grad_norm", "nll"):
        assert_rounds_to(torch.tensor(two[name]), torch.tensor(one[name]).double(), ROUNDINGS)


def test_mixed_rows_are_the_training_documents_and_annotations_of_their_positions(
        toy, corpus, tmp_path):
    mixed_sft.main(f"--model {toy}/base --corpus {corpus} --holdout 5 --out {tmp_path} --cache "
                   f"{tmp_path} --dtype float32 --device cpu".split())
    found, there = rows(tmp_path / "rows.jsonl"), [row["text"] for row in rows(corpus)]
    texts = [row["text"] for row in found if "text" in row]
    assert len(found) / 2 == len(texts) == len(there) - 5
    assert texts == [text for text in there if text in texts]
    for row in found[len(texts):]:
        context = row["prompt"].removeprefix("Next token?\n")
        thought, boxed = row["response"].removesuffix("}").split("</think>\n\n\\boxed{")
        assert any(context in text for text in texts) and thought.endswith(boxed)
        assert context.endswith(thought.removesuffix(boxed))


def test_the_chain_of_cold_start_and_run_on_real_text(toy, corpus, tmp_path):
    shared = (f"--corpus {corpus} --cache {tmp_path} --holdout 5 --dtype float32 --questions 8 "
              "--group-size 4 --template toy --max-response 32 --max-prompt 128 --device cpu ")
    train.main(f"{shared} --model {toy}/base --steps 120 --lr 0.005 --out {tmp_path}/cold".split(),
               one_step=cold_start.one_step, defaults=cold_start.DEFAULTS)
    looks = [row for row in rows(tmp_path / "cold" / "metrics.jsonl") if "parsed" in row]
    assert looks[-1]["parsed"] > 0.5 and looks[-1]["loss"] < looks[0]["loss"]
    train.main(f"{shared} --model {tmp_path}/cold/model --proxy {toy}/base --steps 1 "
               f"--eval-questions 20 --out {tmp_path}/run".split())
    assert rows(tmp_path / "run" / "evals.jsonl")[0]["held-out"]["easy"]["parsed"][0] > 0.3
