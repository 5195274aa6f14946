"""Easy groups are trained on less often: one of pass rate p with probability 1 - 1.2 (p - 0.25).

    torchrun -m paper.recipes.easy_groups [train.py's arguments]

After arXiv 2608.23256, against lengths and entropies that shrink. What to expect on the toy: two to
four points less than without it after as many steps, and no longer responses.
"""

import time
from collections import Counter

import train
from rpt import sample_groups, update
from sampler import uniforms

WHOLE_GROUP = 2**40  # stands for the number of a sample where a group needs one random number


def one_step(policy, optimizer, draw, step, method, reward, seed):
    """rpt_step with a coin for each group, decided by the seed, the step and the group's number."""
    timing, begin = Counter(), time.perf_counter()
    groups = sample_groups(policy, draw, step, method, reward, seed, timing)
    timing["rollout"] = time.perf_counter() - begin
    for group in groups:
        passed = sum(reward >= 1 for reward in group.rewards) / len(group.rewards)
        key = step << 40 | group.number[0] << 32 | group.number[1]
        group.kept &= bool(uniforms(seed, key, WHOLE_GROUP, 1)[0] < 1 - 1.2 * (passed - 0.25))
    kept = [group for group in groups if group.kept]
    metrics = update(policy.model, optimizer, kept, method)
    timing["train"] = time.perf_counter() - begin - timing["rollout"]
    return groups, metrics | {"time": timing}


if __name__ == "__main__":
    train.main(one_step=one_step)
