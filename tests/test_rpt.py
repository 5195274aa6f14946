"""The laws of the method: advantages, loss, gradient and step, against enumeration, float64 and
plain forwards."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rpt
from data import Question, Tokenizer, prompt_ids, read_corpus
from helpers import (ExplicitDevices, assert_rounds_to, exact_gradient, exact_logprobs, in_float64,
                     plain_logits, tiny)
from rpt import (Completion, Group, Method, Policy, Response, group_advantages, policy_loss,
                 rollout, rpt_step, token_logprobs, update)
from worker import coin, uneven

METHOD = Method(questions=6, group_size=4, temperature=0.8, max_prompt=128, max_response=12,
                template="toy", max_rows=10)
# A gradient errs by a few dozen roundings of the largest sum of the absolute gradients of the rows:
# it passes through two layers, the head, and sums over 32 channels and some hundred tokens, and
# errors of random sign add up to the roots of these numbers. Below 30 were seen.
GRADIENT = 128


@pytest.fixture(scope="module")
def tokenizer(toy):
    """The toy's, with so many end tokens that a random model ends a response now and then."""
    tokenizer = Tokenizer.from_dir(toy / "base")
    tokenizer.eos_ids = list(range(0, len(tokenizer), 9))
    return tokenizer


@pytest.fixture(scope="module")
def questions(toy, tokenizer):
    """About the last two tokens of documents."""
    out = []
    for n, document in enumerate(read_corpus(toy / "corpus.jsonl")[:40]):
        ids = tokenizer.encode(document.text)
        truth = tuple(map(tokenizer.token_bytes, ids[-2:]))
        out.append(Question(tuple(ids[:-2]), truth, n, len(ids) - 2, 1.0))
    return out


@pytest.fixture
def policy(tokenizer):
    return Policy(tiny(vocab_size=len(tokenizer), tie_word_embeddings=True), tokenizer)


def sampled(policy, questions, method=METHOD, reward=coin):
    return rollout(policy, [((0, n), q) for n, q in enumerate(questions)], method, reward, 0, 0)


def sgd(model, lr=0.0):
    return torch.optim.SGD(model.parameters(), lr=lr)


def copy_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradient(model, groups, method, tokens=0.0, sequences=1.0):
    """By parameter, of the loss over `tokens` tokens of `sequences` responses."""
    model.zero_grad(set_to_none=True)
    figures = rpt.accumulate(model, rpt.policy_examples(groups, method, tokens, sequences), method)
    assert torch.stack(figures).isfinite().all()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_gradient(got, model, rows, temperature, terms=GRADIENT):
    """got is the gradient of sum(coefficient * log-probability) over rows (prompt, ids,
    coefficients)."""
    exact, scale = exact_gradient(model, rows, temperature)
    assert max(scale.values()) > 0
    for name in got:
        assert_rounds_to(got[name], exact[name], terms, scale[name])


def descent(groups, method, tokens, sequences):
    """The rows of the loss's gradient, where every ratio is 1."""
    rows = []
    for group in groups:
        for c, advantage in zip(group.completions, group.advantages):
            mean_of = {"token": tokens, "sequence": sequences * len(c.ids),
                       "constant": sequences * method.max_response}[method.loss_type]
            rows.append((group.prompt, c.ids, [-advantage / mean_of] * len(c.ids)))
    return rows


# ---- advantages and loss


def test_advantages_are_rewards_standardised_within_their_group():
    rewards = torch.tensor(np.random.default_rng(0).random((5, 8)))
    for row, got in zip(rewards.numpy(), group_advantages(rewards)):  # sums of 8 numbers below 1
        want = (row - row.mean()) / (row.std(ddof=1) + 1e-6)
        assert_rounds_to(got, torch.tensor(want), 16, 1 / row.std(ddof=1))
    plain = rewards - torch.tensor(rewards.numpy().mean(1, keepdims=True))
    assert_rounds_to(group_advantages(rewards, scale_by_std=False), plain, 8, 1)


def test_equal_rewards_have_an_advantage_of_exactly_zero():
    for value, size, scale in itertools.product((0.0, 0.1, 0.95, 1.0, 1 / 3), (2, 3, 7), (0, 1)):
        assert (group_advantages(torch.full((2, size), value), bool(scale)) == 0).all()


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.zeros(3, 1))


def test_policy_loss_is_the_clipped_surrogate():
    new, old, advantages, weights = np.random.default_rng(1).normal(size=(4, 200))
    terms = []
    for n, o, a, w in zip(new, old, advantages, weights):
        ratio = math.exp(n - o)
        terms.append(-w * min(ratio * a, min(max(ratio, 0.9), 1.3) * a))
    loss = policy_loss(*map(torch.tensor, (new, old, advantages, weights)), 0.1, 0.3)
    assert_rounds_to(loss.item(), math.fsum(terms), 8, np.abs(terms).sum())


def test_a_ratio_beyond_floating_point_stays_finite():
    new = torch.tensor([0.0, -1e4], requires_grad=True)
    loss = policy_loss(new, torch.tensor([-1e4, 0.0]), torch.tensor([-1.0, 1.0]), torch.ones(2))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()


class Largest(TorchDispatchMode):
    """The most elements that an operation returned in one tensor, backward passes included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *(t.numel() for t in tensors)])
        return out


def test_token_logprobs_never_holds_the_logits_of_all_tokens():
    for vocabulary in (512, 5000, 20000):
        model, tokens = tiny(vocab_size=vocabulary), 3 * max(512, 2**20 // vocabulary)
        hidden = torch.randn(tokens, 32, requires_grad=True)
        with Largest() as largest:
            token_logprobs(model, hidden, torch.randint(vocabulary, (tokens,)))[0].sum().backward()
        assert model.head.numel() <= largest.elements <= tokens * vocabulary / 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 2**20])  # one token, a ragged last chunk, everything
def test_token_logprobs_equal_the_full_softmax_in_value_and_gradient(monkeypatch, tied, chunk):
    monkeypatch.setattr(rpt, "head_chunk", lambda *_: chunk)
    model, temperature = tiny(tie_word_embeddings=tied), 0.7
    hidden, targets = torch.randn(23, 32, requires_grad=True), torch.randint(40, (23,))
    logprobs, entropy = token_logprobs(model, hidden, targets, temperature)
    assert not entropy.requires_grad
    wanted = torch.randn(23)
    (logprobs * wanted).sum().backward()
    exact_hidden, exact_head = (x.detach().double().requires_grad_() for x in (hidden, model.head))
    full = (exact_hidden @ exact_head.T / temperature).log_softmax(-1)
    want = full.gather(1, targets[:, None])[:, 0]
    (want * wanted).sum().backward()
    # logits are sums of 32 products: roundings of |h| |w| / T, which the gradient carries on
    size = (exact_hidden.abs() @ exact_head.abs().T).max().item() / temperature
    assert_rounds_to(logprobs, want.detach(), 4, size)
    assert_rounds_to(entropy, -(full.exp() * full).sum(-1).detach(), 4 * math.log(40), size)
    for got, exact in ((hidden.grad, exact_hidden), (model.head.grad, exact_head)):
        assert_rounds_to(got, exact.grad, 4 * size, exact.grad.abs().max())


def test_a_frozen_head_gets_no_gradient():
    model, hidden = tiny(), torch.randn(5, 32, requires_grad=True)
    model.head.requires_grad_(False)
    token_logprobs(model, hidden, torch.arange(5))[0].sum().backward()
    assert model.head.grad is None and hidden.grad.abs().sum() > 0


# ---- the gradient


def test_the_expected_update_is_the_gradient_of_the_expected_reward():
    """Every completion of a toy vocabulary, every pair of them as a group: the mean of what the
    code computes."""
    model, prompt, limit, end = tiny(vocab_size=3), [1, 2, 2], 3, 0
    completions = [c for n in range(1, limit + 1) for c in itertools.product(range(3), repeat=n)
                   if end not in c[:-1] and (c[-1] == end or n == limit)]
    rewards = {c: float(np.random.default_rng([7, *c]).random()) for c in completions}
    exact = in_float64(model)
    names, parameters = zip(*exact.named_parameters())
    expected, chance = 0.0, {}
    for c in completions:  # the oracle: a plain forward of each text, and autograd
        logits = plain_logits(exact, [*prompt, *c])[len(prompt) - 1: -1] / 0.8
        logprob = logits.log_softmax(-1)[range(len(c)), c].sum()
        chance[c] = logprob.exp().item()
        expected = expected + logprob.exp() * rewards[c]
    assert_rounds_to(sum(chance.values()), 1.0, 16)
    want = torch.autograd.grad(expected, parameters)

    method = Method(group_size=2, loss_type="constant", max_response=limit, micro_tokens=4000)
    groups = []
    for pair in itertools.product(completions, repeat=2):
        earned = torch.tensor([[rewards[c] for c in pair]], dtype=torch.float64)
        both = math.prod(map(chance.get, pair))
        advantages = group_advantages(earned, scale_by_std=False)[0] * both
        said = [Completion(list(c), [0.0] * len(c), c[-1] == end) for c in pair]
        groups.append(Group((0, 0), Question((), (), 0, 0), prompt, said, [b"", b""],
                            earned[0].tolist(), advantages.tolist()))
    got = gradient(model, groups, method, sequences=2)
    # A group of two has sum of A_i grad log p_i = (1 - 1/2) 2 grad E[R] on average; the loss
    # divides by 2 limit.
    _, scale = exact_gradient(model, descent(groups, method, 0, 2), 0.8)
    for name, exact in zip(names, want):
        assert_rounds_to(got[name], -exact / (2 * limit), GRADIENT, scale[name])


@pytest.mark.parametrize("updates", [1, 2])  # with 2 the ratio is to the sampler's: also 1
@pytest.mark.parametrize("loss_type", ["token", "sequence", "constant"])
def test_the_gradient_is_that_of_plain_forwards_whatever_the_slices(policy, questions, loss_type,
                                                                    updates):
    method = dataclasses.replace(METHOD, loss_type=loss_type, updates=updates)
    groups = sampled(policy, questions[:5])
    rows = descent([g for g in groups if g.informative], method, 100, 20)
    for budget in (1, 60, 400, 10**6):
        sliced = dataclasses.replace(method, micro_tokens=budget)
        got = gradient(policy.model, groups, sliced, 100, 20)
        assert_gradient(got, policy.model, rows, 0.8, updates * GRADIENT)  # a ratio errs as much


def test_ratios_beyond_a_limit_have_no_gradient_and_others_have_their_own(policy, questions):
    """Old log-probabilities are moved so far that no ratio is near a limit."""
    method = dataclasses.replace(METHOD, updates=2, clip_low=0.2, clip_high=0.5)
    groups, random, rows = sampled(policy, questions[:5]), np.random.default_rng(0), []
    for group in groups:
        if not group.informative:
            continue
        texts = [(group.prompt, c.ids) for c in group.completions]
        exact, _ = exact_logprobs(policy.model, texts, 0.8)
        for n, (c, logprobs) in enumerate(zip(group.completions, exact)):
            moves, coefficients = random.choice([-0.5, -0.3, -0.1, 0.1, 0.3, 0.5], len(c.ids)), []
            old = [float(np.float32(a - m)) for a, m in zip(c.logprobs, moves)]
            group.completions[n] = dataclasses.replace(c, logprobs=old)
            for new, before in zip(logprobs[range(len(c.ids)), c.ids].tolist(), old):
                ratio, advantage = math.exp(new - before), group.advantages[n]
                clipped = ratio > 1.5 if advantage > 0 else ratio < 0.8
                coefficients.append(0.0 if clipped else -advantage * ratio / 100)
            rows.append((group.prompt, c.ids, coefficients))
    assert 0.1 < np.mean([x == 0 for *_, row in rows for x in row]) < 0.6
    got = gradient(policy.model, groups, method, 100, 20)
    assert_gradient(got, policy.model, rows, 0.8, 2 * GRADIENT)  # a ratio errs as much


def test_the_end_token_is_trained_and_nothing_after_it():
    """Only tokens that a completion has are in the loss, its last among them."""
    model, prompt, method = tiny(), [3, 4, 5], Method(loss_type="constant", max_response=4)
    said = [Completion([7, 1], [-1.0, -1.0], True), Completion([8, 9, 9], [-1.0] * 3, False)]
    group = Group((0, 0), Question((), (), 0, 0), prompt, said, [b"", b""], [1.0, 0.0], [1.0, -1.0])
    rows = [(prompt, [7, 1], [-0.25, -0.25]), (prompt, [8, 9, 9], [0.25] * 3)]
    assert_gradient(gradient(model, [group], method), model, rows, 0.8)


def test_slices_hold_every_response_once_within_the_budget_and_little_padding():
    random = np.random.default_rng(3)
    examples = []
    for number in range(20):  # the advantage says which prompt, the first token which response
        responses = [Response([n, *[0] * m], [0.0], number, 0.0)
                     for n, m in enumerate(random.integers(0, 40, 6))]
        examples.append(([0] * random.integers(1, 60), responses))
    for budget in (50, 200, 1000, 10**6):
        seen, batches = [], rpt.training_batches(examples, budget)
        for prompts, slices in batches:
            width = len(prompts) * max(map(len, prompts))
            assert width <= budget / 2 or len(prompts) == 1
            for part in slices:
                padded = len(part) * max(len(r.ids) for _, r in part)
                assert width + padded <= budget or len(part) == 1
                padding = padded - sum(len(r.ids) for _, r in part)
                assert padding <= max(0, budget - width) * rpt.PADDING
                seen += [(r.advantage, r.ids[0]) for _, r in part]
                assert all(prompts[row] is examples[r.advantage][0] for row, r in part)
        assert sorted(seen) == list(itertools.product(range(20), range(6)))
    assert len(batches) == 1


def test_a_group_of_equal_rewards_leaves_the_weights_bitwise_alone(policy, questions):
    before = copy_of(policy.model)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.1, weight_decay=0.1)
    equal = sampled(policy, questions[:1], reward=lambda r, q, p: [1.0] * len(r))
    metrics = update(policy.model, optimizer, equal, METHOD)
    assert metrics["informative"] == 0
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
    mixed = sampled(policy, questions[1:4])
    alone, both = (gradient(policy.model, g, METHOD, 100, 8) for g in (mixed, mixed + equal))
    assert all(torch.equal(alone[name], both[name]) for name in alone)  # it is not computed


# ---- the step


def draw_from(questions, count=6):
    return lambda step, retry: [questions[(7 * step + 5 * retry + n) % len(questions)]
                                for n in range(count)]


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.5])
def test_the_trainer_gives_the_samplers_log_probabilities(policy, questions, temperature):
    method = dataclasses.replace(METHOD, temperature=temperature)
    groups, metrics = rpt_step(policy, sgd(policy.model), draw_from(questions), 0, method,
                               coin, seed=1)
    trained = [(g.prompt, c.ids) for g in groups if g.informative for c in g.completions]
    exact, allowed = exact_logprobs(policy.model, trained, temperature)
    assert metrics["trained_tokens"] == sum(len(ids) for _, ids in trained)
    assert 0 < metrics["logprob_diff"] <= metrics["logprob_diff_max"] <= 2 * allowed  # of either
    nll = -torch.cat([logp[range(len(ids)), ids] for (_, ids), logp in zip(trained, exact)])
    assert abs(metrics["nll"] - nll.mean()) <= allowed


def test_one_step_moves_the_weights_by_the_clipped_gradient_of_all_its_tokens(policy, questions):
    for clip in (1e9, 0.01):
        before, method = copy_of(policy.model), dataclasses.replace(METHOD, grad_clip=clip)
        groups, metrics = rpt_step(policy, sgd(policy.model, 1.0), draw_from(questions), 0, method,
                                   coin, 0)
        moved = {name: before[name] - p.detach() for name, p in policy.model.named_parameters()}
        policy.model.load_state_dict(before)
        tokens = sum(len(c.ids) for g in groups for c in g.completions)  # of equal groups too
        rows = descent([g for g in groups if g.informative], method, tokens, 24)
        exact, scale = exact_gradient(policy.model, rows, 0.8)
        norm = sum((g**2).sum() for g in exact.values()).sqrt().item()
        largest = max(scale.values()).item()
        assert abs(metrics["grad_norm"] - norm) <= GRADIENT * 2**-23 * largest
        shrunk = min(1, clip / norm)
        for name in moved:  # and the weight itself is rounded twice, 1e-6 being added to the norm
            size = shrunk * scale[name] + before[name].abs().max() / GRADIENT + clip * 1e-6
            assert_rounds_to(moved[name], shrunk * exact[name], GRADIENT, size)


def test_a_second_update_is_clipped(policy, questions):
    def moved(updates, clip):
        before, method = copy_of(policy.model), dataclasses.replace(
            METHOD, updates=updates, clip_low=min(clip, 1), clip_high=clip)
        rpt_step(policy, sgd(policy.model, 0.05), draw_from(questions), 0, method, coin, 0)
        squares = [(p.detach() - before[name]).square().sum()
                   for name, p in policy.model.named_parameters()]
        policy.model.load_state_dict(before)
        return float(sum(squares)) ** 0.5
    assert moved(1, 0.2) < moved(8, 0.2) < moved(8, 10.0)


def test_an_unfinished_response_earns_nothing(policy, questions):
    groups = sampled(policy, questions[:6], reward=lambda r, q, p: [float(x != b"") for x in r])
    pairs = [(c.finished, r) for g in groups for c, r in zip(g.completions, g.rewards)]
    assert {finished for finished, _ in pairs} == {True, False}
    assert all(reward == 0 for finished, reward in pairs if not finished)


def test_dynamic_sampling_trains_on_informative_groups_and_stops_at_its_cap(policy, questions):
    calls = []

    def draw(step, retry):
        calls.append(retry)
        return draw_from(questions)(step, retry)

    method = dataclasses.replace(METHOD, dynamic_from=2, max_refills=5, max_response=30)

    def step(n, reward):
        return rpt_step(policy, sgd(policy.model), draw, n, method, reward, 0)

    groups, _ = step(1, uneven)  # before its first step everything is kept
    assert calls == [0] and len(groups) == 6 and all(g.kept for g in groups)
    calls.clear()
    groups, metrics = step(2, uneven)
    kept = [g for g in groups if g.kept]
    assert 1 < len(calls) <= 6 and len(groups) == 6 * len(calls) and metrics["informative"] == 6
    assert kept == [g for g in groups if g.informative][:6]  # the first to come
    assert sum(g.informative for g in groups[:-6]) < 6  # and no draw more than it takes
    calls.clear()
    groups, metrics = step(2, lambda r, q, p: [0.0] * len(r))
    assert calls == list(range(6)) and not any(g.kept for g in groups)
    assert metrics["skipped"] == metrics["informative"] == 0


@pytest.mark.parametrize("what", ["weight", "gradient", "reward"])
def test_a_non_finite_number_skips_the_step_and_keeps_the_weights(policy, questions, what):
    model, rewards = policy.model, coin
    if what == "weight":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    elif what == "gradient":
        model.model.layers[1].mlp.up_proj.weight.register_hook(lambda g: g * float("inf"))
    else:
        def rewards(responses, question, policy):
            return [float("nan"), *coin(responses[1:], question, policy)]
    before = copy_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    _, metrics = rpt_step(policy, optimizer, draw_from(questions), 0, METHOD, rewards, 0)
    assert metrics["skipped"] == 1
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num())


@pytest.mark.parametrize("bos", [[], [7]])
def test_the_policys_probability_is_its_plain_next_token_prediction(policy, questions, bos,
                                                                    monkeypatch):
    tokenizer, question = policy.tokenizer, questions[0]
    monkeypatch.setattr(tokenizer, "bos", bos)
    text = [*tokenizer.bos, *question.context]
    exact = plain_logits(in_float64(policy.model), text)[-1].softmax(-1)
    contents = [tokenizer.token_bytes(i) for i in range(len(tokenizer))]
    _, allowed = exact_logprobs(policy.model, [(text, [0])])
    for content in (contents[5], contents[40], contents[200]):
        want = sum(exact[i].item() for i, other in enumerate(contents) if other == content)
        assert abs(policy.probability(question, content) - want) <= allowed * want
    assert policy.probability(question, b"no such token") == 0
    other = questions[1]  # not remembered from the first
    assert policy.probability(other, contents[5]) == Policy(policy.model, tokenizer).probability(
        other, contents[5])


def test_the_prompt_of_a_group_is_its_questions(policy, questions):
    for group, question in zip(sampled(policy, questions[:2]), questions):
        assert group.prompt == prompt_ids(policy.tokenizer, question, "toy", 128)
        assert group.responses[0] == policy.tokenizer.bytes_of(
            [i for i in group.completions[0].ids if i not in policy.tokenizer.eos_ids])


def test_a_whole_step_names_its_devices(policy, questions):
    optimizer = sgd(policy.model, 1e-3)  # AdamW of some releases makes tensors itself
    with ExplicitDevices():
        _, metrics = rpt_step(policy, optimizer, draw_from(questions), 0, METHOD, coin, 0)
    assert metrics["informative"] > 0
    torch.set_default_device("meta")
    try:
        _, metrics = rpt_step(policy, optimizer, draw_from(questions), 1, METHOD, coin, 0)
    finally:
        torch.set_default_device(None)
    assert math.isfinite(metrics["loss"])
