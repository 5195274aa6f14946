"""The paper's analysis of reasoning patterns: how many responses hold a keyword of each group.

    python -m paper.patterns RUN           in % by tenths of a run, beside what else changes
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paper.report import read_lines

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
    """Share in [0, 1] of responses that hold a keyword of each group of PATTERNS; {} for none.

    A keyword counts in any case, as whole words: neither "waiting" nor "await" is "wait", nor
    "neither" "either". Any white space may part the words of a keyword. Inflections count only
    where the paper lists them.
    """
    shares = {}
    for group, keywords in PATTERNS.items() if responses else ():
        words = "|".join(map(re.escape, keywords)).replace("\\ ", r"\s+")
        # Not \b: behind the dot of "etc." it would ask for a letter.
        pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
        shares[group] = sum(map(bool, map(pattern.search, responses))) / len(responses)
    return shares


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m paper.patterns",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/toy")
    folder = parser.parse_args(argv).run
    rows = list(read_lines(folder / "rollouts.jsonl"))
    if not rows:
        sys.exit(f"paper.patterns: {folder}: no rollouts.jsonl of a run with samples")
    head = ["steps", "reward", "parsed", "tokens", *PATTERNS]
    lines = [head]
    for steps in np.array_split(np.arange(rows[-1]["step"] + 1), 10):
        if some := [row for row in rows if row["step"] in steps]:
            reward, tokens = (np.mean([row[key] for row in some]) for key in ("reward", "tokens"))
            shares = [reward, np.mean([row["prediction"] is not None for row in some]),
                      *reasoning_patterns([row["response"] for row in some]).values()]
            first, second, *others = (f"{100 * share:.1f}" for share in shares)
            span = f"{steps[0]} to {steps[-1]}"
            lines.append([span, first, second, f"{tokens:.1f}", *others])
    for line in lines:
        print("  ".join(f"{cell:>{max(10, len(name))}}" for cell, name in zip(line, head)))


if __name__ == "__main__":
    main()
