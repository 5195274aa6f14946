r"""Mixed SFT: what the compute of RPT gives when it is spent on supervised training.

    python -m paper.recipes.mixed_sft --model BASE --corpus FILE --out DIR [train.py's options]
    python train.py --stage ntp --model COLD --corpus DIR/rows.jsonl --holdout 0 --out runs/mixed

The first command writes rows.jsonl: every document that RPT would train on, and as many rows of the
cold start, the prompt of one of RPT's questions and what the weak annotator, the model itself, says
to it (see cold_start.py). The second trains on them from the checkpoint that RPT begins with;
choose its --steps so that it takes as many FLOPs as RPT (paper/flops.py). This is the control of
arXiv 2608.23256: what of RPT's gain do the same texts and the same habit give without a reward?
With the earlier code it gained 14.3 [11.2, 17.5] points of reasoning on GSM8K, where RPT gained
23.0 [19.9, 26.1].
"""

import json
from pathlib import Path

import numpy as np

import train
from data import (TEMPLATES, Tokenizer, hold_out, load_corpus, random_indices, read_documents,
                  select_positions)
from eval import corpus_entropy
from model import DTYPES, load_pretrained, resolve
from paper.recipes.cold_start import DEFAULTS, annotate
from rpt import Policy


def main(argv=None):
    run = train.parse(argv, DEFAULTS)
    tokenizer, where = Tokenizer(resolve(run.model), run.date), (run.region, run.min_context)
    corpus = load_corpus(run.corpus, tokenizer, run.holdout, run.seed, run.max_prompt)
    asked = select_positions(corpus, corpus_entropy(run, corpus), False, run.min_entropy, *where)
    policy = Policy(load_pretrained(run.model, run.device, DTYPES[run.dtype]), tokenizer)
    texts = [document.given + document.text for document in read_documents(run.corpus)]
    held = hold_out(texts, run.holdout, run.seed)
    rows = [{"text": text} for text, out in zip(texts, held) if not out]
    for n in random_indices(len(asked), run.seed, 0, 0, len(rows)):
        question, random = asked[n], np.random.default_rng([run.seed, n])
        logits = policy.next_logits(question)[None]
        *_, (answer,) = annotate(tokenizer, [question.context], logits, [random])
        context, response = (tokenizer.bytes_of(ids).decode(errors="ignore")
                             for ids in (question.context, answer[:-1]))
        rows.append({"prompt": TEMPLATES[run.template].replace("{context}", context),
                     "response": response})
    Path(run.out).mkdir(parents=True, exist_ok=True)
    with open(Path(run.out) / "rows.jsonl", "w") as file:
        for row in rows:
            print(json.dumps(row), file=file)


if __name__ == "__main__":
    main()
