"""Batched sampling with a KV cache: prompts in, completions with log-probabilities out.

RPT samples G completions of every prompt. A prompt is computed once, and its keys and values are
stored once: each step multiplies the queries of a whole group with them in one matrix product.

Rows are decoded in waves. All rows of a wave start together, so they always have the same age.
When its cache grows, rows that have ended leave the wave. If its keys and values would outgrow
`cache_tokens`, about the later half of its rows, whole prompts at a time, is given up and decoded
again in a later, smaller wave. They draw the same tokens again, because each (seed, key, sample,
position) has one uniform number, and the inverse cumulative distribution maps it to a token. So a
completion does not depend, up to rounding, on its neighbours, on the number of processes or on a
restart.

Not supported: top-k and top-p. The policy loss would then train another distribution than the one
that was sampled.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Prompts, Transformer, last_hidden

PREFILL_TOKENS = 32768  # padded tokens of a wave's prompts, which are computed in one forward pass
GROWTH = 8  # columns by which the rows' own cache grows, and an eighth of what it has


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    ids: list[int]  # includes the end token, if one was sampled
    logprobs: list[float]  # nats, of each id under the distribution it was drawn from
    finished: bool  # an end token was sampled; False: cut by the length limit


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. Only a wave of a single prompt with its samples may exceed the bounds."""

    max_new_tokens: int
    eos_ids: Sequence[int]
    samples: int = 1  # completions of every prompt
    temperature: float = 1.0  # 0 is greedy
    seed: int = 0
    max_rows: int = 256  # completions decoded at a time
    cache_tokens: int = 2**62  # columns of keys and values held at a time


def uniforms(seed: int, key: int, sample: int, count: int) -> np.ndarray:
    """Return the numbers in (0, 1) that decide positions 0 .. count - 1, float64 [count]."""
    key = seed % 2**64 | key % 2**64 << 64
    generator = np.random.Generator(np.random.Philox(key=key, counter=sample << 64))
    return (generator.integers(2**32, size=count) + 0.5) / 2**32


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw a token [n] from float32 logits [n, V] with uniform numbers [n]; also return its
    log-probability [n]. Temperature 0 is greedy.

    The token is the first whose cumulative probability exceeds the uniform number. The sums are
    float64: over 152,000 tokens float32 gives a quarter of them no width at all.
    """
    # On a CPU, a few rows at a time, which stay in its cache.
    size = max(1, 2**20 // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    tokens, logprobs = [], []
    for rows, aim in zip(logits.split(size), uniform[:, None].split(size)):
        logprob = (rows / (temperature or 1.0)).log_softmax(-1)
        if temperature == 0:
            token = rows.argmax(-1, keepdim=True)
        else:
            ends = logprob.exp().cumsum(-1, dtype=torch.float64)
            token = torch.searchsorted(ends, aim * ends[:, -1:], right=True)
            token = token.clamp_max(rows.shape[1] - 1)  # for a row of NaN
        tokens.append(token[:, 0])
        logprobs.append(logprob.gather(-1, token)[:, 0])
    return torch.cat(tokens), torch.cat(logprobs)


# ---------------------------------------------------------------------------------- the cache


class KVCache:
    """Keys and values of a wave: of its prompts, and of the tokens that its rows have sampled.

    By layer [2, kv_heads, prompts or rows, columns, d]. Between two calls of `keep`, a forward pass
    reads and writes the same tensors and never waits for the device, so it can be recorded (see
    `capture`). The plain form is the `cache` of toy/mini.py's `rollout`, in which every row holds
    its whole prompt.
    """

    def __init__(self, prompts: Prompts, samples: int):
        self.lengths = prompts.lengths.repeat_interleave(samples)  # of each row's prompt
        self.prompts = [torch.stack([x.transpose(0, 1) for x in pair]) for pair in prompts.layers]
        prompts.layers.clear()  # no second copy while the wave is decoded
        self.rows = torch.arange(len(self.lengths), device=self.lengths.device)
        self.owner = self.rows // samples
        self.own = [x[:, :, self.owner, :0] for x in self.prompts]
        self.age = self.rows[:1] - 1  # [1], the newest column that is filled

    def keep(self, rows: Tensor, more: int) -> None:
        """Drop all rows but these, and prompts that have no row left; then add `more` empty columns
        for the rows' next tokens."""
        self.rows, self.lengths = self.rows[rows], self.lengths[rows]
        kept, self.owner, counts = self.owner[rows].unique(return_inverse=True, return_counts=True)
        # One layer at a time, so that there is never a second copy of the whole.
        for n, (prompt, own) in enumerate(zip(self.prompts, self.own)):
            self.prompts[n] = prompt[:, :, kept]
            self.own[n] = F.pad(own[:, :, rows], (0, 0, 0, more))
        # Row r is the nth[r]-th of its prompt in grid [prompts, most rows of one]. A prompt with
        # fewer rows repeats others, whose results nobody reads.
        first, numbers = counts.cumsum(0) - counts, torch.arange(len(rows), device=rows.device)
        self.nth = numbers - first[self.owner]
        self.grid = (first[:, None] + numbers[: int(counts.max())]).clamp_max(len(rows) - 1)

    def positions(self, width: int) -> Tensor:
        """Open the rows' next column; return the position of its tokens in their texts [rows, 1].

        width is 1, because a row samples one token at a time.
        """
        self.age += width
        prompt, own = (x[0].shape[3] for x in (self.prompts, self.own))
        column = torch.arange(prompt + own, device=self.age.device)
        filled = (column < self.lengths[:, None]) | (column >= prompt)
        filled &= column <= prompt + self.age
        self.mask = torch.where(filled, 0.0, float("-inf"))[:, None]  # [rows, 1, P + columns]
        return (self.lengths + self.age)[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [rows, kv_heads, 1, d]; attend from q [rows, heads, 1, d] to them, the
        columns before and the prompt; returns [rows, 1, heads * d].

        The queries of a group meet the keys of its prompt in one product.
        """
        prompt, own = self.prompts[layer], self.own[layer]
        own.index_copy_(3, self.age, torch.stack((k, v)).transpose(1, 2))
        rows, kv_heads, _, d = k.shape

        def by_prompt(x: Tensor) -> Tensor:  # [kv_heads, rows, n, :] -> [kv_heads, prompts, any, :]
            return x[:, self.grid].flatten(2, 3)

        def by_row(x: Tensor) -> Tensor:  # the inverse
            return x.unflatten(2, (self.grid.shape[1], -1))[:, self.owner, self.nth]

        q = q.reshape(rows, kv_heads, -1, d).transpose(0, 1) * d**-0.5  # [kv_heads, rows, n, d]
        scores = torch.cat((by_row(by_prompt(q) @ prompt[0].mT), q @ own[0].mT), dim=3)
        weights = scores.float().add_(self.mask).softmax(-1).to(q.dtype)
        shared, alone = weights.split([prompt.shape[3], own.shape[3]], dim=3)
        out = by_row(by_prompt(shared) @ prompt[1]) + alone @ own[1]
        return out.transpose(0, 1).reshape(rows, 1, -1)


# ---------------------------------------------------------------------------------- decoding


@torch.no_grad()
def generate(model: Transformer, prompts: Sequence[Sequence[int]], *,
             keys: Sequence[int] | None = None, **sampling) -> list[list[Completion]]:
    """Sample completions of every prompt (token ids); returns them as [prompt][sample].

    sampling: the fields of Sampling. keys: one integer per prompt (default: its index); with seed
    and sample number it decides the randomness. The plain form is toy/mini.py's `rollout`.
    """
    if not all(map(len, prompts)):
        raise ValueError("a prompt is empty: it needs at least one token")
    keys, how, done = range(len(prompts)) if keys is None else keys, Sampling(**sampling), {}
    waiting = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))  # like with like
    width = most = max(1, how.max_rows // how.samples)
    while waiting:
        longest = len(prompts[waiting[0]])
        fits = min(PREFILL_TOKENS // longest,
                   how.cache_tokens // (longest + 2 * how.samples * GROWTH))
        wave = waiting[: max(1, min(width, fits))]
        uniform = np.stack([uniforms(how.seed, keys[n], sample, how.max_new_tokens)
                            for n in wave for sample in range(how.samples)])
        groups = decode(model, [prompts[n] for n in wave], torch.from_numpy(uniform), how)
        done |= {wave[n]: group for n, group in groups.items()}
        waiting = [n for n in waiting if n not in done]
        # After a wave that gave prompts up, try as many as it completed; else twice as many.
        width = min(most, 2 * width) if len(groups) == len(wave) else len(groups)
    return [done[n] for n in range(len(prompts))]


def decode(model: Transformer, prompts: Sequence[Sequence[int]], uniform: Tensor,
           how: Sampling) -> dict[int, list[Completion]]:
    """Decode a wave. uniform: [prompts * samples, max_new_tokens].

    When the cache outgrows `cache_tokens`, the rows of about the later half of the prompts are
    given up, but never those of the first, so that every wave completes one. Returns what was
    completed, by prompt.
    """
    uniform = uniform.to(model.head.device)
    prefix = Prompts(list(map(len, prompts)), uniform.device)
    logits = model.logits(last_hidden(model, prompts, prefix)).repeat_interleave(how.samples, 0)
    cache, eos = KVCache(prefix, how.samples), torch.tensor(how.eos_ids, device=uniform.device)
    ids, logprobs = torch.zeros_like(uniform, dtype=torch.long), uniform.float()
    length = torch.zeros_like(ids[:, 0])  # 0 until a row has ended

    def sample(logits: Tensor) -> None:
        rows, place = cache.rows, cache.age + 1
        token, logprob = sample_tokens(logits, uniform[rows, place], how.temperature)
        ids[rows, place], logprobs[rows, place] = token, logprob
        ended = (token[:, None] == eos).any(1) & (length[rows] == 0)
        length[rows] += ended * (place + 1)

    def advance() -> None:
        newest = ids[cache.rows, cache.age + 1]
        sample(model.logits(model(newest[:, None], cache)[:, 0]))

    sample(logits)
    for age in range(1, how.max_new_tokens):
        columns = cache.own[0].shape[3]
        if age > columns:
            more = GROWTH + columns // GROWTH
            going = (length[cache.rows] == 0).nonzero()[:, 0]  # waits for the device
            if not len(going):
                break
            room = how.cache_tokens - math.prod(cache.prompts[0].shape[2:4])
            if len(going) * (columns + more) > room:
                owner = cache.owner[going]
                going = going[owner < max(int(owner[0]) + 1, int(owner[len(owner) // 2]))]
            cache.keep(going, more)
            step = capture(advance, uniform.device)
        step()
    complete = length > 0
    complete[cache.rows] = True  # not finished, but as long as they may be
    whole = complete.view(-1, how.samples).all(1).tolist()
    rows = [Completion(ids[: size or None], logprobs[: size or None], size > 0) for
            size, ids, logprobs in zip(length.tolist(), ids.tolist(), logprobs.tolist())]
    return {n: rows[n * how.samples: (n + 1) * how.samples] for n in np.flatnonzero(whole).tolist()}


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return a step that runs as one recorded graph where the device has them.

    The kernels of a small model end sooner than Python can start them. ROCm has the device name
    "cuda" and the class CUDAGraph too.
    """
    if device.type != "cuda":
        return step
    module = torch.get_device_module(device)
    graph = module.CUDAGraph()
    with module.graph(graph):
        step()
    return graph.replay
