"""Another advantage: what a response earned above the mean of the others (RLOO, arXiv 2402.14740).

    torchrun -m paper.recipes.leave_one_out [train.py's options]

It is G / (G - 1) times R - mean, without the standard deviation, so questions that are seldom or
nearly always answered weigh less than those in between. Equal rewards still give exactly zero.
"""

import torch

import rpt
import train


def leave_one_out(rewards, scale_by_std=True):
    """Map rewards [Q, G] to advantages [Q, G]."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, rewards - others)


if __name__ == "__main__":
    rpt.group_advantages = leave_one_out
    train.main()
