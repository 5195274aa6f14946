"""The paper's analysis of reasoning patterns: how many responses hold a keyword of each group.

    python -m paper.patterns RUN           in % by tenths of a run, with reward, parsed and length
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paper.report import read_rows

PATTERNS = {  # in the paper's wording
    "transition": ("alternatively", "think differently"),
    "reflection": ("wait", "initial answer", "original answer", "looking back", "thought process"),
    "breakdown": ("break down", "break this down"),
    "hypothesis": ("probably", "something like"),
    "divergent thinking": ("etc.", "or something", "either", "sometimes it refers", "otherwise",
                           "exploring", "options"),
    "deduction": ("summarize", "conclusion", "conclude", "finally", "logically", "consequently"),
}


def reasoning_patterns(responses: Sequence[str]) -> dict[str, float]:
    """Return the share of responses that hold a keyword of each group of PATTERNS; {} for none.

    Keywords count in any case and as whole words: "waiting" is not "wait". Inflections count only
    where the paper lists them.
    """
    shares = {}
    for group, keywords in PATTERNS.items() if responses else ():
        words = "|".join(map(re.escape, keywords)).replace("\\ ", r"\s+")
        # Not \b, which would ask for a letter after the dot of "etc."
        found = (re.search(rf"(?<!\w)(?:{words})(?!\w)", text, re.IGNORECASE) for text in responses)
        shares[group] = sum(map(bool, found)) / len(responses)
    return shares


def main(folder: str) -> None:
    """Print the shares of a run by tenths."""
    rows = read_rows(Path(folder) / "rollouts.jsonl")
    head = ["steps", "reward", "parsed", "tokens", *PATTERNS]
    print("  ".join(f"{name:>10}" for name in head))
    for steps in np.array_split(np.arange(1 + max(row["step"] for row in rows)), 10):
        some = [row for row in rows if row["step"] in steps]
        rewards, said, tokens, texts = (sum((row[key] for row in some), []) for key in
                                        ("rewards", "predictions", "tokens", "responses"))
        if texts:
            shares = [np.mean(rewards), np.mean([text is not None for text in said]),
                      np.mean(tokens) / 100, *reasoning_patterns(texts).values()]
            cells = [f"{steps[0]} to {steps[-1]}", *(f"{100 * share:.1f}" for share in shares)]
            print("  ".join(f"{cell:>{max(10, len(name))}}" for cell, name in zip(cells, head)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
