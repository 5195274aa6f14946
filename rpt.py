"""Reinforcement Pre-Training (arXiv 2506.08007): the method itself, without files or arguments.

One step, `rpt_step`, sections 3.2 and 3.3 of the paper:

    completions = generate(policy, prompts, samples=G, temperature=T)          rollout()
    rewards     = reward(responses, question, policy)                          reward.py
    advantages  = (R - mean R) / std R, within the group of one question       group_advantages()
    loss        = - sum over tokens of min(r A, clip(r) A) / tokens            policy_loss()

Exactly on-policy (one update per batch, the default) the ratio r is 1 and clipping never acts, so
no second forward pass for old log-probabilities is made. Groups whose rewards are all equal have
no gradient and are not computed; their tokens still count in what the loss is divided by. A step
without any gradient is left out, because AdamW's momentum and weight decay would move the weights.

The policy is the distribution that is sampled, softmax(logits / T): its log-probabilities are what
sampler and loss speak of, so the temperature is in both. A response that does not finish is b"" to
the reward, and trained like any other, on all its tokens.

Everything is counted over all processes: questions are dealt to them by number; the loss is divided
by the tokens of the whole step, so that a token weighs the same whichever process has it, and the
update does not depend on their number; no process decides alone what the others have to wait for.

Letters in shapes: Q questions, G responses to each, N tokens, V vocabulary; T, in [B, T], tokens of
the longest. """

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from data import TEMPLATES, Question, Tokenizer, prompt_ids
from model import (Continuation, PrefixCache, Transformer, all_gather, all_sum, rank_and_world,
                   take_rows, unsharded)
from sampler import Completion, generate, last_hidden, pad

STD_EPSILON = 1e-6  # added to a group's standard deviation, which is not 0 where it is used
LOG_RATIO_LIMIT = 20.0  # |log ratio| beyond which the ratio is held, so that exp cannot overflow
PADDING = 1 / 32  # of the tokens that a training slice has room for, at most


def option(default, doc: str, **limits):
    """A dataclass field from which train.py makes a command-line option.

    limits: `choices`, or for a number `at_least`, `above`, `at_most`; each number needs one.
    """
    return field(default=default, metadata={"help": doc, **limits})


@dataclass(frozen=True)
class Method:
    """What defines an RPT step. The defaults are the paper's (section 3.3, appendix B), but for
    dynamic_from and grad_clip, which train.py's recipe `paper` sets."""

    questions: int = option(256, "questions per step", at_least=1)
    group_size: int = option(8, "responses per question, G; a group compares", at_least=2)
    temperature: float = option(0.8, "of sampling, and of the policy loss: a greedy policy has no "
                                     "gradient", above=0)
    max_prompt: int = option(4096, "tokens of a prompt; a longer context loses its beginning",
                             at_least=1)
    max_response: int = option(8192, "tokens of a response", at_least=1)
    template: str = option("v0", "prompt template, by its name in data.py (paper, appendix D)",
                           choices=TEMPLATES)
    scale_by_std: bool = option(True, "divide advantages by the group's standard deviation")
    loss_type: str = option("token", "the loss is a mean over tokens (DAPO), over sequences (GRPO) "
                                     "or over constant lengths (Dr. GRPO)",
                            choices=("token", "sequence", "constant"))
    updates: int = option(1, "optimizer steps on each batch; 1 is exactly on-policy", at_least=1)
    clip_low: float = option(0.2, "ratios below 1 - this are clipped", at_least=0, at_most=1)
    clip_high: float = option(0.2, "ratios above 1 + this are clipped", at_least=0)
    dynamic_from: int = option(-1, "from this step on replace questions whose responses are all "
                                   "right or all wrong; -1: never", at_least=-1)
    max_refills: int = option(4, "how often dynamic sampling draws again for one step", at_least=0)
    grad_clip: float = option(1.0, "largest gradient norm", above=0)
    micro_tokens: int = option(16384, "tokens alive in training: prompts and a slice of responses",
                               at_least=1)
    max_rows: int = option(256, "responses decoded at a time by one process", at_least=1)
    cache_tokens: int = option(0, "tokens of keys and values held at a time by one process; "
                                  "0: no limit but --max-rows", at_least=0)


@dataclass
class Policy:
    """The model that is trained, with its tokenizer: what a reward may ask about."""

    model: Transformer
    tokenizer: Tokenizer
    _seen: tuple = (None, None)  # the last question, and the probabilities behind its context

    def tokens(self, prediction: bytes) -> list[bytes]:
        """The bytes of each token of a prediction; none if it is not UTF-8."""
        return self.tokenizer.tokens(prediction)

    @torch.no_grad()
    def probability(self, question: Question, token: bytes) -> float:
        """P(token | context) by plain next-token prediction (paper, appendix A); 0 for bytes that
        are no token. A context beyond the model's positions loses its beginning."""
        if self._seen[0] is not question:  # each response of a group asks
            window = self.model.config.max_position_embeddings - 1
            context = [*self.tokenizer.bos, *question.context[-window:]]
            logits = self.model.logits(last_hidden(self.model, [context]))[0]
            self._seen = question, logits.softmax(-1)
        return float(self._seen[1][self.tokenizer.ids_of_token(token)].sum())


@dataclass
class Group:
    """The responses to one question and what they earned."""

    number: tuple[int, int]  # (retry, index in its draw) in the step, whichever process holds it
    question: Question
    prompt: list[int]
    completions: list[Completion]
    responses: list[bytes]  # without the end token
    rewards: list[float]
    advantages: list[float]
    kept: bool = True  # False: dynamic sampling has replaced it

    @property
    def informative(self) -> bool:
        """Not all rewards are equal: the group has a gradient."""
        return any(reward != self.rewards[0] for reward in self.rewards)


# ------------------------------------------------------------------------------------- equations


def group_advantages(rewards: Tensor, scale_by_std: bool = True) -> Tensor:
    """rewards [Q, G] -> advantages [Q, G], float64: A = (R - mean) / (std + 1e-6), or R - mean.

    The standard deviation is unbiased. A group of equal rewards is exactly zero, tested on the
    rewards: R - mean is not always 0 in floating point, and divided by a deviation as small it is
    of order one. ValueError for groups of one.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError("a group needs at least 2 responses to compare, "
                         f"rewards are {list(rewards.shape)}")
    rewards = rewards.double()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + STD_EPSILON)
    return torch.where((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0, advantages)


class _HeadLogprobs(torch.autograd.Function):
    """Log-probability and entropy from hidden states, a chunk of tokens at a time, both ways."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):
        ctx.temperature, ctx.chunk = temperature, head_chunk(len(weight), weight.device)
        logprobs, entropies = [], []
        for h, t in zip(hidden.split(ctx.chunk), targets.split(ctx.chunk)):
            logp = ((h @ weight.T).float() / temperature).log_softmax(-1)
            logprobs.append(logp.gather(1, t[:, None])[:, 0])
            entropies.append(-(logp.exp() * logp).sum(-1))
        logprobs, entropies = torch.cat(logprobs), torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor, _):
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for begin in range(0, len(hidden), ctx.chunk):
            part = slice(begin, begin + ctx.chunk)
            logits = (hidden[part] @ weight.T).float() / ctx.temperature
            by_logprob = grad_logprobs[part, None] / ctx.temperature
            grad = logits.softmax(-1).mul_(-by_logprob)  # d logp[t] / d logits = 1[t] - p
            grad = grad.scatter_add_(1, targets[part, None], by_logprob).to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            if grad_weight is not None and grad.dtype == torch.float32:
                grad_weight.addmm_(grad.T, hidden[part])  # without a second matrix of its size
            elif grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def head_chunk(vocab_size: int, device: torch.device) -> int:
    """Tokens whose logits are held at a time; each chunk reads and writes the head's whole
    gradient.

    On a CPU a million logits, which stay in its cache and below the size that malloc gives back to
    the kernel each time, or 512 tokens; on an accelerator a quarter of a billion.
    """
    if device.type == "cpu":
        return max(512, 2**20 // vocab_size)
    return min(4096, max(1024, 2**28 // vocab_size))


def token_logprobs(model: Transformer, hidden: Tensor, targets: Tensor,
                   temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """hidden [N, hidden_size], targets [N] -> log-probability of each target, and the entropy of
    its distribution, which has no gradient.

    Both float32 [N], in nats, at `temperature`. The [N, V] logits never exist: only those of a
    chunk of tokens do at a time, and the backward pass computes them again.
    """
    return _HeadLogprobs.apply(hidden, model.head, targets, temperature)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor,
                clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """GRPO's clipped surrogate, - sum_i w_i min(r_i A_i, clip(r_i, 1 - low, 1 + high) A_i), [N].

    r = exp(logprobs - old_logprobs). weights say what the loss is a mean of, see `token_weight`.
    """
    ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()


def token_weight(length: int, method: Method, tokens: float, sequences: float) -> float:
    """The weight of each token of a response of `length` in a loss over `tokens` tokens of
    `sequences` responses in all.

    "token": every token counts the same (DAPO). "sequence": every response does (GRPO as
    published). "constant": divided by the length limit, whatever the length (Dr. GRPO).
    """
    if method.loss_type == "token":
        return 1 / max(tokens, 1)
    per_response = length if method.loss_type == "sequence" else method.max_response
    return 1 / (max(sequences, 1) * per_response)


# ----------------------------------------------------------------------------------------- step


def rpt_step(policy: Policy, optimizer: torch.optim.Optimizer,
             draw: Callable[[int, int], Sequence[Question]], step: int, method: Method,
             reward: Callable, seed: int) -> tuple[list[Group], dict]:
    """One step of RPT: this process's groups, and the update's metrics with the seconds it took.

    draw(step, retry) gives the same questions on every process.
    """
    timing, begin = Counter(), time.perf_counter()
    groups = sample_groups(policy, draw, step, method, reward, seed, timing)
    timing["rollout"] = time.perf_counter() - begin
    metrics = update(policy.model, optimizer, [group for group in groups if group.kept], method)
    timing["train"] = time.perf_counter() - begin - timing["rollout"]
    return groups, metrics | {"time": timing}


def sample_groups(policy: Policy, draw: Callable[[int, int], Sequence[Question]], step: int,
                  method: Method, reward: Callable, seed: int, timing: Counter) -> list[Group]:
    """This process's share of the groups of a step, those that were replaced among them.

    Dynamic sampling (DAPO; the paper from step 500) keeps only informative groups and draws again
    until the batch is full or `max_refills` is reached.
    """
    rank, world = rank_and_world()
    dynamic = 0 <= method.dynamic_from <= step
    groups: list[Group] = []
    with unsharded(policy.model):
        for retry in range(1 + dynamic * method.max_refills):
            mine = [((retry, n), question) for n, question in enumerate(draw(step, retry))
                    if n % world == rank]
            groups += rollout(policy, mine, method, reward, seed, step, timing)
            usable = [g.number for g in groups if g.informative or not dynamic]
            usable = sorted(number for part in all_gather(usable) for number in part)
            if len(usable) >= method.questions:
                break
    chosen = set(usable[: method.questions])
    for group in groups:
        group.kept = group.number in chosen
    return groups


def rollout(policy: Policy, questions: Sequence[tuple[tuple[int, int], Question]], method: Method,
            reward: Callable, seed: int, step: int, timing: Counter | None = None) -> list[Group]:
    """Samples and rewards G responses to each numbered question; nobody waits for others here.

    An unfinished response is given to the reward as b"": what was not said in time earns nothing.
    """
    prompts = [prompt_ids(policy.tokenizer, question, method.template, method.max_prompt)
               for _, question in questions]
    # with the seed all of the randomness
    keys = [step << 40 | retry << 32 | index for (retry, index), _ in questions]
    spent: dict = {}
    completions = generate(
        policy.model, prompts, keys=keys, timing=spent, samples=method.group_size, seed=seed,
        max_new_tokens=method.max_response, temperature=method.temperature,
        eos_ids=policy.tokenizer.eos_ids, max_rows=method.max_rows,
        cache_tokens=method.cache_tokens or None)
    if timing is not None:
        timing.update(spent)  # adds up
    groups = []
    for (number, question), prompt, group in zip(questions, prompts, completions):
        responses = [policy.tokenizer.bytes_of(c.ids[:-1] if c.finished else c.ids) for c in group]
        said = [text if c.finished else b"" for text, c in zip(responses, group)]
        rewards = reward(said, question, policy)
        rewards_QG = torch.tensor([rewards], dtype=torch.float64, device="cpu")
        advantages = group_advantages(rewards_QG, method.scale_by_std)[0].tolist()
        groups.append(Group(number, question, prompt, group, responses, rewards, advantages))
    return groups


def update(model: Transformer, optimizer: torch.optim.Optimizer, groups: Sequence[Group],
           method: Method) -> dict[str, float]:
    """One optimizer step (or `method.updates`) on everyone's groups; metrics, the same everywhere.

    A step without any informative group, or with a number that is not finite (skipped 1), leaves
    the weights as they are.
    """
    completions = [c for group in groups for c in group.completions]
    tokens, sequences, informative, broken = all_sum(
        sum(len(c.ids) for c in completions), len(completions),
        sum(group.informative for group in groups),
        sum(not math.isfinite(sum(c.logprobs)) for c in completions))
    metrics = {"skipped": float(broken > 0)}
    for _ in range(method.updates if informative else 0):
        if not metrics["skipped"]:
            optimizer.zero_grad(set_to_none=True)
            figures = accumulate(model, policy_examples(groups, method, tokens, sequences), method)
            metrics = optimizer_step(model, optimizer, figures, method.grad_clip)
    return metrics | {"informative": informative}


# ------------------------------------------------------------------------------------- gradients


@dataclass(frozen=True)
class Response:
    """What is learned of one response."""

    ids: Sequence[int]
    logprobs: Sequence[float]  # nats, the sampler's
    advantage: float
    weight: float  # of each token in the loss


Example = tuple[Sequence[int], list[Response]]  # a prompt and the responses to it
Slice = list[tuple[int, Response]]  # each with the row of its prompt in a batch of prompts
IDLE_SLICE: Slice = [(0, Response([0], [0.0], 0.0, 0.0))]  # while other processes have more to do


def policy_examples(groups: Sequence[Group], method: Method, tokens: float,
                    sequences: float) -> list[Example]:
    """The informative groups, in a loss over `tokens` tokens of `sequences` responses in all."""
    return [(group.prompt, [
        Response(c.ids, c.logprobs, advantage, token_weight(len(c.ids), method, tokens, sequences))
        for c, advantage in zip(group.completions, group.advantages)])
        for group in groups if group.informative]


def accumulate(model: Transformer, examples: Sequence[Example], method: Method) -> list[Tensor]:
    """Adds the gradient of everyone's examples to the parameters; returns the figures of each pass,
    for `optimizer_step`.

    A batch of prompts is computed once. Its keys, values and last hidden states are taken as
    leaves, slices of responses to any of its prompts run forward and backward one by one, and what
    gathered on the leaves goes backward through the prompts. That is the chain rule, so the
    gradient is the same whatever `micro_tokens`, and what is alive is the prompts' graph and one
    slice. Every process makes as many passes as the busiest one, agreed on before anyone begins,
    because a pass gathers shards from all. Each pass also sums its gradient over the processes: to
    do that in the last one only would save transfers, and hold a whole float32 gradient on each
    process until then, 59 GB for 14 B weights.
    """
    batches = training_batches(examples, method.micro_tokens)
    agreed = zip_longest(*all_gather([len(slices) for _, slices in batches]), fillvalue=0)
    counts, figures = list(map(max, agreed)), []
    for number, count in enumerate(counts):
        prompts, slices = batches[number] if number < len(batches) else ([[0]], [])
        prefix = PrefixCache(list(map(len, prompts)), model.head.device)
        last = last_hidden(model, prompts, prefix)
        roots = [*prefix.tensors(), last]
        prefix, last = prefix.detached(), last.detach().requires_grad_()
        for responses in slices + [IDLE_SLICE] * (count - len(slices)):
            figures.append(policy_pass(model, prefix, last, responses, method))
        torch.autograd.backward(roots, [leaf.grad for leaf in (*prefix.tensors(), last)])
    return figures


def training_batches(examples: Sequence[Example],
                     micro_tokens: int) -> list[tuple[list[Sequence[int]], list[Slice]]]:
    """Batches of prompts, half of `micro_tokens` at most, with slices of the responses to them in
    what is left of it. A prompt or response that is longer is alone."""
    batches = []
    for batch in pack(examples, lambda example: len(example[0]), micro_tokens // 2, padding=1.0):
        prompts = [prompt for prompt, _ in batch]
        rows = [(row, response) for row, (_, group) in enumerate(batch) for response in group]
        left = micro_tokens - len(prompts) * len(prompts[0])
        batches.append((prompts, pack(rows, lambda row: len(row[1].ids), left)))
    return batches


def pack(items: Sequence, length: Callable, budget: int, padding: float = PADDING) -> list[list]:
    """Items, longest first, in parts of at most `budget` padded tokens, at most the share `padding`
    of the budget for padding; an item that is longer than the budget is a part of its own. A share
    of the budget and not of the part, because a pass through all layers costs an accelerator the
    same for few tokens as for many."""
    parts, real = [], 0
    for item in sorted(items, key=length, reverse=True):  # stable: the same on every run
        padded = (len(parts[-1]) + 1) * length(parts[-1][0]) if parts else math.inf
        if padded <= budget and padded - real - length(item) <= padding * budget:
            parts[-1].append(item)
            real += length(item)
        else:
            parts.append([item])
            real = length(item)
    return parts


def response_logprobs(model: Transformer, prefix: PrefixCache, last: Tensor, responses: Slice,
                      temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every token of the responses, one after the other, [N] each.

    last: hidden [prompts, hidden_size] of each prompt's last token, which predicts the first token
    of its responses.
    """
    device = model.head.device
    ids = pad([response.ids for _, response in responses], device)  # [rows, T]
    continuation = Continuation(prefix, [row for row, _ in responses])
    hidden = model(ids, continuation)
    first = take_rows(last, continuation.rows)[:, None]
    hidden = torch.cat((first, hidden[:, :-1]), dim=1).flatten(0, 1)
    lengths = np.array([len(response.ids) for _, response in responses])
    real = np.flatnonzero(np.arange(ids.shape[1]) < lengths[:, None])  # known here: nobody waits
    real = torch.from_numpy(real).to(device)
    return token_logprobs(model, hidden[real], ids.flatten()[real], temperature)


def policy_pass(model: Transformer, prefix: PrefixCache, last: Tensor, responses: Slice,
                method: Method) -> Tensor:
    """Adds the gradient of a slice; its figures [6], see `optimizer_step`, left on the device."""
    logprobs, entropy = response_logprobs(model, prefix, last, responses, method.temperature)
    columns = np.array([(r.advantage, r.weight) for _, r in responses], dtype=np.float32)
    columns = columns.repeat([len(r.ids) for _, r in responses], axis=0)
    sampled = np.concatenate([r.logprobs for _, r in responses]).astype(np.float32)
    advantages, weights = torch.from_numpy(columns).to(logprobs.device).unbind(1)
    sampled = torch.from_numpy(sampled).to(logprobs.device)
    old = sampled if method.updates > 1 else logprobs.detach()
    loss = policy_loss(logprobs, old, advantages, weights, method.clip_low, method.clip_high)
    loss.backward()
    real, logprobs = weights > 0, logprobs.detach()  # an idle slice counts nothing
    off = (logprobs - sampled).abs() * real
    return torch.stack((loss.detach(), -(logprobs * real).sum(), (entropy * real).sum(), off.sum(),
                        real.sum(), off.max()))


def optimizer_step(model: Transformer, optimizer: torch.optim.Optimizer, figures: Sequence[Tensor],
                   grad_clip: float) -> dict[str, float]:
    """One step on the gradients that have gathered; metrics, the same on every process.

    figures: of each pass its loss, sums over tokens of -log-probability, entropy and |difference to
    the sampler's log-probability|, tokens, and the largest difference. If the loss or the gradient
    is not finite, the weights stay as they were, and all that is returned is skipped 1: what
    decides is the same everywhere.
    """
    passes = np.array(torch.stack(list(figures)).tolist())  # [passes, 6], read once a step
    loss, nll, entropy, off, trained = all_sum(*passes[:, :5].sum(0))
    largest = max(all_gather(float(passes[:, 5].max())))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if math.isfinite(loss + norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(loss + norm):
        return {"skipped": 1.0}
    return {"loss": loss, "nll": nll / max(trained, 1), "entropy": entropy / max(trained, 1),
            "logprob_diff": off / max(trained, 1), "logprob_diff_max": largest,
            "trained_tokens": trained, "grad_norm": norm, "skipped": 0.0}
