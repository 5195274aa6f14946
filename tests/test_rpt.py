"""The laws of the method: advantages, loss, gradient and step, against enumeration, float64 and plain forwards."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rpt
from data import Question, toy_stories, toy_tokenizer
from helpers import ExplicitDevices, tiny
from rpt import (Completion, Group, Method, Policy, group_advantages, policy_loss, rollout, rpt_step, token_logprobs,
                 update)

METHOD = Method(questions=6, group_size=4, temperature=0.8, max_prompt=128, max_response=12, template="toy",
                max_rows=10)


@pytest.fixture(scope="module")
def tokenizer():
    """The toy's, with so many end tokens that a random model ends a response now and then."""
    tokenizer = toy_tokenizer()
    tokenizer.eos_ids = list(range(0, len(tokenizer), 9))
    return tokenizer


@pytest.fixture(scope="module")
def questions(tokenizer):
    out = []
    for number, story in enumerate(toy_stories(40, seed=5)):
        ids = tokenizer.encode(story.text)
        truth = tuple(tokenizer.token_bytes(i) for i in ids[-2:])
        out.append(Question(tuple(ids[:-2]), truth, number, len(ids) - 2, 1.0))
    return out


def model_for(tokenizer, seed=0):
    return tiny(seed=seed, vocab_size=len(tokenizer), tie_word_embeddings=True)


def by_length(responses, question, policy):
    """A reward that any model can earn: an odd number of bytes."""
    return [float(len(r) % 2) for r in responses]


def group_of(prompt, completions, advantages, rewards=None):
    return Group((0, 0), Question((), (), 0, 0), list(prompt), completions, [b""] * len(completions),
                 rewards or [float(i) for i in range(len(completions))], advantages)


def gradient(model, groups, method, tokens, sequences, budget=10**6):
    model.zero_grad(set_to_none=True)
    for batch in rpt.micro_batches(groups, budget):
        rpt._policy_pass(model, batch, method, tokens, sequences)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---- advantages and loss


def test_advantages_are_rewards_standardised_within_their_group():
    rewards = torch.tensor(np.random.default_rng(0).random((5, 8)))
    for row, got in zip(rewards.numpy(), group_advantages(rewards).numpy()):
        np.testing.assert_allclose(got, (row - row.mean()) / (row.std(ddof=1) + 1e-6), rtol=1e-12)
    np.testing.assert_allclose(group_advantages(rewards, scale_by_std=False), rewards - rewards.mean(1, keepdim=True))


def test_equal_rewards_have_an_advantage_of_exactly_zero():
    for value in (0.0, 0.1, 0.95, 1.0, 1 / 3):
        for size in (2, 3, 6, 7, 8):
            for scale in (True, False):
                rewards = torch.full((2, size), value, dtype=torch.float64)
                assert (group_advantages(rewards, scale) == 0).all()


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.zeros(3, 1))


def test_policy_loss_is_the_clipped_surrogate():
    random = np.random.default_rng(1)
    new, old, advantage, weight = random.normal(size=(4, 200))
    want = 0.0
    for n, o, a, w in zip(new, old, advantage, weight):
        ratio = math.exp(n - o)
        want -= w * min(ratio * a, min(max(ratio, 0.9), 1.3) * a)
    tensors = [torch.tensor(x) for x in (new, old, advantage, weight)]
    assert policy_loss(*tensors, clip_low=0.1, clip_high=0.3).item() == pytest.approx(want, rel=1e-12)


def test_a_ratio_beyond_floating_point_stays_finite():
    new = torch.tensor([0.0, -1e4], requires_grad=True)
    loss = policy_loss(new, torch.tensor([-1e4, 0.0]), torch.tensor([-1.0, 1.0]), torch.ones(2))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()


@pytest.mark.parametrize("normalize", ["token", "sequence", "constant"])
def test_weights_make_the_loss_the_mean_they_name(normalize):
    lengths, limit = [1, 4, 9], 16
    losses = [np.random.default_rng(n).random(n) for n in lengths]
    got = sum(rpt.token_weights(n, normalize, sum(lengths), 3, limit) * loss.sum() for n, loss in zip(lengths, losses))
    want = {"token": np.concatenate(losses).mean(), "sequence": np.mean([loss.mean() for loss in losses]),
            "constant": sum(loss.sum() for loss in losses) / (3 * limit)}[normalize]
    assert got == pytest.approx(want)


class Largest(TorchDispatchMode):
    """The most elements that an operation returned in one tensor, backward passes included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out])
                                              if isinstance(t, torch.Tensor))])
        return out


def test_token_logprobs_never_holds_the_logits_of_all_tokens():
    for vocabulary in (512, 5000, 20000):
        model, tokens = tiny(vocab_size=vocabulary), 3 * max(192, 2**20 // vocabulary)
        hidden, targets = torch.randn(tokens, 32, requires_grad=True), torch.randint(vocabulary, (tokens,))
        with Largest() as largest:
            logprobs, entropy = token_logprobs(model, hidden, targets)
            (logprobs + entropy).sum().backward()
        assert model.head.numel() <= largest.elements <= tokens * vocabulary / 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 2**20])  # one token at a time, a ragged last chunk, everything at once
def test_token_logprobs_equal_the_full_softmax_in_value_and_gradient(monkeypatch, tied, chunk):
    monkeypatch.setattr(rpt, "head_chunk", lambda vocab_size: chunk)
    model, temperature = tiny(tie_word_embeddings=tied), 0.7
    hidden, targets = torch.randn(23, 32, requires_grad=True), torch.randint(40, (23,))
    by_logprob, by_entropy = torch.randn(23), torch.randn(23)
    logprobs, entropy = token_logprobs(model, hidden, targets, temperature)
    ((logprobs * by_logprob).sum() + (entropy * by_entropy).sum()).backward()
    exact_hidden, exact_head = hidden.detach().double().requires_grad_(), model.head.detach().double().requires_grad_()
    full = (exact_hidden @ exact_head.T / temperature).log_softmax(-1)
    want, want_entropy = full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)
    ((want * by_logprob).sum() + (want_entropy * by_entropy).sum()).backward()
    for got, exact in ((logprobs, want), (entropy, want_entropy), (hidden.grad, exact_hidden.grad),
                       (model.head.grad, exact_head.grad)):
        torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=2e-5)


def test_a_frozen_head_gets_no_gradient():
    model, hidden = tiny(), torch.randn(5, 32, requires_grad=True)
    model.head.requires_grad_(False)
    token_logprobs(model, hidden, torch.arange(5))[0].sum().backward()
    assert model.head.grad is None and hidden.grad.abs().sum() > 0


# ---- the gradient


def test_the_expected_update_is_the_gradient_of_the_expected_reward():
    """Every completion of a toy vocabulary, every pair of them as a group: the mean of what the code computes."""
    model, prompt, temperature, limit, end = tiny(vocab_size=3), [1, 2, 2], 0.8, 3, 0
    completions = [c for n in range(1, limit + 1) for c in itertools.product(range(3), repeat=n)
                   if end not in c[:-1] and (c[-1] == end or n == limit)]
    reward = {c: float(np.random.default_rng([7, *c]).random()) for c in completions}
    expected, probability = 0.0, {}
    for c in completions:  # the oracle: a plain forward of each text, and autograd
        logits = model.logits(model(torch.tensor([prompt + list(c)])))[0, len(prompt) - 1: -1] / temperature
        logprob = logits.log_softmax(-1).gather(1, torch.tensor(c)[:, None]).sum()
        probability[c] = logprob.exp().item()
        expected = expected + logprob.exp() * reward[c]
    assert sum(probability.values()) == pytest.approx(1, abs=1e-5)
    want = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)

    method = Method(group_size=2, temperature=temperature, normalize="constant", max_response=limit)
    groups = []
    for a, b in itertools.product(completions, repeat=2):
        advantages = group_advantages(torch.tensor([[reward[a], reward[b]]]), scale_by_std=False)[0]
        chance = probability[a] * probability[b]
        groups.append(group_of(prompt, [Completion(list(c), [0.0] * len(c), c[-1] == end) for c in (a, b)],
                               (advantages * chance).tolist()))
    got = gradient(model, groups, method, tokens=0, sequences=2, budget=4000)
    # A group of two has sum of A_i grad log p_i = (1 - 1/2) * 2 * grad E[R] on average; the loss divides by 2 * limit.
    scale = -(2 * limit) / 1.0
    for (name, _), exact in zip(model.named_parameters(), want):
        if exact is not None:
            torch.testing.assert_close(scale * got[name], exact, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("normalize", ["token", "sequence", "constant"])
def test_the_gradient_does_not_depend_on_the_micro_batches(tokenizer, questions, normalize):
    model, method = model_for(tokenizer), dataclasses.replace(METHOD, normalize=normalize)
    groups = rollout(model, tokenizer, [((0, n), q) for n, q in enumerate(questions[:5])], method, by_length, 0, 0)
    want = gradient(model, groups, method, 100, 20)
    for budget in (1, 60, 150, 400):
        got = gradient(model, groups, method, 100, 20, budget)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)


def test_micro_batches_hold_every_response_once_within_the_budget():
    random = np.random.default_rng(3)
    groups = [group_of([0] * random.integers(1, 60),
                       [Completion([0] * n, [0.0] * n, True) for n in random.integers(1, 40, 6)], [0.0] * 6)
              for _ in range(20)]
    for number, group in enumerate(groups):
        group.number = (0, number)
    for budget in (50, 200, 1000, 10**6):
        batches = rpt.micro_batches(groups, budget)
        seen = sorted((g.number[1], s) for batch in batches for g, part in batch for s in part)
        assert seen == [(g, s) for g in range(20) for s in range(6)]
        for batch in batches:
            padded = len(batch) * max(len(g.prompt) for g, _ in batch) + sum(len(part) for _, part in batch) * max(
                len(g.completions[s].ids) for g, part in batch for s in part)
            assert padded <= budget or len(batch) == 1 and len(batch[0][1]) == 1
    assert len(rpt.micro_batches(groups, 10**6)) == 1


def test_a_group_of_equal_rewards_leaves_the_weights_bitwise_alone(tokenizer, questions):
    model = model_for(tokenizer)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    groups = rollout(model, tokenizer, [((0, 0), questions[0])], METHOD, lambda r, q, p: [1.0] * len(r), 0, 0)
    metrics = update(model, [optimizer], groups, METHOD)
    assert metrics["informative"] == 0 and all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    mixed = rollout(model, tokenizer, [((0, 1), questions[1])], METHOD, by_length, 0, 0)
    weights = dict(tokens=100, sequences=8)
    alone, both = (gradient(model, g, METHOD, **weights) for g in (mixed, mixed + groups))
    torch.testing.assert_close(alone, both, rtol=1e-5, atol=1e-6)


def test_the_end_token_is_trained_and_nothing_after_it():
    model, prompt = tiny(), [3, 4, 5]
    end, others = Completion([7, 1], [-1.0, -1.0], True), Completion([8, 9, 9], [-1.0] * 3, False)
    longer = Completion([7], [-1.0], False)
    method = Method(group_size=2, normalize="constant", max_response=4)
    with_end = gradient(model, [group_of(prompt, [end, others], [1.0, -1.0])], method, 0, 1)
    without = gradient(model, [group_of(prompt, [longer, others], [1.0, -1.0])], method, 0, 1)
    extra = {name: with_end[name] - without[name] for name in with_end}
    model.zero_grad()
    text = torch.tensor([prompt + [7]])
    (-(model.logits(model(text))[0, -1] / method.temperature).log_softmax(-1)[1] / 4).backward()
    for name, parameter in model.named_parameters():  # the difference is exactly the end token's own gradient
        torch.testing.assert_close(extra[name], parameter.grad, rtol=1e-4, atol=1e-6)


# ---- the step


def draw_from(questions, count):
    return lambda step, retry: [questions[(7 * step + 5 * retry + n) % len(questions)] for n in range(count)]


def test_the_trainer_gives_the_samplers_log_probabilities(tokenizer, questions):
    for temperature in (0.5, 0.8, 1.0, 1.5):
        model, method = model_for(tokenizer), dataclasses.replace(METHOD, temperature=temperature)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        _, metrics = rpt_step(model, tokenizer, [optimizer], draw_from(questions, 6), 0, method, by_length, seed=1)
        assert metrics["informative"] > 0 and 0 <= metrics["logprob_diff"] <= metrics["logprob_diff_max"]
        assert metrics["logprob_diff_max"] * min(temperature, 1) < 1e-5  # it magnifies the rounding of logits


def test_the_first_ratio_is_one_so_a_reused_batch_begins_like_an_on_policy_one(tokenizer, questions):
    results = []
    for updates in (1, 2):
        model, method = model_for(tokenizer), dataclasses.replace(METHOD, updates=updates)
        groups = rollout(model, tokenizer, [((0, n), q) for n, q in enumerate(questions[:4])], method, by_length, 0, 0)
        results.append(gradient(model, groups, method, 100, 16))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-3, atol=1e-6)


def test_a_second_update_is_clipped(tokenizer, questions):
    def moved(updates, clip):
        model = model_for(tokenizer)
        method = dataclasses.replace(METHOD, updates=updates, clip_low=clip, clip_high=clip)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        rpt_step(model, tokenizer, [torch.optim.SGD(model.parameters(), lr=0.05)], draw_from(questions, 6), 0, method,
                 by_length, 0)
        return (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm().item()
    assert moved(1, 0.2) < moved(8, 0.2) < moved(8, 10.0)


def test_metrics_say_what_happened(tokenizer, questions):
    model = model_for(tokenizer)
    groups, metrics = rpt_step(model, tokenizer, [torch.optim.SGD(model.parameters(), lr=0.0)],
                               draw_from(questions, 6), 3, METHOD, by_length, seed=2)
    completions, rewards = [c for g in groups for c in g.completions], [g.rewards for g in groups]
    assert [g.number for g in groups] == [(0, n) for n in range(6)]
    assert metrics["groups"] == 6 and metrics["responses"] == 24
    assert metrics["reward"] == pytest.approx(np.mean(rewards))
    assert metrics["accuracy"] == pytest.approx(np.mean(rewards))
    assert metrics["length"] == pytest.approx(np.mean([len(c.ids) for c in completions]))
    assert metrics["length_max"] == max(len(c.ids) for c in completions)
    assert metrics["truncated"] == pytest.approx(np.mean([not c.finished for c in completions]))
    assert metrics["all_right"] == np.mean([min(r) == 1 for r in rewards])
    assert metrics["all_wrong"] == pytest.approx(np.mean([max(r) == 0 for r in rewards]))
    assert metrics["informative"] == sum(len(set(r)) > 1 for r in rewards)
    assert metrics["decode_tokens"] == sum(len(c.ids) for c in completions)
    assert metrics["trained_tokens"] == sum(len(c.ids) for g in groups if g.informative for c in g.completions)


def test_an_unfinished_response_earns_nothing(tokenizer, questions):
    seen = []

    def note(responses, question, policy):
        seen.extend(responses)
        return [1.0 if r else 0.0 for r in responses]

    groups = rollout(model_for(tokenizer), tokenizer, [((0, n), q) for n, q in enumerate(questions[:6])], METHOD, note,
                     0, 0)
    pairs = [(c.finished, r) for g in groups for c, r in zip(g.completions, g.rewards)]
    assert {finished for finished, _ in pairs} == {True, False}
    assert all(reward == 0 for finished, reward in pairs if not finished) and b"" in seen


def test_dynamic_sampling_keeps_informative_groups_and_stops_at_its_cap(tokenizer, questions):
    model, calls = model_for(tokenizer), []

    def draw(step, retry):
        calls.append(retry)
        return draw_from(questions, 6)(step, retry)

    def rare(responses, question, policy):
        return by_length(responses, question, policy) if question.document % 3 == 0 else [0.0] * len(responses)

    method = dataclasses.replace(METHOD, dynamic_from=2, max_refills=5, max_response=30)
    optimizer = [torch.optim.SGD(model.parameters(), lr=0.0)]
    groups, metrics = rpt_step(model, tokenizer, optimizer, draw, 1, method, rare, 0)
    assert calls == [0] and len(groups) == 6 and metrics["drawn"] == 6  # before its first step: everything is kept
    calls.clear()
    groups, metrics = rpt_step(model, tokenizer, optimizer, draw, 2, method, rare, 0)
    assert all(g.informative for g in groups) and len(groups) <= 6 and 1 < len(calls) <= 6
    assert [g.number for g in groups] == sorted(g.number for g in groups) and metrics["drawn"] == 6 * len(calls)
    calls.clear()
    groups, metrics = rpt_step(model, tokenizer, optimizer, draw, 2, method, lambda r, q, p: [0.0] * len(r), 0)
    assert calls == list(range(6)) and groups == [] and metrics["skipped"] == 0 and metrics["informative"] == 0


@pytest.mark.parametrize("what", ["weight", "gradient", "reward"])
def test_a_non_finite_number_skips_the_step_and_keeps_the_weights(tokenizer, questions, what):
    model, reward = model_for(tokenizer), by_length
    if what == "weight":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    elif what == "gradient":
        model.model.layers[1].mlp.up_proj.weight.register_hook(lambda g: g * float("inf"))
    else:
        def with_nan(responses, question, policy):
            return [float("nan"), *by_length(responses[1:], question, policy)]
        reward = with_nan
    before = {name: p.clone() for name, p in model.state_dict().items()}
    _, metrics = rpt_step(model, tokenizer, [torch.optim.AdamW(model.parameters(), lr=0.1)], draw_from(questions, 6), 0,
                          METHOD, reward, 0)
    assert metrics["skipped"] == 1
    assert all(torch.equal(p, before[name]) or what == "weight" and p.isnan().any()
               for name, p in model.state_dict().items())


def test_the_policys_probability_is_its_plain_next_token_prediction(tokenizer, questions):
    model, question = model_for(tokenizer), questions[0]
    policy = Policy(model, tokenizer, METHOD)
    exact = model.logits(model(torch.tensor([question.context])))[0, -1].softmax(-1)
    for id in (5, 40, 200):
        same = [i for i in range(len(tokenizer)) if tokenizer.token_bytes(i) == tokenizer.token_bytes(id)]
        expected = sum(exact[i].item() for i in same)
        assert policy.probability(question, tokenizer.token_bytes(id)) == pytest.approx(expected, rel=1e-4)
    assert policy.probability(question, b"no such token") == 0


def test_a_whole_step_names_its_devices(tokenizer, questions):
    model = model_for(tokenizer)
    optimizer = [torch.optim.AdamW(model.parameters(), lr=1e-3)]
    with ExplicitDevices():
        _, metrics = rpt_step(model, tokenizer, optimizer, draw_from(questions, 6), 0, METHOD, by_length, 0)
    assert metrics["informative"] > 0
    torch.set_default_device("meta")
    try:
        _, again = rpt_step(model, tokenizer, optimizer, draw_from(questions, 6), 1, METHOD, by_length, 0)
    finally:
        torch.set_default_device(None)
    assert math.isfinite(again["loss"])


# ---- options of later work


def test_easy_groups_are_kept_with_falling_probability(tokenizer, questions):
    model, kept = model_for(tokenizer), {}
    method = dataclasses.replace(METHOD, keep_easy=False, group_size=4, max_response=2)
    for right in range(5):
        def reward(responses, question, policy):
            return [1.0] * right + [0.0] * (4 - right)  # noqa: B023
        groups = [g for step in range(8) for g in rollout(
            model, tokenizer, [((0, n), q) for n, q in enumerate(questions)], method, reward, 0, step)]
        kept[right] = np.mean([g.kept for g in groups])
    for right, share in kept.items():
        want = min(1.0, 1 - 1.2 * (right / 4 - 0.25))
        assert share == pytest.approx(want, abs=4 * math.sqrt(0.25 / 320)), right
    assert kept[0] == kept[1] == 1


def test_the_auxiliary_loss_adds_the_gradient_of_next_token_prediction(tokenizer, questions):
    method = dataclasses.replace(METHOD, grad_clip=1e9)
    moved = {}
    for weight in (0.0, 0.25):
        model = model_for(tokenizer)
        groups = rollout(model, tokenizer, [((0, n), q) for n, q in enumerate(questions[:6])], method, by_length, 0, 0)
        before = {name: p.clone() for name, p in model.state_dict().items()}
        weighted = dataclasses.replace(method, ntp_weight=weight)
        update(model, [torch.optim.SGD(model.parameters(), lr=1.0)], groups, weighted)
        moved[weight] = {name: before[name] - p for name, p in model.state_dict().items()}
    model = model_for(tokenizer)
    losses = []
    for question in questions[:6]:
        ids = torch.tensor([question.context])
        losses.append(-model.logits(model(ids))[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    (0.25 * torch.cat(losses).mean()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(moved[0.25][name] - moved[0.0][name], parameter.grad, rtol=1e-3, atol=2e-5)


def test_information_gain_compares_the_thoughtful_policy_with_the_plain_average(tokenizer, questions):
    model, average, question = model_for(tokenizer), model_for(tokenizer, seed=1), questions[3]
    policy = Policy(model, tokenizer, METHOD, average)
    responses = [b"A 1 B C.\n</think>\n\n\\boxed{ A}", b"</think>", b"never ends", b""]
    truth = tokenizer.encode(" A")[0]
    question = dataclasses.replace(question, truth=(b" A", b"."))
    plain = average.logits(average(torch.tensor([question.context])))[0, -1].log_softmax(-1)[truth]
    prompt = rpt.prompt_ids(tokenizer, question, "toy", METHOD.max_prompt)
    for response, got in zip(responses, policy.gain(responses, question)):
        if b"</think>" not in response:
            assert got == 0
            continue
        run = prompt + tokenizer.encode(response.split(b"</think>")[0].decode()) + [tokenizer.special["</think>"]]
        run += tokenizer.encode("\n\n\\boxed{")
        want = model.logits(model(torch.tensor([run])))[0, -1].log_softmax(-1)[truth] - plain
        assert got == pytest.approx(want.item(), abs=1e-4)


def test_the_average_follows_the_policy(tokenizer, questions):
    model, average = model_for(tokenizer), model_for(tokenizer)
    method = dataclasses.replace(METHOD, average_decay=0.75)
    old = {name: p.clone() for name, p in average.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rpt_step(model, tokenizer, [optimizer], draw_from(questions, 6), 0, method, by_length, 0, average=average)
    for name, new in model.state_dict().items():
        torch.testing.assert_close(average.state_dict()[name], 0.75 * old[name] + 0.25 * new)
    assert any(not torch.equal(old[name], new) for name, new in model.state_dict().items())
