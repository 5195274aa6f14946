"""Laws of the statistics in eval.py and paper/, each against an oracle that shares no code."""

import itertools
import math

import numpy as np
import pytest

from eval import bootstrap_interval, measures
from helpers import assert_rounds_to
from paper.compare import by_first, differences
from paper.patterns import PATTERNS, reasoning_patterns


def documents(rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Right/wrong values and document labels; a document's own accuracy is uniform in [0, 1], so
    the mean is 0.5."""
    labels = np.repeat(np.arange(number), rng.integers(5, 31, size=number))
    return (rng.random(len(labels)) < rng.random(number)[labels]).astype(float), labels


# ---- intervals


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
    rng, by_documents, by_positions = np.random.default_rng(1), [], []
    for _ in range(200):
        values, labels = documents(rng, 60)
        _, low, high = bootstrap_interval(values, labels, resamples=400)
        by_documents.append(low <= 0.5 <= high)
        if len(by_positions) < 50:  # slower, and far enough off to show in fewer
            _, low, high = bootstrap_interval(values, range(len(values)), resamples=400)
            by_positions.append(low <= 0.5 <= high)
    # 0.95 less 4 and plus 3 deviations of 200 draws
    assert 0.88 <= np.mean(by_documents) <= 0.99 and np.mean(by_positions) < 0.75


def test_bootstrap_interval_does_not_depend_on_the_order_of_values():
    rng = np.random.default_rng(2)
    values, labels = documents(rng, 20)
    order, expected = rng.permutation(len(values)), bootstrap_interval(values, labels)
    assert_rounds_to(bootstrap_interval(values[order], labels[order]), expected, len(values))


# ---- patterns and pairs


@pytest.mark.parametrize("response, groups", [
    ("Wait, that is off. WAIT.", {"reflection"}),
    ("waiting rooms await the waiters", set()),
    ("(commas, etc.) follow", {"divergent thinking"}),
    ("etcetera, or etc, without its dot", set()),
    ("Neither is an adoption, or someone's", set()),
    ("It is probably 4, or\n something like it.", {"hypothesis", "divergent thinking"}),
    ("Let me break this down. Finally, we conclude.", {"breakdown", "deduction"}),
])
def test_a_response_shows_the_groups_of_the_whole_words_it_holds(response, groups):
    assert reasoning_patterns([response]) == {group: float(group in groups) for group in PATTERNS}


def test_paired_differences_are_those_of_the_same_questions():
    def record(n, standard, *rewards):
        return {"document": n // 2, "position": n, "entropy": 0.6 + n / 10, "standard": standard,
                "truth": "720", "rewards": rewards, "tokens": [3] * 4,
                "predictions": ["71", "72", "80", None]}

    first = [record(n, n % 2, 0.0, 1.0, 0.0, 0.0) for n in range(8)]
    second = [record(n, 1, 1.0, 1.0, n % 2, 0.0) for n in range(8)]
    gaps = [100 * ((2 + n % 2) / 4 - 1 / 4) for n in range(8)]
    mean, low, high = bootstrap_interval(gaps, [n // 2 for n in range(8)])
    lines = differences(first, second)
    assert f"B's reasoning less A's reasoning, easy (8): {mean:+.1f} [{low:+.1f}, {high:+.1f}]" in \
        lines
    assert "B's standard less A's standard, easy (8): +50.0 [+50.0, +50.0]" in lines
    judged = [measures(row) for row in by_first(first)]
    assert all(of["reasoning"] == of["majority vote"] / 2 == 0.5 for of in judged)
    for others in (second[1:], [row | {"truth": "8"} for row in second], second * 2,
                   [row | {"document": 9} for row in second]):
        with pytest.raises(ValueError, match="other questions"):
            differences(first * (len(others) // 8 or 1), others)
