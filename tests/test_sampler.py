"""Laws of sampler.py. The oracle is a loop of plain forwards over the whole text, without any cache."""

import itertools
import os
from collections import Counter

import numpy as np
import pytest
import torch

import sampler
from helpers import ExplicitDevices, exact_logprobs, tiny
from rpt import Group, completion_logprobs
from sampler import Completion, draw, generate, prefill, uniforms

CPU = torch.device("cpu")
EOS = [3, 11, 17, 29, 38]
LONGEST = list(np.random.default_rng(0).integers(40, size=14))
PROMPTS = [list(map(int, prompt)) for prompt in (
    LONGEST, [5, 6], LONGEST[:9] + [1, 2, 3], [7], LONGEST, LONGEST[:8], [8, 9, 10, 11, 12, 13, 14], [5, 6, 0, 1])]
WAYS = {"all at once": None, "one row": 1, "three rows": 3, "seven rows": 7}


def plain_logits(model, text: list[int]) -> torch.Tensor:
    """Of the token after a text, computed from nothing."""
    with torch.no_grad():
        return model.logits(model(torch.tensor([text])))[0, -1]


def plain_completion(model, prompt, choose, limit: int, eos_ids, temperature: float = 1.0) -> Completion:
    """What generate() must give: choose(position, logits) is the next token."""
    ids, logprobs = [], []
    while len(ids) < limit and not (ids and ids[-1] in eos_ids):
        logits = plain_logits(model, prompt + ids)
        ids.append(choose(len(ids), logits))
        logprobs.append(float((logits / (temperature or 1)).log_softmax(-1)[ids[-1]]))
    return Completion(ids, logprobs, ids[-1] in eos_ids)


def same(a: Completion, b: Completion) -> bool:
    return (a.ids, a.finished) == (b.ids, b.finished) and np.allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- law 2: caches


@pytest.mark.parametrize("max_rows", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_greedy_completions_are_those_of_plain_forwards(model_type, max_rows):
    model = tiny(model_type, seed=6)
    wanted = [plain_completion(model, p, lambda _, logits: int(logits.argmax()), 15, EOS, 0) for p in PROMPTS]
    assert 2 <= sum(c.finished for c in wanted) < len(wanted) and len({len(c.ids) for c in wanted}) > 2
    for prompt, completions in zip(wanted, generate(model, PROMPTS, samples=2, max_new_tokens=15, temperature=0,
                                                    eos_ids=EOS, max_rows=max_rows), strict=True):
        assert len(completions) == 2 and all(same(completion, prompt) for completion in completions)


@pytest.mark.parametrize("max_rows", WAYS.values(), ids=WAYS)
def test_sampled_completions_are_those_of_plain_forwards(max_rows):
    model, keys = tiny("qwen3"), [31, 5, 0, 2**70, -4, 6, 7, 9]
    sampled = generate(model, PROMPTS, samples=4, max_new_tokens=40, temperature=1.3, eos_ids=EOS, seed=8, keys=keys,
                       max_rows=max_rows)
    ends = Counter(completion.finished for group in sampled for completion in group)
    assert ends[True] > 20 and ends[False] >= 1 and len({len(c.ids) for group in sampled for c in group}) > 10
    for prompt, key, group in zip(PROMPTS, keys, sampled):
        for sample, completion in enumerate(group):
            numbers = uniforms(8, key, sample, 40)

            def choose(position, logits):
                cumulative = (logits / 1.3).double().softmax(-1).cumsum(-1)
                return int((cumulative > numbers[position]).nonzero()[0])

            assert same(completion, plain_completion(model, prompt, choose, 40, EOS, 1.3))


@pytest.mark.parametrize("cohorts", [1, 2, 4])
def test_rows_of_many_ages_side_by_side_are_those_of_plain_forwards(cohorts, monkeypatch):
    model, merged, merge = tiny("llama"), [], sampler._Cohort.merged
    monkeypatch.setattr(sampler, "COHORTS", cohorts)
    monkeypatch.setattr(sampler._Cohort, "merged", lambda *pair: merged.append(1) or merge(*pair))
    prompts = [prompt[::step] + [number] for number in range(6) for step in (1, 2) for prompt in PROMPTS[:4]]
    sampled = generate(model, prompts, max_new_tokens=40, temperature=1.5, eos_ids=EOS[:3], max_rows=16, seed=6)
    assert len(merged) > 2
    for key, (prompt, [completion]) in enumerate(zip(prompts, sampled)):
        numbers = uniforms(6, key, 0, 40)

        def choose(position, logits):
            cumulative = (logits / 1.5).double().softmax(-1).cumsum(-1)
            return int((cumulative > numbers[position]).nonzero()[0])

        assert same(completion, plain_completion(model, prompt, choose, 40, EOS[:3], 1.5))


@pytest.mark.parametrize("cache_tokens", [1, 400, 700, 5000])
def test_groups_given_up_for_want_of_memory_come_out_the_same(cache_tokens, monkeypatch):
    model, held, evicted = tiny("qwen3"), [], []
    evict, keep = sampler._Batch.evict, sampler._Batch.step
    arguments = {"samples": 3, "max_new_tokens": 70, "temperature": 1.3, "eos_ids": EOS[:1], "seed": 9}
    wanted = generate(model, PROMPTS, **arguments)

    def step(batch):
        held.append((batch.cache.tokens(), batch.cache.groups()))
        keep(batch)

    monkeypatch.setattr(sampler._Batch, "evict", lambda batch: evicted.append(1) or evict(batch))
    monkeypatch.setattr(sampler._Batch, "step", step)
    for group, others in zip(generate(model, PROMPTS, cache_tokens=cache_tokens, **arguments), wanted):
        assert all(map(same, group, others))
    assert all(tokens <= cache_tokens or groups == 1 for tokens, groups in held)
    assert len(evicted) >= {400: 3, 700: 2}.get(cache_tokens, 0)
    assert max(groups for _, groups in held) == 1 or cache_tokens > 1


SLOW = pytest.mark.skipif("RPT_TEST_SLOW" not in os.environ, reason="RPT_TEST_SLOW is not set: it compiles for minutes")


@pytest.mark.parametrize("much", [False, pytest.param(True, marks=SLOW)])
def test_compiled_blocks_and_decoding_compute_the_same(much, monkeypatch):
    used, compile = Counter(), torch.compile

    def counting(function, **how):
        fused = compile(function, **how)
        return lambda *arguments: (used.update([function.__name__]), fused(*arguments))[1]

    monkeypatch.setattr(torch, "compile", counting)
    plain, compiled = tiny("qwen3", seed=6), tiny("qwen3", seed=6)
    compiled.compile_blocks()
    prompts = PROMPTS if much else [[1, 2, 3], [4, 5, 6]]
    arguments = {"samples": 3, "max_new_tokens": 20, "eos_ids": EOS if much else [],
                 "max_rows": 7, "temperature": 1.2}
    sampled = generate(plain, prompts, **arguments)
    for group, others in zip(generate(compiled, prompts, **arguments), sampled):
        assert all(map(same, group, others))
    assert used.keys() == {"before", "after", "attend_shared"} and min(used.values()) >= 2 * 19  # layers, steps
    if much:  # training too
        batch = [(Group((0, n), None, prompt, group, [], [], []), [0, 1, 2])
                 for n, (prompt, group) in enumerate(zip(prompts, sampled))]
        for model in (plain, compiled):
            completion_logprobs(model, batch, 1.2)[0].sum().backward()
        for ours, theirs in zip(compiled.parameters(), plain.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_prompt_that_shares_its_beginning_is_not_computed_again_and_comes_out_the_same():
    model, widths = tiny("llama"), []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].shape))
    with torch.no_grad():
        parts = list(prefill(model, PROMPTS))
        computed = sum(rows * width for rows, width in widths)
        assert len(parts) == 2 and sorted(i for part in parts for i in part[0]) == list(range(len(PROMPTS)))
        assert set(parts[1][0]) >= {0, 2, 5} or set(parts[1][0]) >= {4, 2, 5}  # one of the two equal prompts is a root
        assert computed < 14 * len(PROMPTS) / 1.4
        for indices, _, hidden in parts:
            for i, row in zip(indices, model.logits(hidden)):
                assert torch.allclose(row, plain_logits(model, PROMPTS[i]), rtol=0, atol=1e-5)


def test_asking_rarely_whether_rows_are_done_changes_nothing(monkeypatch):
    model, arguments = tiny(), {"samples": 3, "max_new_tokens": 9, "eos_ids": EOS, "seed": 2, "max_rows": 5}
    wanted, harvest, calls = generate(model, PROMPTS, **arguments), sampler._Batch.harvest, itertools.count(1)
    monkeypatch.setattr(sampler._Batch, "harvest", lambda self: [] if next(calls) % 16 else harvest(self))
    for group, others in zip(generate(model, PROMPTS, **arguments), wanted):
        assert all(map(same, group, others))
    assert next(calls) > 32


# ---------------------------------------------------------------------------------------------- law 3: trainer


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.0, 1.7])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_sampler_and_trainer_agree_on_every_log_probability(model_type, temperature):
    model = tiny(model_type, tie_word_embeddings=model_type == "llama")
    sampled = generate(model, PROMPTS, samples=3, max_new_tokens=12, temperature=temperature, eos_ids=EOS, max_rows=7)
    batch = [(Group((0, n), None, prompt, group, [], [], []), [0, 1, 2])
             for n, (prompt, group) in enumerate(zip(PROMPTS, sampled))]
    trained, _ = completion_logprobs(model, batch, temperature)
    ours = torch.tensor([logprob for group in sampled for c in group for logprob in c.logprobs])
    rows = [(prompt, c.ids) for prompt, group in zip(PROMPTS, sampled) for c in group]
    exact, allowed = exact_logprobs(model, rows, temperature)  # a low temperature magnifies the rounding of logits
    exact = torch.cat([logprobs[range(len(ids)), ids] for (_, ids), logprobs in zip(rows, exact)])
    for got in (trained, ours):
        assert got.shape == exact.shape and (got - exact).abs().max() <= allowed


# ---------------------------------------------------------------------------------------------- law 4: reproducibility


def test_a_completion_depends_on_model_seed_key_and_sample_alone():
    model, fixed = tiny("qwen3"), {"max_new_tokens": 30, "eos_ids": EOS, "seed": 5, "temperature": 1.4}
    keys = [100 + n for n in range(len(PROMPTS))]
    wanted = generate(model, PROMPTS, samples=5, keys=keys, **fixed)
    assert len({tuple(c.ids) for group in wanted for c in group}) > 30

    def check(order, samples, **more):
        prompts, their_keys = [PROMPTS[i] for i in order], [keys[i] for i in order]
        out = generate(model, prompts, samples=samples, keys=their_keys, **fixed | more)
        for i, group in zip(order, out, strict=True):
            assert len(group) == samples and all(map(same, group, wanted[i])), (i, more)

    everything = list(range(len(PROMPTS)))
    check(everything, 5)  # again
    check(everything, 3)  # fewer samples: the first of them
    check(everything[::-1], 5)  # another order
    for i in everything:  # alone
        check([i], 2)
    check([6, 6, 1, 6], 4)  # beside its own copies
    for max_rows in (1, 2, 5, 11):
        check(everything, 5, max_rows=max_rows)
    longer = generate(model, PROMPTS, samples=5, keys=keys, **fixed | {"max_new_tokens": 50})
    for group, others in zip(longer, wanted):  # another limit only cuts elsewhere
        assert all(a.ids[:30] == b.ids for a, b in zip(group, others))


def test_another_seed_key_or_sample_is_another_draw():
    model, fixed = tiny(), {"max_new_tokens": 20, "eos_ids": [], "temperature": 1.5}
    texts = Counter()
    for seed, key in itertools.product((0, 1, 2**63), (0, 1, 2**40, -1)):
        [group] = generate(model, [[1, 2]], samples=3, seed=seed, keys=[key], **fixed)
        texts.update(tuple(c.ids) for c in group)
    assert len(texts) == 3 * 4 * 3
    same_key = generate(model, [[1, 2], [1, 2]], keys=[4, 4], **fixed)
    assert same(same_key[0][0], same_key[1][0])
    default = generate(model, [[1, 2], [1, 2]], **fixed)
    assert default == generate(model, [[1, 2], [1, 2]], keys=[0, 1], **fixed) and default[0][0].ids != default[1][0].ids


def test_uniform_numbers_are_uniform_inside_the_unit_interval_and_independent_of_how_many_are_asked():
    numbers = np.stack([uniforms(seed, key, sample, 50)
                        for seed in range(3) for key in range(20) for sample in range(20)])
    assert 0 < numbers.min() < numbers.max() < 1 and len(np.unique(numbers)) > 0.999 * numbers.size
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert chi_square(counts, np.full(100, numbers.size / 100)) < critical(99)
    for other in (numbers[1:, 0], numbers[20:, 0], numbers[:, 1]):  # the next sample, key, position
        assert abs(np.corrcoef(numbers[:len(other), 0], other)[0, 1]) < 4 / len(other) ** 0.5
    assert np.array_equal(uniforms(1, 2, 3, 7), uniforms(1, 2, 3, 40)[:7])


# ---------------------------------------------------------------------------------------------- the distribution


def chi_square(counts, expected) -> float:
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    return float(((counts - expected) ** 2 / expected).sum())


def critical(freedom: int) -> float:
    """The value that chi-square exceeds once in ten thousand times (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_model(temperature):
    model, draws, V = tiny(vocab_size=8), 20_000, 8
    with torch.no_grad():
        first = (plain_logits(model, [1, 2, 3]) / temperature).double().softmax(-1)
        second = torch.stack([(plain_logits(model, [1, 2, 3, a]) / temperature).double().softmax(-1) for a in range(V)])
    joint = (first[:, None] * second).numpy()  # [first token, second token]
    [group] = generate(model, [[1, 2, 3]], samples=draws, max_new_tokens=2, temperature=temperature, eos_ids=[], seed=1)
    counts = np.zeros((V, V))
    for completion in group:
        counts[tuple(completion.ids)] += 1
    for seen, wanted in ((counts.sum(1), joint.sum(1) * draws), (counts.ravel(), joint.ravel() * draws)):
        often = wanted > 5  # the rest is one cell, if it is large enough
        rest = [(seen[~often].sum(), wanted[~often].sum())] if wanted[~often].sum() > 5 else []
        cells = [*zip(seen[often], wanted[often]), *rest]
        assert len(cells) > 4 and chi_square(*zip(*cells)) < critical(len(cells) - 1)


@pytest.mark.parametrize("V", [1, 5, 300, 150_000])
@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_draw_inverts_the_cumulative_distribution_exactly(V, temperature):
    generator, n = torch.Generator("cpu").manual_seed(V), 40
    logits = torch.randn(n, V, generator=generator) * torch.linspace(0, 3, n)[:, None]  # flat to sharp
    uniform = torch.rand(n, dtype=torch.float64, generator=generator)
    uniform[:4] = torch.tensor([0.5 / 2**32, 1 - 0.5 / 2**32, 1e-300, 1 - 2**-53], dtype=torch.float64)
    exact = (logits.double() / temperature).softmax(-1).numpy()
    rounded = (logits / temperature).log_softmax(-1).exp().double().numpy()  # what float32 makes of it
    for row in range(4, 24):  # hard ones: just inside a token's share, by less than float32 sums can tell
        k = int(torch.randint(V, (), generator=generator))
        uniform[row] = (rounded[row, :k].sum() + 0.001 * rounded[row, k]) / rounded[row].sum()
    token, logprob = draw(logits, uniform, temperature)
    for row in range(n):
        cumulative = list(itertools.accumulate(map(float, rounded[row])))
        aim = float(uniform[row]) * cumulative[-1]
        choice = next(i for i, total in enumerate(cumulative) if total > aim)  # the definition
        before = exact[row, : token[row]].sum()
        assert before - 1e-6 <= uniform[row] <= before + exact[row, token[row]] + 1e-6
        assert int(token[row]) == choice
        assert float(logprob[row]) == pytest.approx(np.log(exact[row, token[row]]), abs=1e-4)  # float32 sums


def test_a_token_of_probability_zero_is_never_drawn():
    patterns = torch.tensor(list(itertools.product([0.0, float("-inf")], repeat=6))[:-1])
    ends = torch.tensor([0.0, 1e-300, 0.5 / 2**32, 0.25, 0.5, 0.75, 1 - 0.5 / 2**32, 1 - 2**-53], dtype=torch.float64)
    for uniform in ends:
        token, logprob = draw(patterns, uniform.expand(len(patterns)), 1.0)
        assert torch.isfinite(patterns.gather(1, token[:, None])).all() and torch.isfinite(logprob).all()
    underflow = torch.tensor([[-200.0, 0.0, -200.0]]).expand(len(ends), 3)
    assert draw(underflow, ends, 1.0)[0].eq(1).all()


# ---------------------------------------------------------------------------------------------- the end of a completion


def test_the_end_token_is_part_of_the_completion_and_only_it_finishes_one():
    model = tiny()
    [free] = generate(model, [[4, 5]], samples=40, max_new_tokens=10, temperature=2.0, eos_ids=[], seed=3)
    assert all(len(c.ids) == len(c.logprobs) == 10 and not c.finished for c in free)
    for eos_ids in ([free[0].ids[0]], [free[0].ids[9]], EOS, list(range(40))):
        [group] = generate(model, [[4, 5]], samples=40, max_new_tokens=10, temperature=2.0, eos_ids=eos_ids, seed=3)
        for completion, unlimited in zip(group, free):
            ends = [i for i, id in enumerate(unlimited.ids) if id in eos_ids]
            length = ends[0] + 1 if ends else 10
            assert completion.ids == unlimited.ids[:length] and completion.finished == bool(ends)
            assert np.allclose(completion.logprobs, unlimited.logprobs[:length], rtol=0, atol=1e-5)
        if eos_ids == [free[0].ids[0]]:
            assert group[0].ids == eos_ids and group[0].finished  # the very first token
        if eos_ids == [free[0].ids[9]]:
            assert len(group[0].ids) <= 10 and group[0].finished  # the very last one
    [[one]] = generate(model, [[4, 5]], max_new_tokens=1, temperature=2.0, eos_ids=[], seed=3)
    assert one.ids == free[0].ids[:1] and not one.finished


def test_unusable_arguments_are_refused_before_anything_is_computed():
    model, good = tiny(), {"max_new_tokens": 2, "eos_ids": [1]}
    model.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    assert generate(model, [], **good) == []
    for prompts, change in (
            ([[1], []], {}), ([[1]], {"samples": 0}), ([[1]], {"max_new_tokens": 0}), ([[1]], {"temperature": -0.1}),
            ([[1]], {"temperature": float("nan")}), ([[1]], {"keys": []}), ([[1]], {"keys": [1, 2]}),
            ([[1]], {"max_rows": -1}), ([[1]], {"max_rows": 0})):
        with pytest.raises(ValueError, match="generate needs"):
            generate(model, prompts, **good | change)


def test_timing_counts_the_tokens():
    timing = {}
    out = generate(tiny(), PROMPTS, samples=2, max_new_tokens=5, eos_ids=EOS, timing=timing)
    assert timing["decode_tokens"] == sum(len(c.ids) for group in out for c in group)
    assert timing["prefill_tokens"] == sum(map(len, PROMPTS))
    assert timing["prefill_seconds"] > 0 < timing["decode_seconds"]


# ---------------------------------------------------------------------------------------------- law 11: devices


def test_generate_creates_nothing_on_an_implicit_device():
    model, arguments = tiny("llama"), {"samples": 3, "max_new_tokens": 20, "eos_ids": EOS, "max_rows": 4}
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
@pytest.mark.parametrize("max_rows", [None, 7])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_an_accelerator_samples_what_the_cpu_samples(model_type, max_rows):
    arguments = {"samples": 4, "max_new_tokens": 70, "eos_ids": EOS[:1], "max_rows": max_rows, "temperature": 1.2}
    wanted = generate(tiny(model_type, seed=6), PROMPTS, **arguments)
    there = tiny(model_type, seed=6).to(torch.accelerator.current_accelerator())
    for group, others in zip(generate(there, PROMPTS, **arguments), wanted):
        assert all(map(same, group, others))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda device")
def test_decoding_does_not_make_the_host_wait():
    batch = sampler._Batch(tiny().to("cuda"), 100, 1.0, EOS, 0)
    with torch.no_grad():
        batch.admit([(i, range(4)) for i in range(len(PROMPTS))], PROMPTS, range(len(PROMPTS)))
        batch.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(60):
                batch.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
