"""Each change of paper/recipes runs by its own command, and computes what it says."""

import copy
import dataclasses
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import rpt
import train
from data import Question, Tokenizer, load_corpus, prompt_ids, select_positions
from helpers import assert_rounds_to, exact_gradient, exact_logprobs, tiny
from paper.recipes import auxiliary_loss, capital_letters, easy_groups
from paper.recipes.information_gain import DECAY, InformationGain, likelihood
from paper.recipes.leave_one_out import leave_one_out
from paper.recipes.length_budget import BUDGET, brief
from paper.recipes.longer_predictions import longer
from rpt import Completion, Group, Policy
from test_rpt import GRADIENT, METHOD, descent
from test_train import results, rows
from worker import coin

FOLDER = Path(auxiliary_loss.__file__).parent
RECIPES = sorted({file.stem for file in FOLDER.glob("[a-z]*.py")} 
                 - {"cold_start", "mixed_sft"})  # they have their own file


@pytest.fixture(scope="module")
def tokenizer(toy):
    return Tokenizer.from_dir(toy / "base")


@pytest.fixture
def launch(command, tmp_path, monkeypatch):
    """Runs a recipe's file as a command; its folder."""
    for module, name in ((rpt, "group_advantages"), (evaluation, "select_positions"),
                         (train, "log")):
        monkeypatch.setattr(module, name, getattr(module, name))  # what it replaces is put back

    def run(name, *more, out="run"):
        arguments = command(tmp_path / out, "--eval-questions", 0, *more)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return tmp_path / out

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_on_the_toy(launch, name):
    if name == "tensorboard":
        pytest.importorskip("tensorboard")
    out = launch(name)
    metrics = rows(out / "metrics.jsonl")
    assert len(metrics) == 3 and all(row["skipped"] == 0 for row in metrics)
    assert sum(row["informative"] for row in metrics) > 0 and (out / "model").is_dir()
    assert f" -m paper.recipes.{name}" in (FOLDER / f"{name}.py").read_text()  # it says how


def test_tensorboard_is_told_what_the_metrics_say(launch):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = launch("tensorboard")
    events = reading.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    wanted = [np.float32(row["reward"]) for row in rows(out / "metrics.jsonl")]
    assert [event.value for event in events.Scalars("reward")] == wanted


# ---- rewards, advantages, filters


def test_leave_one_out_compares_with_the_mean_of_the_others():
    rewards = torch.tensor(np.random.default_rng(0).random((4, 6)))
    rewards[2] = 0.1
    for row, got in zip(rewards.tolist(), leave_one_out(rewards)):
        want = [r - math.fsum(row[:n] + row[n + 1:]) / 5 for n, r in enumerate(row)]
        assert_rounds_to(got, torch.tensor(want, dtype=torch.float64), 8, 1)
    assert (leave_one_out(rewards)[2] == 0).all()


def test_longer_predictions_earn_their_length_and_long_responses_pay():
    question = Question((), (b" D", b"."), 0, 0)
    responses = [b"</think>\\boxed{" + text + b"}" for text in (b" D", b" D.", b" ", b" E")]
    assert longer(responses, question, None) == [2, 3, 0, 0]
    right = responses[0]
    long = [b"x" * (BUDGET + n - len(right)) + right for n in (0, 1, 50, 200)]
    assert brief([*long, responses[3]], question, None) == [1, 0.99, 0.5, 0, 0]


def test_capital_letters_are_the_usual_positions_before_one(toy, tokenizer, tmp_path):
    corpus = load_corpus(toy / "corpus.jsonl", tokenizer, tmp_path, 40, 0)
    entropy = np.ones(len(corpus.tokens), np.float32)
    every = select_positions(corpus, entropy, train.PositionFilter(region="all"))
    found = capital_letters.capitals(corpus, entropy, train.PositionFilter(region="all"))
    texts = [b"".join(every[n].truth).lstrip() for n in range(0, len(every), 97)]
    capital = [text[:1].isupper() for text in texts]
    assert np.isin(every.positions[::97], found.positions).tolist() == capital
    assert 0 < sum(capital) < len(texts)


# ---- RMT's auxiliary loss


def test_the_auxiliary_loss_adds_the_gradient_of_next_token_prediction(toy):
    tokenizer = Tokenizer.from_dir(toy / "base")
    tokenizer.eos_ids = list(range(0, len(tokenizer), 9))  # a random model ends a response, too
    policy = Policy(tiny(vocab_size=len(tokenizer), tie_word_embeddings=True), tokenizer)
    texts = ["The ball is under A. 1 C A.", "2 B A.", "The ball"]
    questions = [Question(tuple(tokenizer.encode(text)), (b" A",), n, 0)
                 for n, text in enumerate(texts)]
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    method = dataclasses.replace(METHOD, questions=3, grad_clip=1e9)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    groups, metrics = auxiliary_loss.one_step(policy, optimizer, lambda *_: questions, 0, method,
                                              coin, 0)
    moved = {name: before[name] - p.detach() for name, p in policy.model.named_parameters()}
    policy.model.load_state_dict(before)
    tokens = sum(len(c.ids) for group in groups for c in group.completions)
    first = descent([g for g in groups if g.informative], method, tokens, 0)
    predicted = sum(len(q.context) - 1 for q in questions)
    second = [(q.context[:1], q.context[1:], [-0.1 / predicted] * (len(q.context) - 1))
              for q in questions]
    (one, size), (two, more) = (exact_gradient(policy.model, part, temperature)
                                for part, temperature in ((first, 0.8), (second, 1.0)))
    assert metrics["informative"] > 0 and not metrics["skipped"]
    for name, got in moved.items():  # and one rounding of the weight
        scale = size[name] + more[name] + before[name].abs().max() / GRADIENT
        assert_rounds_to(got, one[name] + two[name], GRADIENT, scale)


# ---- easy groups


def test_easy_groups_are_kept_with_falling_probability(monkeypatch):
    kept, said = {}, [Completion([1], [0.0], True)] * 4
    monkeypatch.setattr(easy_groups, "update", lambda *_: {})
    for right in range(5):
        groups = [Group((0, n), Question((), (), 0, 0), [1], said, [b""] * 4,
                        [1.0] * right + [0.0] * (4 - right), [0.0] * 4) for n in range(1000)]
        monkeypatch.setattr(easy_groups, "sample_groups", lambda *_: groups)  # noqa: B023
        policy = Policy(None, None)
        for step in range(2):
            easy_groups.one_step(policy, None, None, step, METHOD, None, 7)
            kept[right, step] = [group.kept for group in groups]
            for group in groups:
                group.kept = True
        want = min(1, 1 - 1.2 * (right / 4 - 0.25))
        share = np.mean(kept[right, 0] + kept[right, 1])
        assert abs(share - want) <= 4 * math.sqrt(want * (1 - want) / 2000), right
    assert kept[2, 0] != kept[2, 1]  # another coin in each step


# ---- RLP's information gain


def gain_of(policy, average):
    gain = InformationGain(METHOD)
    gain.average = average
    return gain


def test_information_gain_compares_the_thoughtful_policy_with_the_plain_average(tokenizer):
    model, average = (tiny(seed=seed, vocab_size=len(tokenizer)) for seed in (0, 1))
    context = tuple(tokenizer.encode("The ball is under A. 1 C A. It is under"))
    truth = tokenizer.encode(" C")[0]
    question = Question(context, (tokenizer.token_bytes(truth),), 0, 0)
    responses = [b"A 1 C A.\n</think>\n\n\\boxed{ A}", b"</think>", b"never ends", b""]
    gain = gain_of(None, average)
    got = gain(responses, question, Policy(model, tokenizer))
    prompt = prompt_ids(tokenizer, question, "toy", METHOD.max_prompt)
    thoughts = [text.split(b"</think>")[0].decode() for text in responses[:2]]
    texts = [(prompt + tokenizer.response_ids(thought + "</think>\n\n\\boxed{"), [truth])
             for thought in thoughts]
    exact, allowed = exact_logprobs(model, texts)
    (plain,), more = exact_logprobs(average, [([*tokenizer.bos, *context], [truth])])
    for one, logprobs in zip(got, exact):
        assert abs(one - (logprobs[0, truth] - plain[0, truth])) <= allowed + more


def test_not_to_finish_a_thought_never_pays(tokenizer, monkeypatch):
    gains = [-3.0, 0.5, -1.0, 2.0]
    monkeypatch.setitem(InformationGain.__call__.__globals__, "likelihood",
                        lambda model, runs, ids: torch.tensor(gains if len(runs) > 1 else [0.0]))
    question = Question((1,), (b" A",), 0, 0)
    responses = [b"a</think>", b"", b"b</think>", b"c</think>"]  # the second does not end
    policy = Policy(None, tokenizer)
    assert gain_of(policy, None)(responses, question, policy) == [-3, -3, -1, 2]
    gains[:] = [3.0, 0.5, 1.0, 2.0]
    assert gain_of(policy, None)(responses, question, policy) == [3, 0, 1, 2]
    assert gain_of(policy, None)([b""] * 4, question, policy) == [0] * 4


def test_the_likelihood_of_what_is_nearly_impossible_is_finite():
    model = tiny()
    with torch.no_grad():
        model.head.mul_(1000)
    got = likelihood(model, [[1, 2, 3]], list(range(40)))
    assert_rounds_to(got, torch.zeros(1).double(), 8, 1)  # one of all tokens follows
    every = torch.stack([likelihood(model, [[1, 2, 3]], [token])[0] for token in range(40)])
    assert every.isfinite().all() and every.min() < -200  # softmax().log() has no such number


def test_the_average_follows_the_policy_and_survives_a_restart(launch, tokenizer, monkeypatch):
    once = results(launch("information_gain", "--lr", 0.01, out="once"))
    launch("information_gain", "--lr", 0.01, "--steps", 1, out="twice")
    assert results(launch("information_gain", "--lr", 0.01, out="twice")) == once
    model = tiny()
    gain, policy = InformationGain(METHOD), Policy(model, tokenizer)
    gain.extra(policy)
    old = copy.deepcopy(gain.average.state_dict())

    def moved(*_):
        with torch.no_grad():
            model.head.add_(1)
        return [], {}

    monkeypatch.setattr(rpt, "rpt_step", moved)
    gain.step(policy)
    for name, new in gain.average.state_dict().items():
        want = DECAY * old[name].double() + (1 - DECAY) * model.state_dict()[name].double()
        assert_rounds_to(new, want, 2)
    assert not torch.equal(gain.average.head, old["lm_head.weight"])
