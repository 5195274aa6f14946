"""Other weights of responses: every response counts the same, or lengths do not count at all.

    torchrun -m paper.recipes.dr_grpo --no-scale-by-std [train.py's options]

The loss is then a mean over the responses of a step, not over its tokens (DAPO). A response's loss
is the sum over its tokens divided by --max-response, whatever its length (Dr. GRPO, arXiv
2503.20783). With PER = "sequence" below it is the mean over its tokens, as in the original GRPO.
"""

from dataclasses import replace

import rpt
import train

PER = "constant"
usual = rpt.accumulate


def accumulate(model, examples, method):
    """Accumulate gradients with these weights, with rpt.accumulate's arguments."""
    def weigh(response):
        length = len(response.ids) if PER == "sequence" else method.max_response
        return replace(response, weight=1 / (method.questions * method.group_size * length))

    return usual(model, [(prompt, list(map(weigh, group))) for prompt, group in examples], method)


if __name__ == "__main__":
    rpt.accumulate = accumulate
    train.main()
