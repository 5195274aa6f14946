"""Whether a toy run has learned: `python tests/learned.py runs/toy/table.json` ends with 1 if it has not.

In every split RPT's reasoning must be above the base's standard prediction and reasoning, the ends of
the 95 % intervals apart.
"""

import json
import sys
from pathlib import Path


def failures(table: dict) -> list[str]:
    """What speaks against it, a sentence each. table: by model, split and measure [mean, low, high]."""
    found = []
    for split, measures in table["base"].items():
        low = table["rpt"][split]["reasoning"][1]
        for measure in ("standard", "reasoning"):
            high = measures[measure][2]
            if not low > high:
                found.append(f"{split}: RPT, reasoning begins at {100 * low:.1f} %, "
                             f"base, {measure} ends at {100 * high:.1f} %")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(failures(json.loads(Path(sys.argv[1]).read_text()))) or 0)
