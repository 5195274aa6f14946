"""A new reward: a right prediction earns more the longer it is.

    torchrun -m paper.recipes.longer_predictions [train.py's options]

A reward is one function over the responses to a question. On the toy the answer is one token long,
" D", or two with its full stop. Within 80 steps nearly all predictions of the earlier code ended in
a full stop.
"""

import train
from reward import predictions_of, prefix_match


def longer(responses, question, policy):
    """Return the number of bytes of each right prediction, 0 for a wrong one."""
    return [prefix_match(p, question.truth) * len(p or b"") for p in predictions_of(responses)]


if __name__ == "__main__":
    train.main(reward=longer)
