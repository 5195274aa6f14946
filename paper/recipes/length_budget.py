"""A length budget: every byte of a response beyond BUDGET costs a hundredth of its reward.

    torchrun -m paper.recipes.length_budget [train.py's options]

On the toy a chain of thought grows with the swaps of its story, so a budget that is too small for
eight swaps keeps the longest stories from being solved.
"""

import train
from reward import prefix

BUDGET = 80  # bytes


def brief(responses, question, policy):
    """Return the paper's reward, reduced for long responses, at least 0."""
    return [reward * max(0.0, 1 - max(0, len(text) - BUDGET) / 100)
            for reward, text in zip(prefix(responses, question, policy), responses)]


if __name__ == "__main__":
    train.main(reward=brief)
