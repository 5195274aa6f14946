"""RMT's auxiliary loss (arXiv 2509.24375): L = L_RL + 0.1 L_NTP on the contexts of the questions.

    torchrun -m paper.recipes.auxiliary_loss [train.py's arguments]

Two losses gather in the same gradients before one optimizer step. What to expect on the toy: the
same next-token accuracy within its interval.
"""

import time
from collections import Counter
from dataclasses import replace

import train
from model import all_sum
from rpt import Response, accumulate, optimizer_step, policy_examples, sample_groups

WEIGHT = 0.1


def one_step(policy, optimizer, draw, step, method, reward, seed):
    """rpt_step, with the next-token loss of every context's tokens but its first beside it."""
    timing, begin = Counter(), time.perf_counter()
    groups = sample_groups(policy, draw, step, method, reward, seed, timing)
    timing["rollout"] = time.perf_counter() - begin
    kept = [group for group in groups if group.kept]
    responses = [c for group in kept for c in group.completions]
    contexts = [group.question.context for group in kept if len(group.question.context) > 1]
    tokens, sequences, informative, predicted = all_sum(
        sum(len(c.ids) for c in responses), len(responses), sum(g.informative for g in kept),
        sum(len(ids) - 1 for ids in contexts))
    plain = [(ids[:1], [Response(ids[1:], [0.0] * (len(ids) - 1), 1.0, WEIGHT / predicted)])
             for ids in contexts]
    optimizer.zero_grad(set_to_none=True)
    examples = policy_examples(kept, method, tokens, sequences)
    figures = accumulate(policy.model, examples, method)
    auxiliary = replace(method, temperature=1.0, updates=1)
    figures += accumulate(policy.model, plain, auxiliary)
    metrics = optimizer_step(policy.model, optimizer, figures, method.grad_clip)
    timing["train"] = time.perf_counter() - begin - timing["rollout"]
    return groups, metrics | {"informative": informative, "time": timing}


if __name__ == "__main__":
    train.main(one_step=one_step)
