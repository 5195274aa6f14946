r"""Mixed SFT: what the compute of RPT gives when it is spent on supervised training.

    python -m paper.recipes.mixed_sft --model BASE --corpus FILE --out DIR [train.py's arguments]
    python train.py --stage ntp --model COLD --corpus DIR/rows.jsonl --holdout 0 --out runs/mixed

The first command writes rows.jsonl: every document that RPT would train on, and as many of the cold
start's rows, the prompt of one of RPT's questions and what the weak annotator, the model itself,
says to it (see cold_start.py). The second trains on them from the checkpoint that RPT begins with;
choose its --steps so that its metrics' FLOPs add up to those of RPT's. This is the control of
arXiv 2608.23256: what of RPT's gain do the same texts and the same habit give without a reward?
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

import data
import train
from data import TEMPLATES, TRAIN, random_indices
from model import DTYPES, load_pretrained
from paper.recipes.cold_start import DEFAULTS, TAIL, annotation, guess, sayable
from rpt import Policy
from sampler import last_hidden

BATCH = 32  # questions that are annotated at a time


@torch.no_grad()
def annotated_rows(policy, questions, randoms, template):
    """A prompt and response for each question, as texts."""
    tokenizer = policy.tokenizer
    contexts = [[*tokenizer.bos, *question.context] for question in questions]
    logits = policy.model.logits(last_hidden(policy.model, contexts))
    for question, random, p in zip(questions, randoms, sayable(policy, logits)):
        tail = question.context[-int(random.choice(TAIL)):]
        response = tokenizer.bytes_of(annotation(tokenizer, tail, guess(random, p))[:-1])
        context = tokenizer.bytes_of(question.context).decode(errors="ignore")
        yield {"prompt": TEMPLATES[template].replace("{context}", context),
               "response": response.decode(errors="ignore")}


def main(argv=None):
    run = train.parse(DEFAULTS + (sys.argv[1:] if argv is None else list(argv)))
    with train.one_sentence():
        rows = mixed_rows(train.prepare(run))
        file = Path(run.out) / "rows.jsonl"
        with open(file, "w") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{len(rows):,} rows written to {file}")


def mixed_rows(setup):
    """A row for each training document, and as many annotated ones."""
    run, (asked, _) = setup.run, train.questions(setup)
    split = asked.corpus.split
    rows = [{"text": document.text} for document, part in zip(data.documents(run.corpus), split)
            if part == TRAIN]
    policy = Policy(load_pretrained(setup.source, setup.device, DTYPES[run.dtype]), setup.tokenizer)
    chosen = random_indices(len(asked), run.seed, 0, 0, len(rows))
    for begin in range(0, len(chosen), BATCH):
        numbers = chosen[begin: begin + BATCH]
        randoms = [np.random.default_rng([run.seed, n]) for n in numbers]
        rows += annotated_rows(policy, [asked[n] for n in numbers], randoms, run.template)
    return rows


if __name__ == "__main__":
    main()
