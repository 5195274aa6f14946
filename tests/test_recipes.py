"""Each program of paper/recipes runs as it says, and computes what it says."""

import json
import math
import runpy
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_rounds_to, plain_logits, tiny
from test_rpt import METHOD, assert_gradient, coin, descent

import rpt
import train
from data import Question, Tokenizer, hold_out, load_corpus, prompt_ids, select_positions
from paper.recipes import (auxiliary_loss, deduplicate, dr_grpo, easy_groups, information_gain,
                           random_positions)
from paper.recipes.format_only import format_only
from paper.recipes.leave_one_out import leave_one_out
from paper.recipes.length_budget import BUDGET, brief
from rpt import Group, Policy, Response

FOLDER = ROOT / "paper" / "recipes"
RUNS = sorted(file.stem for file in FOLDER.glob("*.py")
              if f"    torchrun -m paper.recipes.{file.stem} " in file.read_text())
REPLACED = {"dr_grpo": (rpt, "accumulate"), "leave_one_out": (rpt, "group_advantages"),
            "random_positions": (train, "select_positions")}


@pytest.fixture(scope="module")
def tokenizer(toy):
    return Tokenizer(toy / "base")


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_runs_on_the_toy_by_its_command(monkeypatch, tmp_path, name):
    module, patched = REPLACED.get(name, (train, "main"))
    usual = getattr(module, patched)
    monkeypatch.setattr(module, patched, usual)  # to be put back
    options = (f"--out {tmp_path} --cache {tmp_path.parent}/cache --steps 2 --questions 5 "
               "--group-size 4 --max-response 40 --holdout 40 --eval-questions 0 --device cpu")
    monkeypatch.setattr(sys, "argv", [name, *options.split()])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    metrics = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["skipped"] for row in metrics] == [0, 0]
    assert (getattr(module, patched) is usual) == (name not in REPLACED)


# ---- rewards, advantages, weights, groups


def test_leave_one_out_compares_with_the_mean_of_the_others():
    row = np.random.default_rng(0).random(6)
    want = [r - np.delete(row, n).mean() for n, r in enumerate(row)]
    assert_rounds_to(leave_one_out(torch.tensor(row[None]))[0], want, 8, 1)
    assert not leave_one_out(torch.full((1, 3), 0.1)).any()


def test_rewards_pay_for_brevity_and_for_any_box():
    question = Question((), (b" D", b"."), 0, 0)
    responses = [b"</think>\\boxed{%b}" % text for text in (b" D", b" D.", b" ", b" E")]
    assert format_only([*responses, b""], question, None) == [1, 1, 1, 1, 0]
    right = responses[0]
    long = [b"x" * (BUDGET + n - len(right)) + right for n in (0, 1, 50, 200)]
    assert brief([*long, responses[3]], question, None) == [1, 0.99, 0.5, 0, 0]


@pytest.mark.parametrize("per", ["constant", "sequence"])
def test_dr_grpo_weighs_every_response_alike_or_no_length_at_all(monkeypatch, per):
    monkeypatch.setattr(dr_grpo, "usual", lambda model, examples, method: examples)
    monkeypatch.setattr(dr_grpo, "PER", per)
    group = [Response([0] * n, [0.0] * n, 1.0, 1 / 11) for n in (1, 3, 7)]
    ((prompt, weighed),) = dr_grpo.accumulate(None, [([5], group)], METHOD)
    total = [r.weight * len(r.ids) * METHOD.questions * METHOD.group_size for r in weighed]
    assert total == pytest.approx([1] * 3 if per == "sequence" else
                                  [n / METHOD.max_response for n in (1, 3, 7)])
    assert prompt == [5] and [replace(r, weight=1 / 11) for r in weighed] == group


def test_the_auxiliary_loss_adds_the_gradient_of_next_token_prediction(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "eos_ids", list(range(0, len(tokenizer), 9)))
    policy = Policy(tiny(vocab_size=len(tokenizer), tie_word_embeddings=True), tokenizer)
    questions = [Question((n, 5, 7, n), (), n, 0) for n in range(6)]
    gradient, optimizer = {}, torch.optim.SGD(policy.model.parameters(), 0.0)
    optimizer.register_step_pre_hook(lambda *_: gradient.update(
        {name: p.grad.clone() for name, p in policy.model.named_parameters()}))
    method = replace(METHOD, temperature=1.0)
    groups, metrics = auxiliary_loss.one_step(policy, optimizer, lambda *_: questions, 0, method,
                                              coin, 0)
    assert metrics["informative"] > 0
    plain = [(q.context[:1], q.context[1:], [-0.1 / 18] * 3) for q in questions]
    assert_gradient(gradient, policy.model, descent(policy.model, groups, method)[0] + plain, 1.0)


def test_easy_groups_are_kept_with_falling_probability(monkeypatch):
    monkeypatch.setattr(easy_groups, "update", lambda *_: {})
    for right in range(5):
        rewards = [1.0] * right + [0.0] * (4 - right)
        groups = [Group((n % 50, 0, n), None, [], [], [], rewards) for n in range(2000)]
        monkeypatch.setattr(easy_groups, "sample_groups", lambda *_: groups)  # noqa: B023
        easy_groups.one_step(Policy(None, None), None, None, 0, METHOD, None, 7)
        want = min(1, 1 - 1.2 * (right / 4 - 0.25))
        share = np.mean([group.kept for group in groups])
        assert abs(share - want) <= 4 * math.sqrt(want * (1 - want) / 2000)


# ---- positions and documents


def test_random_positions_are_of_the_usual_ones_whatever_their_entropy(toy, tokenizer):
    corpus = load_corpus(toy / "corpus.jsonl", tokenizer, 40, 0, 256)
    entropy = np.arange(len(corpus.tokens), dtype=np.float32) % 2
    every = select_positions(corpus, entropy, False, -1.0)
    some = random_positions.at_random(corpus, entropy, False, 0.5).places
    assert set(some) < set(every.places)
    assert abs(len(some) / len(every) - 0.15) < 4 * math.sqrt(0.15 * 0.85 / len(every))
    assert abs(entropy[some].mean() - 0.5) < 4 * math.sqrt(0.25 / len(some))  # whatever it is
    held = random_positions.at_random(corpus, entropy, True, 0.5).places
    assert (held == select_positions(corpus, entropy, True, 0.5).places).all()


def test_near_duplicates_of_held_out_documents_go(tmp_path):
    words = np.random.default_rng(0).integers(10**6, size=(30, 30)).astype(str).tolist()
    for share in (18, 19):  # 11 and 12 of 23 runs of eight
        words += [[*a[:share], *b[share:]] for a, b in zip(words[:30], words[1:30])]
    source, texts = tmp_path / "in.txt", list(map(" ".join, words))
    source.write_text("<|endoftext|>".join(texts))
    deduplicate.main([source, tmp_path / "out", "12", "3"])
    left = [json.loads(line)["text"] for line in open(tmp_path / "out")]
    runs, held = [{(*each[n: n + 8],) for n in range(23)} for each in words], hold_out(texts, 12, 3)
    want = [text for text, own, out in zip(texts, runs, held) if out or max(
        len(own & runs[n]) for n in np.flatnonzero(held)) < 12]
    assert left == want != texts


# ---- RLP's information gain


def test_information_gain_compares_the_thoughtful_policy_with_the_plain_reference(
        tokenizer, monkeypatch):
    model, reference = (tiny(seed=seed, vocab_size=len(tokenizer)) for seed in (0, 1))
    monkeypatch.setattr(information_gain, "load_reference", lambda *_: reference)
    run, context = train.parse([]), tokenizer.encode("The ball is under A. 1 C A. It is under")
    question = Question(tuple(context), (b" C",), 0, 0)
    responses = [b"A 1 C A.\n</think>\n\n\\boxed{ A}", b"</think>", b"never ends", b""]
    got = information_gain.information_gain(run, responses, question, Policy(model, tokenizer))

    def logprob(model, ids):
        return plain_logits(model, ids)[-1].log_softmax(-1)[tokenizer.encode(" C")].item()

    prompt = prompt_ids(tokenizer, question, "toy", run.max_prompt)
    want = [logprob(model, prompt + tokenizer.encode_chat(thought + "</think>\n\n\\boxed{"))
            - logprob(reference, context) for thought in ("A 1 C A.\n", "")]
    want += [min(0, *want)] * 2  # it never pays not to finish a thought
    assert got == pytest.approx(want, abs=1e-4)  # float32, of logits below 10
