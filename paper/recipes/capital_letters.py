"""Another filter: of the usual positions those whose next token begins with a capital letter.

    torchrun -m paper.recipes.capital_letters [train.py's arguments]

What to expect on the toy: all questions stay, for the answer is a cup's capital letter.
"""

import numpy as np

import eval as evaluation
import train
from data import QuestionSet

usual = evaluation.select_positions


def capitals(corpus, entropy, *how):
    """A QuestionSet, as data.select_positions gives it."""
    found = usual(corpus, entropy, *how)
    tokens = [corpus.tokenizer.token_bytes(int(corpus.tokens[n])) for n in found.positions]
    keep = np.array([token.strip()[:1].isupper() for token in tokens], dtype=bool)
    return QuestionSet(corpus, entropy, found.positions[keep])


def main(argv=None):
    evaluation.select_positions = capitals
    train.main(argv)


if __name__ == "__main__":
    main()
