"""Laws of the statistics in eval.py and paper/, each against an oracle that shares no code with it;
and what paper/plan.py counts."""

import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from eval import bootstrap_interval, majority_vote, votes
from helpers import ROOT, assert_rounds_to, tiny
from paper import compare, plan
from paper.patterns import PATTERNS, main, reasoning_patterns
from paper.scaling import fit_power_law, power_law_intervals


def documents(rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Right/wrong values and document labels; a document's own accuracy is uniform in [0, 1], so
    the mean is 0.5."""
    labels = np.repeat(np.arange(number), rng.integers(5, 31, size=number))
    return (rng.random(len(labels)) < rng.random(number)[labels]).astype(float), labels


def test_bootstrap_interval_is_that_of_all_draws_of_clusters():
    groups = [[1, 0, 1, 1.5], [0, 0.25], [1, 1, 0.7], [0.1, 0, 0, 0, 0.35], [0.6], [0.9, 0.2, 0.85]]
    values = list(itertools.chain(*groups))
    labels = [7 * index - 3 for index, group in enumerate(groups) for _ in group]
    means = []
    for draw in itertools.product(groups, repeat=len(groups)):  # 6^6 equally likely draws
        pool = [value for group in draw for value in group]
        means.append(sum(pool) / len(pool))
    mean, low, high = bootstrap_interval(values, labels, resamples=40_000)
    assert_rounds_to(mean, sum(values) / len(values), len(values))
    off = 4 * math.sqrt(0.025 * 0.975 / 40_000)  # of the share of draws below a quantile
    for bound, quantile in ((low, 0.025), (high, 0.975)):
        assert np.quantile(means, quantile - off) <= bound <= np.quantile(means, quantile + off)


def test_bootstrap_interval_covers_the_true_mean_at_the_stated_rate_only_with_clusters():
    rng = np.random.default_rng(1)
    by_documents, by_positions = [], []
    for seed in range(300):
        values, labels = documents(rng, 60)
        _, low, high = bootstrap_interval(values, labels, resamples=400, seed=seed)
        by_documents.append(low <= 0.5 <= high)
        if seed < 100:  # slower, and far enough off to show in fewer
            rows = np.arange(len(values))
            _, low, high = bootstrap_interval(values, rows, resamples=400, seed=seed)
            by_positions.append(low <= 0.5 <= high)
    assert 0.90 <= np.mean(by_documents) <= 0.985
    assert np.mean(by_positions) < 0.75


def test_bootstrap_interval_does_not_depend_on_the_order_of_values():
    rng = np.random.default_rng(2)
    values, labels = documents(rng, 20)
    order = rng.permutation(len(values))
    expected = bootstrap_interval(values, labels)
    assert_rounds_to(bootstrap_interval(values[order], labels[order]), expected, len(values))


def test_bootstrap_interval_without_spread_between_clusters_to_see_has_no_bounds():
    assert bootstrap_interval([1, 0, 0, 1], [5, 5, 5, 5]) == (0.5, None, None)
    with pytest.raises(ValueError, match="nothing was measured"):
        bootstrap_interval([], [])


def test_majority_vote_is_the_first_seen_of_the_most_frequent_answers():
    for predictions in itertools.product([b" 4", b"4", b"", None], repeat=5):
        counts = Counter(p for p in predictions if p is not None)
        ranked = sorted(counts, key=lambda p: (-counts[p], predictions.index(p)))
        assert votes(predictions) == [(p, counts[p]) for p in ranked]
        assert majority_vote(predictions) == (ranked[0] if ranked else None)


def assert_fit(fit, compute, A, alpha, P_star):
    """fit is (A, alpha, P_star), but for the last grid and for rounding.

    A rounding is 8 epsilons of an accuracy. alpha may be off by a step of the last grid, 3e-10 of
    itself; A and P_star make up for it. All three may be off by what roundings of the accuracies
    move.
    """
    C = compute / compute.min()  # in units of the smallest the Jacobian is well conditioned
    size = A * compute.min() ** -alpha
    jacobian = np.stack([size * C**-alpha, -size * alpha * C**-alpha * np.log(C), np.ones_like(C)])
    line = jacobian[[0, 2]].T  # of relative changes of A and alpha, and of P_star
    made_up, *_ = np.linalg.lstsq(line, jacobian[1], rcond=None)
    rounding = 8 * 2**-52 * max(abs(size), abs(size + P_star))
    off = np.abs(np.linalg.pinv(jacobian.T)).sum(axis=1) * rounding
    off += 3e-10 * np.abs([made_up[0], 1, made_up[1]])
    off[0] += off[1] * alpha * math.log(compute.min())  # A itself is at a compute of 1
    for got, want, allowed in zip(fit, (A, alpha, P_star), off * (abs(A), alpha, 1)):
        assert abs(got - want) <= allowed, f"{got} instead of {want}, {allowed:.3g} is allowed"


@pytest.mark.parametrize("alpha", [0.03, 0.2, 0.5, 1.3])
@pytest.mark.parametrize("first, last", [(1e9, 1e12), (1e18, 1e24), (1e9, 1e24), (100, 1200)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_power_law_is_recovered_from_noiseless_points(alpha, first, last, sign):
    compute = np.geomspace(first, last, 7)
    A, P_star = sign * 20 * first**alpha, 45.0  # the curve starts 20 points off its limit
    fit = fit_power_law(compute, A / compute**alpha + P_star)
    assert_fit(fit[:3], compute, A, alpha, P_star)
    assert_rounds_to(fit[3], 1.0, 4)


def test_power_law_is_the_least_squares_fit():
    rng = np.random.default_rng(4)
    compute = np.array([100, 200, 400, 800, 1000, 1200]) * 1e17
    accuracy = 45 - 9 * (compute / 1e19) ** -0.6 + rng.normal(0, 0.2, 6)
    A, alpha, P_star, r2 = fit_power_law(compute, accuracy)

    def squares(alpha: float) -> float:
        design = np.stack([(compute / 1e19) ** -alpha, np.ones(6)], axis=1)
        return ((accuracy - design @ np.linalg.lstsq(design, accuracy, rcond=None)[0]) ** 2).sum()

    best = min(squares(candidate) for candidate in np.geomspace(0.05, 5, 5000))
    mine = ((accuracy - A / compute**alpha - P_star) ** 2).sum()
    # exp(alpha log C), with alpha log C of 26, makes 26 roundings of an accuracy of 45
    rounding = 2 * 26 * 2**-52 * accuracy.max() * np.sqrt(6 * best)
    assert mine <= best + rounding
    assert abs(r2 - (1 - mine / (6 * accuracy.var()))) <= rounding / (6 * accuracy.var()) + 2**-51


def test_power_law_intervals_cover_the_true_parameters_at_about_the_stated_rate():
    rng = np.random.default_rng(5)
    compute = np.geomspace(1e18, 1e22, 16)
    truth = {"A": -12 * 1e18**0.4, "alpha": 0.4, "P_star": 45.0}
    covered, exact = Counter(), truth["A"] / compute ** truth["alpha"] + truth["P_star"]
    for seed in range(100):
        accuracy = exact + rng.normal(0, 0.3, len(compute))
        bounds = power_law_intervals(compute, accuracy, resamples=120, seed=seed)
        for name, (low, high) in bounds.items():
            covered[name] += low <= truth[name] <= high
    for name in truth:
        assert 0.87 <= covered[name] / 100 <= 0.99, (name, covered)


def test_power_law_intervals_shrink_to_the_parameters_without_noise():
    compute = np.geomspace(1e18, 1e22, 8)
    intervals = power_law_intervals(compute, 45 - 3e7 / compute**0.4)
    for end in (0, 1):
        fit = [intervals[name][end] for name in ("A", "alpha", "P_star")]
        assert_fit(fit, compute, -3e7, 0.4, 45.0)


@pytest.mark.parametrize("compute, accuracy, message", [
    ([1, 2, 3], [1, 2, 3], "4 or more points"),
    ([1, 2, 3, 4], [1, 2, 3], "4 or more points"),
    (5, 5, "4 or more points"),
    ([1, 1, 2, 2], [1, 2, 3, 4], "3 or more values of compute"),
    ([0, 1, 2, 3], [1, 2, 3, 4], "positive compute"),
    ([1, 2, 3, -4], [1, 2, 3, 4], "positive compute"),
    ([1, 2, 3, math.inf], [1, 2, 3, 4], "finite"),
    ([1, 2, 3, 4], [1, 2, 3, math.nan], "finite"),
    ([1, 2, 3, 4], [5, 5, 5, 5], "2 or more of accuracy"),
])
def test_power_law_rejects_points_that_determine_none(compute, accuracy, message):
    for function in (fit_power_law, power_law_intervals):
        with pytest.raises(ValueError, match=message):
            function(compute, accuracy)


@pytest.mark.parametrize("response, groups", [
    ("Wait, that is off. WAIT.", {"reflection"}),
    ("waiting rooms await the waiters", set()),
    ("Alternatively, think differently.", {"transition"}),
    ("commas, dots, etc.", {"divergent thinking"}),
    ("(commas, etc.) follow", {"divergent thinking"}),
    ("etcetera, or etc, without its dot", set()),
    ("Neither is an adoption.", set()),
    ("either way", {"divergent thinking"}),
    ("or someone, for something", set()),
    ("It is probably 4, or\n something like it.", {"hypothesis", "divergent thinking"}),
    ("Let me break this down. Finally, we conclude.", {"breakdown", "deduction"}),
    ("We break it down; he concludes.", set()),
    ("My *initial answer*: 4", {"reflection"}),
    ("", set()),
])
def test_a_response_shows_the_groups_of_the_whole_words_it_holds(response, groups):
    assert reasoning_patterns([response]) == {group: float(group in groups) for group in PATTERNS}


def test_the_patterns_of_a_run_are_shown_by_tenths(tmp_path, capsys):
    def row(step):
        return {"step": step, "reward": float(step > 9), "tokens": 20 + step,
                "prediction": " a" if step > 4 else None, "response": "Wait" if step % 2 else ""}

    texts = [json.dumps(row(step)) + "\n" for step in range(20)]
    (tmp_path / "rollouts.jsonl").write_text("".join(texts))
    main([str(tmp_path)])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:6] == ["steps", "reward", "parsed", "tokens", "transition", "reflection"]
    assert len(lines) == 10 and lines[0].split() == [
        "0", "to", "1", "0.0", "0.0", "20.5", "0.0", "50.0", *["0.0"] * 4]
    assert lines[2].split()[3:6] == ["0.0", "50.0", "24.5"]
    assert lines[9].split()[:6] == ["18", "to", "19", "100.0", "100.0", "38.5"]
    with pytest.raises(SystemExit, match="no rollouts.jsonl"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stop:  # not a traceback
        main([])
    assert stop.value.code == 2


def test_reasoning_patterns_are_shares_of_responses():
    responses = ["wait, wait, finally", "wait", "conclusion", "the next token"]
    assert reasoning_patterns(responses) == {
        "transition": 0, "reflection": 0.5, "breakdown": 0, "hypothesis": 0,
        "divergent thinking": 0, "deduction": 0.5}
    assert reasoning_patterns([]) == {}


@pytest.mark.parametrize("group, keywords", [
    ("transition", "alternatively, think differently"),
    ("reflection", "wait, initial answer, original answer, looking back, thought process"),
    ("breakdown", "break down, break this down"),
    ("hypothesis", "probably, something like"),
    ("divergent thinking", "etc., or something, either, sometimes it refers, otherwise, exploring, "
                           "options"),
    ("deduction", "summarize, conclusion, conclude, finally, logically, consequently"),
])
def test_the_keywords_are_those_the_paper_prints_each_found_in_its_group_only(group, keywords):
    assert ", ".join(PATTERNS[group]) == keywords
    for keyword in keywords.split(", "):
        shares = reasoning_patterns([f"So {keyword.upper()}"])
        assert {name for name, share in shares.items() if share} == {group}


# ---- what a run would take


def test_the_plan_counts_the_bytes_of_the_shards(capsys):
    def planned(*options):
        plan.main(["--recipe", "paper", "--model", str(ROOT / "paper/configs/r1-distill-qwen-14b"),
                   *options])
        return capsys.readouterr().out

    said = planned("--processes", "8", "--memory", "80")
    weights = float(re.search(r"master weights ([\d.]+)", said)[1])
    assert weights == pytest.approx(14.77e9 * 4 / 8 / 1e9, rel=0.01)  # 14.77 billion parameters
    assert float(re.search(r"rollout weights ([\d.]+)", said)[1]) == pytest.approx(29.5, rel=0.01)
    tokens = re.search(r"--cache-tokens (\d+) makes the rollout fit", said)[1]
    said = planned("--processes", "8", "--memory", "80", "--cache-tokens", tokens)
    assert "DOES NOT FIT" not in said and " s " not in said  # and it promises no seconds
    said = planned("--processes", "1", "--memory", "192")
    assert "DOES NOT FIT: weights and optimizer leave no room" in said


def test_the_plan_counts_two_operations_for_each_weight_and_token(tmp_path, capsys):
    config = tiny(num_hidden_layers=3).config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    plan.main(["--model", str(tmp_path), "--questions", "2", "--group-size", "2",
               "--prompt-tokens", "10", "--response-tokens", "20"])
    weights = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 40 * 32
    attended = 4 * 3 * 32  # for each token and each that it attends to
    prefill = 2 * 10 * (2 * weights + attended * 5)
    decode = 2 * 40 * (2 * weights + attended * (10 + 10))
    said = capsys.readouterr().out
    assert f"a step of 100 tokens: {4 * (prefill + decode):.2e} FLOP" in said
    assert f"prefill {prefill:.2e}, decode {decode:.2e}" in said


def test_paired_differences_are_those_of_the_same_questions():
    def record(n, standard, right, entropy=2.0):
        return {"document": n // 2, "position": n, "entropy": entropy, "standard": standard,
                "reasoning": right, "vote": 1.0, "parsed": [1.0] * 4, "length": [3] * 4}

    first = [record(n, n % 2, [0.0, 1.0, 0.0, 0.0], 0.6 + n / 10) for n in range(8)]
    second = [record(n, 1, [1.0, 1.0, n % 2, 0.0], 0.6 + n / 10) for n in range(8)]
    lines = compare.differences(first, second)
    gaps = [100 * ((2 + n % 2) / 4 - 1 / 4) for n in range(8)]
    mean, low, high = bootstrap_interval(gaps, [n // 2 for n in range(8)])
    assert f"B's reasoning less A's reasoning, easy (8): {mean:+.1f} [{low:+.1f}, {high:+.1f}]" \
        in lines
    assert "B's standard less A's standard, easy (8): +50.0 [+50.0, +50.0]" in lines
    assert "B's majority vote less A's standard, easy (8): +50.0 [+50.0, +50.0]" in lines
    assert not [line for line in lines if "hard" in line]  # no question is above 1.5 nats
    with pytest.raises(ValueError, match="other questions"):
        compare.differences(first, second[1:])
    with pytest.raises(SystemExit, match="no records"):
        compare.main(["nowhere.jsonl", "nowhere either.jsonl"])
    for wanting, code in ((["alone.jsonl"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as stop:  # not a traceback
            compare.main(wanting)
        assert stop.value.code == code
