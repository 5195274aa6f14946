r"""A cold start: a model that never reasons about its next token learns to, without any truth.

    python -m paper.recipes.cold_start --model HuggingFaceTB/SmolLM2-135M-Instruct --corpus FILE \
        --out runs/cold [train.py's arguments]

RPT needs a model that boxes predictions; the paper's was distilled from a reasoning one. Here a
weak annotator answers questions of training documents, and the model imitates it: the thought says
the last few tokens of the context again and goes on with one guess, the box holds the guess. The
guess is drawn from the model's own next-token distribution at temperature 1, and what is learned at
its place is that whole distribution, so this teaches a format and a habit and no knowledge. At KEEP
places of each context the model is held to its own distribution: a cold start that forgets language
leaves nothing to reason with.

The exported tokenizer opens the assistant's turn with <think> and, unless the template has none,
an empty system message, which spares a short prompt a long greeting. metrics.jsonl says now and
then how many of the sampled responses can be read (`parsed`), and how many thoughts end where the
context ends and add one token (`on_track`), on questions of training documents.
"""

import json
import os
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train
from data import TEMPLATES, Tokenizer, prompt_ids
from model import (DTYPES, all_sum, choose_device, load_pretrained, rank_and_world, read_json,
                   resolve, unsharded)
from reward import reachable
from rpt import optimizer_step, rollout, token_logprobs
from sampler import pad

TAIL = range(4, 9)  # tokens of the context that a thought may begin with
KEEP = 16  # places of each context where the model is held to its own distribution
WARM_UP, DECAY = 5, 0.4  # steps in which the learning rate rises; the share in which it falls to 0
LOOK = 16  # steps between looks at what the model says
DEFAULTS = ("--recipe small --steps 128 --questions 16 --lr 3e-4 --weight-decay 0 --template toy "
            f"--min-context {max(TAIL)} --max-context 112 --max-prompt 384 --max-response 32 "
            "--dtype bfloat16 --eval-questions 0 --region solution").split()
QUIET = ("{% if messages[0]['role'] != 'system' %}"
         "{% set messages = [{'role': 'system', 'content': ''}] + messages %}{% endif %}")


class ColdStart:
    """The step: a batch of rows by the annotator, imitated."""

    def __init__(self, run: train.Run):
        self.steps, self.peak = run.steps, run.lr
        self.annotator = load_pretrained(run.model, choose_device(run.device), DTYPES[run.dtype])

    def __call__(self, policy, optimizer, draw, step, method, reward, seed):
        """rpt_step's arguments; the groups are what the policy says now and then."""
        timing, begin = Counter(), time.perf_counter()
        rank, world = rank_and_world()
        falling = (self.steps - step) / (DECAY * self.steps)
        for group in optimizer.param_groups:
            group["lr"] = self.peak * min(1, (step + 1) / WARM_UP, falling)
        questions = draw(step, 0)
        numbered = [(n, questions[n]) for n in range(len(questions))[rank::world]]
        randoms = [np.random.default_rng([seed, step, n]) for n, _ in numbered]
        loss, figures = self.imitate(policy, [q for _, q in numbered], randoms, method)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        metrics = optimizer_step(policy.model, optimizer, [figures], method.grad_clip)
        timing["train"] = time.perf_counter() - begin
        groups = []
        if step % LOOK == 0 or step == self.steps - 1:
            groups, metrics["on_track"] = look(policy, draw(step, 1), step, method, reward, seed)
        timing["rollout"] = time.perf_counter() - begin - timing["train"]
        return groups, metrics | {"time": timing}

    def imitate(self, policy, questions, randoms, method):
        """This process's part of the loss, a mean over everyone's tokens and questions, and its
        figures for optimizer_step."""
        tokenizer, model, device = policy.tokenizer, policy.model, policy.model.head.device
        rows, bos = np.arange(len(questions))[:, None], len(tokenizer.bos)
        sizes = np.array([[len(question.context)] for question in questions])
        places = np.concatenate([random.integers(0, size, (1, KEEP))
                                 for random, size in zip(randoms, sizes)])
        with torch.no_grad():
            contexts = [[*tokenizer.bos, *question.context] for question in questions]
            hidden = self.annotator(pad(contexts, device))
            plain = self.annotator.logits(hidden[rows, bos + places]).softmax(-1)
            logits = self.annotator.logits(hidden[rows, bos + sizes - 1])
            likely = sayable(policy, logits)
        tails = [int(random.choice(TAIL)) for random in randoms]
        answers = [annotation(tokenizer, question.context[-tail:], guess(random, p))
                   for question, tail, random, p in zip(questions, tails, randoms, likely[:, 0])]
        prompts = [prompt_ids(tokenizer, q, method.template, method.max_prompt) for q in questions]

        hidden = model(pad([p + a for p, a in zip(prompts, answers)], device))
        before = [len(prompt) - 1 for prompt in prompts]  # predicts an answer's first
        form = [(row, before[row] + n, id) for row, answer in enumerate(answers)
                for n, id in enumerate(answer) if n != tails[row]]
        said_in, said_at, said = np.array(form).T
        logprobs, entropy = token_logprobs(model, hidden[said_in, said_at],
                                           torch.from_numpy(said).to(device))
        guessed_at = np.add(before, tails)[:, None]
        tokens, asked = all_sum(len(said), len(questions))
        front = tokenizer.chat(TEMPLATES[method.template], [-1]).index(-1)  # of a context
        kl = (divergence(likely, model.logits(hidden[rows, guessed_at]))
              + divergence(plain, model.logits(hidden[rows, front + places])))
        loss = 0.5 * kl * len(questions) / asked - logprobs.sum() / tokens
        nothing, count = torch.zeros_like(loss), torch.full_like(loss, len(logprobs))
        return loss, torch.stack(
            (loss, -logprobs.sum(), entropy.sum(), nothing, count, nothing)).detach()


def sayable(policy, logits):
    """softmax(logits) [..., V] over the ids that can be boxed and read back."""
    boxed = boxable(policy.tokenizer, logits.shape[-1]).to(logits.device)
    return logits.masked_fill(~boxed, -torch.inf).softmax(-1)


@cache
def boxable(tokenizer, count):
    """Which of the first `count` ids can be boxed and read back."""
    special = set(tokenizer.special.values())
    return torch.tensor([id not in special and reachable([tokenizer.token_bytes(id)])
                         for id in range(count)], device="cpu")


def guess(random, probabilities):
    """A token at random, by the same numbers on every machine."""
    cumulative = probabilities.double().cpu().numpy().cumsum()
    return int(np.searchsorted(cumulative, random.random() * cumulative[-1], "right"))


def annotation(tokenizer, tail, token):
    """What the annotator says: the end of the context, a guess, and the guess in the box."""
    close = tokenizer.response_ids("</think>\n\n\\boxed{")
    end = [*tokenizer.response_ids("}"), tokenizer.eos_ids[0]]
    return [*tail, token, *close, token, *end]


def divergence(target, logits):
    """KL(target || softmax(logits)) in nats, a mean over places; both [..., V]."""
    target, logp = target.flatten(0, -2), logits.flatten(0, -2).log_softmax(-1)
    return F.kl_div(logp, target, reduction="batchmean")


def look(policy, questions, step, method, reward, seed):
    """Groups of responses to this process's share of every fourth question, all of training
    documents, and the share of thoughts, over all processes, that are on track."""
    rank, world = rank_and_world()
    numbered = [((1, n), question) for n, question in enumerate(questions[::4])][rank::world]
    with unsharded(policy.model):
        groups = rollout(policy, numbered, method, reward, seed, step)
    found = [on_track(policy.tokenizer, group.question.context, c.ids)
             for group in groups for c in group.completions]
    right, said = all_sum(sum(found), len(found))
    return groups, right / said


def on_track(tokenizer, context, ids):
    """Whether a thought but for its last token is what the context ends with."""
    mark = tokenizer.response_ids("</think>")
    ends = [n for n in range(len(ids)) if ids[n: n + len(mark)] == mark]
    thought = ids[: ends[0] - 1] if ends else []
    return len(thought) > 0 and [*context[-len(thought):]] == thought


def without_greeting(source: Path, folder: Path) -> Path:
    """A copy of a model's directory (weights by links) whose template opens no system message of
    its own accord; the directory itself if the template allows no such message."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (source / "config.json", *source.glob("*.safetensors*")):
        link = folder / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())
    tokenizer = Tokenizer.from_dir(source)
    tokenizer.save(folder)
    settings = read_json(folder / "tokenizer_config.json")
    settings["chat_template"] = QUIET + settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False))
    try:
        shorter = len(Tokenizer.from_dir(folder).chat("")) < len(tokenizer.chat(""))
    except ValueError:
        shorter = False
    return folder if shorter else source


def main(argv=None):
    argv = DEFAULTS + (sys.argv[1:] if argv is None else list(argv))
    run = train.parse(argv)
    with train.one_sentence():  # each process prepares its own folder: they have not met yet
        folder = Path(run.out) / f"start-{os.environ.get('RANK', 0)}"
        argv += ["--model", str(without_greeting(resolve(run.model), folder))]
        step = ColdStart(train.parse(argv))
    train.main(argv, one_step=step)


if __name__ == "__main__":
    main()
