"""The paper's analysis of reasoning patterns: how many responses hold a keyword of each group."""

import re
from collections.abc import Sequence

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
