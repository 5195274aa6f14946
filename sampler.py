"""Batched sampling with a KV cache: prompts in, completions with log-probabilities out.

Reinforcement Pre-Training samples G completions of every prompt, so the prompt is computed once and
its keys and values are held once per group: each step multiplies the queries of a whole group with
them in one matrix product. Completions have a cache of their own that grows with them. A row that
ends leaves the batch, and a waiting group takes its place, so that the batch stays full and memory
follows the tokens that are alive.

Randomness. One uniform number belongs to each (seed, key, sample, position); it comes from a
counter-based generator and is turned into a token by inverting the cumulative distribution. A
completion is therefore a function of the model and of (seed, key, sample), up to rounding: not of
its neighbours, its slot, the number of processes or a restart.

Memory. `cache_tokens` bounds the columns of keys and values that are held between two forwards;
beside them a prefill needs its own, at most PREFILL_TOKENS. When the rows have grown so far that
the bound would not hold, the youngest group is given up and done again later, down to a single
group, whatever that needs. Sampling ends all the same: a pass of its loop admits groups, makes room
or decodes. Groups are admitted only if the bound would still hold after the cache has grown once
more, and `KVCache.tokens` counts for both, so that no group is given up before GROWTH steps have
been decoded since the last one came. The oldest group is never given up, and max_new_tokens steps
are all that it needs.

Left out: top-k and top-p, which would make the sampler another distribution than the one the policy
loss corrects.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import PrefixCache, Transformer

PREFILL_TOKENS = 16384  # padded tokens of prompts in one forward; a single longer one goes alone
ROOM = 1 / 8  # rows that are done leave when they are this share: moving a cache costs
BLOCK = 512  # tokens of the vocabulary whose probabilities are summed in float32
GROWTH = 32  # columns by which the rows' own cache grows
TIMING = ("prefill_seconds", "prefill_tokens", "decode_seconds", "decode_tokens")
CHECK_EVERY = 16  # steps after which an accelerator is asked whether rows are done: it has to wait


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    ids: list[int]  # includes the end token, if one was sampled
    logprobs: list[float]  # nats, of each id under the distribution it was drawn from (greedy: 1.0)
    finished: bool  # an end token was sampled; False: the length limit cut it


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. Raises ValueError for a number out of its range."""

    max_new_tokens: int
    eos_ids: Sequence[int]
    samples: int = 1  # completions of every prompt
    temperature: float = 1.0  # 0 is greedy
    seed: int = 0
    max_rows: int | None = None  # completions decoded at once; None: all
    cache_tokens: int | None = None  # columns of keys and values held at once; None: any number

    def __post_init__(self):
        for name in ("max_new_tokens", "samples", "max_rows", "cache_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number from 0 on, not {self.temperature}")


def uniforms(seed: int, key: int, sample: int, count: int) -> np.ndarray:
    """The numbers in (0, 1) that decide positions 0 .. count - 1; float64 [count]."""
    key = seed % 2**64 | key % 2**64 << 64
    generator = np.random.Generator(np.random.Philox(key=key, counter=sample << 64))
    return (generator.integers(2**32, size=count) + 0.5) / 2**32


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """float32 logits [n, V], uniform [n] -> token [n] and its log-probability [n] at `temperature`.

    The token is the first whose cumulative probability exceeds the uniform number. In two steps: a
    block of the vocabulary, then a token of the block. Over a vocabulary of 152 thousand, float32
    sums drift by more than the probability of most tokens, and float64 ones take longer than all
    the rest; within a block float32 is exact enough, and the blocks are few.
    """
    logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    else:
        blocks = F.pad(logprobs.exp(), (0, -logits.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        block, uniform = _invert(blocks.sum(-1), uniform[:, None])
        place, _ = _invert(blocks.take_along_dim(block[..., None], 1)[:, 0], uniform)
        token = (block * BLOCK + place).clamp_max(logits.shape[-1] - 1)  # a row of NaN: the last
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


def _invert(shares: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The first of shares [n, K] at which their sum exceeds uniform [n, 1] of the whole, and where
    within its share that is, from 0 to 1; [n, 1] each, in float64."""
    ends = shares.cumsum(-1, dtype=torch.float64)
    aim = uniform * ends[:, -1:]
    chosen = torch.searchsorted(ends, aim, right=True).clamp_max(shares.shape[1] - 1)
    share = shares.gather(1, chosen)
    return chosen, (aim - ends.gather(1, chosen) + share) / share


# ------------------------------------------------------------------------------ the cache


class KVCache:
    """Keys and values for one token a row and step: of the groups' prompts, and of the rows' own.

    Rows of a group are neighbours, groups stand in the order in which they came. Prompts and rows
    begin in column 0; what is not filled is masked. The key heads come first, [kv_heads, groups or
    rows, columns, d]: the rows of full groups then need no rearranging between the products with
    their prompts and those with their own tokens.

    Between two changes of its rows or columns a step reads and writes the same tensors whatever it
    computes, so that it can be recorded (see `Batch.step`).
    """

    def __init__(self, model: Transformer):
        c = model.config
        self.layers = c.num_hidden_layers
        empty = model.head.new_zeros(c.num_key_value_heads, 0, 0, c.head_dim)
        self.prompts, self.own = ([empty] * (2 * self.layers) for _ in range(2))  # keys, values
        self.lengths: list[int] = []  # of each prompt, in tokens
        self.counts: list[int] = []  # rows of each group
        self._arrange(model.head.new_zeros(0, dtype=torch.long))

    def tokens(self, lengths: Sequence[int] = (), rows: int = 0, growth: int = 0) -> int:
        """Columns of keys and values that are held, used or not, by prompts and by rows.

        Or that would be, if prompts of these lengths joined with so many rows, and the rows' own
        cache grew by so many columns.
        """
        columns = max([self.prompts[0].shape[2], *lengths])
        own = self.own[0].shape[2] + growth
        return (len(self.lengths) + len(lengths)) * columns + (len(self.age) + rows) * own

    def admit(self, prefix: PrefixCache, counts: Sequence[int]) -> None:
        """Adds computed prompts as groups, with counts[i] rows each."""
        columns = max(self.prompts[0].shape[2], prefix.keys[0].shape[2])
        rows = len(self.age) + sum(counts)
        for i, fresh in enumerate(prefix.tensors()):
            parts = self.prompts[i], fresh.transpose(0, 1)
            self.prompts[i] = torch.cat([_extended(x, columns, dim=2) for x in parts], dim=1)
            self.own[i] = _extended(self.own[i], rows, dim=1)
        self.lengths += prefix.sizes
        self.counts += counts
        self._arrange(_extended(self.age, rows))

    def grow(self) -> None:
        """Another block of columns for the rows' own tokens."""
        for i, x in enumerate(self.own):  # one layer at a time: no second copy of the whole
            self.own[i] = _extended(x, x.shape[2] + GROWTH, dim=2)
        self._arrange(self.age)

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows, groups without rows, and columns that nothing uses."""
        group_of = np.repeat(np.arange(len(self.counts)), self.counts)[rows]
        groups, counts = np.unique(group_of, return_counts=True)
        self.lengths, self.counts = [self.lengths[g] for g in groups], counts.tolist()
        rows, groups = self._index(rows), self._index(groups)
        age = self.age[rows]
        columns, own = max(self.lengths, default=0), max(age.tolist(), default=0) + GROWTH
        for i in range(2 * self.layers):
            self.prompts[i] = self.prompts[i][:, groups, :columns]
            self.own[i] = self.own[i][:, rows, :own]
        self._arrange(age)

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.age.device)

    def _arrange(self, age: Tensor) -> None:
        """What a step needs besides keys and values. age: tokens that rows have stored [rows]."""
        self.age, self.graph = age, None  # the recorded step, if there is one, is of other tensors
        columns, own = self.prompts[0].shape[2], self.own[0].shape[2]
        self.free = own - max(age.tolist(), default=0)  # steps for which there are columns
        self.rows = torch.arange(len(age), device=age.device)
        self.ends = self._index(np.repeat(self.lengths, self.counts))  # length of a row's prompt
        filled = [torch.arange(size, device=age.device) < filled[:, None]
                  for size, filled in ((columns, self.ends), (own, age))]
        self.mask = torch.where(torch.cat(filled, dim=1), 0.0, float("-inf"))  # added to scores
        # Where rows stand in the [groups, slots] of the products with prompts, and back.
        self.grid = self.place = slice(None)
        slots = np.arange(max(self.counts, default=0)) < np.array(self.counts)[:, None]
        if not slots.all():
            self.grid = self._index(slots.cumsum() - 1)
            self.place = self._index(np.flatnonzero(slots))

    def positions(self, width: int) -> Tensor:
        """Opens each row's next column; where in its text the token stands [rows, 1]."""
        assert width == 1, "a KVCache takes one token per row"
        self.column = self.age.clone()
        self.age += 1
        self.mask.scatter_(1, self.prompts[0].shape[2] + self.column[:, None], 0.0)
        return (self.ends + self.column)[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k and v [rows, kv_heads, 1, d] in the open column; q [rows, heads, 1, d] attends
        to it, the columns before and the prompt -> [rows, 1, heads * d].

        All queries of a group meet its prompt in one product.
        """
        prompt_keys, prompt_values, keys, values = (
            x[layer + i] for x in (self.prompts, self.own) for i in (0, self.layers))
        keys[:, self.rows, self.column] = k[:, :, 0].transpose(0, 1)
        values[:, self.rows, self.column] = v[:, :, 0].transpose(0, 1)
        (kv_heads, rows, _, d), groups = keys.shape, len(self.counts)

        def by_group(x: Tensor) -> Tensor:
            """[kv_heads, rows, repeats, n] -> [kv_heads, groups, slots * repeats, n]"""
            return x[:, self.grid].reshape(kv_heads, groups, -1, x.shape[3])

        def by_row(x: Tensor) -> Tensor:
            """And back."""
            return x.reshape(kv_heads, -1, q.shape[2], x.shape[3])[:, self.place]

        q = (q * d**-0.5).reshape(rows, kv_heads, -1, d).transpose(0, 1).contiguous()
        shared, own = by_row(by_group(q) @ prompt_keys.mT), q @ keys.mT
        scores = torch.cat((shared, own), dim=3).float().add_(self.mask[:, None])
        weights = scores.softmax(-1).to(q.dtype)  # [kv_heads, rows, repeats, columns]
        shared, own = weights.split([shared.shape[3], own.shape[3]], dim=3)
        out = by_row(by_group(shared) @ prompt_values) + own @ values
        return out.transpose(0, 1).reshape(rows, 1, -1)


def _extended(x: Tensor, size: int, dim: int = 0) -> Tensor:
    """x with zeros behind it, of this size in one dimension."""
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat((x, x.new_zeros(shape)), dim)


# ------------------------------------------------------------------------------ prompts


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token sequences as one right-padded tensor [n, longest]; the padding has no effect."""
    rows = [torch.tensor(sequence, dtype=torch.long, device="cpu") for sequence in sequences]
    return pad_sequence(rows, batch_first=True).to(device)


def last_hidden(model: Transformer, sequences: Sequence[Sequence[int]],
                cache: PrefixCache | None = None) -> Tensor:
    """What predicts the token after each of the sequences: hidden [n, hidden_size]."""
    hidden = model(pad(sequences, model.head.device), cache)
    return hidden[range(len(sequences)), [len(sequence) - 1 for sequence in sequences]]


# ------------------------------------------------------------------------------ generation


class Job(NamedTuple):
    prompt: int  # its index
    samples: Sequence[int]  # the samples of it that are wanted: the rows of a group


class Batch:
    """The rows being decoded: what they have sampled so far and to whom each belongs."""

    STATE = ("uniform", "ids", "logprobs", "length")  # tensors that have a row for each row

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], keys: Sequence[int],
                 sampling: Sampling):
        self.model, self.prompts, self.keys, self.sampling = model, prompts, keys, sampling
        self.limit = sampling.max_new_tokens
        self.max_rows = sampling.max_rows or max(1, len(prompts) * sampling.samples)
        self.cache_tokens = sampling.cache_tokens or float("inf")
        self.cache = KVCache(model)
        self.owners: list[tuple[int, int]] = []  # (prompt, sample) of each row
        new, device = model.head.new_zeros, model.head.device
        self.eos_ids = torch.tensor(list(sampling.eos_ids), dtype=torch.long, device=device)
        # By row and position; one column more than the limit, for what rows sample when done.
        self.uniform = new(0, self.limit + 1, dtype=torch.float64)
        self.ids = new(0, self.limit + 1, dtype=torch.long)
        self.logprobs = new(0, self.limit + 1, dtype=torch.float32)
        self.length = new(0, 1, dtype=torch.long)  # of rows that ended; 0 while running

    def admissible(self, waiting: deque[Job]) -> list[Job]:
        """Takes jobs for which there are rows and memory, with prompts of like length.

        There is memory if the bound will still hold when the cache grows next. A job that would be
        alone needs none.
        """
        jobs, lengths, rows = [], [], 0
        while waiting and len(self.owners) + rows + len(waiting[0].samples) <= self.max_rows:
            rows += len(waiting[0].samples)
            lengths.append(len(self.prompts[waiting[0].prompt]))
            padded, held = len(lengths) * lengths[0], self.cache.tokens(lengths, rows, GROWTH)
            if jobs and (padded > PREFILL_TOKENS or 2 * lengths[-1] < lengths[0]):
                break
            if held > self.cache_tokens and (jobs or self.owners):
                break
            jobs.append(waiting.popleft())
        return jobs

    def admit(self, jobs: Sequence[Job]) -> None:
        """Computes the prompts of the jobs and samples each row's first token."""
        prompts, counts = [self.prompts[job.prompt] for job in jobs], [len(j.samples) for j in jobs]
        prefix = PrefixCache(list(map(len, prompts)), self.cache.age.device)
        hidden = last_hidden(self.model, prompts, prefix)
        self.cache.admit(prefix, counts)
        owners = [(job.prompt, sample) for job in jobs for sample in job.samples]
        self.owners += owners
        for name in self.STATE:
            setattr(self, name, _extended(getattr(self, name), len(self.owners)))
        new = slice(-len(owners), None)
        self.uniform[new] = torch.from_numpy(np.stack(
            [uniforms(self.sampling.seed, self.keys[prompt], sample, self.limit + 1)
             for prompt, sample in owners]))
        logits = self.model.logits(hidden)
        self._sample(logits[np.repeat(np.arange(len(jobs)), counts)], new)

    def _sample(self, logits: Tensor, rows: slice) -> None:
        """Draws and notes the next token of some rows."""
        column = self.cache.age[rows][:, None].clamp(max=self.limit)
        uniform = self.uniform[rows].gather(1, column)[:, 0]
        token, logprob = sample_tokens(logits, uniform, self.sampling.temperature)
        self.ids[rows].scatter_(1, column, token[:, None])
        self.logprobs[rows].scatter_(1, column, logprob[:, None])
        length = self.length[rows]
        ended = (token[:, None] == self.eos_ids).any(1, keepdim=True)
        length += (column + 1) * (ended & (length == 0) & (column < self.limit))

    def step(self) -> None:
        """One more token for every row; the cache must have a free column.

        A "cuda" device is given the step as one recorded graph: kernels of 64 rows end sooner than
        Python starts them. Rows that come or go, and caches that grow, make it record again. (ROCm
        has that device name and class too; torch.accelerator has graphs only in releases later than
        the oldest we run on.)
        """
        self.cache.free -= 1
        device = self.cache.age.device
        if device.type != "cuda":
            return self._advance()
        if self.cache.graph is None:
            module = torch.get_device_module(device)
            self.cache.graph = module.CUDAGraph()
            with module.graph(self.cache.graph):
                self._advance()
        self.cache.graph.replay()

    def _advance(self) -> None:
        token = self.ids.gather(1, self.cache.age[:, None].clamp(max=self.limit))
        self._sample(self.model.logits(self.model(token, self.cache)[:, 0]), slice(None))

    def make_room(self) -> list[Job]:
        """Lets the cache grow; gives up the youngest groups while the bound would not hold."""
        given_up = []
        while self.cache.tokens(growth=GROWTH) > self.cache_tokens and len(self.cache.counts) > 1:
            given_up.append(self.preempt())
        self.cache.grow()
        return given_up

    def pop_finished(self) -> list[tuple[int, int, Completion]]:
        """Takes out the rows that are done, if they are many or the cache is full.

        (prompt, sample, Completion) of each. It waits for the device.
        """
        length, age = self.length[:, 0].tolist(), self.cache.age.tolist()
        going = [row for row, n in enumerate(length) if not n and age[row] + 1 < self.limit]
        many = ROOM * len(length) if self.cache.free else 1
        if len(length) - len(going) < max(many, 1):
            return []
        done, out = sorted(set(range(len(length))) - set(going)), []
        for row, ids, logprobs in zip(done, self.ids[done].tolist(), self.logprobs[done].tolist()):
            end = length[row] or self.limit
            out.append((*self.owners[row], Completion(ids[:end], logprobs[:end], length[row] > 0)))
        self._keep(going)
        return out

    def preempt(self) -> Job:
        """Gives up the youngest group: a job to be done again, which yields the same tokens."""
        rows = len(self.owners) - self.cache.counts[-1]
        job = Job(self.owners[rows][0], [sample for _, sample in self.owners[rows:]])
        self._keep(list(range(rows)))
        return job

    def _keep(self, rows: list[int]) -> None:
        self.cache.keep(rows)
        for name in self.STATE:
            setattr(self, name, getattr(self, name)[rows])
        self.owners = [self.owners[row] for row in rows]


def rates(timing: dict[str, float]) -> str:
    """Tokens per second of prefill and decoding."""
    return ", ".join(f"{phase} {timing[f'{phase}_tokens'] / timing[f'{phase}_seconds']:,.0f} tok/s"
                     for phase in ("prefill", "decode") if timing[f"{phase}_seconds"])


@torch.no_grad()
def generate(model: Transformer, prompts: Sequence[Sequence[int]], *,
             keys: Sequence[int] | None = None, progress: bool = False,
             timing: dict[str, float] | None = None, **sampling) -> list[list[Completion]]:
    """Samples completions of every prompt (token ids); returns them as [prompt][sample].

    sampling: the fields of Sampling. keys: one integer per prompt (default: its index) which, with
    the seed and the number of the sample, decides its randomness. timing, if given, receives
    seconds and tokens of prefill and decoding. Raises ValueError for an empty prompt or an unusable
    number.
    """
    keys = list(range(len(prompts))) if keys is None else list(keys)
    if len(keys) != len(prompts):
        raise ValueError(f"{len(keys)} keys for {len(prompts)} prompts: one each is needed")
    if not all(map(len, prompts)):
        raise ValueError(f"prompt {list(map(len, prompts)).index(0)} is empty: give it a token")
    batch = Batch(model, prompts, keys, Sampling(**sampling))
    samples, size = batch.sampling.samples, batch.max_rows
    waiting = deque(Job(prompt, range(first, min(first + size, samples)))
                    for prompt in sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
                    for first in range(0, samples, size))
    results: list[list] = [[None] * samples for _ in prompts]
    timing = {} if timing is None else timing
    timing |= dict.fromkeys(TIMING, 0)
    bar = tqdm(total=len(prompts) * samples, desc="sampling", unit="completion", leave=False,
               disable=not progress)
    steps = 1 if model.head.device.type == "cpu" else CHECK_EVERY
    while waiting or batch.owners:
        begin, phase = time.perf_counter(), "decode"
        if jobs := batch.admissible(waiting):
            batch.admit(jobs)
            phase = "prefill"
            timing["prefill_tokens"] += sum(len(prompts[job.prompt]) for job in jobs)
        elif batch.cache.free == 0:
            waiting.extendleft(batch.make_room())
        else:
            for _ in range(min(steps, batch.cache.free)):
                batch.step()
        for prompt, sample, completion in batch.pop_finished():
            results[prompt][sample] = completion
            timing["decode_tokens"] += len(completion.ids)
            bar.update()
        timing[f"{phase}_seconds"] += time.perf_counter() - begin
        bar.set_postfix_str(rates(timing), refresh=False)
    bar.close()
    return results
