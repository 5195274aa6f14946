r"""RLP's reward (arXiv 2510.01265): by how many nats a thought raises the next token's likelihood,
log p(x | context, thought) - log p_average(x | context), against an averaged policy.

    python -m paper.recipes.information_gain --no-scale-by-std [train.py's arguments]

The first is the policy's, with \boxed{ opened behind the thought; the second is the plain
prediction of a running average of the policy. A response that does not end its thought earns the
least that any of its group did, at most 0: otherwise not to finish would pay where thoughts do
harm. What to expect on the toy: nothing in 80 steps (paper/results.md).
"""

import copy

import torch

import rpt
import train
from data import prompt_ids
from sampler import last_hidden

DECAY = 0.999  # of the averaged policy, per step


class InformationGain:
    """The reward, the averaged policy, and the step after which it follows."""

    def __init__(self, method):
        self.method, self.average = method, None

    def extra(self, policy):
        """What a checkpoint has to hold besides the policy."""
        if hasattr(policy.model, "unshard"):
            raise ValueError("information_gain: a sharded model cannot be copied; use one process "
                             "and --dtype float32")
        self.average = copy.deepcopy(policy.model)
        return {"average": self.average}

    def __call__(self, responses, question, policy):
        tokenizer = policy.tokenizer
        prompt = prompt_ids(tokenizer, question, self.method.template, self.method.max_prompt)
        thoughts = [r.split(b"</think>")[0].decode(errors="replace") for r in responses]
        ids = tokenizer.ids_of_token(question.truth[0])
        runs = [prompt + tokenizer.response_ids(f"{thought}</think>\n\n\\boxed{{")
                for thought in thoughts]
        context = [[*tokenizer.bos, *question.context[-self.method.max_prompt:]]]
        gains = likelihood(policy.model, runs, ids) - likelihood(self.average, context, ids)
        ended = [b"</think>" in response for response in responses]
        least = min([0.0, *(gain for gain, end in zip(gains.tolist(), ended) if end)])
        return [gain if end else least for gain, end in zip(gains.tolist(), ended)]

    def step(self, policy, *how):
        """rpt_step, then the average follows the policy."""
        groups, metrics = rpt.rpt_step(policy, *how)
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), policy.model.parameters()):
                mean.lerp_(now, 1 - DECAY)
        return groups, metrics


@torch.no_grad()
def likelihood(model, runs, ids):
    """log P in nats [n] that one of the tokens `ids` follows each of the runs."""
    return model.logits(last_hidden(model, runs)).log_softmax(-1)[:, ids].logsumexp(-1)


def main(argv=None):
    gain = InformationGain(train.parse(argv))
    train.main(argv, reward=gain, one_step=gain.step, extra=gain.extra)


if __name__ == "__main__":
    main()
