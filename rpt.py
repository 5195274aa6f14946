"""Reinforcement Pre-Training (arXiv 2506.08007): the method itself, without files or arguments.

One step, `rpt_step` (sections 3.2 and 3.3 of the paper):

    completions = generate(policy, prompts, samples=G, temperature=...)        rollout()
    rewards     = reward(responses, question, policy)                          reward.py
    advantages  = (R - mean R) / std R, within the group of one question       group_advantages()
    loss        = - sum over tokens of min(r A, clip(r) A) / tokens            policy_loss()

This is GRPO, with these choices:

1. On-policy. With one update per batch (the default) the ratio r is 1, clipping never acts, and no
   second forward pass for old log-probabilities is needed.
2. The policy is softmax(logits / temperature), the distribution that is sampled. The temperature is
   in the sampler's log-probabilities and in the loss.
3. The loss is a mean over all tokens of the step, on all processes (DAPO). So every token weighs
   the same, and the update does not depend on micro-batches or on the number of processes.
4. A group with equal rewards has no gradient and is not computed, but its tokens count in the mean
   (unless dynamic sampling replaces it). A step without any informative group makes no optimizer
   step, because AdamW's momentum and weight decay would move the weights.
5. A response that hits the length limit is passed to the reward as b"", because it would have gone
   on. It is trained like any other (no overlong filtering), so running on becomes less likely.

Letters in shapes: Q questions, G responses to each, B rows, L tokens of the longest row, N tokens,
V vocabulary.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data import TEMPLATES, Question, Tokenizer, prompt_ids
from model import (Continuation, Prompts, Transformer, all_gather, all_sum, last_hidden, pad,
                   rank_and_world, take_rows, unsharded)
from sampler import Completion, generate

STD_EPSILON = 1e-6  # added to a group's standard deviation
MAX_REFILLS = 4  # how often dynamic sampling draws again in one step
LOG_RATIO_LIMIT = 20.0  # the log ratio is clamped to this, so that exp cannot overflow
PADDING = 1 / 32  # share of a slice's budget that may be padding
HEAD_CHUNK = 1024  # tokens whose logits exist at a time


def option(default, doc: str, **how):
    """Return a dataclass field that is also a command-line option (see eval.parser_of).

    how: `choices`, or `least` for the smallest number allowed (default: 1, or above 0 for a float).
    """
    return field(default=default, metadata={"help": doc, **how})


@dataclass(frozen=True)
class Method:
    """What defines an RPT step, and the memory that it may take. The defaults are the paper's
    (section 3.3, appendix B), but `--recipe paper` also sets grad_clip and dynamic_from."""

    questions: int = option(256, "questions per step")
    group_size: int = option(8, "responses per question, G", least=2)
    temperature: float = option(0.8, "of sampling, and in the policy loss", least=0)
    max_prompt: int = option(4096, "tokens of a prompt; a longer context loses its beginning")
    max_response: int = option(8192, "tokens of a response")
    template: str = option("v0", "prompt template (paper, appendix D)", choices=TEMPLATES)
    scale_by_std: bool = option(True, "divide advantages by the group's standard deviation")
    updates: int = option(1, "optimizer steps on each batch; 1 is exactly on-policy")
    clip_low: float = option(0.2, "ratios below 1 - this are clipped")
    clip_high: float = option(0.2, "ratios above 1 + this are clipped")
    dynamic_from: int = option(-1, "from this step on replace questions whose responses are all "
                                   "right or all wrong; -1: never", least=-1)
    grad_clip: float = option(1.0, "largest gradient norm")
    micro_tokens: int = option(16384, "tokens of a forward and backward pass in training")
    max_rows: int = option(256, "responses decoded at a time by one process")
    cache_tokens: int = option(2**20, "tokens of keys and values held by one process")


@dataclass
class Policy:
    """The model that is trained, with its tokenizer: what a reward may ask about."""

    model: Transformer
    tokenizer: Tokenizer

    @torch.no_grad()
    def next_logits(self, question: Question) -> Tensor:
        """Return the logits [V] of plain next-token prediction at a question."""
        room = self.model.config.max_position_embeddings - 1
        context = [*self.tokenizer.bos, *question.context[-room:]]
        return self.model.logits(last_hidden(self.model, [context]))[0]

    def next_token(self, question: Question) -> Callable[[bytes], float]:
        """Return P(token | context) as a function of the token's bytes (appendix A)."""
        probabilities = self.next_logits(question).softmax(-1)
        return lambda token: float(probabilities[self.tokenizer.ids_of[token]].sum())


@dataclass
class Group:
    """The responses to one question and what they earned."""

    number: tuple[int, int, int]  # (step, retry, index in the draw), the same on any process
    question: Question
    prompt: list[int]
    completions: list[Completion]
    responses: list[bytes]  # without the end token
    rewards: list[float]
    kept: bool = True  # False: dynamic sampling has replaced it

    @property
    def informative(self) -> bool:
        """Not all rewards are equal, so the group has a gradient."""
        return any(reward != self.rewards[0] for reward in self.rewards)


# ------------------------------------------------------------------------------------- equations


def group_advantages(rewards: Tensor, scale_by_std: bool = True) -> Tensor:
    """Map rewards [Q, G] to advantages [Q, G], float64: A = (R - mean) / (std + 1e-6), or R - mean.

    The standard deviation is unbiased. It makes a rare success weigh more than a frequent one.
    Equal rewards give exactly zero. The test is on the rewards: R - mean may be rounding noise.
    """
    rewards = rewards.double()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + STD_EPSILON)
    return torch.where((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0, advantages)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor,
                clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """Return GRPO's clipped surrogate over tokens [N], with r = exp(logprobs - old_logprobs):
    - sum_i weights_i min(r_i A_i, clip(r_i, 1 - clip_low, 1 + clip_high) A_i)."""
    ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()


def token_logprobs(model: Transformer, hidden: Tensor, targets: Tensor,
                   temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each target, and the entropy of its distribution.

    hidden [N, hidden_size], targets [N]; both results are float32 [N] in nats, at `temperature`.
    Only the entropy has no gradient. The [N, V] logits never exist as a whole: backward computes
    each chunk of them again. The plain form is in toy/mini.py's `policy_loss`.
    """
    def chunk(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = (F.linear(hidden, head).float() / temperature).log_softmax(-1)
        chosen = logprobs.gather(1, targets[:, None])[:, 0]
        logprobs = logprobs.detach()  # so that backward recomputes nothing after this line
        return chosen, -(logprobs.exp() * logprobs).sum(-1)

    chunks = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK))
    parts = [checkpoint(chunk, h, model.head, t, use_reentrant=False) for h, t in chunks]
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies)


# ----------------------------------------------------------------------------------------- step


def rpt_step(policy: Policy, optimizer: torch.optim.Optimizer, draw: Callable, step: int,
             method: Method, reward: Callable, seed: int) -> tuple[list[Group], dict]:
    """Run one step of RPT; returns this process's groups, and the metrics of the update.

    draw(step, retry) must return the same list of questions on every process.
    """
    begin = time.perf_counter()
    groups = sample_groups(policy, draw, step, method, reward, seed)
    sampled = time.perf_counter()
    metrics = update(policy.model, optimizer, [group for group in groups if group.kept], method)
    seconds = {"rollout": sampled - begin, "train": time.perf_counter() - sampled}
    return groups, metrics | {"seconds": seconds}


def sample_groups(policy: Policy, draw: Callable, step: int, method: Method, reward: Callable,
                  seed: int) -> list[Group]:
    """Sample this process's groups for one step, including groups that dynamic sampling replaces.

    Dynamic sampling (DAPO; the paper from step 500) keeps only informative groups and draws again
    until the batch is full or MAX_REFILLS is reached.
    """
    rank, world = rank_and_world()
    retries = MAX_REFILLS if 0 <= method.dynamic_from <= step else 0
    groups = []
    with unsharded(policy.model):
        for retry in range(1 + retries):
            questions = draw(step, retry)
            mine = {(step, retry, n): questions[n] for n in range(rank, len(questions), world)}
            groups += rollout(policy, mine, method, reward, seed)
            usable = all_gather([g.number for g in groups if g.informative or not retries])
            usable = sorted(chain(*usable))[: method.questions]
            if len(usable) == method.questions:
                break
    for group in groups:
        group.kept = group.number in usable
    return groups


def rollout(policy: Policy, questions: dict[tuple[int, int, int], Question], method: Method,
            reward: Callable, seed: int) -> list[Group]:
    """Sample and reward G responses to each numbered question. It calls no collective.

    Together with the seed, a question's number determines all of its randomness.
    """
    tokenizer, groups = policy.tokenizer, []
    prompts = [prompt_ids(tokenizer, question, method.template, method.max_prompt)
               for question in questions.values()]
    completions = generate(
        policy.model, prompts, samples=method.group_size, max_new_tokens=method.max_response,
        temperature=method.temperature, eos_ids=tokenizer.eos_ids, seed=seed,
        keys=[step << 40 | retry << 32 | n for step, retry, n in questions],
        max_rows=method.max_rows, cache_tokens=method.cache_tokens)
    for (number, question), prompt, group in zip(questions.items(), prompts, completions):
        responses = [tokenizer.bytes_of(c.ids[:-1] if c.finished else c.ids) for c in group]
        finished = [text if c.finished else b"" for text, c in zip(responses, group)]
        rewards = list(reward(finished, question, policy))
        if len(rewards) != len(group) or not math.isfinite(sum(rewards)):
            raise ValueError(f"the reward of {len(group)} responses is {rewards}")
        groups.append(Group(number, question, prompt, group, responses, rewards))
    return groups


# ---------------------------------------------------------------------------------------- update


@dataclass(frozen=True)
class Response:
    """What is learned from one response."""

    ids: Sequence[int]
    logprobs: Sequence[float]  # nats, the sampler's
    advantage: float
    weight: float  # of each token in the loss


Example = tuple[Sequence[int], list[Response]]  # a prompt and the responses to it
IDLE = [(0, Response([0], [0.0], 0.0, 0.0))]  # a slice for a process that has no more of its own


def update(model: Transformer, optimizer: torch.optim.Optimizer, groups: Sequence[Group],
           method: Method) -> dict[str, float]:
    """Make `method.updates` optimizer steps on the groups of all processes; returns their metrics.

    The metrics are of the first optimizer step, before the weights move; only `skipped` is of the
    last. A step that is not finite changes nothing; the steps before it stay.
    """
    tokens, informative = all_sum(sum(len(c.ids) for g in groups for c in g.completions),
                                  sum(group.informative for group in groups))
    examples = []
    for group in groups:
        if group.informative:
            rewards = torch.tensor([group.rewards], dtype=torch.float64, device="cpu")
            advantages = group_advantages(rewards, method.scale_by_std)[0].tolist()
            responses = [Response(c.ids, c.logprobs, advantage, 1 / tokens)
                         for c, advantage in zip(group.completions, advantages)]
            examples.append((group.prompt, responses))
    metrics = {"skipped": 0.0}
    for _ in range(method.updates if informative else 0):
        figures = accumulate(model, examples, method)
        found = optimizer_step(model, optimizer, figures, method.grad_clip)
        metrics = found | metrics | {"skipped": found["skipped"]}
    return metrics | {"informative": informative}


def next_token_step(policy: Policy, optimizer: torch.optim.Optimizer, draw: Callable, step: int,
                    method: Method, *_) -> tuple[list, dict]:
    """Run a step of next-token prediction, with rpt_step's arguments: the paper's baseline, or
    supervised training.

    draw returns pairs (ids, first). The gradient is a policy gradient in which ids[:first] is the
    prompt and ids[first:] a response with advantage 1; the usual loss is the metric nll.
    """
    (rank, world), rows, examples = rank_and_world(), draw(step, 0), []
    weight = 1 / sum(len(ids) - first for ids, first in rows)
    for ids, first in rows[rank::world]:
        response = Response(ids[first:], [0.0] * (len(ids) - first), 1.0, weight)
        examples.append((ids[:first], [response]))
    figures = accumulate(policy.model, examples, replace(method, temperature=1.0, updates=1))
    return [], optimizer_step(policy.model, optimizer, figures, method.grad_clip)


def accumulate(model: Transformer, examples: Sequence[Example], method: Method) -> Tensor:
    """Add the gradient of the examples to the parameters; returns the figures of each slice.

        prompts ──forward──▶ roots: keys, values, last hidden
                                │ detach
                             leaves ──▶ slice 1: forward, backward ─┐ gradients
                                    ──▶ slice 2: forward, backward ─┤ add up on
                                    ──▶ ...                         ┘ the leaves
        prompts ◀─backward── roots ◀── the leaves' gradients

    So a prompt is computed once for all its responses, and only the graph of the prompts and of one
    slice is alive. By the chain rule the gradient does not depend on `micro_tokens`. The plain
    form, one forward and one backward pass over all rows, is in toy/mini.py's `train_step`.
    """
    figures, device = [], model.head.device
    batches = pack(examples, lambda example: len(example[0]), method.micro_tokens // 2, padding=1.0)
    for batch in fill(batches, [([0], [])]):
        lengths = [len(prompt) for prompt, _ in batch]
        cache = Prompts(lengths, device)
        last = last_hidden(model, [prompt for prompt, _ in batch], cache)
        roots = [*chain(*cache.layers), last]
        *leaves, last = (root.detach().requires_grad_() for root in roots)
        cache.layers = list(zip(leaves[::2], leaves[1::2]))
        rows = [(n, response) for n, (_, responses) in enumerate(batch) for response in responses]
        room = method.micro_tokens - len(batch) * max(lengths)
        for part in fill(pack(rows, lambda row: len(row[1].ids), room, PADDING), IDLE):
            figures.append(add_gradient(model, cache, last, part, method))
        torch.autograd.backward(roots, [leaf.grad for leaf in (*leaves, last)])
    return torch.stack(figures)


def pack(items: Sequence, length: Callable, budget: int, padding: float) -> list[list]:
    """Group items, longest first, into parts of at most `budget` tokens when padded to the longest,
    of which at most budget * padding are padding. A longer item becomes a part of its own."""
    parts, real = [], 0
    for item in sorted(items, key=length, reverse=True):
        padded = (len(parts[-1]) + 1) * length(parts[-1][0]) if parts else math.inf
        if padded <= budget and padded - real - length(item) <= padding * budget:
            parts[-1].append(item)
            real += length(item)
        else:
            parts.append([item])
            real = length(item)
    return parts


def fill(parts: list, idle) -> list:
    """Append idle parts until this process has as many as the busiest one. Every forward pass
    gathers shards from all processes, so all have to make the same number of them."""
    return parts + [idle] * (max(all_gather(len(parts))) - len(parts))


def add_gradient(model: Transformer, cache: Prompts, last: Tensor, part: list[tuple[int, Response]],
                 method: Method) -> Tensor:
    """Add the gradient of a slice of (row of its prompt, response).

    last: hidden [prompts, hidden_size] of each prompt's last token, which predicts the first token
    of a response. Returns the figures [5]: the loss; sums over tokens of -log-probability, entropy
    and |difference from the sampler's log-probability|; tokens.
    """
    device, responses = model.head.device, [response for _, response in part]
    rows = torch.tensor([row for row, _ in part], device=device)
    ids = pad([r.ids for r in responses], device)  # [B, L]
    hidden = model(ids, Continuation(cache, rows))
    hidden = torch.cat((take_rows(last, rows)[:, None], hidden[:, :-1]), dim=1)

    lengths, advantages, weights = torch.tensor(
        [(len(r.ids), r.advantage, r.weight) for r in responses], device=device).T[:, :, None]
    real = torch.arange(ids.shape[1], device=device) < lengths
    sampled = pad([r.logprobs for r in responses], device, torch.float32)[real]  # [N]
    logprobs, entropy = token_logprobs(model, hidden[real], ids[real], method.temperature)
    advantages, weights = advantages.expand(ids.shape)[real], weights.expand(ids.shape)[real]
    old = sampled if method.updates > 1 else logprobs.detach()
    loss = policy_loss(logprobs, old, advantages, weights, method.clip_low, method.clip_high)
    loss.backward()

    counted, logprobs = weights > 0, logprobs.detach()  # an idle slice counts nothing
    off = (logprobs - sampled).abs() * counted
    return torch.stack((loss.detach(), -(logprobs * counted).sum(), (entropy * counted).sum(),
                        off.sum(), counted.sum()))


def optimizer_step(model: Transformer, optimizer: torch.optim.Optimizer, figures: Tensor,
                   grad_clip: float) -> dict[str, float]:
    """Step with the accumulated gradients; returns metrics that are the same on every process.

    If the loss or the gradient is not finite, the weights stay as they were, and the only metric is
    {"skipped": 1.0}.
    """
    loss, nll, entropy, off, tokens = all_sum(*figures.double().sum(0).tolist())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    finite = math.isfinite(loss + norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    if not finite:
        return {"skipped": 1.0}
    return {"loss": loss, "nll": nll / tokens, "entropy": entropy / tokens,
            "logprob_diff": off / tokens, "trained_tokens": tokens, "grad_norm": norm,
            "skipped": 0.0}
