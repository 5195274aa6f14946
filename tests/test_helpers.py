"""The comparisons of helpers.py accept what rounding does, and nothing else."""

import dataclasses

import numpy as np
import pytest
import torch

from helpers import (Completion, assert_rounds_to, assert_same_completions, in_float64,
                     plain_logits, tiny, uniforms)
from sampler import generate

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11]]
HOW = {"samples": 4, "max_new_tokens": 12, "temperature": 1.3, "eos_ids": [3, 17], "seed": 5}
NEXT = 1 + torch.finfo(torch.float32).eps  # the float32 number after 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_rounding_more_than_the_bound_is_refused(dtype):
    exact = torch.tensor([1.0, -3.0, 4.0, 0.0], dtype=torch.float64)
    epsilon = torch.finfo(dtype).eps
    off = torch.tensor([2 * epsilon, 0, 0, 0], dtype=torch.float64)
    actual = (exact + off).to(dtype)
    assert_rounds_to(actual, exact, 0.5)  # half an epsilon of 4, the largest
    assert_rounds_to(actual, exact, 2, scale=1)
    assert_rounds_to(actual, exact, 2, scale=exact.abs())
    for terms, scale in ((0.49, None), (1.9, 1), (1.9, exact.abs())):
        with pytest.raises(AssertionError, match="1 of 4 are off"):
            assert_rounds_to(actual, exact, terms, scale)


def test_what_is_not_finite_has_to_be_equal():
    inf, nan = torch.inf, torch.nan
    assert_rounds_to(torch.tensor([inf, -inf, 1]), torch.tensor([inf, -inf, 1.0]).double(), 1, 1)
    for actual, exact in (([inf], [1.0]), ([1.0], [inf]), ([nan], [1.0]), ([inf], [-inf])):
        with pytest.raises(AssertionError, match="1 of 1 are off"):
            assert_rounds_to(torch.tensor(actual), torch.tensor(exact).double(), 1e9, 1)


def test_only_equal_shapes_and_a_float64_reference_are_compared():
    with pytest.raises(AssertionError, match="not float64"):
        assert_rounds_to(torch.ones(2), torch.ones(2), 1)
    with pytest.raises(AssertionError, match=r"\[1\] is not \[2\]"):
        assert_rounds_to(torch.ones(1), torch.ones(2).double(), 1)
    assert_rounds_to(0.1 + 0.2, 0.3, 1)  # numbers are float64
    assert_rounds_to([], np.zeros(0), 1)


def test_a_model_in_float64_computes_in_float64():
    """Its logits move by what its weights move, far below what float32 can tell."""
    model = tiny("qwen3")
    exact = plain_logits(in_float64(model), [1, 2, 3])
    near = in_float64(model)
    with torch.no_grad():
        for weight in near.parameters():
            weight *= 1 + 1e-12
    moved = (plain_logits(near, [1, 2, 3]) - exact).abs().max()
    assert 1e-14 < moved < 1e-9 < (plain_logits(model, [1, 2, 3]) - exact).abs().max() < 1e-4


# ---- completions


def check(model, ours, theirs, **more):
    how = {"temperature": HOW["temperature"], "seed": HOW["seed"]} | more
    return assert_same_completions(model, PROMPTS, ours, theirs, **how)


def changed(groups, prompt, sample, **more):
    """A copy of completions by [prompt][sample] in which one is another."""
    groups = [list(group) for group in groups]
    groups[prompt][sample] = dataclasses.replace(groups[prompt][sample], **more)
    return groups


@pytest.mark.parametrize("temperature", [0, 0.5, 1.3])
def test_other_batches_give_the_same_completions(temperature):
    model, how = tiny("llama"), HOW | {"temperature": temperature}
    ours, theirs = generate(model, PROMPTS, **how), generate(model, PROMPTS, max_rows=3, **how)
    check(model, ours, theirs, temperature=temperature)
    check(model, ours, ours, temperature=temperature)


def test_a_true_error_is_caught():
    model = tiny()
    good, [prompt, sample] = generate(model, PROMPTS, **HOW), [2, 1]
    completion = good[prompt][sample]
    ids, logprobs = completion.ids, completion.logprobs
    assert len(ids) > 2
    for wrong in (
            {"ids": [ids[0], (ids[1] + 1) % 40, *ids[2:]]},  # not the token that was drawn
            {"ids": ids[:-1], "logprobs": logprobs[:-1], "finished": False},  # ends too early
            {"ids": ids + [1], "logprobs": logprobs + [-1.0]},  # or too late
            {"finished": not completion.finished},
            {"logprobs": [logprobs[0] + 1e-4, *logprobs[1:]]}):
        for pair in ((good, changed(good, prompt, sample, **wrong)),
                     (changed(good, prompt, sample, **wrong), good)):
            with pytest.raises(AssertionError):
                check(model, *pair)
    other = tiny()
    with torch.no_grad():  # one weight of 1,280 off by a thousandth
        other.head[7, 3] *= 1.001
    with pytest.raises(AssertionError, match="log-probability is off"):
        check(model, good, generate(other, PROMPTS, **HOW))
    with pytest.raises(AssertionError):  # and the uniform numbers are those of this seed
        check(model, good, generate(model, PROMPTS, **HOW | {"seed": 6}))


@pytest.mark.parametrize("offset, accepted",
                         [(0, True), (1e-8, True), (1e-3, False), (-1e-3, False)])
def test_a_token_may_differ_only_at_a_boundary(offset, accepted, monkeypatch):
    """Two neighbours in the vocabulary, and a uniform number beside what divides their shares."""
    model, exact = tiny(), in_float64(tiny())
    logprobs = (plain_logits(exact, PROMPTS[0])[-1] / 1.3).log_softmax(-1)
    shares = logprobs.exp().cumsum(-1)
    token = int((shares > 0.4).nonzero()[0])
    assert logprobs[token: token + 2].exp().min() > 1e-3  # both have more than the offset
    monkeypatch.setattr("helpers.uniforms", lambda *_: np.array([shares[token].item() + offset]))
    ours, theirs = ([[Completion([t], [logprobs[t].item()], False)]] for t in (token, token + 1))
    if accepted:
        assert assert_same_completions(model, PROMPTS[:1], ours, theirs, 1.3, 5) == 1
    else:
        with pytest.raises(AssertionError, match="more than rounding explains"):
            assert_same_completions(model, PROMPTS[:1], ours, theirs, 1.3, 5)


def test_equally_likely_tokens_may_stand_for_each_other_when_greedy():
    model, greedy = tiny(tie_word_embeddings=False), {"temperature": 0, "seed": 0}
    with torch.no_grad():
        best = int(plain_logits(model, PROMPTS[0])[-1].argmax())
        other = (best + 1) % 40
        model.head[other] = model.head[best] * NEXT

    def one(token):
        logprob = plain_logits(model, PROMPTS[0])[-1].log_softmax(-1)[token].item()
        return [[Completion([token], [logprob], False)]]

    assert assert_same_completions(model, PROMPTS[:1], one(best), one(other), **greedy) == 1
    with pytest.raises(AssertionError, match="more than rounding explains"):
        assert_same_completions(model, PROMPTS[:1], one(best), one((best + 2) % 40), **greedy)
