"""Tell how often a model works its calculations, and how often they are right.

    python -m paper.recipes.skill runs/multi/rollouts.jsonl [FIGURE.svg]

The file may be a run's rollouts, or the records of an evaluation. The figure shows how reward,
length and the share of worked responses went in a run.

A response is worked if its thought has a step. `share` is of all responses of the kind in a quarter
of the run, and `steps` is the mean share of a response's steps that are right. To look at divisions
alone, begin with: grep '/[0-9]*=", "truth"' FILE
"""

import re
import sys
from collections import defaultdict
from decimal import Decimal
from pathlib import Path

import numpy as np

from paper.recipes.calculations import APPLY
from paper.recipes.multi_step import kind_of
from paper.report import read_rows, svg

STEP = re.compile(r"(?<![-+*/.\d])(\d+\.?\d*)([-+*/])(\d+\.?\d*)=(\d+\.?\d*)")


def steps_of(response):
    """Return the steps of a response's thought, each as (a, sign, b, result)."""
    return STEP.findall(response.partition("</think>")[0])


def is_right(a, sign, b, result):
    """Tell whether a step is right."""
    a, b, result = map(Decimal, (a, b, result))
    return result * b == a if sign == "/" else APPLY[sign](a, b) == result


def examine(records):
    """Return a row for each response (reward, length, share of right steps), by kind and by whether
    the response is worked."""
    rows = defaultdict(lambda: {"worked": [], "quick": []})
    end = 1 + max(record["step"] for record in records)
    for record in records:
        quarter = 1 + 4 * record["step"] // end
        groups = rows[f"{kind_of(record['context'].encode())}, quarter {quarter}"]
        for reward, length, response in zip(
                *(record[name] for name in ("rewards", "tokens", "responses"))):
            steps = steps_of(response)
            right = np.mean([is_right(*step) for step in steps] or np.nan)
            groups["worked" if steps else "quick"].append((reward, length, right))
    return rows


def picture(records):
    """Return an SVG of reward, length and the share of worked responses against the step, each the
    mean over a tenth of the run."""
    steps, curves = defaultdict(list), defaultdict(list)
    width = max(1, (records[-1]["step"] + 1) // 10)
    for record in records:
        worked = [bool(steps_of(response)) for response in record["responses"]]
        steps[record["step"] // width * width] += zip(record["rewards"], worked, record["tokens"])
    for step, rows in steps.items():
        reward, share, length = np.mean(rows, 0)
        curves["RPT, mean reward"].append((step, reward))
        curves["share of responses that work the calculation"].append((step, share))
        curves["length of a response, in hundreds of tokens"].append((step, length / 100))
    return svg("Reinforcement Pre-Training on GSM8K: results of calculations", curves)


def main():
    if not sys.argv[1:]:
        sys.exit(__doc__)
    records = read_rows(Path(sys.argv[1]))
    for figure in sys.argv[2:]:
        Path(figure).write_text(picture(records))
    rows = examine(records)
    print(f"{'':32}\tshare\treward\tlength\tsteps")
    for name, groups in sorted(rows.items()):
        for how, found in groups.items():
            if found:
                share = len(found) / sum(map(len, groups.values()))
                print(f"{name:24}{how:8}", *np.round([share, *np.mean(found, 0)], 2), sep="\t")


if __name__ == "__main__":
    main()
