"""A control of the reward: pay for any prediction that can be read.

    torchrun -m paper.recipes.format_only [train.py's options]

A rising reward says nothing about prediction here. On the toy the earlier code moved nothing (30.8
[29.5, 31.9] % of the easy split, before and after), because the base nearly always boxes something.
"""

import train
from reward import predictions_of


def format_only(responses, question, policy):
    """Return 1.0 for each response that boxes something."""
    return [float(bool(prediction)) for prediction in predictions_of(responses)]


if __name__ == "__main__":
    train.main(reward=format_only)
