"""Another filter: of the usual positions those where the result of a calculation begins.

    python -m paper.recipes.multi_step --model runs/worked/mixed/model --proxy BASE \
        --corpus gsm8k-b.jsonl --holdout 400 --template toy --min-context 8 --max-prompt 384 \
        --max-response 128 --lr 4e-5 --weight-decay 0 --steps 36 --dtype bfloat16 --out runs/multi
    python -m paper.recipes.multi_step eval runs/multi --samples 8
    [--kind multi-step | results]  [--all-digits]

A calculation is an annotation such as <<120-40-24=56>>. It is multi-step if it has three numbers
or more, or two of at least two significant digits each. --kind results asks about all of them, and
--all-digits also after the first digits of a result. What is asked is decided from the text before
the position alone, so the filter tells nothing about the result.

expected: not yet measured on this code. The sketch took 18 minutes on two cores.
"""

import argparse
import re
import sys
from functools import partial

import numpy as np

import eval as evaluation
import train
from data import QuestionSet

KINDS = {"multi-step": ["multi-step"], "results": ["multi-step", "one-step"]}
usual = train.select_positions


def kind_of(before, all_digits=False):
    """Tell from the bytes before a position what is asked there: "multi-step", "one-step", or
    "elsewhere"."""
    calculation = re.search(rb"<<([^<>=]+)=([\d.]*)$", before)
    if not calculation or calculation[2] and not all_digits:
        return "elsewhere"
    numbers = re.findall(rb"\d+\.?\d*|\.\d+", calculation[1])
    significant = [len(number.replace(b".", b"").strip(b"0")) for number in numbers]
    multi = len(numbers) > 2 or len(numbers) == 2 and min(significant) > 1
    return "multi-step" if multi else "one-step"


def results(kind, all_digits, corpus, entropy, *how):
    """Return a QuestionSet, as data.select_positions does."""
    found = usual(corpus, entropy, *how)
    contexts = (corpus.tokenizer.bytes_of(question.context[-64:]) for question in found)
    keep = [kind_of(context, all_digits) in KINDS[kind] for context in contexts]
    return QuestionSet(corpus, entropy, found.places[np.array(keep, dtype=bool)])


def main(argv=None):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--kind", choices=KINDS, default="multi-step")
    parser.add_argument("--all-digits", action="store_true")
    own, rest = parser.parse_known_args(argv)
    train.select_positions = partial(results, own.kind, own.all_digits)
    if rest[:1] == ["eval"]:
        sys.argv = rest
        evaluation.main()
    else:
        train.main(rest)


if __name__ == "__main__":
    main()
