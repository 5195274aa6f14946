"""Batched sampling with a KV cache: prompts in, completions with log-probabilities out.

Reinforcement Pre-Training samples G completions of every prompt, so the prompt is computed once and its keys and
values are held once per group: each step multiplies the queries of a whole group with them in one matrix product.
Completions have a cache of their own that grows with them. A row that ends leaves the batch, and a waiting group
takes its place, so that the batch stays full and memory follows the tokens that are alive.

Randomness. One uniform number belongs to each (seed, key, sample, position); it comes from a counter-based generator
and is turned into a token by inverting the cumulative distribution. A completion is therefore a function of the model
and of (seed, key, sample) alone: not of its neighbours, its slot, the number of processes or a restart.

Left out: top-k and top-p, which would make the sampler another distribution than the one the policy loss corrects.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import Segment, Transformer

PREFILL_TOKENS = 16384  # prompts are computed in batches of about so many tokens
ROOM = 1 / 8  # rows that ended are taken out, and groups admitted, when they are this share: moving a cache costs
GROWTH = 32  # columns by which the rows' own cache grows
COHORTS = 2  # parts into which the rows are split by age


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    ids: list[int]  # includes the end token, if one was sampled
    logprobs: list[float]  # nats, of each id under the distribution it was drawn from (temperature 1 if greedy)
    finished: bool  # an end token was sampled; False: the length limit cut it


def uniforms(seed: int, key: int, sample: int, count: int) -> np.ndarray:
    """The numbers in (0, 1) that decide positions 0 .. count - 1 of one completion; float64 [count]."""
    counter = np.random.Philox(key=np.array([seed % 2**64, key % 2**64], dtype=np.uint64), counter=[0, sample, 0, 0])
    return (np.random.Generator(counter).integers(2**32, size=count) + 0.5) / 2**32


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """float32 logits [n, V], uniform [n] -> token [n] and its log-probability [n] at `temperature`.

    The token is the first whose cumulative probability exceeds the uniform number, summed in float64: over a
    vocabulary of 152 thousand, float32 sums drift by more than the probability of most tokens.
    """
    if temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    logprobs = (logits / temperature).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    token = token.clamp_max(logits.shape[-1] - 1)  # only a row of NaN gets this far
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


class DecodeCache:
    """Keys and values for one token per row and step, in cohorts of rows of similar age, oldest first."""

    def __init__(self, attention: Callable[..., Tensor] | None = None):
        """attention: what computes `attend_shared`, if not that."""
        self.cohorts: list[_Cohort] = []
        self.attention = attention or attend_shared

    def admit(self, prompts: Segment, counts: Sequence[int]) -> None:
        """Adds the prompts of a segment as groups, with counts[i] rows each."""
        self.cohorts.append(_Cohort.of(prompts, counts))
        while len(self.cohorts) > 1:  # merge the neighbours that then have the fewest columns to mask
            masked, n = min((old.masked_with(young), n) for n, (old, young) in enumerate(pairwise(self.cohorts)))
            if masked and len(self.cohorts) <= COHORTS:
                break
            self.cohorts[n: n + 2] = [self.cohorts[n].merged(self.cohorts[n + 1])]

    def tokens(self) -> int:
        """Columns of keys and values that are held, of prompts and of rows, used or not."""
        return sum(cohort.valid.numel() + len(cohort.ages) * cohort.capacity for cohort in self.cohorts)

    def groups(self) -> int:
        return sum(len(cohort.counts) for cohort in self.cohorts)

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows, groups without rows, and columns that no row uses."""
        cohorts, first = [], 0
        for cohort in self.cohorts:
            its = [row - first for row in rows if first <= row < first + len(cohort.ages)]
            first += len(cohort.ages)
            if its:
                cohorts.append(cohort if len(its) == len(cohort.ages) else cohort.kept(its))
        self.cohorts = cohorts

    def make_room(self) -> bool:
        """To be called before every step; whether its tensors are others than those of the step before."""
        return any([cohort.make_room() for cohort in self.cohorts])

    def positions(self, width: int) -> Tensor:
        """Opens each row's next column, and says at which position of its text its token stands: [rows, 1]."""
        assert width == 1, "a DecodeCache takes one token per row"
        return torch.cat([cohort.open_column() for cohort in self.cohorts])[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [rows, heads, 1, d], k and v [rows, kv_heads, 1, d] -> [rows, 1, heads * d]."""
        if len(self.cohorts) == 1:
            return self.cohorts[0].attend(self.attention, layer, q, k, v)
        parts = zip(self.cohorts, *(x.split([len(cohort.ages) for cohort in self.cohorts]) for x in (q, k, v)))
        return torch.cat([cohort.attend(self.attention, layer, *part) for cohort, *part in parts])


class _Cohort:
    """Groups of similar age: each prompt's keys and values once, and those of the rows' own tokens, from column 0 on.

    Rows of a group are neighbours. Rows of very different age are in different cohorts: a young one must not pay for
    columns that it does not fill. What is not filled is masked, as are holes in prompts (see `prefill`). The key
    heads come first, [kv_heads, groups or rows, columns, d]: the rows of full groups then need no rearranging between
    the product with their prompts and the one with their own tokens.

    Between two changes of its rows or columns, a step reads and writes the same tensors whatever it computes, so that
    it can be recorded (see `_Batch.step`).
    """

    def __init__(self, prompt: list[tuple[Tensor, Tensor]], valid: Tensor, counts: list[int],
                 own: list[tuple[Tensor, Tensor]], ends: Tensor, ages: list[int]):
        self.prompt, self.own = prompt, own  # by layer, keys and values of the groups' prompts, of the rows' own tokens
        self.valid = valid  # prompt columns that count, [groups, P]
        self.counts = counts  # rows of each group
        self.ends, self.ages = ends, ages  # of each row: tokens of the prompt, [rows]; own tokens
        device = ends.device
        self.age = torch.tensor(ages, device=device)  # the same on the device
        self.rows, self.columns = (torch.arange(n, device=device) for n in (len(ages), self.capacity))
        self.prompt_mask = None if bool(valid.all()) else _mask(valid)[:, None]  # [groups, 1, P]
        # Where each row stands in the [groups, slots] layout of the product with prompts, and back.
        self.slots, first = max(counts), np.cumsum([0] + counts)
        self.grid = self.place = None
        if min(counts) < self.slots:  # else the layout is the order of the rows
            self.grid = torch.tensor([first[g] + min(s, count - 1) for g, count in enumerate(counts)
                                      for s in range(self.slots)], device=device)
            self.place = torch.tensor([g * self.slots + s for g, count in enumerate(counts) for s in range(count)],
                                      device=device)

    @classmethod
    def of(cls, prompts: Segment, counts: Sequence[int]) -> "_Cohort":
        """Freshly computed prompts, with rows that have no token yet."""
        prompt = [tuple(x.transpose(0, 1).contiguous() for x in prompts.all_keys(layer))
                  for layer in range(len(prompts.keys))]
        rows, (kv_heads, _, _, d) = sum(counts), prompt[0][0].shape
        own = [tuple(x.new_zeros(kv_heads, rows, 0, d) for x in pair) for pair in prompt]
        ends = torch.tensor(np.repeat(prompts.ends, counts), device=prompts.device)
        return cls(prompt, prompts.valid(prompts.keys[0].shape[2]), list(counts), own, ends, [0] * rows)

    def kept(self, rows: Sequence[int]) -> "_Cohort":
        group_of = np.repeat(np.arange(len(self.counts)), self.counts)[rows]
        groups, counts = np.unique(group_of, return_counts=True)
        prompt, valid = self.prompt, self.valid
        if len(groups) < len(self.counts):
            groups = torch.tensor(groups, device=self.age.device)
            valid = valid[groups]
            used = int(valid.any(0).nonzero().max()) + 1
            prompt, valid = [tuple(x[:, groups, :used] for x in pair) for pair in prompt], valid[:, :used]
        index, ages = torch.tensor(rows, device=self.age.device), [self.ages[row] for row in rows]
        own = [tuple(x[:, index, : max(ages) + GROWTH] for x in pair) for pair in self.own]
        return _Cohort(prompt, valid, counts.tolist(), own, self.ends[index], ages)

    def masked_with(self, younger: "_Cohort") -> int:
        """How many columns would have to be masked in a union."""
        return len(younger.ages) * (max(self.ages) - max(younger.ages))

    def merged(self, younger: "_Cohort") -> "_Cohort":
        def union(pairs: Iterable) -> list:
            return [tuple(map(_stack, *pair)) for pair in pairs]
        valid = _stack(self.valid[None, :, :, None], younger.valid[None, :, :, None])[0, :, :, 0]
        return _Cohort(union(zip(self.prompt, younger.prompt)), valid, self.counts + younger.counts,
                       union(zip(self.own, younger.own)), torch.cat((self.ends, younger.ends)),
                       self.ages + younger.ages)

    @property
    def capacity(self) -> int:
        return self.own[0][0].shape[2]

    def make_room(self) -> bool:
        """Sees to it that every row has a column for one more token; whether the tensors are others than before."""
        full = max(self.ages) == self.capacity
        if full:
            self.own = [tuple(F.pad(x, (0, 0, 0, GROWTH)) for x in pair) for pair in self.own]
            self.columns = torch.arange(self.capacity, device=self.age.device)
        self.ages = [age + 1 for age in self.ages]
        return full

    def open_column(self) -> Tensor:
        """The positions [rows] in the text at which the rows' next tokens stand."""
        self.column = self.age.clone()
        self.age += 1
        self.mask = _mask(self.columns <= self.column[:, None])[:, None]  # [rows, 1, columns]
        return self.ends + self.column

    def attend(self, attention: Callable[..., Tensor], layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k and v [rows, kv_heads, 1, d] in the open column; q [rows, heads, 1, d] attends to all."""
        keys, values = self.own[layer]
        keys[:, self.rows, self.column] = k[:, :, 0].transpose(0, 1)
        values[:, self.rows, self.column] = v[:, :, 0].transpose(0, 1)
        return attention(q, *self.prompt[layer], self.prompt_mask, keys, values, self.mask, self.slots, self.grid,
                         self.place)


def attend_shared(q: Tensor, prompt_keys: Tensor, prompt_values: Tensor, prompt_mask: Tensor | None, keys: Tensor,
                  values: Tensor, mask: Tensor, slots: int, grid: Tensor | None, place: Tensor | None) -> Tensor:
    """One softmax over a group's prompt and a row's own tokens: q [rows, heads, 1, d] -> [rows, 1, heads * d].

    All queries of a group meet its prompt in one product. Both parts are exponentiated around their common maximum,
    so numerators and denominators just add up.
    """
    (kv_heads, groups, columns, d), rows = prompt_keys.shape, len(q)

    def by_group(x: Tensor) -> Tensor:  # [kv_heads, rows, repeats, n] -> [kv_heads * groups, slots * repeats, n]
        x = x if grid is None else x[:, grid]
        return x.reshape(kv_heads * groups, -1, x.shape[-1])

    def by_row(x: Tensor) -> Tensor:  # and back
        x = x.view(kv_heads, groups * slots, -1, x.shape[-1])
        return x if place is None else x[:, place]

    q = (q * d**-0.5).reshape(rows, kv_heads, -1, d).transpose(0, 1).contiguous()  # [kv_heads, rows, repeats, d]
    shared = torch.bmm(by_group(q), prompt_keys.flatten(0, 1).mT).float()
    own = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).mT).float().view(kv_heads, rows, -1, keys.shape[2])
    if prompt_mask is not None:
        shared.view(kv_heads, groups, -1, columns).add_(prompt_mask)
    own.add_(mask)
    peak = torch.maximum(by_row(shared.amax(-1, keepdim=True)), own.amax(-1, keepdim=True))
    shared, own = shared.sub_(by_group(peak)).exp_(), own.sub_(peak).exp_()
    total = by_row(shared.sum(-1, keepdim=True)) + own.sum(-1, keepdim=True)
    out = by_row(torch.bmm(shared.to(q.dtype), prompt_values.flatten(0, 1)))
    out = out + torch.bmm(own.flatten(0, 1).to(q.dtype), values.flatten(0, 1)).view(q.shape)
    return (out / total).to(q.dtype).transpose(0, 1).reshape(rows, 1, -1)


def _mask(valid: Tensor) -> Tensor:
    return torch.zeros(valid.shape, device=valid.device).masked_fill_(~valid, float("-inf"))


def _stack(a: Tensor, b: Tensor) -> Tensor:
    """[n, groups, columns, m] of both, the groups one after the other; columns that are added hold zeros."""
    columns = max(a.shape[2], b.shape[2])
    return torch.cat([F.pad(x, (0, 0, 0, columns - x.shape[2])) for x in (a, b)], dim=1)


# ---------------------------------------------------------------------------------------------- prompts


def pad(runs: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token runs as one right-padded tensor [n, longest]; what stands in the padding has no effect."""
    ids = np.zeros((len(runs), max(map(len, runs))), dtype=np.int64)
    for row, run in zip(ids, runs):
        row[: len(run)] = run
    return torch.from_numpy(ids).to(device)


def last_hidden(model: Transformer, runs: Sequence[Sequence[int]], cache: Segment | None = None) -> Tensor:
    """What predicts the token after each of the runs: hidden [n, hidden_size] of their last tokens."""
    device = model.head.device
    last = torch.tensor([len(run) - 1 for run in runs], device=device)
    return model(pad(runs, device), cache)[torch.arange(len(runs), device=device), last]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two runs have in common at their beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(different[0]) if len(different) else n


def prefill(model: Transformer, prompts: Sequence[Sequence[int]]) -> Iterable[tuple]:
    """Computes prompts; yields (indices, Segment, hidden of each last token [n, hidden_size]).

    A prompt that shares at least half of its tokens with a longer one, as do questions about one document, is not
    computed again: only its own end is, on the keys and values of the longer one up to where they part.
    """
    order, roots, tails = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), [], []
    for i in order:
        shared = [min(common_prefix(prompts[i], prompts[root]), len(prompts[i]) - 1) for root in roots]
        best = max(range(len(roots)), key=shared.__getitem__, default=None)
        if best is None or 2 * shared[best] < len(prompts[i]):
            roots.append(i)
        else:
            tails.append((i, best, shared[best]))

    whole, device = [prompts[i] for i in roots], model.head.device
    segment = Segment([len(run) for run in whole], device)
    yield roots, segment, last_hidden(model, whole, segment)
    if tails:
        runs = [prompts[i][shared:] for i, _, shared in tails]
        rest = Segment([len(run) for run in runs], device, segment, [root for _, root, _ in tails],
                       [shared for _, _, shared in tails])
        yield [i for i, _, _ in tails], rest, last_hidden(model, runs, rest)


# ---------------------------------------------------------------------------------------------- generation


Job = tuple[int, Sequence[int]]  # a prompt and the samples of it that are wanted


class _Batch:
    """The rows being decoded: what they have sampled so far and to whom each belongs."""

    def __init__(self, model: Transformer, limit: int, temperature: float, eos_ids: Sequence[int], seed: int):
        self.model, self.device = model, model.head.device
        self.limit, self.temperature, self.seed = limit, temperature, seed
        self.ends = torch.zeros(len(model.head), dtype=torch.bool, device=self.device)  # whether a token is an end
        self.ends[[id for id in eos_ids if id < len(self.ends)]] = True
        self.cache = DecodeCache(torch.compile(attend_shared, dynamic=True) if model.compiled else None)
        self.owners: list[tuple[int, int]] = []  # (prompt, sample) of each row
        # By row and position; one column more than the limit, for what rows sample after they are done.
        self.uniform = torch.zeros(0, limit + 1, dtype=torch.float64, device=self.device)
        self.ids = torch.zeros(0, limit + 1, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(0, limit + 1, device=self.device)
        self.token = torch.zeros(0, 1, dtype=torch.long, device=self.device)  # the last of each row
        self.age = torch.zeros(0, 1, dtype=torch.long, device=self.device)  # tokens sampled so far
        self.length = torch.zeros(0, 1, dtype=torch.long, device=self.device)  # of rows that ended; 0 while running

    def admit(self, jobs: Sequence[Job], prompts: Sequence[Sequence[int]], keys: Sequence[int]) -> None:
        """Computes the prompts of the jobs (prompt, samples) and samples each row's first token."""
        self._changed()
        for indices, segment, hidden in prefill(self.model, [prompts[job[0]] for job in jobs]):
            chosen = [jobs[i] for i in indices]
            counts = [len(samples) for _, samples in chosen]
            self.cache.admit(segment, counts)
            owners = [(prompt, sample) for prompt, samples in chosen for sample in samples]
            self.owners += owners
            numbers = np.stack([uniforms(self.seed, keys[p], s, self.limit + 1) for p, s in owners])
            self.uniform = torch.cat((self.uniform, torch.from_numpy(numbers).to(self.device)))
            for name in ("ids", "logprobs", "token", "age", "length"):
                setattr(self, name, F.pad(getattr(self, name), (0, 0, 0, len(owners))))
            groups = torch.tensor(np.repeat(np.arange(len(chosen)), counts), device=self.device)
            self._sample(self.model.logits(hidden)[groups], slice(-len(owners), None))

    def _sample(self, logits: Tensor, rows: slice) -> None:
        """Draws and notes the next token of some rows."""
        age = self.age[rows]
        column = age.clamp(max=self.limit)
        token, logprob = draw(logits, self.uniform[rows].gather(1, column)[:, 0], self.temperature)
        token = token[:, None]
        self.ids[rows].scatter_(1, column, token)
        self.logprobs[rows].scatter_(1, column, logprob[:, None])
        age += 1
        self.token[rows] = token
        length = self.length[rows]
        length += age * (self.ends[token] & (length == 0))

    def step(self) -> None:
        """One more token for every row.

        A "cuda" device is given the step as one recorded graph: kernels of 64 rows end sooner than Python starts them.
        Rows that come or go, and caches that grow, make it record again. (ROCm has that device name and class too;
        torch.accelerator has graphs only in releases later than the oldest we run on.)
        """
        if self.cache.make_room():
            self._changed()
        if self.device.type != "cuda" or not self.warm:
            self.warm = True
            return self._advance()
        if self.graph is None:
            module = torch.get_device_module(self.device)
            self.graph = module.CUDAGraph()
            with module.graph(self.graph):
                self._advance()
        self.graph.replay()

    def _changed(self) -> None:
        self.graph, self.warm = None, not self.model.compiled  # torch.compile must not compile while recording

    def _advance(self) -> None:
        self._sample(self.model.logits(self.model(self.token, self.cache)[:, 0]), slice(None))

    def harvest(self) -> list[tuple[int, int, Completion]]:
        """Takes out the rows that are done, if they are many: (prompt, sample, Completion). It waits for the device."""
        length, age = self.length[:, 0].tolist(), self.age[:, 0].tolist()
        done = [row for row in range(len(age)) if 0 < length[row] <= self.limit or age[row] >= self.limit]
        if len(done) < max(1, ROOM * len(age)):
            return []
        index = torch.tensor(done, device=self.device)
        out = []
        for row, ids, logprobs in zip(done, self.ids[index].tolist(), self.logprobs[index].tolist()):
            finished = 0 < length[row] <= self.limit
            end = length[row] if finished else self.limit
            out.append((*self.owners[row], Completion(ids[:end], logprobs[:end], finished)))
        self._keep(sorted(set(range(len(age))) - set(done)))
        return out

    def evict(self) -> Job:
        """Gives up the youngest group; the job to be done again, which yields the same tokens whenever that is."""
        rows = len(self.owners) - self.cache.cohorts[-1].counts[-1]
        job = self.owners[rows][0], [sample for _, sample in self.owners[rows:]]
        self._keep(list(range(rows)))
        return job

    def _keep(self, rows: list[int]) -> None:
        self._changed()
        self.cache.keep(rows)
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        for name in ("uniform", "ids", "logprobs", "token", "age", "length"):
            setattr(self, name, getattr(self, name)[index])
        self.owners = [self.owners[row] for row in rows]


def _admissible(waiting: deque[Job], batch: _Batch, prompts: Sequence[Sequence[int]], max_rows: int,
                cache_tokens: int | None) -> list[Job]:
    """Takes the jobs for which there are rows and memory; none while that would be only a few rows."""
    jobs, tokens, room, held = [], 0, max_rows - len(batch.owners), batch.cache.tokens()
    while waiting and len(waiting[0][1]) <= room and (room >= ROOM * max_rows or jobs) and tokens < PREFILL_TOKENS:
        prompt, samples = waiting[0]
        held += len(prompts[prompt]) + 2 * GROWTH * len(samples)  # and some room to grow
        if cache_tokens and held > cache_tokens and (jobs or batch.owners):
            break
        jobs.append(waiting.popleft())
        room, tokens = room - len(samples), tokens + len(prompts[prompt])
    return jobs


@torch.no_grad()
def generate(model: Transformer, prompts: Sequence[Sequence[int]], *, samples: int = 1, max_new_tokens: int,
             temperature: float = 1.0, eos_ids: Sequence[int], seed: int = 0, keys: Sequence[int] | None = None,
             max_rows: int | None = None, cache_tokens: int | None = None, progress: bool = False,
             timing: dict[str, float] | None = None) -> list[list[Completion]]:
    """Samples `samples` completions of every prompt (token ids); returns them as [prompt][sample].

    temperature 0 is greedy. keys: one integer per prompt (default: its index) which, with `seed` and the number of
    the sample, decides its randomness. max_rows: completions decoded at once (default: all). cache_tokens:
    tokens whose keys and values may be held (default: any number); when the rows have grown beyond it, the youngest
    group is given up and done again later, down to a single group, whatever that one needs. timing, if given, receives
    seconds and tokens of prefill and decoding. Raises ValueError for an empty prompt or an unusable limit.
    """
    keys = list(range(len(prompts))) if keys is None else list(keys)
    max_rows = max(1, len(prompts) * samples) if max_rows is None else max_rows
    if (len(keys) != len(prompts) or not all(prompts) or min(samples, max_new_tokens, max_rows) < 1
            or not 0 <= temperature < np.inf):
        raise ValueError("generate needs non-empty prompts, one key each, samples, max_new_tokens and max_rows >= 1, "
                         "and a finite temperature >= 0")
    waiting = deque(sorted(((i, range(first, min(first + max_rows, samples))) for i in range(len(prompts))
                            for first in range(0, samples, max_rows)), key=lambda job: -len(prompts[job[0]])))
    results: list[list] = [[None] * samples for _ in prompts]
    batch = _Batch(model, max_new_tokens, temperature, eos_ids, seed)
    check_every = 1 if batch.device.type == "cpu" else 16  # asking an accelerator whether rows are done makes it wait
    spent = timing if timing is not None else {}
    spent |= {"prefill_seconds": 0.0, "prefill_tokens": 0, "decode_seconds": 0.0, "decode_tokens": 0}
    bar = tqdm(total=len(prompts) * samples, desc="sampling", unit="completion", disable=not progress, leave=False)
    while waiting or batch.owners:
        begin = time.perf_counter()
        jobs = _admissible(waiting, batch, prompts, max_rows, cache_tokens)
        if jobs:
            batch.admit(jobs, prompts, keys)
            spent["prefill_tokens"] += sum(len(prompts[prompt]) for prompt, _ in jobs)
        else:
            for _ in range(check_every):
                batch.step()
        ended = batch.harvest()
        for prompt, sample, completion in ended:
            results[prompt][sample] = completion
        while cache_tokens and batch.cache.tokens() > cache_tokens and batch.cache.groups() > 1:
            waiting.appendleft(batch.evict())
        phase = "prefill_seconds" if jobs else "decode_seconds"
        spent[phase] += time.perf_counter() - begin
        spent["decode_tokens"] += sum(len(completion.ids) for _, _, completion in ended)
        bar.update(len(ended))
        if progress and ended:
            bar.set_postfix_str(f"prefill {spent['prefill_tokens'] / max(spent['prefill_seconds'], 1e-9):,.0f} tok/s, "
                                f"decode {spent['decode_tokens'] / max(spent['decode_seconds'], 1e-9):,.0f} tok/s")
    bar.close()
    return results
