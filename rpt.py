"""Reinforcement Pre-Training (arXiv 2506.08007): the method itself, without files or arguments.

One step, sections 3.2 and 3.3 of the paper:

    completions = generate(policy, prompts, samples=G, temperature=T)          rollout()
    rewards     = reward(responses, question)                                  reward.py
    advantages  = (R - mean R) / std R, within the group of one question       group_advantages()
    loss        = - sum over tokens of min(r A, clip(r) A) / tokens            policy_loss()

Exactly on-policy (one update per batch, the default) the ratio r is 1 and clipping never acts, so no second forward
pass for old log-probabilities is made. Groups whose rewards are all equal have no gradient and are not computed.

Everything is counted over all processes: questions are dealt to them by number, the loss is divided by the tokens
of the whole step, and no process decides alone what the others have to wait for.
"""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data import TEMPLATES, Question, Tokenizer, prompt_ids
from model import Segment, Transformer, all_gather, forward_flops, rank_and_world
from reward import extract_prediction
from sampler import Completion, generate, last_hidden, pad, uniforms

STD_EPSILON = 1e-6  # added to a group's standard deviation; groups without any are exactly zero before it matters
LOG_RATIO_LIMIT = 20.0  # |log ratio| beyond which the ratio is held, so that exp cannot overflow
EASY = 2**40  # stands for the number of a sample where randomness is needed for a whole group


def option(default, doc: str, **more):
    """A dataclass field with a line of documentation, from which train.py makes a command-line option."""
    return field(default=default, metadata={"help": doc, **more})


@dataclass(frozen=True)
class Method:
    """What defines an RPT step. The defaults are the paper's (section 3.3, appendix B)."""

    questions: int = option(256, "questions per step")
    group_size: int = option(8, "responses per question, G")
    temperature: float = option(0.8, "sampling temperature; the policy loss uses the same")
    max_prompt: int = option(4096, "tokens of a prompt; a longer context loses its beginning")
    max_response: int = option(8192, "tokens of a response")
    template: str = option("v0", "prompt template, by its name in data.py (paper, appendix D)", choices=TEMPLATES)
    scale_by_std: bool = option(True, "divide advantages by the group's standard deviation")
    normalize: str = option("token", "the loss is a mean over tokens, over sequences, or over constant lengths",
                            choices=("token", "sequence", "constant"))
    updates: int = option(1, "optimizer steps on each batch; 1 is exactly on-policy")
    clip_low: float = option(0.2, "ratios below 1 - this are clipped")
    clip_high: float = option(0.2, "ratios above 1 + this are clipped")
    dynamic_from: int = option(-1, "from this step on resample questions whose responses are all right or all wrong; "
                                   "-1: never")
    max_refills: int = option(4, "how often dynamic sampling draws again for one step")
    keep_easy: bool = option(True, "train on every informative group; no: keep one of pass rate p with probability "
                                   "1 - 1.2 (p - 0.25) (arXiv 2608.23256)")
    ntp_weight: float = option(0.0, "weight of a next-token loss on the contexts (RMT, arXiv 2509.24375: 0.1)")
    average_decay: float = option(0.999, "decay of the averaged policy of reward `gain` (RLP, 2510.01265)")
    grad_clip: float = option(1.0, "largest gradient norm")
    micro_tokens: int = option(16384, "tokens, padding included, of one forward and backward pass")
    max_rows: int = option(256, "responses decoded at a time by one process")
    cache_tokens: int = option(0, "tokens of keys and values held at a time by one process; 0: no limit but --max-rows")


@dataclass
class Group:
    """The responses to one question and what they earned."""

    number: tuple[int, int]  # (draw, index in the draw) within the step, the same whichever process holds it
    question: Question
    prompt: list[int]
    completions: list[Completion]
    responses: list[bytes]  # without the end token
    rewards: list[float]
    advantages: list[float]
    kept: bool = True  # False: left out of training by `keep_easy`

    @property
    def informative(self) -> bool:
        """Not all rewards are equal: the group has a gradient."""
        return self.kept and any(reward != self.rewards[0] for reward in self.rewards)


class Policy:
    """What a reward may ask of the model that is being trained, and of the running average of its past."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, method: Method, average: Transformer | None = None):
        self.model, self.tokenizer, self.method, self.average = model, tokenizer, method, average
        self.tokens = tokenizer.tokens
        self._seen: tuple = (None, None)  # the last question, and the probabilities behind its context

    @torch.no_grad()
    def _next(self, model: Transformer, runs: Sequence[Sequence[int]]) -> Tensor:
        """Probabilities [n, vocabulary] of the token after each run."""
        return model.logits(last_hidden(model, runs)).softmax(-1)

    def _plain(self, model: Transformer, question: Question) -> Tensor:
        """Next-token probabilities [vocabulary] behind the context alone."""
        return self._next(model, [[*self.tokenizer.bos, *question.context[-self.method.max_prompt:]]])[0]

    def probability(self, question: Question, token: bytes) -> float:
        """P(token | context) by plain next-token prediction (paper, appendix A); 0 for bytes that are no token."""
        if self._seen[0] is not question:  # each response of a group asks
            self._seen = question, self._plain(self.model, question)
        return float(self._seen[1][self.tokenizer.ids_of_token(token)].sum())

    def gain(self, responses: Sequence[bytes], question: Question) -> list[float]:
        """RLP's reward (arXiv 2510.01265): log P(next token | context, thought) - log P(next token | context), in nats.

        The first is the policy's, with \\boxed{ opened behind the thought; the second is the averaged policy's plain
        prediction. A response that does not end its thought gains nothing.
        """
        prompt = prompt_ids(self.tokenizer, question, self.method.template, self.method.max_prompt)
        runs = [prompt + self.tokenizer.thought_ids(response.split(b"</think>")[0]) for response in responses]
        ids = self.tokenizer.ids_of_token(question.truth[0])
        thoughtful = self._next(self.model, runs)[:, ids].sum(-1).log()
        plain = self._plain(self.average, question)[ids].sum().log()
        return [float(gain) if b"</think>" in r else 0.0 for gain, r in zip(thoughtful - plain, responses)]


# ---------------------------------------------------------------------------------------------- equations


def group_advantages(rewards: Tensor, scale_by_std: bool = True) -> Tensor:
    """rewards [Q, G] -> advantages [Q, G], float64: A = (R - mean) / (std + 1e-6), std unbiased, or A = R - mean.

    A group of equal rewards is exactly zero, tested on the rewards: R - mean is not always 0 in floating point, and
    divided by a standard deviation as small it is of order one. ValueError for groups of one.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 responses to compare, rewards are {list(rewards.shape)}")
    rewards = rewards.double()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + STD_EPSILON)
    return torch.where((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0, advantages)


class _HeadLogprobs(torch.autograd.Function):
    """Log-probability and entropy from hidden states, a chunk of tokens at a time, forward and backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int):
        logprobs, entropies = [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logp = ((h @ weight.T).float() / temperature).log_softmax(-1)
            logprobs.append(logp.gather(1, t[:, None])[:, 0])
            entropies.append(-(logp.exp() * logp).sum(-1))
        logprobs, entropies = torch.cat(logprobs), torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, targets, entropies)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor, grad_entropies: Tensor):
        hidden, weight, targets, entropies = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for begin in range(0, len(hidden), ctx.chunk):
            part = slice(begin, begin + ctx.chunk)
            logp = ((hidden[part] @ weight.T).float() / ctx.temperature).log_softmax(-1)
            p = logp.exp()  # d logp[t] / d logits = 1[t] - p,  d entropy / d logits = -p (logp + entropy)
            by_logprob, by_entropy = grad_logprobs[part, None], grad_entropies[part, None]
            grad = logp.add_(entropies[part, None]).mul_(-by_entropy).sub_(by_logprob).mul_(p)
            grad.scatter_add_(1, targets[part, None], by_logprob)
            grad = (grad / ctx.temperature).to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            if grad_weight is not None and grad.dtype == torch.float32:
                grad_weight.addmm_(grad.T, hidden[part])  # without a second matrix of the weight's size
            elif grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def head_chunk(vocab_size: int) -> int:
    """Tokens whose logits are held at a time.

    Few, so that a million logits stay in a CPU's cache and below the size that malloc takes from the kernel and gives
    back each time; but at least 192, because every chunk reads and writes the head's whole gradient.
    """
    return max(192, 2**20 // vocab_size)


def token_logprobs(model: Transformer, hidden: Tensor, targets: Tensor,
                   temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """hidden [N, hidden_size], targets [N] -> log-probability of each target and entropy of its distribution.

    Both float32 [N], in nats, at `temperature`, both differentiable. The [N, vocabulary] logits never exist: only
    those of a chunk of tokens do at a time, and the backward pass computes them again.
    """
    return _HeadLogprobs.apply(hidden, model.head, targets, temperature, head_chunk(model.config.vocab_size))


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, clip_low: float = 0.2,
                clip_high: float = 0.2) -> Tensor:
    """GRPO's clipped surrogate, - sum_i w_i min(r_i A_i, clip(r_i, 1 - low, 1 + high) A_i), over tokens [N].

    r = exp(logprobs - old_logprobs). weights say what the loss is a mean of, see `token_weights`.
    """
    ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()


def token_weights(length: int, normalize: str, tokens: int, sequences: int, max_response: int) -> float:
    """The weight of each token of a response in a loss over `tokens` tokens of `sequences` responses in all.

    "token": every token counts the same (DAPO). "sequence": every response does (GRPO as published). "constant":
    tokens are divided by the length limit, whatever the response's length (Dr. GRPO).
    """
    if normalize == "token":
        return 1 / max(tokens, 1)
    return 1 / (max(sequences, 1) * (length if normalize == "sequence" else max_response))


# ---------------------------------------------------------------------------------------------- processes


def all_sum(*values: float) -> list[float]:
    """The sum over all processes of each value, in float64."""
    return [float(sum(column)) for column in zip(*all_gather(values))]


@contextlib.contextmanager
def unsharded(*models: Transformer) -> Iterator[None]:
    """Holds the whole weights on every process, so that decoding needs no collective and may differ in length.

    `no_grad`, because tensors of inference mode would poison the next training step.
    """
    shards = [module for model in models for module in model.modules() if hasattr(module, "unshard")]
    for module in shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module not in models, recurse=False)  # the head is used after the forward


# ---------------------------------------------------------------------------------------------- rollout and update


def rollout(model: Transformer, tokenizer: Tokenizer, questions: Sequence[tuple[tuple[int, int], Question]],
            method: Method, reward: Callable, seed: int, step: int, timing: dict | None = None,
            average: Transformer | None = None) -> list[Group]:
    """Samples and rewards G responses to each numbered question; no process waits for another here.

    An unfinished response is given to the reward as b"": what was not said in time earns nothing.
    """
    prompts = [prompt_ids(tokenizer, question, method.template, method.max_prompt) for _, question in questions]
    keys = [step << 40 | draw << 32 | index for (draw, index), _ in questions]  # with the seed all of the randomness
    completions = generate(
        model, prompts, samples=method.group_size, max_new_tokens=method.max_response, temperature=method.temperature,
        eos_ids=tokenizer.eos_ids, seed=seed, keys=keys, max_rows=method.max_rows,
        cache_tokens=method.cache_tokens or None, timing=timing)
    policy, groups = Policy(model, tokenizer, method, average), []
    for (number, question), key, prompt, group in zip(questions, keys, prompts, completions):
        responses = [tokenizer.bytes_of(c.ids[:-1] if c.finished else c.ids) for c in group]
        rewards = reward([r if c.finished else b"" for r, c in zip(responses, group)], question, policy)
        earned = torch.tensor([rewards], dtype=torch.float64, device="cpu")
        advantages = group_advantages(earned, method.scale_by_std)[0].tolist()
        passed = sum(r >= 1 for r in rewards) / len(rewards)
        kept = method.keep_easy or uniforms(seed, key, EASY, 1)[0] < 1 - 1.2 * (passed - 0.25)
        groups.append(Group(number, question, prompt, group, responses, rewards, advantages, kept))
    return groups


def pack(items: Sequence, tokens: Callable[[list], int], budget: int) -> list[list]:
    """Neighbouring items in batches of at most `budget` tokens; an item that alone has more is a batch."""
    batches: list[list] = []
    for item in items:
        if batches and tokens([*batches[-1], item]) <= budget:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def micro_batches(groups: Sequence[Group], budget: int) -> list[list[tuple[Group, list[int]]]]:
    """Parts (group, its samples) such that prompts and padded responses of a batch stay within `budget` tokens.

    Groups of similar length go together. A group that alone is too large is divided, a single response never.
    """
    def longest(group: Group) -> int:
        return max(len(c.ids) for c in group.completions)

    def tokens(batch: list[tuple[Group, list[int]]]) -> int:  # the last group is the one of the longest response
        return (len(batch) * max(len(group.prompt) for group, _ in batch)
                + sum(len(samples) for _, samples in batch) * longest(batch[-1][0]))

    parts = []
    for group in sorted(groups, key=lambda g: (longest(g), g.number)):
        order = sorted(range(len(group.completions)), key=lambda s: -len(group.completions[s].ids))
        limit = max(1, (budget - len(group.prompt)) // longest(group))
        parts += [(group, order[i: i + limit]) for i in range(0, len(order), limit)]
    return pack(parts, tokens, budget)


def completion_logprobs(model: Transformer, batch: Sequence[tuple[Group, list[int]]],
                        temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every token of the batch's responses, one after the other, [N] each.

    Each prompt is computed once; the responses of its group attend to its keys and values, and the gradient flows
    back through them. The first token is predicted by the prompt's last hidden state.
    """
    device = model.head.device
    prompts = [group.prompt for group, _ in batch]
    rows = [row for row, (_, samples) in enumerate(batch) for _ in samples]
    responses = [group.completions[s].ids for group, samples in batch for s in samples]
    shared = Segment([len(p) for p in prompts], device)
    last = last_hidden(model, prompts, shared)
    ids = pad(responses, device)
    own = Segment([len(r) for r in responses], device, shared, rows)
    hidden = torch.cat((last[own.rows][:, None], model(ids, own)[:, :-1]), dim=1)  # [rows, T, hidden_size]
    real = torch.arange(ids.shape[1], device=device) < own.lengths[:, None]
    return token_logprobs(model, hidden[real], ids[real], temperature)


def _policy_pass(model: Transformer, batch: Sequence[tuple[Group, list[int]]], method: Method, tokens: float,
                 sequences: float) -> dict[str, float]:
    """Adds the gradient of one micro-batch; returns sums over its tokens."""
    rows = [(group.completions[s], group.advantages[s]) for group, samples in batch for s in samples]
    logprobs, entropy = completion_logprobs(model, batch, method.temperature)
    per_token = [(old, advantage, token_weights(len(c.ids), method.normalize, tokens, sequences, method.max_response))
                 for c, advantage in rows for old in c.logprobs]
    sampled, advantages, weights = torch.tensor(per_token, device=logprobs.device, dtype=torch.float32).unbind(1)
    old = sampled if method.updates > 1 else logprobs.detach()
    loss = policy_loss(logprobs, old, advantages, weights, method.clip_low, method.clip_high)
    loss.backward()
    off = (logprobs.detach() - sampled).abs()
    return {"loss": loss.item(), "entropy": entropy.detach().sum().item(), "logprob_diff": off.sum().item(),
            "logprob_diff_max": off.max().item(), "trained_tokens": len(off)}


def _ntp_pass(model: Transformer, runs: Sequence[Sequence[int]], weight: float) -> dict[str, float]:
    """Adds the gradient of plain next-token prediction on a batch of runs, each token weighing `weight`."""
    ids = pad(runs, model.head.device)
    lengths = torch.tensor([len(run) for run in runs], device=ids.device)
    real = torch.arange(1, ids.shape[1], device=ids.device) < lengths[:, None]
    logprobs, entropy = token_logprobs(model, model(ids)[:, :-1][real], ids[:, 1:][real])
    loss = -weight * logprobs.sum()
    loss.backward()
    return {"loss": loss.item(), "entropy": entropy.detach().sum().item(), "trained_tokens": len(logprobs)}


def _ntp_work(model: Transformer, runs: Sequence[Sequence[int]], method: Method, weight: float) -> tuple:
    """Passes of next-token prediction over runs, as `optimize` takes them; a run of one token predicts nothing."""
    batches = pack(sorted(runs, key=len), lambda batch: len(batch) * len(batch[-1]), method.micro_tokens)
    return lambda batch: _ntp_pass(model, batch, weight), batches, [[0]]


def optimize(model: Transformer, optimizers: Sequence[torch.optim.Optimizer],
             work: Sequence[tuple[Callable, list, list]], grad_clip: float) -> dict[str, float]:
    """One optimizer step on the gradients of everyone's passes; metrics, the same on every process.

    work: for each kind of pass a function that adds the gradient of a batch and returns sums over its tokens, this
    process's batches, and an idle one. Every process makes as many passes of a kind as the busiest one, because a
    pass gathers shards from all. If the loss or the gradient is not finite, the weights stay as they were, and all
    that is returned is skipped 1: the sums are the same everywhere, so all processes decide alike.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    counts = all_gather([len(batches) for _, batches, _ in work])  # agreed on before anyone begins
    parts = []
    for (one_pass, batches, idle), most in zip(work, map(max, zip(*counts))):
        parts += [one_pass(batch) for batch in batches]
        for _ in range(len(batches), most):
            one_pass(idle)
    keys = ("loss", "entropy", "logprob_diff", "trained_tokens")
    loss, entropy, off, trained = all_sum(*(sum(part.get(key, 0.0) for part in parts) for key in keys))
    largest = max(all_gather(max((part.get("logprob_diff_max", 0.0) for part in parts), default=0.0)))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(loss + norm):
        return {"skipped": 1.0}
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "entropy": entropy / max(trained, 1), "logprob_diff": off / max(trained, 1),
            "logprob_diff_max": largest, "trained_tokens": trained, "grad_norm": norm, "skipped": 0.0}


IDLE = Group((-1, -1), Question((), (), -1, -1), [0, 0], [Completion([0], [0.0], False)], [b""], [0.0], [0.0])


def update(model: Transformer, optimizers: Sequence[torch.optim.Optimizer], groups: Sequence[Group],
           method: Method) -> dict[str, float]:
    """One optimizer step (or `method.updates`) on everyone's groups. Returns metrics, the same on every process.

    A step without any informative group, or with a non-finite number (skipped 1), leaves the weights as they are.
    """
    mine = [group for group in groups if group.informative]
    completions = [c for group in groups for c in group.completions]
    tokens, sequences, informative, broken = all_sum(
        sum(len(c.ids) for c in completions), len(completions), len(mine),
        sum(not math.isfinite(sum(c.logprobs)) for c in completions))
    work = [(lambda batch: _policy_pass(model, batch, method, tokens, sequences),
             micro_batches(mine, method.micro_tokens), [(IDLE, [0])])]
    if method.ntp_weight:  # RMT: the tokens that no question is about are still learned by prediction
        runs = [group.question.context for group in groups if len(group.question.context) > 1]
        total = max(1, *all_sum(sum(len(run) - 1 for run in runs)))
        work.append(_ntp_work(model, runs, method, method.ntp_weight / total))
    out = {"skipped": float(broken > 0)}
    for _ in range(method.updates if informative or method.ntp_weight else 0):
        if not out["skipped"]:
            out = optimize(model, optimizers, work, method.grad_clip)
    return out | {"informative": informative}


def ntp_step(model: Transformer, optimizers: Sequence[torch.optim.Optimizer], runs: Sequence[Sequence[int]],
             method: Method) -> dict:
    """One step of next-token prediction on token runs, the same list on every process: the paper's baseline.

    Every token but the first of a run counts the same.
    """
    (rank, world), begin = rank_and_world(), time.perf_counter()
    total = sum(map(len, runs))
    work = _ntp_work(model, runs[rank::world], method, 1 / max(1, total - len(runs)))
    metrics = optimize(model, optimizers, [work], method.grad_clip)
    seconds = time.perf_counter() - begin
    return metrics | {"flops": 3 * forward_flops(model.config, total, total / len(runs) / 2), "time": {
        "seconds": seconds, "train_tokens_per_s": metrics.get("trained_tokens", 0) / seconds}}


def rpt_step(model: Transformer, tokenizer: Tokenizer, optimizers: Sequence[torch.optim.Optimizer],
             draw: Callable[[int, int], Sequence[Question]], step: int, method: Method, reward: Callable, seed: int,
             average: Transformer | None = None) -> tuple[list[Group], dict]:
    """One step of RPT. draw(step, retry) gives the same questions on every process.

    Returns this process's groups and the metrics of all. Dynamic sampling (DAPO; the paper from step 500) keeps only
    informative groups and draws again until the batch is full or `max_refills` is reached. `average` is an older copy
    of the policy for reward `gain`, which follows it.
    """
    (rank, world), begin = rank_and_world(), time.perf_counter()
    dynamic = 0 <= method.dynamic_from <= step
    groups, timing, drawn, flops = [], Counter(), 0, 0.0
    with unsharded(*filter(None, (model, average))):
        for retry in range(1 + dynamic * method.max_refills):
            questions, spent = draw(step, retry), {}
            drawn += len(questions)
            mine = [((retry, n), question) for n, question in enumerate(questions) if n % world == rank]
            fresh = rollout(model, tokenizer, mine, method, reward, seed, step, spent, average)
            timing.update(spent)  # adds up
            flops += groups_flops(model, fresh)
            groups += [group for group in fresh if group.informative or not dynamic]
            numbers = sorted(n for part in all_gather([group.number for group in groups]) for n in part)
            if len(numbers) >= method.questions:
                break
    kept = set(numbers[: method.questions])
    groups = [group for group in groups if group.number in kept]
    sampled = time.perf_counter()
    trained = update(model, optimizers, groups, method)
    if average:
        with torch.no_grad():
            for mean, now in zip(average.parameters(), model.parameters()):
                mean.lerp_(now, 1 - method.average_decay)
    flops += 3 * method.updates * groups_flops(model, [group for group in groups if group.informative])
    prefilled, decoded, flops = all_sum(timing["prefill_tokens"], timing["decode_tokens"], flops)
    seconds = timing["prefill_seconds"], timing["decode_seconds"], sampled - begin, time.perf_counter() - sampled
    prefill, decode, acting, learning = map(max, zip(*all_gather(seconds)))  # of the slowest process
    return groups, rollout_metrics(groups) | trained | {
        "drawn": drawn, "prefill_tokens": prefilled, "decode_tokens": decoded, "flops": flops, "time": {
            "seconds": acting + learning, "rollout": acting, "prefill": prefill, "decode": decode, "train": learning,
            "prefill_tokens_per_s": prefilled / max(prefill, 1e-9), "decode_tokens_per_s": decoded / max(decode, 1e-9),
            "train_tokens_per_s": trained.get("trained_tokens", 0) / max(learning, 1e-9)}}


def groups_flops(model: Transformer, groups: Sequence[Group]) -> float:
    """Floating-point operations of a forward pass over groups, each prompt computed once."""
    sizes = [(len(g.prompt), sum(len(c.ids) for c in g.completions), len(g.completions)) for g in groups]
    return sum(forward_flops(model.config, prompt, prompt / 2) + forward_flops(model.config, n, prompt + n / size / 2)
               for prompt, n, size in sizes)


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all processes' groups: what the policy said and earned."""
    completions = [c for group in groups for c in group.completions]
    rewards = [reward for group in groups for reward in group.rewards]
    lengths = [len(c.ids) for c in completions]
    n_groups, n, earned, right, tokens, parsed, cut, solved, all_right = all_sum(
        len(groups), len(rewards), sum(rewards), sum(reward >= 1 for reward in rewards), sum(lengths),
        sum(extract_prediction(r) is not None for group in groups for r in group.responses),
        sum(not c.finished for c in completions),
        sum(max(group.rewards) >= 1 for group in groups), sum(min(group.rewards) >= 1 for group in groups))
    longest = float(max(all_gather(max(lengths, default=0))))
    per_response, per_group = max(n, 1), max(n_groups, 1)
    return {"reward": earned / per_response, "accuracy": right / per_response, "parsed": parsed / per_response,
            "truncated": cut / per_response, "length": tokens / per_response, "length_max": longest,
            "solved": solved / per_group, "all_right": all_right / per_group, "all_wrong": 1 - solved / per_group,
            "groups": n_groups, "responses": n}
