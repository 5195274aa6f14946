"""The paper's analysis of reasoning patterns: how many responses hold a keyword of each group.

    python -m paper.patterns RUN           in %, by tenths of a run
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

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
    """Print the shares of each tenth of a run."""
    rows = read_rows(Path(folder) / "rollouts.jsonl")
    if not rows:
        sys.exit(f"paper.patterns: error: {folder}: no rollouts.jsonl, or an empty one")
    steps = 1 + rows[-1]["step"]
    print("  ".join(f"{name:>10}" for name in ["tenth", *PATTERNS]))
    for tenth in range(10):
        texts = sum((row["responses"] for row in rows if row["step"] * 10 // steps == tenth), [])
        if texts:
            shares = reasoning_patterns(texts).items()
            print(f"{tenth + 1:>10}", *(f"{100 * share:>{max(10, len(name))}.1f}"
                                        for name, share in shares), sep="  ")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
