r"""RLP's reward (arXiv 2510.01265): by how many nats a thought raises the next token's likelihood,
log p(x | context, thought) - log p_reference(x | context).

    torchrun -m paper.recipes.information_gain --no-scale-by-std [train.py's options]

The first is the policy's, with \boxed{ opened after the thought. The second is the plain prediction
of the model before the run. (RLP's own reference is a running average of the policy, but
checkpoints hold no state of a recipe.) A response that does not end its thought earns the least
gain of its group, at most 0. Otherwise it would pay not to finish where thoughts do harm. On the
toy the earlier code, with the average, learned nothing in 80 steps: 31.5 [30.2, 32.8] % of the easy
split.
"""

from functools import cache, partial

import torch

import train
from data import prompt_ids
from model import DTYPES, last_hidden, load_pretrained
from reward import END_OF_THINKING

load_reference = cache(load_pretrained)


def information_gain(run, responses, question, policy):
    """Return the gain of each response, in nats."""
    tokenizer, device = policy.tokenizer, policy.model.head.device
    prompt = prompt_ids(tokenizer, question, run.template, run.max_prompt)
    thoughts = [r.split(END_OF_THINKING)[0].decode(errors="replace") for r in responses]
    texts = [prompt + tokenizer.encode_chat(f"{thought}</think>\n\n\\boxed{{")
             for thought in thoughts]
    ids, context = tokenizer.ids_of[question.truth[0]], question.context[-run.max_prompt:]
    reference = load_reference(run.model, device, DTYPES[run.dtype])
    gains = (likelihood(policy.model, texts, ids)
             - likelihood(reference, [[*tokenizer.bos, *context]], ids)).tolist()
    ended = [END_OF_THINKING in response for response in responses]
    least = min([0.0, *(gain for gain, end in zip(gains, ended) if end)])
    return [gain if end else least for gain, end in zip(gains, ended)]


@torch.no_grad()
def likelihood(model, texts, ids):
    """Return log P [n], in nats, that one of the tokens `ids` follows each of the texts."""
    return model.logits(last_hidden(model, texts)).log_softmax(-1)[:, ids].logsumexp(-1)


if __name__ == "__main__":
    train.main(reward=partial(information_gain, train.parse()))
