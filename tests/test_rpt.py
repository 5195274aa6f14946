"""Laws of the method: advantages, loss, gradient and step, against enumeration, float64 and plain
forward passes."""

import copy
import itertools
import math
from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest
import torch
from helpers import (ExplicitDevices, assert_rounds_to, exact_gradient, exact_logprobs, in_float64,
                     plain_logits, tiny)
from torch.autograd.graph import saved_tensors_hooks

import rpt
from data import Question, Tokenizer, prompt_ids
from rpt import (Group, Method, Policy, Response, group_advantages, pack, policy_loss, rollout,
                 rpt_step, token_logprobs, update)
from sampler import Completion

METHOD = Method(questions=6, group_size=4, max_prompt=128, max_response=12, template="toy",
                max_rows=10, grad_clip=1e9)
# A gradient errs by a few dozen roundings of the largest sum of the rows' absolute gradients: it
# passes through two layers and the head, and sums over 32 channels and some hundred tokens. Errors
# of random sign add up to the roots of these numbers. A ratio errs as much again.
GRADIENT = 128


@pytest.fixture(scope="module")
def tokenizer(toy):
    """The toy's, with so many end tokens that a random model ends a response now and then."""
    tokenizer = Tokenizer(toy / "base")
    tokenizer.eos_ids = list(range(0, len(tokenizer), 9))
    return tokenizer


@pytest.fixture(scope="module")
def questions(tokenizer):
    random = np.random.default_rng(0)
    return [Question(tuple(random.integers(len(tokenizer), size=n + 1).tolist()), (), n, 0)
            for n in range(40)]


@pytest.fixture
def policy(tokenizer):
    return Policy(tiny(vocab_size=len(tokenizer), tie_word_embeddings=True), tokenizer)


def coin(responses, question, policy):
    """A reward that any model can earn: 1 for half of the responses, but not to every question."""
    return [float(crc32(r) % 2 and question.document % 3 > 0) for r in responses]


def sampled(policy, questions, method=METHOD, reward=coin):
    return rollout(policy, {(0, 0, n): q for n, q in enumerate(questions)}, method, reward, 0)


def same(model, other):
    return all(map(torch.equal, model.parameters(), other.parameters()))


def updated(model, groups, method=METHOD, lr=0.0):
    """Run `update`; also return the model and its gradient at each optimizer step."""
    steps, optimizer = [], torch.optim.SGD(model.parameters(), lr)
    optimizer.register_step_pre_hook(lambda *_: steps.append(
        (copy.deepcopy(model), {name: p.grad.clone() for name, p in model.named_parameters()})))
    return update(model, optimizer, groups, method), steps


def descent(model, groups, method):
    """The loss's gradient as rows (prompt, ids, a coefficient of each log-probability), and the
    ratio of each token, by definition."""
    tokens = sum(len(c.ids) for group in groups for c in group.completions)
    rows, ratios = [], []
    for group in groups:
        rewards = np.array(group.rewards)
        if (rewards == rewards[0]).all():
            continue
        exact, _ = exact_logprobs(model, [(group.prompt, c.ids) for c in group.completions],
                                  method.temperature)
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for c, advantage, logprobs in zip(group.completions, advantages, exact):
            new = logprobs[range(len(c.ids)), c.ids].numpy()
            ratio = np.exp(new - c.logprobs) if method.updates > 1 else np.ones(len(new))
            beyond = (ratio > 1 + method.clip_high if advantage > 0
                      else ratio < 1 - method.clip_low)
            rows.append((group.prompt, c.ids, np.where(beyond, 0, -advantage * ratio / tokens)))
            ratios += ratio.tolist()
    return rows, np.array(ratios)


def assert_gradient(got, model, rows, temperature=METHOD.temperature, terms=GRADIENT, factor=1.0):
    exact, scale = exact_gradient(model, rows, temperature)
    assert max(scale.values()) > 0
    for name in got:
        assert_rounds_to(got[name], factor * exact[name], terms, factor * scale[name])


# ---- advantages and loss


def test_advantages_are_rewards_standardised_within_their_group():
    for row in np.random.default_rng(0).random((5, 8)):
        want = (row - row.mean()) / (row.std(ddof=1) + 1e-6)
        got = group_advantages(torch.tensor(row[None]))[0]
        assert_rounds_to(got, torch.tensor(want), 16, 1 / row.std())  # sums of 8 numbers below 1


def test_equal_rewards_have_an_advantage_of_exactly_zero():
    for value, size in itertools.product((0.0, 0.1, 0.95, 1 / 3), (2, 3, 7)):
        assert not group_advantages(torch.tensor([[value] * size], dtype=torch.float64)).any()


def test_policy_loss_is_the_clipped_surrogate():
    new, old, a, weights = np.random.default_rng(1).normal(size=(4, 200))
    ratio = np.exp(new - old)
    terms = -weights * np.minimum(ratio * a, ratio.clip(0.9, 1.3) * a)
    loss = policy_loss(*map(torch.tensor, (new, old, a, weights)), 0.1, 0.3)
    assert_rounds_to(loss.item(), math.fsum(terms), 8, np.abs(terms).sum())


def test_a_ratio_beyond_floating_point_stays_finite():
    new = torch.tensor([0.0, -1e4], requires_grad=True)
    loss = policy_loss(new, torch.tensor([-1e4, 0.0]), torch.tensor([-1.0, 1.0]), torch.ones(2))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()


@pytest.mark.parametrize("chunk", [1, 7, 2**20])  # one token, a ragged last chunk, everything
def test_token_logprobs_are_the_full_softmax_without_all_its_logits(monkeypatch, chunk):
    monkeypatch.setattr(rpt, "HEAD_CHUNK", chunk)
    model, hidden, factors = tiny(), torch.randn(100, 32, requires_grad=True), torch.randn(100)
    targets = torch.arange(100) % 40
    saved, rows, linear = [], [], torch.nn.functional.linear
    monkeypatch.setattr(rpt.F, "linear", lambda h, head: rows.append(len(h)) or linear(h, head))
    with saved_tensors_hooks(lambda x: saved.append(x.shape[-1]) or x, lambda x: x):
        logprobs, entropy = token_logprobs(model, hidden, targets, 0.7)
    (logprobs * factors).sum().backward()
    assert max(rows) == min(chunk, 100) and 40 not in saved and not entropy.requires_grad
    exact_hidden, exact_head = (x.detach().double().requires_grad_() for x in (hidden, model.head))
    full = (exact_hidden @ exact_head.T / 0.7).log_softmax(-1)
    exact = full[range(100), targets]
    (exact * factors).sum().backward()
    # Logits are sums of 32 products: roundings of |h| |w| / T, which the gradient carries on.
    size = (exact_hidden.abs() @ exact_head.abs().T).max().item() / 0.7
    assert_rounds_to(logprobs, exact, 4, size)
    assert_rounds_to(entropy, -(full.exp() * full).sum(-1), 4 * math.log(40), size)
    for got, exact in ((hidden.grad, exact_hidden.grad), (model.head.grad, exact_head.grad)):
        assert_rounds_to(got, exact, 4 * size, exact.abs().max())


# ---- the gradient


def test_the_expected_update_is_the_gradient_of_the_expected_reward():
    """Every completion of a toy vocabulary, every pair of them as a group: the mean of what the
    code computes."""
    model, prompt, limit, end = tiny(vocab_size=3), [1, 2, 2], 3, 0
    completions = [c for n in range(1, limit + 1) for c in itertools.product(range(3), repeat=n)
                   if end not in c[:-1] and (c[-1] == end or n == limit)]
    rewards = dict(zip(completions, np.random.default_rng(7).random(len(completions))))
    exact, chance = in_float64(model), {}  # the oracle: a plain forward pass of each, and autograd
    for c in completions:
        logits = plain_logits(exact, [*prompt, *c])[len(prompt) - 1: -1] / METHOD.temperature
        chance[c] = logits.log_softmax(-1)[range(len(c)), c].sum().exp()
    assert_rounds_to(sum(chance.values()), torch.tensor(1.0).double(), 16)
    sum(chance[c] * rewards[c] for c in completions).backward()

    examples = []
    for pair in itertools.product(completions, repeat=2):
        earned = torch.tensor([[rewards[c] for c in pair]])
        advantages = group_advantages(earned, False)[0] * chance[pair[0]] * chance[pair[1]]
        examples.append((prompt, [Response(c, [0.0] * len(c), a, 1.0)
                                  for c, a in zip(pair, advantages.tolist())]))
    rpt.accumulate(model, examples, replace(METHOD, micro_tokens=4000))
    # A group of two has sum of A_i grad log p_i = (1 - 1/2) 2 grad E[R] on average. |A| is below
    # 1/2, and each completion stands twice with each other one.
    rows = [(prompt, c, [chance[c].item()] * len(c)) for c in completions]
    _, scale = exact_gradient(model, rows, METHOD.temperature)
    for (name, p), exact in zip(model.named_parameters(), exact.parameters()):
        assert_rounds_to(p.grad, -exact.grad, GRADIENT, scale[name])


@pytest.mark.parametrize("model_type, micro_tokens, temperature", [
    ("qwen2", 1, 0.8), ("qwen3", 60, 0.3), ("llama", 400, 1.5), ("qwen2", 10**6, 0.8)])
def test_a_step_is_that_of_plain_forwards_whatever_the_slices(policy, questions, model_type,
                                                              micro_tokens, temperature):
    policy.model = tiny(model_type, vocab_size=len(policy.tokenizer), tie_word_embeddings=True)
    method = replace(METHOD, micro_tokens=micro_tokens, temperature=temperature)
    groups = sampled(policy, questions[:6], method)
    informative = [group for group in groups if group.informative]
    assert 0 < len(informative) < 6  # all tokens are in the mean
    metrics, [(model, got)] = updated(policy.model, groups, method)
    rows, _ = descent(model, groups, method)
    assert_gradient(got, model, rows, temperature)
    exact, scale = exact_gradient(model, rows, temperature)
    norm = sum((g**2).sum() for g in exact.values()).sqrt().item()
    assert abs(metrics["grad_norm"] - norm) <= GRADIENT * 2**-23 * max(scale.values())
    _, [(_, clipped)] = updated(model, groups, replace(method, grad_clip=0.01))
    assert_gradient(clipped, model, rows, temperature, 2 * GRADIENT, 0.01 / norm)

    texts = [(group.prompt, c.ids) for group in informative for c in group.completions]
    exact, allowed = exact_logprobs(model, texts, temperature)
    nll = -torch.cat([logp[range(len(ids)), ids] for (_, ids), logp in zip(texts, exact)])
    assert abs(metrics["nll"] - nll.mean()) <= allowed
    assert metrics["trained_tokens"] == len(nll) and metrics["informative"] == len(informative)
    # The sampler's log-probabilities are off by no more, and neither are the trainer's.
    assert 0 < metrics["logprob_diff"] <= 2 * allowed


def test_each_of_several_updates_is_plain_autograd_on_the_same_responses(policy, questions):
    method = replace(METHOD, updates=3, clip_low=0.1, clip_high=0.2)
    groups = sampled(policy, questions[:6])
    once, _ = updated(policy.model, groups)
    metrics, steps = updated(policy.model, groups, method, lr=0.005)
    assert len(steps) == 3
    for number, (model, got) in enumerate(steps):
        rows, ratios = descent(model, groups, method)
        assert np.abs(np.subtract.outer(ratios, [0.9, 1.2])).min() > 1e-5  # beyond rounding
        clipped = np.mean([x == 0 for *_, row in rows for x in row])
        assert 0.1 < clipped < 0.9 if number else clipped == 0
        assert_gradient(got, model, rows, terms=2 * GRADIENT)
    assert metrics["logprob_diff"] == once["logprob_diff"]  # before the weights move


@pytest.mark.parametrize("good", [0, 1])  # updates before it
def test_an_update_that_is_not_finite_changes_nothing_and_is_said(policy, questions, good,
                                                                  monkeypatch):
    accumulate, models = rpt.accumulate, []

    def spoiled(model, *how):
        figures = accumulate(model, *how)
        models.append(copy.deepcopy(model))
        if len(models) > good:
            model.head.grad[0, 0] = float("inf")
        return figures

    monkeypatch.setattr(rpt, "accumulate", spoiled)
    groups = sampled(policy, questions[:6])
    metrics, steps = updated(policy.model, groups, replace(METHOD, updates=3), lr=0.1)
    assert len(steps) == good and metrics["skipped"] == 1 and ("loss" in metrics) == (good == 1)
    assert same(policy.model, models[good]) and same(policy.model, models[0]) == (good == 0)


def test_the_end_token_is_trained_and_nothing_after_it():
    """Only tokens that a completion has are in the loss, its last among them."""
    said = [Completion([7, 1], [-1.0] * 2, True), Completion([8, 9, 9], [-1.0] * 3, False)]
    group = Group((0, 0, 0), Question((), (), 0, 0), [3, 4, 5], said, [b"", b""], [1.0, 0.0])
    metrics, [(model, got)] = updated(tiny(), [group])
    assert_gradient(got, model, descent(model, [group], METHOD)[0])
    assert metrics["trained_tokens"] == 5


def test_a_group_of_equal_rewards_leaves_the_weights_bitwise_alone(policy, questions):
    before = copy.deepcopy(policy.model)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.1, weight_decay=0.1)
    equal = sampled(policy, questions[:2], reward=lambda r, q, p: [0.1] * len(r))
    assert update(policy.model, optimizer, equal, METHOD) == {"skipped": 0, "informative": 0}
    assert same(policy.model, before)


def test_parts_hold_every_item_once_within_the_budget_and_little_padding():
    items = list(enumerate(np.random.default_rng(3).integers(1, 60, 70).tolist()))
    for budget, padding in itertools.product((1, 50, 200, 10**6), (0, 1 / 32, 1.0)):
        parts = pack(items, lambda item: item[1], budget, padding)
        assert sorted(itertools.chain(*parts)) == items
        for part in parts:
            padded = len(part) * max(n for _, n in part)
            waste = padded - sum(n for _, n in part)
            assert len(part) == 1 or padded <= budget and waste <= padding * budget


# ---- the step


def test_dynamic_sampling_trains_on_informative_groups_and_stops_at_its_cap(policy, questions):
    method = replace(METHOD, dynamic_from=2, max_response=30)
    optimizer = torch.optim.SGD(policy.model.parameters())

    def draws(step, reward):
        retries = []

        def draw(step, retry):
            retries.append(retry)
            return questions[6 * retry: 6 * retry + 6]

        return *rpt_step(policy, optimizer, draw, step, method, reward, 0), retries

    groups, _, retries = draws(1, coin)  # not yet
    assert retries == [0] and len(groups) == 6 and all(g.kept for g in groups)
    groups, metrics, retries = draws(2, coin)
    assert 1 < len(retries) <= 1 + rpt.MAX_REFILLS and len(groups) == 6 * len(retries)
    assert metrics["informative"] == 6 and sum(g.informative for g in groups[:-6]) < 6
    # The first to come are kept.
    assert [g for g in groups if g.kept] == [g for g in groups if g.informative][:6]
    groups, metrics, retries = draws(2, lambda r, *_: [0.0] * len(r))
    assert retries == list(range(1 + rpt.MAX_REFILLS)) and not any(g.kept for g in groups)
    assert metrics["skipped"] == metrics["informative"] == 0


def test_a_response_is_its_bytes_without_the_end_and_unfinished_earns_nothing(policy, questions):
    given, tokenizer, seen = [], policy.tokenizer, set()
    groups = sampled(policy, questions, reward=lambda r, *_: given.append(r) or [0.0] * len(r))
    for group, question, texts in zip(groups, questions, given):
        assert group.prompt == prompt_ids(tokenizer, question, "toy", 128)
        for c, response, text in zip(group.completions, group.responses, texts):
            said = [id for id in c.ids if id not in tokenizer.eos_ids]
            assert response == tokenizer.bytes_of(said)
            assert (len(c.ids) - len(said), text) == ((1, response) if c.finished else (0, b""))
            seen.add(c.finished)
    assert seen == {True, False}


@pytest.mark.parametrize("rewards", [[1.0, 0.0, 1.0], [1.0, math.nan, 0.0, 0.0]])
def test_a_reward_that_is_not_a_number_for_each_response_is_refused(policy, questions, rewards):
    with pytest.raises(ValueError, match="the reward of 4 responses is"):
        sampled(policy, questions[:1], reward=lambda *_: rewards)


@pytest.mark.parametrize("length, bos", [(20, []), (255, [7]), (400, [7]), (400, [])])
def test_the_policys_probability_is_its_plain_next_token_prediction(policy, length, bos,
                                                                    monkeypatch):
    tokenizer, context = policy.tokenizer, tuple(range(length % 300)) * 4
    monkeypatch.setattr(tokenizer, "bos", bos)
    monkeypatch.setitem(tokenizer.ids_of, b"two", [40, 200])  # spelled by two ids
    text = [*bos, *context[-255:]]  # the model has 256 positions
    [exact], allowed = exact_logprobs(policy.model, [(text, [0])])
    probability = policy.next_token(Question(context, (), 0, 0))
    for content, ids in ((tokenizer.token_bytes(5), [5]), (b"two", [40, 200]), (b"none", [])):
        want = exact[0, ids].exp().sum()
        assert abs(probability(content) - want) <= 2 * allowed * want


def test_a_whole_step_names_its_devices(policy, questions):
    with ExplicitDevices():
        updated(policy.model, sampled(policy, questions[:6]))
        policy.next_token(questions[0])
    torch.set_default_device("meta")
    try:
        metrics, _ = updated(policy.model, sampled(policy, questions[:6]))
    finally:
        torch.set_default_device(None)
    assert math.isfinite(metrics["loss"])
