r"""A cold start: a model that never reasons about its next token learns to, without any truth.

    python -m paper.recipes.cold_start --model HuggingFaceTB/SmolLM2-135M-Instruct --corpus FILE \
        --out runs/cold [train.py's options]

RPT needs a model that boxes predictions; the paper's was distilled from a reasoning one. Here a
weak annotator, the model before the run, answers questions of training documents, and the model
imitates it. The thought says the last few tokens of the context again and goes on with one guess;
the box holds the guess. The guess is drawn from the annotator's own next-token distribution, and
what is learned at its place is that whole distribution. So this teaches a format and a habit, no
knowledge.
At KEEP places of each context the model is held to the annotator's distribution, because a cold
start that forgets language leaves nothing to reason with.

The exported tokenizer opens the assistant's turn with <think>. metrics.jsonl and rollouts.jsonl say
now and then what the model says, and how much of it can be read (`parsed`). With the earlier code
nearly all could (.99), and two of three thoughts ended as the context does, after 128 steps on
GSM8K, in 19 minutes on two cores.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

import train
from data import TEMPLATES
from model import DTYPES, all_sum, load_pretrained, pad, rank_and_world, unsharded
from reward import box, extract_prediction
from rpt import optimizer_step, rollout, token_logprobs
from sampler import sample_tokens

TAIL = range(4, 9)  # tokens of the context that a thought may begin with
KEEP = 16  # places of each context where the model is held to the annotator's distribution
WARM_UP, DECAY = 5, 0.4  # steps in which the learning rate rises; the share in which it falls to 0
LOOK = 16  # steps between looks at what the model says
DEFAULTS = dict(recipe="small", steps=128, questions=16, lr=3e-4, weight_decay=0.0, template="toy",
                min_context=max(TAIL), max_prompt=256, max_response=32, dtype="bfloat16",
                eval_questions=0)
load_annotator = cache(load_pretrained)


def one_step(policy, optimizer, draw, step, run, reward, seed):
    """Imitate the annotator on a batch, with rpt_step's arguments; the groups are what the policy
    says now and then."""
    (rank, world), questions, groups = rank_and_world(), draw(step, 0), []
    falling = (run.steps - step) / (DECAY * run.steps)
    for group in optimizer.param_groups:
        group["lr"] = run.lr * min(1, (step + 1) / WARM_UP, falling)
    annotator = load_annotator(run.model, policy.model.head.device, DTYPES[run.dtype])
    randoms = [np.random.default_rng([seed, step, n]) for n in range(len(questions))]
    loss, figures = imitate(annotator, policy, questions[rank::world], randoms[rank::world], run)
    loss.backward()
    metrics = optimizer_step(policy.model, optimizer, figures, run.grad_clip)
    if step % LOOK == 0 or step == run.steps - 1:  # look at what it says
        some = draw(step, 1)[::4]
        mine = {(step, 1, n): some[n] for n in range(rank, len(some), world)}
        with unsharded(policy.model):
            groups = rollout(policy, mine, run, reward, seed)
    return groups, metrics


def imitate(annotator, policy, questions, randoms, run):
    """Return this process's part of the loss, a mean over everyone's tokens and questions, and its
    figures for optimizer_step."""
    tokenizer, model, device = policy.tokenizer, policy.model, policy.model.head.device
    shell, bos = tokenizer.chat(TEMPLATES[run.template], [-1]), tokenizer.bos
    contexts = [question.context[len(shell) - 1 - run.max_prompt:] for question in questions]
    prompts = [tokenizer.chat(TEMPLATES[run.template], context) for context in contexts]
    rows, last = np.arange(len(questions)), np.array([len(context) - 1 for context in contexts])
    places = np.stack([random.integers(0, end + 1, KEEP) for random, end in zip(randoms, last)])
    with torch.no_grad():
        hidden = annotator(pad([[*bos, *context] for context in contexts], device))[:, len(bos):]
        plain = annotator.logits(hidden[rows[:, None], places]).softmax(-1)
        likely, tails, answers = annotate(tokenizer, contexts,
                                          annotator.logits(hidden[rows, last]), randoms)
    hidden = model(pad([prompt + answer for prompt, answer in zip(prompts, answers)], device))
    before = np.array([len(prompt) - 1 for prompt in prompts])  # predicts an answer's first token
    form = [(row, before[row] + n, id) for row, answer in enumerate(answers)
            for n, id in enumerate(answer) if n != tails[row]]
    said_in, said_at, said = np.array(form).T
    logprobs, entropy = token_logprobs(model, hidden[said_in, said_at],
                                       torch.from_numpy(said).to(device))
    tokens, asked = all_sum(len(said), len(questions))
    kl = (divergence(likely, model.logits(hidden[rows, before + tails]))
          + divergence(plain, model.logits(hidden[rows[:, None], shell.index(-1) + places])))
    loss = 0.5 * kl * len(questions) / asked - logprobs.sum() / tokens
    nothing, count = torch.zeros_like(loss), torch.full_like(loss, len(logprobs))
    figures = torch.stack((loss, -logprobs.sum(), entropy.sum(), nothing, count, nothing))
    return loss, figures.detach()[None]


def annotate(tokenizer, contexts, logits, randoms):
    """Return the annotator's distribution [n, V] of what follows each context, over the tokens that
    can be boxed; how many tokens it says again; and all that it says."""
    logits = logits.masked_fill(~boxable(tokenizer, logits.shape[1]).to(logits.device), -torch.inf)
    tails = [int(random.choice(TAIL)) for random in randoms]
    uniform = torch.tensor([random.random() for random in randoms], dtype=torch.float64,
                           device=logits.device)
    guesses, _ = sample_tokens(logits, uniform, 1.0)
    said = [annotation(tokenizer, context[-tail:], guess)
            for context, tail, guess in zip(contexts, tails, guesses.tolist())]
    return logits.softmax(-1), tails, said


@cache
def boxable(tokenizer, count):
    """Tell which of the first `count` ids can be boxed and read back, bool [count]."""
    special = {b"", *(text.encode() for text in tokenizer.special)}
    return torch.tensor([text not in special and extract_prediction(box(text)) == text
                         for text in map(tokenizer.token_bytes, range(count))], device="cpu")


def annotation(tokenizer, tail, token):
    """Return the end of the context, a guess, and the guess in the box."""
    return [*tail, token, *tokenizer.encode_chat("</think>\n\n\\boxed{"), token,
            *tokenizer.encode_chat("}"), tokenizer.end]


def divergence(target, logits):
    """Return KL(target || softmax(logits)) in nats, a mean over places; both are [..., V]."""
    target, logp = target.flatten(0, -2), logits.flatten(0, -2).log_softmax(-1)
    return F.kl_div(logp, target, reduction="batchmean")


if __name__ == "__main__":
    train.main(one_step=one_step, defaults=DEFAULTS)
