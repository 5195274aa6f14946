"""Measure the perplexity of held-out documents under plain next-token prediction.

    python -m paper.perplexity MODEL_OR_RUN [train.py's options]

RPT trains next-token reasoning, not plain prediction, so its perplexity is a control. The options
of a run are the defaults, and its documents are those that it was never trained on (of stages rpt
and ntp: rlvr splits by the problems alone).
"""

import math
import sys

import numpy as np
import torch

from data import Corpus, load_corpus
from eval import BATCH_TOKENS, bootstrap_interval, show_interval
from model import Transformer, pad
from paper.ask import load
from rpt import pack, token_logprobs


@torch.no_grad()
def perplexity(model: Transformer, corpus: Corpus) -> tuple[float, ...]:
    """Return (mean, low, high) of exp(mean of -log P) over the tokens of held-out documents.

    The interval is over documents. In a row of prompt and response only the response counts.
    """
    values, documents, bos = [], [], corpus.tokenizer.bos
    held, lengths = np.flatnonzero(corpus.held).tolist(), np.diff(corpus.starts)
    for batch in pack(held, lambda document: lengths[document], BATCH_TOKENS, padding=1.0):
        texts = [[*bos * (not corpus.is_chat[d]), *corpus.ids(d)] for d in batch]
        ids = pad(texts, model.head.device)
        for d, text, row, hidden in zip(batch, texts, ids, model(ids)):
            first = int(corpus.given[d]) if corpus.is_chat[d] else 1
            hidden, following = hidden[first - 1: len(text) - 1], row[first: len(text)]
            values += (-token_logprobs(model, hidden, following)[0]).tolist()
            documents += [d] * len(following)
    if not values:
        raise ValueError("no document is held out; --holdout says how many")
    return tuple(map(math.exp, bootstrap_interval(values, documents)))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        run, policy = load(sys.argv[1], sys.argv[2:])
        if not run.corpus:
            raise ValueError("no --corpus to measure it on")
        corpus = load_corpus(run.corpus, policy.tokenizer, run.holdout, run.seed, run.max_prompt)
        found = perplexity(policy.model, corpus)
    except (ValueError, OSError) as error:
        sys.exit(f"paper.perplexity: error: {error}")
    print(f"{sys.argv[1]}: perplexity of held-out documents {show_interval(found, digits=3)}")
