"""Compare two models on the same questions: paired differences, with intervals over documents.

    python eval.py A ... --samples 8 --out a;  python eval.py B ... --samples 8 --out b
    python -m paper.compare a/records.jsonl b/records.jsonl

Each line is B's accuracy less A's, in points. Because the questions are the same, a question that
is hard for both does not widen the interval. `reasoning` is the mean over samples.
"""

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from eval import SPLITS, bootstrap_interval, measures
from paper.report import read_rows

PAIRS = (("standard", "standard"), ("reasoning", "reasoning"), ("standard", "reasoning"),
         ("standard", "majority vote"))


def differences(first: Sequence[dict], second: Sequence[dict]) -> list[str]:
    """Return a line for each pair of measures and split. Raise ValueError if questions differ."""
    places = [[(row["document"], row["position"]) for row in rows] for rows in (first, second)]
    if places[0] != places[1] or not places[0]:
        raise ValueError("no records, or of other questions: evaluate both models with the same "
                         "corpus, holdout, seed and number of questions")
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


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print("\n".join(differences(*map(read_rows, map(Path, sys.argv[1:])))))
    except ValueError as error:
        sys.exit(f"paper.compare: error: {error}")
