"""Laws of sampler.py. The oracle is a loop of plain forwards over the whole text, without a cache.

Equal tokens are asked for up to rounding (`assert_same_completions`): where rows or columns stand
otherwise, sums have another order.
"""

import itertools
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sampler
from helpers import (ExplicitDevices, assert_rounds_to, assert_same_completions, plain_logits,
                     tiny)
from sampler import Completion, KVCache, generate, sample_tokens, uniforms

SLOW = pytest.mark.skipif("RPT_TEST_SLOW" not in os.environ, reason="RPT_TEST_SLOW is not set")
EOS = [3, 11, 17, 29, 38]
LONGEST = list(map(int, np.random.default_rng(0).integers(40, size=14)))
PROMPTS = [LONGEST, [5, 6], LONGEST[:9] + [1, 2, 3], [7], LONGEST, LONGEST[:8],
           [8, 9, 10, 11, 12, 13, 14], [5, 6, 0, 1]]


@torch.no_grad()
def plain_completions(model, prompts, *, samples=1, max_new_tokens, temperature=1.0, eos_ids,
                      seed=0, keys=None) -> list[list[Completion]]:
    """What generate() must give, from its definition."""
    def complete(prompt, key, sample) -> Completion:
        ids, logprobs, numbers = [], [], uniforms(seed, key, sample, max_new_tokens)
        while len(ids) < max_new_tokens and not (ids and ids[-1] in eos_ids):
            logprob = (plain_logits(model, prompt + ids)[-1] / (temperature or 1)).log_softmax(-1)
            drawn = int((logprob.exp().cumsum(-1) > numbers[len(ids)]).nonzero()[0])
            ids.append(drawn if temperature else int(logprob.argmax()))
            logprobs.append(float(logprob[ids[-1]]))
        return Completion(ids, logprobs, ids[-1] in eos_ids)

    return [[complete(prompt, key, sample) for sample in range(samples)]
            for prompt, key in zip(prompts, keys or itertools.count())]


def compare(model, prompts, wanted, keys=None, **arguments) -> None:
    """generate() with these arguments gives, up to rounding, what is wanted."""
    given = generate(model, prompts, keys=keys, **arguments)
    assert_same_completions(model, prompts, given, wanted, arguments.get("temperature", 1.0),
                            arguments.get("seed", 0), keys)


# ------------------------------------------------------------------------------ law 2: caches


@pytest.mark.parametrize("temperature", [0, 1.3])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_sampled_completions_are_those_of_plain_forwards(model_type, temperature):
    model, keys = tiny(model_type, seed=6), [31, 5, 0, 2**70, -4, 6, 7, 9]
    how = {"samples": 2, "max_new_tokens": 30, "temperature": temperature, "eos_ids": EOS[:3],
           "seed": 8}
    wanted = plain_completions(model, PROMPTS, keys=keys, **how)
    flat = [completion for group in wanted for completion in group]
    assert 2 < sum(c.finished for c in flat) < len(flat) and len({len(c.ids) for c in flat}) > 2
    for max_rows in (256, 1, 3, 7):
        compare(model, PROMPTS, wanted, keys, max_rows=max_rows, **how)


# ------------------------------------------------------------------------------ bounds, and an end


def random_configurations(n: int, seed: int) -> Iterator[tuple[list, dict, dict]]:
    """Prompts, how to sample, and bounds, of many kinds."""
    chance = random.Random(seed)
    for number in range(n):
        top = chance.choice([3, 100, 400])
        prompts = [[chance.randrange(40) for _ in range(chance.randint(1, top))]
                   for _ in range(chance.randint(1, 12))]
        how = {"samples": chance.randint(1, 8), "max_new_tokens": chance.choice([1, 40, 60, 80]),
               "seed": number, "eos_ids": chance.choice([[], EOS[:2]])}
        whole = len(prompts) * (max(map(len, prompts)) + how["samples"] * how["max_new_tokens"])
        some = int(whole * chance.uniform(0.02, 0.3)) + 1
        yield prompts, how, {"max_rows": chance.choice([256, 256, chance.randint(1, 64)]),
                             "cache_tokens": chance.choice([2**62, 1, some, some, some])}


def watch(monkeypatch, bound: int, given_up: list[int]) -> None:
    """Check that a wave never holds more columns than the bound, or else one prompt. Notes the
    number of prompts that each wave gives up."""
    decode, positions = sampler.decode, KVCache.positions

    def counted(model, prompts, uniform, how):
        done = decode(model, prompts, uniform, how)
        assert done, "every wave completes a prompt"
        given_up.append(len(prompts) - len(done))
        return done

    def checked(cache, width):
        columns = sum(x[0].shape[2] * x[0].shape[3] for x in (cache.prompts, cache.own))
        assert cache.prompts[0].untyped_storage().nbytes() == cache.prompts[0].nbytes
        assert cache.prompts[0].shape[2] == len(cache.owner.unique())
        assert columns <= bound or len(cache.owner.unique()) == 1
        return positions(cache, width)

    monkeypatch.setattr(sampler, "decode", counted)
    monkeypatch.setattr(KVCache, "positions", checked)


@pytest.mark.parametrize("count, seed", [(8, 3), pytest.param(500, 0, marks=SLOW)])
def test_random_configurations_hold_their_bound_and_give_the_same(count, seed, monkeypatch):
    monkeypatch.setattr(sampler, "PREFILL_TOKENS", 4096)
    given_up, model = [], tiny("qwen3")
    for prompts, how, bounds in random_configurations(count, seed):
        monkeypatch.setattr(sampler, "GROWTH", (4, 16, 32)[how["seed"] % 3])
        wanted = generate(model, prompts, **how)
        with monkeypatch.context() as patch:
            watch(patch, bounds["cache_tokens"], given_up)
            compare(model, prompts, wanted, **how, **bounds)
    assert sum(given_up) >= count / 50


class Recorder(TorchDispatchMode):
    """Stands in for a recorded graph: notes every operation, and replays it on the same tensors."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(*map(tree_leaves, (out, again))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def test_a_step_reads_and_writes_the_same_tensors_so_that_it_can_be_recorded(monkeypatch):
    model, recorded = tiny("qwen3"), []
    how = {"samples": 4, "max_new_tokens": 80, "eos_ids": [3], "temperature": 1.2, "seed": 4}
    wanted = generate(model, PROMPTS, **how)

    def capture(step, device):
        recorder, first = Recorder(), itertools.count()
        recorded.append(recorder)

        def run():
            if next(first):
                return recorder.replay()
            with recorder:
                step()
        return run

    monkeypatch.setattr(sampler, "capture", capture)
    assert generate(model, PROMPTS, **how) == wanted
    assert len(recorded) > 2 and len({len(c.ids) for group in wanted for c in group}) > 5


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(tiny(), [[1], []], max_new_tokens=1, eos_ids=[])


# ------------------------------------------------------------------------------ law 4: reproducible


def test_a_completion_depends_on_model_seed_key_and_sample_alone():
    model = tiny("qwen3")
    how = {"max_new_tokens": 30, "eos_ids": EOS, "seed": 5, "temperature": 1.4}
    keys = [100 + n for n in range(len(PROMPTS))]
    wanted = generate(model, PROMPTS, samples=5, keys=keys, **how)
    assert len({tuple(c.ids) for group in wanted for c in group}) > 30

    def check(order, samples, **more):
        prompts, its_keys = [PROMPTS[i] for i in order], [keys[i] for i in order]
        compare(model, prompts, [wanted[i][:samples] for i in order], its_keys, samples=samples,
                **how, **more)

    everything = list(range(len(PROMPTS)))
    assert generate(model, PROMPTS, samples=5, keys=keys, **how) == wanted  # again: bit by bit
    check(everything, 3)  # fewer samples: the first of them
    check(everything[::-1], 5)  # another order
    for i in everything:  # alone
        check([i], 2)
    check([6, 6, 1, 6], 4)  # beside its own copies
    for max_rows in (1, 2, 5, 11):
        check(everything, 5, max_rows=max_rows)
    longer = generate(model, PROMPTS, samples=5, keys=keys, **how | {"max_new_tokens": 50})
    cut = [[Completion(c.ids[:30], c.logprobs[:30], c.finished and len(c.ids) <= 30) for c in group]
           for group in longer]  # another limit only cuts elsewhere
    assert_same_completions(model, PROMPTS, cut, wanted, 1.4, 5, keys)


def test_another_seed_key_or_sample_is_another_draw():
    model, how = tiny(), {"max_new_tokens": 20, "eos_ids": [], "temperature": 1.5}
    texts = set()
    for seed, key in itertools.product((0, 1, 2**63), (0, 1, 2**40, -1)):
        [group] = generate(model, [[1, 2]], samples=3, seed=seed, keys=[key], **how)
        texts |= {tuple(c.ids) for c in group}
    assert len(texts) == 3 * 4 * 3
    [[a], [b]] = generate(model, [[1, 2], [1, 2]], keys=[4, 4], **how)
    assert_same_completions(model, [[1, 2]], [[a]], [[b]], 1.5, 0, [4])
    default = generate(model, [[1, 2], [1, 2]], **how)
    assert default == generate(model, [[1, 2], [1, 2]], keys=[0, 1], **how)


def test_uniform_numbers_are_uniform_and_independent_of_how_many_are_asked():
    numbers = np.stack([uniforms(seed, key, sample, 50) for seed in range(3)
                        for key in range(20) for sample in range(20)])
    assert 0 < numbers.min() < numbers.max() < 1
    assert len(np.unique(numbers)) > 0.999 * numbers.size
    counts, even = np.histogram(numbers, bins=100, range=(0, 1))[0], numbers.size / 100
    assert ((counts - even) ** 2 / even).sum() < 160  # chi-square, once in ten thousand times
    for other in (numbers[1:, 0], numbers[20:, 0], numbers[:, 1]):  # next sample, key, position
        assert abs(np.corrcoef(numbers[:len(other), 0], other)[0, 1]) < 4 / len(other) ** 0.5
    assert np.array_equal(uniforms(1, 2, 3, 7), uniforms(1, 2, 3, 40)[:7])


def test_uniform_numbers_are_the_same_in_every_release():
    assert uniforms(5, 2**70 - 4, 7, 3).tolist() == [
        0.8122700293315575, 0.7045112777268514, 0.7882121644215658]
    assert uniforms(-1, -4, 0, 2).tolist() == [0.8814527184003964, 0.0048437988152727485]


# ------------------------------------------------------------------------------ the distribution


@pytest.mark.parametrize("V", [1, 5, 300, 150_000])
@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_a_token_inverts_the_cumulative_distribution_exactly(V, temperature):
    generator, n = torch.Generator("cpu").manual_seed(V), 40
    logits = torch.randn(n, V, generator=generator) * torch.linspace(0, 3, n)[:, None]
    uniform = torch.rand(n, dtype=torch.float64, generator=generator)
    edges = [0.5 / 2**32, 1 - 0.5 / 2**32, 1e-300, 1 - 2**-53]
    uniform[:4] = torch.tensor(edges, dtype=torch.float64)
    logprobs = (logits.double() / temperature).log_softmax(-1)
    rounded = (logits / temperature).log_softmax(-1).exp().double().numpy()
    for row in range(4, 24):  # hard ones: just inside a token's share, beyond float32 sums
        k = int(torch.randint(V, (), generator=generator))
        share = rounded[row, :k].sum() + 0.001 * rounded[row, k]
        uniform[row] = share / rounded[row].sum()
    token, logprob = sample_tokens(logits, uniform, temperature)
    for row in range(n):
        ends = list(itertools.accumulate(map(float, rounded[row]), initial=0.0))
        aim = float(uniform[row]) * ends[-1]
        slack = V * 2**-52 * ends[-1]  # float64 sums in another order
        assert ends[token[row]] - slack <= aim < ends[token[row] + 1] + slack
    # The logarithm of a float32 sum over the vocabulary is off by 1 to 5 epsilons of the largest
    # log-probability, by processor.
    scale = max(1.0, logprobs.abs().max().item())
    assert_rounds_to(logprob, logprobs.gather(1, token[:, None])[:, 0], 16, scale)


def test_a_token_of_probability_zero_is_never_drawn():
    patterns = list(itertools.product([0.0, float("-inf")], repeat=6))[:-1]
    patterns = torch.tensor(patterns)
    ends = torch.tensor([0.0, 1e-300, 0.5 / 2**32, 0.25, 0.5, 0.75, 1 - 0.5 / 2**32, 1 - 2**-53],
                        dtype=torch.float64)
    for uniform in ends:
        token, logprob = sample_tokens(patterns, uniform.expand(len(patterns)), 1.0)
        assert torch.isfinite(patterns.gather(1, token[:, None])).all()
        assert torch.isfinite(logprob).all()
    underflow = torch.tensor([[-200.0, 0.0, -200.0]]).expand(len(ends), 3)
    assert sample_tokens(underflow, ends, 1.0)[0].eq(1).all()


# ------------------------------------------------------------------------------ the end


def test_the_end_token_is_part_of_the_completion_and_only_it_finishes_one():
    model = tiny()
    how = {"samples": 40, "max_new_tokens": 10, "temperature": 2.0, "seed": 3}
    [free] = generate(model, [[4, 5]], eos_ids=[], **how)
    assert all(len(c.ids) == len(c.logprobs) == 10 and not c.finished for c in free)
    first, last = free[0].ids[0], free[0].ids[9]
    for eos_ids in ([first], [last], EOS, [first, 1000]):
        cut = []
        for c in free:
            length = next((i + 1 for i, id in enumerate(c.ids) if id in eos_ids), 0)
            cut.append(Completion(c.ids[: length or 10], c.logprobs[: length or 10], length > 0))
        assert cut[0].finished or eos_ids == EOS
        compare(model, [[4, 5]], [cut], eos_ids=eos_ids, **how)


# ------------------------------------------------------------------------------ law 11: devices


def test_generate_creates_nothing_on_an_implicit_device():
    model = tiny("llama")
    arguments = {"samples": 3, "max_new_tokens": 20, "eos_ids": EOS, "max_rows": 4}
    wanted = generate(model, PROMPTS, **arguments)
    with ExplicitDevices():
        assert generate(model, PROMPTS, **arguments) == wanted
    try:
        torch.set_default_device("meta")
        elsewhere = generate(model, PROMPTS, **arguments)
    finally:
        torch.set_default_device(None)
    assert elsewhere == wanted


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
@pytest.mark.parametrize("max_rows", [256, 7])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_an_accelerator_samples_what_the_cpu_samples(model_type, max_rows):
    how = {"samples": 4, "max_new_tokens": 70, "eos_ids": EOS[:1], "temperature": 1.2}
    wanted = generate(tiny(model_type, seed=6), PROMPTS, max_rows=max_rows, **how)
    there = tiny(model_type, seed=6).to(torch.accelerator.current_accelerator())
    compare(there, PROMPTS, wanted, max_rows=max_rows, **how)
