"""Evaluation of Reinforcement Pre-Training (arXiv 2506.08007).

Statistics: what turns lists of right and wrong predictions into the numbers of the paper's tables and figures, each
with an interval. Numpy only; no model is needed.
"""

import math
import re
from collections import Counter
from typing import Sequence

import numpy as np

# ---- statistics

LEVEL = 0.95  # of every interval
RESAMPLES = 2000  # of the bootstrap over documents
ALPHA_RANGE = (1e-3, 10.0)  # below, A / C^alpha is a straight line in log C; above, a step at the smallest compute

# The keyword groups of the paper's analysis of reasoning patterns, in its wording.
PATTERNS = {
    "transition": ("alternatively", "think differently"),
    "reflection": ("wait", "initial answer", "original answer", "looking back", "thought process"),
    "breakdown": ("break down", "break this down"),
    "hypothesis": ("probably", "something like"),
    "divergent thinking": ("etc.", "or something", "either", "sometimes it refers", "otherwise", "exploring",
                           "options"),
    "deduction": ("summarize", "conclusion", "conclude", "finally", "logically", "consequently"),
}


def bootstrap_interval(values: Sequence[float], clusters: Sequence[int], level: float = LEVEL,
                       resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of `values` [N] by the percentile bootstrap over whole clusters `clusters` [N].

    Positions of one document are not independent, so documents are what is drawn with replacement. Every value
    weighs the same: a resample's mean is its sum of values over its number of values. No value gives (nan, nan, nan);
    a single cluster shows no spread between clusters, so it gives (mean, nan, nan). ValueError if lengths differ.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} cluster labels; give one label for each value.")
    if len(values) == 0:
        return math.nan, math.nan, math.nan
    _, member = np.unique(np.asarray(clusters), return_inverse=True)  # [N]
    sums, counts = np.bincount(member, weights=values), np.bincount(member)  # [K], [K]
    if len(counts) == 1:
        return float(values.mean()), math.nan, math.nan
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=resamples)  # [resamples, K]
    low, high = np.quantile((draws @ sums) / (draws @ counts), [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def paired_difference(a: Sequence[float], b: Sequence[float], clusters: Sequence[int], level: float = LEVEL,
                      resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """`bootstrap_interval` of the mean of a - b, both [N], on the same positions in order; ValueError if N differs."""
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} values but b has {len(b)}; measure both on the same positions.")
    return bootstrap_interval(np.subtract(a, b), clusters, level, resamples, seed)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Chance that k of `samples` completions, drawn without replacement, hold a correct one (arXiv 2107.03374).

    ValueError unless 1 <= k <= samples and 0 <= correct <= samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@k needs 1 <= k <= samples and 0 <= correct <= samples, "
                         f"but got k={k}, correct={correct}, samples={samples}.")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_vote(predictions: Sequence[bytes | None]) -> bytes | None:
    """The most frequent prediction; of equals the first seen. None (no answer) does not vote; all None gives None."""
    votes = Counter(prediction for prediction in predictions if prediction is not None)
    return max(votes, key=votes.__getitem__, default=None)  # a Counter keeps the order in which keys were first seen


def fit_power_law(compute: Sequence[float], accuracy: Sequence[float]) -> tuple[float, float, float, float]:
    """(A, alpha, P_star, r2) of P(C) = A / C^alpha + P_star by least squares; the paper's scaling law.

    `compute` [N] in any positive unit (FLOPs, steps), `accuracy` [N] in any unit; A < 0 where accuracy rises. alpha is
    searched in ALPHA_RANGE: a value at an end says that the points do not determine it. ValueError for
    fewer than 4 points, a compute that is not positive, a value that is not finite, or nothing that varies.
    """
    log_compute, accuracy = _check_points(compute, accuracy)
    (A,), (alpha,), (P_star,), fitted = _fit_rows(log_compute, accuracy[None])
    r2 = 1 - ((accuracy - fitted[0]) ** 2).sum() / ((accuracy - accuracy.mean()) ** 2).sum()
    return float(A), float(alpha), float(P_star), float(r2)


def power_law_intervals(compute: Sequence[float], accuracy: Sequence[float], level: float = LEVEL,
                        resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Percentile intervals of "A", "alpha" and "P_star" of `fit_power_law`, by residual bootstrap.

    Residuals of the fit are drawn with replacement, put on the fitted curve, and the law is fitted again. They are
    widened by sqrt(N / (N - 3)) first, for three fitted parameters make them too small. Assumes equal noise at every
    point. In simulation 95 % intervals hold the truth in 93 % of cases with 16 points, in 87 % with the paper's six.
    """
    log_compute, accuracy = _check_points(compute, accuracy)
    fitted = _fit_rows(log_compute, accuracy[None])[-1][0]
    residuals = (accuracy - fitted) * math.sqrt(len(accuracy) / (len(accuracy) - 3))
    drawn = np.random.default_rng(seed).choice(residuals, size=(resamples, len(residuals)))  # [resamples, N]
    *parameters, _ = _fit_rows(log_compute, fitted + drawn)
    bounds = np.quantile(parameters, [(1 - level) / 2, (1 + level) / 2], axis=1).tolist()  # [2][3]: lows, highs
    return dict(zip(("A", "alpha", "P_star"), zip(*bounds)))


def reasoning_patterns(responses: Sequence[str]) -> dict[str, float]:
    """Share in [0, 1] of responses that hold a keyword of each group of PATTERNS; nan without responses.

    A keyword counts in any case, as whole words: neither "waiting" nor "await" is "wait", nor "neither" "either". Any
    white space may part the words of a keyword. Inflections count only where the paper lists them.
    """
    shares = {}
    for group, keywords in PATTERNS.items():
        words = "|".join(r"\s+".join(map(re.escape, keyword.split())) for keyword in keywords)
        # Not \b: behind the dot of "etc." it would ask for a letter.
        pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
        hits = [pattern.search(response) is not None for response in responses]
        shares[group] = sum(hits) / len(hits) if hits else math.nan
    return shares


def _check_points(compute: Sequence[float], accuracy: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(log compute, accuracy), both float64 [N], or the ValueError that says why no power law fits them."""
    compute, accuracy = np.asarray(compute, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    if compute.shape != accuracy.shape or compute.size < 4:
        need = "4 or more points (compute, accuracy)"
    elif not (np.isfinite(compute).all() and np.isfinite(accuracy).all() and (compute > 0).all()):
        need = "finite points at positive compute"
    elif len(np.unique(compute)) < 3 or np.ptp(accuracy) == 0:
        need = "3 or more values of compute and 2 or more of accuracy"
    else:
        return np.log(compute), accuracy
    raise ValueError(f"A power law needs {need}, but got {compute.tolist()} and {accuracy.tolist()}.")


def _fit_rows(log_compute: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Least-squares (A, alpha, P_star) each [R], and fitted values [R, N], for R data sets `rows` [R, N] at once.

    For a given alpha the law is a line in (C^-alpha - 1) / alpha, which, unlike C^-alpha, stays well conditioned as
    alpha goes to 0. C is in units of the smallest compute, so no power overflows. That leaves one search, over alpha.
    """
    shifted = log_compute - log_compute.min()  # [N], >= 0
    mean = rows.mean(axis=1, keepdims=True)

    def line(log_alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slope [R], intercept [R] and fitted values [R, N] at alpha [R]."""
        basis = np.expm1(-np.exp(log_alpha)[:, None] * shifted) / np.exp(log_alpha)[:, None]  # [R, N]
        middle = basis.mean(axis=1, keepdims=True)
        slope = ((basis - middle) * (rows - mean)).sum(1, keepdims=True) / ((basis - middle) ** 2).sum(1, keepdims=True)
        return slope[:, 0], (mean - slope * middle)[:, 0], mean + slope * (basis - middle)

    def error(log_alpha: np.ndarray) -> np.ndarray:
        return ((rows - line(log_alpha)[-1]) ** 2).sum(axis=1)  # [R]; from residuals, as a difference would cancel

    grid = np.linspace(*np.log(ALPHA_RANGE), 150)
    best = np.argmin([error(np.full(len(rows), point)) for point in grid], axis=0)  # [R]
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(50):  # the bracket ends 0.12 * golden^50 = 4e-12 wide, relative to alpha
        left, right = high - golden * (high - low), low + golden * (high - low)
        keep_left = error(left) < error(right)
        low, high = np.where(keep_left, low, left), np.where(keep_left, right, high)
    slope, intercept, fitted = line((low + high) / 2)
    alpha = np.exp((low + high) / 2)
    return slope / alpha * np.exp(alpha * log_compute.min()), alpha, intercept - slope / alpha, fitted
