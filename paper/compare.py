"""Paired differences between two models on the same questions, with intervals over documents.

    python eval.py A ... --out a.jsonl;  python eval.py B ... --out b.jsonl
    python -m paper.compare a.jsonl b.jsonl

Each line is B's accuracy less A's in points: of the same questions, so that what makes a question
hard for both does not widen the interval. `reasoning` is the mean over samples.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval import SPLITS, bootstrap_interval, measures
from paper.report import read_lines

PAIRS = (("standard", "standard"), ("reasoning", "reasoning"), ("standard", "reasoning"),
         ("standard", "majority vote"))


def differences(first: Sequence[dict], second: Sequence[dict]) -> list[str]:
    """A line for each pair of measures and split. ValueError if the questions differ."""
    places = [[(row["document"], row["position"]) for row in rows] for rows in (first, second)]
    if places[0] != places[1] or not places[0]:
        raise ValueError("no records, or of other questions: evaluate both models with the same "
                         "corpus, holdout, seed and number of questions")
    lines = []
    for a, b in PAIRS:
        for split, nats in SPLITS.items():
            chosen = [(measures(x), measures(y), x["document"])
                      for x, y in zip(first, second) if x.get("entropy", 9.0) > nats]
            if chosen and all(a in x and b in y for x, y, _ in chosen):
                gaps = [100 * (y[b] - x[a]) for x, y, _ in chosen]
                mean, low, high = bootstrap_interval(gaps, [place for *_, place in chosen])
                lines.append(f"B's {b} less A's {a}, {split} ({len(gaps)}): "
                             f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m paper.compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for file in ("a.jsonl", "b.jsonl"):
        parser.add_argument(file, type=Path, help="what eval.py --out wrote")
    files = vars(parser.parse_args(argv)).values()
    try:
        print("\n".join(differences(*(list(read_lines(file)) for file in files))))
    except ValueError as error:
        sys.exit(f"paper.compare: {error}")


if __name__ == "__main__":
    main()
