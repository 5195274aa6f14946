"""Compare two models on the same questions: paired differences, with intervals over documents.

    python eval.py A ... --samples 8 --out a;  python eval.py B ... --samples 8 --out b
    python -m paper.compare a/records.jsonl b/records.jsonl [--first]

It prints the accuracies of both, then B's less A's in points. Because the questions are the same, a
question that is hard for both does not widen the interval of a difference. `reasoning` is the mean
over samples.

Plain prediction names one token, but a box may hold a longer prefix, such as a whole number, which
is harder to get right. --first judges each box by its first character alone, as is fair where a
digit is a token.
"""

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from eval import SPLITS, bootstrap_interval, measures, summary, table
from paper.report import read_rows

PAIRS = (("standard", "standard"), ("reasoning", "reasoning"), ("standard", "reasoning"),
         ("standard", "majority vote"))


def differences(first: Sequence[dict], second: Sequence[dict]) -> list[str]:
    """Return a line for each pair of measures and split. Raise ValueError if questions differ."""
    asked = [[(row["document"], row["position"], row["truth"]) for row in rows]
             for rows in (first, second)]
    if asked[0] != asked[1] or not asked[0] or len(set(asked[0])) < len(asked[0]):
        raise ValueError("no records, other questions, or several steps: evaluate both models with "
                         "the same corpus, holdout, seed and number of questions")
    splits, lines = SPLITS if first[0]["entropy"] is not None else {"all": -1.0}, []
    pairs = [(measures(x), measures(y), x["entropy"] or 0.0, x["document"])
             for x, y in zip(first, second)]
    for (a, b), split in product(PAIRS, splits):
        chosen = [(100 * (y[b] - x[a]), document) for x, y, entropy, document in pairs
                  if entropy > splits[split] and a in x and b in y]
        if chosen:
            mean, low, high = bootstrap_interval(*zip(*chosen))
            lines.append(f"B's {b} less A's {a}, {split} ({len(chosen)}): "
                         f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
    return lines


def by_first(records: Sequence[dict]) -> list[dict]:
    """Return records of which only the first characters of predictions are left and judged."""
    return [row | {"predictions": (cut := [said and said[:1] for said in row["predictions"]]),
                   "rewards": [float(said == row["truth"][:1]) for said in cut]}
            for row in records]


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[3:] not in ([], ["--first"]):
        sys.exit(__doc__)
    try:
        first, second = map(by_first if sys.argv[3:] else list,
                            map(read_rows, map(Path, sys.argv[1:3])))
        lines = differences(first, second)
    except (ValueError, OSError) as error:
        sys.exit(f"paper.compare: error: {error}")
    print(table({"A": summary(first), "B": summary(second)}, "both"), *lines, sep="\n")
