"""Measure how often worked thoughts are right, and how often a run works them.

    python -m paper.recipes.skill MODEL_OR_RUN [train.py's options]

First the model has to work random calculations: how often the result is right, its first digit, and
a step, by the signs of a calculation. Then, of the rollouts of a run, at results of several steps
or one and elsewhere, in quarters of the run: reward, length in tokens, the share of thoughts that
have a step, and the reward with and without one.
"""

import json
import re
import sys
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from random import Random

import numpy as np

from data import TEMPLATES
from paper.ask import load
from paper.recipes.calculations import APPLY, draw
from paper.recipes.multi_step import kind_of
from sampler import generate

COUNT = 200  # random calculations
STEP = re.compile(r"(\d+\.?\d*)([-+*/])(\d+\.?\d*)=(\d+\.?\d*)")


def is_right(a, sign, b, result):
    """Tell whether a step is right."""
    a, b, result = map(Decimal, (a, b, result))
    return result * b == a if sign == "/" else APPLY[sign](a, b) == result


def skill(run, policy):
    """Return whether result and first digit are right, and the share of right steps, of random
    calculations by their signs."""
    random, tokenizer, rows = Random(run.seed), policy.tokenizer, defaultdict(list)
    calculations = [draw(random) for _ in range(COUNT)]
    prompts = [tokenizer.chat(TEMPLATES["toy"].replace("{context}", f"so it is <<{c.expression}="))
               + tokenizer.encode(f"{c.expression}:") for c in calculations]
    said = generate(policy.model, prompts, max_new_tokens=128, temperature=run.temperature,
                    eos_ids=tokenizer.eos_ids, seed=run.seed)
    for (expression, _, truth, _), (completion,) in zip(calculations, said):
        response = tokenizer.bytes_of(completion.ids).decode(errors="replace")
        thought = re.split("\n|</think>", response)[0]
        result, steps = thought.rpartition("=")[2], STEP.findall(thought)
        right = [is_right(*step) for step in steps] or [np.nan]
        for name in ("all", "".join(sorted(set(re.findall("[-+*/]", expression))))):
            rows[name].append((result == truth, result[:1] == truth[:1], np.mean(right)))
    return rows


def shares(records):
    """Return the figures of the responses of a run, by what is asked and quarter."""
    rows = defaultdict(list)
    for record in records:
        quarter = 1 + 4 * record["step"] // (records[-1]["step"] + 1)
        name = f"{kind_of(record['context'].encode())}, quarter {quarter}"
        for reward, length, text in zip(record["rewards"], record["tokens"], record["responses"]):
            worked = bool(STEP.search(text.partition("</think>")[0]))
            by_kind = (reward, np.nan) if worked else (np.nan, reward)
            rows[name].append((reward, length, worked, *by_kind))
    return rows


def show(names, rows):
    """Print a table of means."""
    print(f"{'':24}" + "".join(f"{name:>14}" for name in names))
    for name, found in sorted(rows.items()):
        means = np.ma.masked_invalid(found).mean(0).filled(np.nan)
        print(f"{name:24}" + "".join(f"{mean:14.2f}" for mean in means))


if __name__ == "__main__":
    show(("result", "first digit", "steps"), skill(*load(sys.argv[1], sys.argv[2:])))
    log = Path(sys.argv[1]) / "rollouts.jsonl"
    if log.exists():
        show(("reward", "length", "worked", "reward worked", "reward quick"),
             shares([json.loads(line) for line in open(log)]))
