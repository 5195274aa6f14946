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

Left out: top-k and top-p, which would make the sampler another distribution than the one the policy
loss corrects.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import ModelConfig, PrefixCache, Transformer

PREFILL_TOKENS = 16384  # padded tokens of prompts in one forward; a single longer one goes alone
ROOM = 1 / 8  # share of rows that leave, or that are filled, together: moving a cache costs
GROWTH = 32  # columns by which the rows' own cache grows
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
    words = np.array([seed % 2**64, key % 2**64], dtype=np.uint64)
    counter = np.random.Philox(key=words, counter=[0, sample, 0, 0])
    return (np.random.Generator(counter).integers(2**32, size=count) + 0.5) / 2**32


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """float32 logits [n, V], uniform [n] -> token [n] and its log-probability [n] at `temperature`.

    The token is the first whose cumulative probability exceeds the uniform number, summed in
    float64: over a vocabulary of 152 thousand, float32 sums drift by more than the probability of
    most tokens.
    """
    if temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    logprobs = (logits / temperature).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    token = token.clamp_max(logits.shape[-1] - 1)  # only a row of NaN gets this far
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


# ------------------------------------------------------------------------------ the cache


class KVCache:
    """Keys and values for one token a row and step: of the groups' prompts, and of the rows' own.

    Rows of a group are neighbours, groups stand in the order in which they came. A row's tokens
    begin in column 0, a prompt's too; what is not filled is masked. The key heads come first,
    [kv_heads, groups or rows, columns, head_dim]: the rows of full groups then need no rearranging
    between the product with their prompts and the one with their own tokens.

    Between two changes of its rows or columns a step reads and writes the same tensors whatever it
    computes, so that it can be recorded (see `Batch.step`).
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype):
        shape = config.num_key_value_heads, 0, 0, config.head_dim
        self.layers, self.device = config.num_hidden_layers, device
        # Keys of all layers, then values of all layers.
        self.prompts = [torch.zeros(shape, device=device, dtype=dtype)] * (2 * self.layers)
        self.own = list(self.prompts)
        self.lengths: list[int] = []  # of the prompts, in tokens
        self.counts: list[int] = []  # rows of each group
        self.ages: list[int] = []  # own tokens of each row; the same on the device in `age`
        self._arrange(torch.zeros(0, dtype=torch.long, device=device))

    def tokens(self, lengths: Sequence[int] = (), rows: int = 0, growth: int = 0) -> int:
        """Columns of keys and values that are held, used or not, by prompts and by rows.

        Or that would be, if prompts of these lengths with so many rows joined, and the rows' own
        cache grew by `growth` columns.
        """
        columns = max([self.prompts[0].shape[2], *lengths])
        own = self.own[0].shape[2] + growth
        return (len(self.lengths) + len(lengths)) * columns + (len(self.ages) + rows) * own

    def free(self) -> int:
        """How many steps there are columns for."""
        return self.own[0].shape[2] - max(self.ages, default=0)

    def admit(self, prefix: PrefixCache, counts: Sequence[int]) -> None:
        """Takes over the prompts of a prefix as groups, with counts[i] rows each; it is emptied."""
        groups, rows = len(self.counts), sum(counts)
        fresh = [*prefix.keys, *prefix.values]
        prefix.keys, prefix.values = [], []
        columns = max(self.prompts[0].shape[2], fresh[0].shape[2])
        for i in range(2 * self.layers):  # one layer at a time: no second copy of the whole
            x, fresh[i] = fresh[i].transpose(0, 1), None
            self.prompts[i] = _enlarged(self.prompts[i], groups + len(counts), columns)
            self.prompts[i][:, groups:, : x.shape[2]] = x
            self.own[i] = _enlarged(self.own[i], len(self.ages) + rows, self.own[i].shape[2])
        self.lengths += prefix.sizes
        self.counts += counts
        self.ages += [0] * rows
        self._arrange(F.pad(self.age, (0, rows)))

    def grow(self) -> None:
        """Another block of columns for the rows' own tokens."""
        for i, x in enumerate(self.own):
            self.own[i] = _enlarged(x, x.shape[1], x.shape[2] + GROWTH)
        self._arrange(self.age)

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows (in order), groups without rows, and columns that nothing uses."""
        group_of = np.repeat(np.arange(len(self.counts)), self.counts)[rows]
        groups, counts = np.unique(group_of, return_counts=True)
        self.lengths, dropped = [self.lengths[g] for g in groups], len(groups) < len(self.counts)
        self.counts, self.ages = counts.tolist(), [self.ages[row] for row in rows]
        groups = torch.tensor(groups, device=self.device)
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        columns, own = max(self.lengths, default=0), max(self.ages, default=0) + GROWTH
        for i in range(2 * self.layers):
            if dropped:
                self.prompts[i] = self.prompts[i][:, groups, :columns]
            self.own[i] = self.own[i][:, index, :own]
        self._arrange(self.age[index])

    def _arrange(self, age: Tensor) -> None:
        """What a step needs besides the keys and values; `age`: own tokens of each row [rows]."""
        def tensor(values) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=self.device)

        self.age, lengths = age, tensor(self.lengths)
        self.rows = torch.arange(len(self.ages), device=self.device)
        self.columns = torch.arange(self.own[0].shape[2], device=self.device)
        self.ends = tensor(np.repeat(self.lengths, self.counts))  # tokens of each row's prompt
        self.prompt_mask = None
        columns = self.prompts[0].shape[2]
        if min(self.lengths, default=0) < columns:  # [groups, 1, columns]
            filled = torch.arange(columns, device=self.device) < lengths[:, None]
            self.prompt_mask = _mask(filled)[:, None]
        # Where rows stand in the [groups, slots] layout of the product with prompts, and back.
        self.slots = max(self.counts, default=0)
        self.grid = self.place = None
        if min(self.counts, default=0) < self.slots:  # else the layout is the order of the rows
            counts, slots = np.array(self.counts)[:, None], np.arange(self.slots)
            first = np.cumsum(self.counts)[:, None] - counts
            self.grid = tensor((first + np.minimum(slots, counts - 1)).ravel())
            self.place = tensor(np.flatnonzero(slots < counts))

    def positions(self, width: int) -> Tensor:
        """Opens each row's next column; where in its text the token stands [rows, 1]."""
        assert width == 1, "a KVCache takes one token per row"
        self.column = self.age.clone()
        self.age += 1
        self.mask = _mask(self.columns <= self.column[:, None])[:, None]  # [rows, 1, columns]
        return (self.ends + self.column)[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k and v [rows, kv_heads, 1, d] in the open column; q [rows, heads, 1, d] attends.

        One softmax over a group's prompt and a row's own tokens -> [rows, 1, heads * d]. All
        queries of a group meet its prompt in one product. Both parts are exponentiated around their
        common maximum, so that numerators and denominators just add up.
        """
        prompt_keys, prompt_values = self.prompts[layer], self.prompts[layer + self.layers]
        keys, values = self.own[layer], self.own[layer + self.layers]
        keys[:, self.rows, self.column] = k[:, :, 0].transpose(0, 1)
        values[:, self.rows, self.column] = v[:, :, 0].transpose(0, 1)
        (kv_heads, groups, columns, d), rows = prompt_keys.shape, len(q)
        q = (q * d**-0.5).reshape(rows, kv_heads, -1, d).transpose(0, 1).contiguous()
        shared = torch.bmm(self._by_group(q), prompt_keys.flatten(0, 1).mT).float()
        own = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).mT).float()
        own = own.view(kv_heads, rows, -1, keys.shape[2]).add_(self.mask)
        if self.prompt_mask is not None:
            shared.view(kv_heads, groups, -1, columns).add_(self.prompt_mask)
        peak = torch.maximum(self._by_row(shared.amax(-1, keepdim=True)),
                             own.amax(-1, keepdim=True))
        shared, own = shared.sub_(self._by_group(peak)).exp_(), own.sub_(peak).exp_()
        total = self._by_row(shared.sum(-1, keepdim=True)) + own.sum(-1, keepdim=True)
        out = self._by_row(torch.bmm(shared.to(q.dtype), prompt_values.flatten(0, 1)))
        out = out + torch.bmm(own.flatten(0, 1).to(q.dtype), values.flatten(0, 1)).view(q.shape)
        return (out / total).to(q.dtype).transpose(0, 1).reshape(rows, 1, -1)

    def _by_group(self, x: Tensor) -> Tensor:
        """[kv_heads, rows, repeats, n] -> [kv_heads * groups, slots * repeats, n]."""
        x = x if self.grid is None else x[:, self.grid]
        return x.reshape(len(x) * len(self.counts), -1, x.shape[-1])

    def _by_row(self, x: Tensor) -> Tensor:
        """And back."""
        x = x.view(len(self.own[0]), len(self.counts) * self.slots, -1, x.shape[-1])
        return x if self.place is None else x[:, self.place]


def _enlarged(x: Tensor, rows: int, columns: int) -> Tensor:
    """x [n, rows, columns, d] in the corner of a larger tensor; what is new holds zeros."""
    out = x.new_zeros(len(x), rows, columns, x.shape[3])
    out[:, : x.shape[1], : x.shape[2]] = x
    return out


def _mask(valid: Tensor) -> Tensor:
    return torch.zeros(valid.shape, device=valid.device).masked_fill_(~valid, float("-inf"))


# ------------------------------------------------------------------------------ prompts


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token sequences as one right-padded tensor [n, longest]; the padding has no effect."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for row, sequence in zip(ids, sequences):
        row[: len(sequence)] = sequence
    return torch.from_numpy(ids).to(device)


def last_hidden(model: Transformer, sequences: Sequence[Sequence[int]],
                cache: PrefixCache | None = None) -> Tensor:
    """What predicts the token after each of the sequences: hidden [n, hidden_size]."""
    device = model.head.device
    last = torch.tensor([len(sequence) - 1 for sequence in sequences], device=device)
    hidden = model(pad(sequences, device), cache)
    return hidden[torch.arange(len(sequences), device=device), last]


def prefill_batches(lengths: Sequence[int]) -> Iterator[slice]:
    """Neighbours to be computed in one forward: of like length, PREFILL_TOKENS with padding."""
    first = 0
    for i in range(1, len(lengths) + 1):
        some = lengths[first: i + 1]
        if (i == len(lengths) or max(some) * len(some) > PREFILL_TOKENS
                or 2 * min(some) < max(some)):
            yield slice(first, i)
            first = i


# ------------------------------------------------------------------------------ generation


class Job(NamedTuple):
    prompt: int  # its index
    samples: Sequence[int]  # the samples of it that are wanted: the rows of a group


class Batch:
    """The rows being decoded: what they have sampled so far and to whom each belongs."""

    STATE = ("uniform", "ids", "logprobs", "length")  # tensors that have a row for each row

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], keys: Sequence[int],
                 sampling: Sampling):
        self.model, self.device = model, model.head.device
        self.prompts, self.keys, self.sampling = prompts, keys, sampling
        self.limit = sampling.max_new_tokens
        self.max_rows = sampling.max_rows or max(1, len(prompts) * sampling.samples)
        self.cache_tokens = sampling.cache_tokens or float("inf")
        self.is_end = torch.zeros(len(model.head), dtype=torch.bool, device=self.device)
        self.is_end[[id for id in sampling.eos_ids if id < len(self.is_end)]] = True
        self.cache = KVCache(model.config, self.device, model.head.dtype)
        self.owners: list[tuple[int, int]] = []  # (prompt, sample) of each row
        # By row and position; one column more than the limit, for what rows sample when done.
        width = {"device": self.device, "size": (0, self.limit + 1)}
        self.uniform = torch.zeros(**width, dtype=torch.float64)
        self.ids = torch.zeros(**width, dtype=torch.long)
        self.logprobs = torch.zeros(**width)
        self.length = torch.zeros(0, 1, dtype=torch.long, device=self.device)  # 0 while running

    def admissible(self, waiting: deque[Job]) -> list[Job]:
        """Takes the jobs for which there are rows and memory; none while that is only a few rows.

        There is memory if the bound will still hold when the cache grows next. A job that would be
        alone needs none.
        """
        jobs, lengths, rows = [], [], 0
        room = self.max_rows - len(self.owners)
        if room < ROOM * self.max_rows:
            return jobs
        while waiting and rows + len(waiting[0].samples) <= room:
            rows += len(waiting[0].samples)
            lengths.append(len(self.prompts[waiting[0].prompt]))
            crowded = self.cache.tokens(lengths, rows, GROWTH) > self.cache_tokens
            if crowded and (jobs or self.owners):
                break
            jobs.append(waiting.popleft())
        return jobs

    def admit(self, jobs: Sequence[Job]) -> None:
        """Computes the prompts of the jobs and samples each row's first token."""
        self._changed()
        for part in prefill_batches([len(self.prompts[job.prompt]) for job in jobs]):
            some = jobs[part]
            prompts = [self.prompts[job.prompt] for job in some]
            prefix = PrefixCache([len(prompt) for prompt in prompts], self.device)
            hidden = last_hidden(self.model, prompts, prefix)
            counts = [len(job.samples) for job in some]
            self.cache.admit(prefix, counts)
            owners = [(job.prompt, sample) for job in some for sample in job.samples]
            self.owners += owners
            for name in self.STATE:
                setattr(self, name, F.pad(getattr(self, name), (0, 0, 0, len(owners))))
            numbers = np.stack([uniforms(self.sampling.seed, self.keys[prompt], sample,
                                         self.limit + 1) for prompt, sample in owners])
            new = slice(-len(owners), None)
            self.uniform[new] = torch.from_numpy(numbers).to(self.device)
            groups = torch.tensor(np.repeat(np.arange(len(some)), counts), device=self.device)
            self._sample(self.model.logits(hidden)[groups], new)

    def _sample(self, logits: Tensor, rows: slice) -> None:
        """Draws and notes the next token of some rows."""
        age = self.cache.age[rows][:, None]
        column = age.clamp(max=self.limit)
        uniform = self.uniform[rows].gather(1, column)[:, 0]
        token, logprob = sample_tokens(logits, uniform, self.sampling.temperature)
        self.ids[rows].scatter_(1, column, token[:, None])
        self.logprobs[rows].scatter_(1, column, logprob[:, None])
        length = self.length[rows]
        length += (age + 1) * (self.is_end[token][:, None] & (length == 0))

    def step(self) -> None:
        """One more token for every row; the cache must have a free column.

        A "cuda" device is given the step as one recorded graph: kernels of 64 rows end sooner than
        Python starts them. Rows that come or go, and caches that grow, make it record again. (ROCm
        has that device name and class too; torch.accelerator has graphs only in releases later than
        the oldest we run on.)
        """
        self.cache.ages = [age + 1 for age in self.cache.ages]
        if self.device.type != "cuda":
            return self._advance()
        if self.graph is None:
            module = torch.get_device_module(self.device)
            self.graph = module.CUDAGraph()
            with module.graph(self.graph):
                self._advance()
        self.graph.replay()

    def _changed(self) -> None:
        self.graph = None

    def _advance(self) -> None:
        token = self.ids.gather(1, self.cache.age[:, None].clamp(max=self.limit))
        self._sample(self.model.logits(self.model(token, self.cache)[:, 0]), slice(None))

    def make_room(self) -> list[Job]:
        """Lets the cache grow; gives up the youngest groups while the bound would not hold."""
        given_up = []
        while self.cache.tokens(growth=GROWTH) > self.cache_tokens and len(self.cache.counts) > 1:
            given_up.append(self.preempt())
        self._changed()
        self.cache.grow()
        return given_up

    def pop_finished(self) -> list[tuple[int, int, Completion]]:
        """Takes out the rows that are done, if they are many or the cache is full.

        (prompt, sample, Completion) of each. It waits for the device.
        """
        length, rows = self.length[:, 0].tolist(), range(len(self.owners))
        done = [row for row in rows
                if 0 < length[row] <= self.limit or self.cache.ages[row] + 1 >= self.limit]
        if not done or len(done) < ROOM * len(rows) and self.cache.free():
            return []
        index, out = torch.tensor(done, device=self.device), []
        for row, ids, logprobs in zip(done, self.ids[index].tolist(),
                                      self.logprobs[index].tolist()):
            finished = 0 < length[row] <= self.limit
            end = length[row] if finished else self.limit
            out.append((*self.owners[row], Completion(ids[:end], logprobs[:end], finished)))
        self._keep(sorted(set(rows) - set(done)))
        return out

    def preempt(self) -> Job:
        """Gives up the youngest group: a job to be done again, which yields the same tokens."""
        rows = len(self.owners) - self.cache.counts[-1]
        job = Job(self.owners[rows][0], [sample for _, sample in self.owners[rows:]])
        self._keep(list(range(rows)))
        return job

    def _keep(self, rows: list[int]) -> None:
        self._changed()
        self.cache.keep(rows)
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        for name in self.STATE:
            setattr(self, name, getattr(self, name)[index])
        self.owners = [self.owners[row] for row in rows]


@torch.no_grad()
def generate(model: Transformer, prompts: Sequence[Sequence[int]], *,
             keys: Sequence[int] | None = None, progress: bool = False,
             timing: dict[str, float] | None = None, **sampling) -> list[list[Completion]]:
    """Samples completions of every prompt (token ids); returns them as [prompt][sample].

    sampling: the fields of Sampling. keys: one integer per prompt (default: its index) which, with
    the seed and the number of the sample, decides its randomness. timing, if given, receives
    seconds and tokens of prefill and decoding. Raises ValueError for an empty prompt or an unusable
    number.

    cache_tokens bounds what is held: when the rows have grown so far that it no longer would, the
    youngest group is given up and done again later, down to a single group, whatever that needs.

    Why it ends: a pass admits groups, makes room, or decodes. Groups are admitted only if the cache
    may still grow once, which `KVCache.tokens` says before and after alike; so none is given up
    before every row has decoded a block of GROWTH tokens. The oldest group is never given up, and
    after at most max_new_tokens steps it is done for good.
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
    meter = Meter(len(prompts) * samples, progress, timing)
    while waiting or batch.owners:
        jobs = batch.admissible(waiting)
        if jobs:
            batch.admit(jobs)
        elif batch.cache.free() == 0:
            waiting.extendleft(batch.make_room())
        else:
            steps = 1 if batch.device.type == "cpu" else CHECK_EVERY
            for _ in range(min(steps, batch.cache.free())):
                batch.step()
        ended = batch.pop_finished()
        for prompt, sample, completion in ended:
            results[prompt][sample] = completion
        meter.note(sum(len(prompts[job.prompt]) for job in jobs), ended)
    meter.close()
    return results


class Meter:
    """Seconds and tokens of prefill and decoding, and the progress bar that shows them."""

    def __init__(self, total: int, progress: bool, timing: dict[str, float] | None):
        self.spent = timing if timing is not None else {}
        for phase in ("prefill", "decode"):
            self.spent |= {f"{phase}_seconds": 0.0, f"{phase}_tokens": 0}
        self.bar = tqdm(total=total, desc="sampling", unit="completion", disable=not progress,
                        leave=False)
        self.begin = time.perf_counter()

    def note(self, prefilled: int, ended: Sequence[tuple[int, int, Completion]]) -> None:
        """One pass: tokens of prompts that were computed (0: it decoded), rows that ended."""
        spent, now = self.spent, time.perf_counter()
        spent["prefill_seconds" if prefilled else "decode_seconds"] += now - self.begin
        self.begin = now
        spent["prefill_tokens"] += prefilled
        spent["decode_tokens"] += sum(len(completion.ids) for _, _, completion in ended)
        self.bar.update(len(ended))
        if ended and not self.bar.disable:
            self.bar.set_postfix_str(", ".join(
                f"{phase} {spent[phase + '_tokens'] / max(spent[phase + '_seconds'], 1e-9):,.0f}"
                " tok/s" for phase in ("prefill", "decode")))

    def close(self) -> None:
        self.bar.close()
