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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import Segment, Transformer

PREFILL_TOKENS = 16384  # prompts are computed in batches of about so many tokens
ROOM = 1 / 8  # rows that ended are taken out, and groups admitted, when they are this share: moving a cache costs
GROWTH = 32  # columns by which the rows' own cache grows, at least
COHORTS = 4  # parts of the rows' own cache, by age


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
    """Keys and values for one token per row and step: prompts once per group, the rows' own tokens behind them.

    Rows of a group are neighbours, in the order of admission. Keys are stored transposed, which the products with few
    queries like better. Prompt columns may have holes (see `prefill`), which are masked.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.prompt: list[tuple[Tensor, Tensor]] = []  # by layer, [groups, kv_heads, head_dim, P] and [.., P, head_dim]
        self.valid = torch.zeros(0, 0, dtype=torch.bool, device=device)  # prompt columns that count, [groups, P]
        self.counts: list[int] = []  # rows of each group
        self.position = torch.zeros(0, dtype=torch.long, device=device)  # of the next token, [rows]
        self.cohorts: list[_Cohort] = []  # the rows' own keys and values, oldest rows first

    def admit(self, prompts: Segment, counts: Sequence[int]) -> None:
        """Adds the prompts of a segment as groups, with counts[i] rows each."""
        layers = [prompts.all_keys(layer) for layer in range(len(prompts.keys))]
        old = self.prompt or [(k.mT[:0], v[:0]) for k, v in layers]
        self.prompt = [(_stack(keys, k.mT, 3), _stack(values, v, 2)) for (keys, values), (k, v) in zip(old, layers)]
        self.valid = _stack(self.valid, prompts.valid(prompts.keys[0].shape[2]), 1)
        self.position = torch.cat((self.position, torch.tensor(
            [end for end, count in zip(prompts.ends, counts) for _ in range(count)], device=self.device)))
        self.counts += counts
        rows, (_, kv_heads, _, d) = sum(counts), layers[0][0].shape
        self.cohorts.append(_Cohort([(k.new_zeros(rows, kv_heads, d, 0), v.new_zeros(rows, kv_heads, 0, d))
                                     for k, v in layers], [0] * rows))
        while len(self.cohorts) > COHORTS:  # merge the neighbours that then have the fewest columns to mask
            n = min(range(len(self.cohorts) - 1), key=lambda n: self.cohorts[n].masked_with(self.cohorts[n + 1]))
            self.cohorts[n: n + 2] = [self.cohorts[n].merged(self.cohorts[n + 1])]
        self._index()

    def tokens(self) -> int:
        """Columns of keys and values that are held, of prompts and of rows, used or not."""
        return self.valid.numel() + sum(len(cohort.starts) * cohort.capacity for cohort in self.cohorts)

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows, groups without rows, and columns that no row uses."""
        cohorts, first = [], 0
        for cohort in self.cohorts:
            its = [row - first for row in rows if first <= row < first + len(cohort.starts)]
            first += len(cohort.starts)
            if its:
                cohorts.append(cohort if len(its) == len(cohort.starts) else cohort.kept(its))
        self.cohorts = cohorts
        group_of = [group for group, count in enumerate(self.counts) for _ in range(count)]
        counts = np.bincount([group_of[row] for row in rows], minlength=len(self.counts)).tolist()
        groups = [group for group, count in enumerate(counts) if count]
        self.position = self.position[torch.tensor(rows, dtype=torch.long, device=self.device)]
        if len(groups) < len(self.counts):
            kept = torch.tensor(groups, dtype=torch.long, device=self.device)
            self.valid = self.valid[kept]
            used = int(self.valid.any(0).nonzero().max()) + 1 if groups else 0
            self.valid = self.valid[:, :used]
            self.prompt = [(keys[kept, :, :, :used], values[kept, :, :used]) for keys, values in self.prompt]
        self.counts = [counts[group] for group in groups]
        self._index()

    def _index(self) -> None:
        """Where each row stands in the [groups, slots] layout of the product with prompts, and the prompts' mask."""
        self.slots = max(self.counts, default=0)
        first = np.cumsum([0] + self.counts)
        grid = [first[g] + min(s, count - 1) for g, count in enumerate(self.counts) for s in range(self.slots)]
        place = [g * self.slots + s for g, count in enumerate(self.counts) for s in range(count)]
        full = len(grid) == len(place)  # then the layout is the order of the rows
        self.grid = None if full else torch.tensor(grid, device=self.device)
        self.place = None if full else torch.tensor(place, device=self.device)
        self.mask = None if bool(self.valid.all()) else _mask(self.valid)[:, None, None]  # [groups, 1, 1, P]

    def _by_group(self, x: Tensor) -> Tensor:
        """[rows, kv_heads, repeats, n] -> [groups, kv_heads, slots * repeats, n]"""
        x = x if self.grid is None else x[self.grid]
        _, kv_heads, repeats, n = x.shape
        x = x.view(-1, self.slots, kv_heads, repeats, n).transpose(1, 2)
        return x.reshape(-1, kv_heads, self.slots * repeats, n)

    def _by_row(self, x: Tensor) -> Tensor:
        """The inverse of `_by_group`."""
        groups, kv_heads, queries, n = x.shape
        x = x.view(groups, kv_heads, self.slots, -1, n).transpose(1, 2)
        x = x.reshape(groups * self.slots, kv_heads, -1, n)
        return x if self.place is None else x[self.place]

    def positions(self, width: int) -> Tensor:
        """Opens the next column, and says at which position of its text each row's token stands: [rows, 1]."""
        assert width == 1, "a DecodeCache takes one token per row"
        for cohort in self.cohorts:
            cohort.open_column()
        self.position = self.position + 1
        return self.position[:, None] - 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [rows, heads, 1, d], k and v [rows, kv_heads, 1, d] -> [rows, 1, heads * d].

        All queries of a group meet its prompt in one product, and each row its own tokens; the two are then weighed
        by what they have of the softmax's denominator.
        """
        rows, heads, _, d = q.shape
        q = (q * d**-0.5).view(rows, k.shape[1], -1, d)  # [rows, kv_heads, repeats, d]
        shared, shared_total = map(self._by_row, _attend_part(self._by_group(q), *self.prompt[layer], self.mask))
        if len(self.cohorts) == 1:
            own, own_total = self.cohorts[0].attend(layer, q, k, v)
        else:
            sizes = [len(cohort.starts) for cohort in self.cohorts]
            parts = zip(self.cohorts, q.split(sizes), k.split(sizes), v.split(sizes))
            own, own_total = map(torch.cat, zip(*(cohort.attend(layer, *part) for cohort, *part in parts)))
        return torch.lerp(own, shared, (shared_total - own_total).sigmoid().to(q.dtype)).reshape(rows, 1, heads * d)


class _Cohort:
    """Own keys and values of rows of similar age.

    Its rows write the same column in a step; a row that is younger than the oldest has nothing in the first columns,
    and these are masked. Rows of very different age are in different cohorts: a young one must not pay for columns
    it does not have.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], starts: Sequence[int], width: int = 0):
        least = min(starts)
        self.layers = [(k[..., least:], v[:, :, least:]) for k, v in layers]  # [rows, kv_heads, d, capacity], [.., d]
        self.starts, self.width = [start - least for start in starts], width - least  # each row's first column; columns
        self.mask = None
        if any(self.starts):
            device = layers[0][0].device
            columns = torch.arange(max(self.starts), device=device)
            self.mask = _mask(columns >= torch.tensor(self.starts, device=device)[:, None])[:, None, None]

    def kept(self, rows: Sequence[int]) -> "_Cohort":
        index = torch.tensor(rows, dtype=torch.long, device=self.layers[0][0].device)
        return _Cohort([(k[index], v[index]) for k, v in self.layers], [self.starts[row] for row in rows], self.width)

    def masked_with(self, younger: "_Cohort") -> int:
        """How many columns would have to be masked in a union."""
        return len(younger.starts) * (self.width - younger.width)

    def merged(self, younger: "_Cohort") -> "_Cohort":
        """The union; the younger rows' columns move to the right, so that the newest remains the last."""
        shift, w = self.width - younger.width, younger.width
        layers = [(torch.cat((a[..., : self.width], F.pad(c[..., :w], (shift, 0)))),
                   torch.cat((b[:, :, : self.width], F.pad(e[:, :, :w], (0, 0, shift, 0)))))
                  for (a, b), (c, e) in zip(self.layers, younger.layers)]
        return _Cohort(layers, [*self.starts, *(start + shift for start in younger.starts)], self.width)

    @property
    def capacity(self) -> int:
        return self.layers[0][0].shape[-1]

    def open_column(self) -> None:
        if self.width == self.capacity:
            room = max(GROWTH, self.width // 2)
            self.layers = [(F.pad(k, (0, room)), F.pad(v, (0, 0, 0, room))) for k, v in self.layers]
        self.width += 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v [rows, kv_heads, 1, d] in the open column; q [rows, kv_heads, repeats, d] attends to all."""
        keys, values = self.layers[layer]
        keys[..., self.width - 1], values[:, :, self.width - 1] = k[:, :, 0], v[:, :, 0]
        return _attend_part(q, keys[..., : self.width], values[:, :, : self.width], self.mask)


def _attend_part(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over a part of the keys, and the logarithm of its softmax denominator, [..., queries, d] and [..., 1].

    keys [..., d, columns] are transposed. Two parts join as lerp(a, b, sigmoid(log_total_b - log_total_a)). The
    largest weight is exp(peak - log_total), and never 0: so no second pass of exponentials is needed for log_total.
    """
    scores = (q @ keys).float()
    if mask is not None:
        scores[..., : mask.shape[-1]] += mask
    weights = scores.softmax(-1)
    total = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    return weights.to(values.dtype) @ values, total


def _mask(valid: Tensor) -> Tensor:
    return torch.zeros(valid.shape, device=valid.device).masked_fill_(~valid, float("-inf"))


def _stack(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Concatenates tensors of different size in `dim` along dimension 0; what is added is zero."""
    width = max(a.shape[dim], b.shape[dim])
    return torch.cat([F.pad(t, [0, 0] * (t.ndim - 1 - dim) + [0, width - t.shape[dim]]) for t in (a, b)])


# ---------------------------------------------------------------------------------------------- prompts


def pad(runs: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token runs as one right-padded tensor [n, longest]; what stands in the padding has no effect."""
    ids = np.zeros((len(runs), max(map(len, runs))), dtype=np.int64)
    for row, run in zip(ids, runs):
        row[: len(run)] = run
    return torch.from_numpy(ids).to(device)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two runs have in common at their beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(different[0]) if len(different) else n


def prefill(model: Transformer, prompts: Sequence[Sequence[int]], device: torch.device) -> Iterable[tuple]:
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

    def last(segment: Segment, runs: Sequence[Sequence[int]]) -> Tensor:
        hidden = model(pad(runs, device), segment)
        return hidden[torch.arange(len(runs), device=device), segment.lengths - 1]

    whole = [prompts[i] for i in roots]
    segment = Segment([len(run) for run in whole], device)
    yield roots, segment, last(segment, whole)
    if tails:
        runs = [prompts[i][shared:] for i, _, shared in tails]
        rest = Segment([len(run) for run in runs], device, segment, [root for _, root, _ in tails],
                       [shared for _, _, shared in tails])
        yield [i for i, _, _ in tails], rest, last(rest, runs)


# ---------------------------------------------------------------------------------------------- generation


Job = tuple[int, Sequence[int]]  # a prompt and the samples of it that are wanted


class _Batch:
    """The rows being decoded: what they have sampled so far and to whom each belongs."""

    def __init__(self, model: Transformer, limit: int, temperature: float, eos_ids: Sequence[int], seed: int):
        self.model, self.device = model, model.head.device
        self.limit, self.temperature, self.seed = limit, temperature, seed
        self.eos = torch.tensor(sorted(eos_ids), device=self.device)
        self.cache = DecodeCache(self.device)
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
        for indices, segment, hidden in prefill(self.model, [prompts[job[0]] for job in jobs], self.device):
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
        length += age * (torch.isin(token, self.eos) & (length == 0))

    def step(self) -> None:
        """One more token for every row."""
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
        rows = len(self.owners) - self.cache.counts[-1]
        job = self.owners[rows][0], [sample for _, sample in self.owners[rows:]]
        self._keep(list(range(rows)))
        return job

    def _keep(self, rows: list[int]) -> None:
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
        while cache_tokens and batch.cache.tokens() > cache_tokens and len(batch.cache.counts) > 1:
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
