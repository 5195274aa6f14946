"""Another filter: keep the usual positions whose next token begins with a capital letter.

    torchrun -m paper.recipes.capital_letters [train.py's options]

On the toy all questions stay, because the answer is a cup's capital letter.
"""

import numpy as np

import train
from data import QuestionSet

usual = train.select_positions


def capitals(corpus, entropy, *how):
    """Return a QuestionSet, as data.select_positions does."""
    places = usual(corpus, entropy, *how).places
    tokens = map(corpus.tokenizer.token_bytes, corpus.tokens[places].tolist())
    keep = np.array([token.strip()[:1].isupper() for token in tokens], dtype=bool)
    return QuestionSet(corpus, entropy, places[keep])


if __name__ == "__main__":
    train.select_positions = capitals
    train.main()
