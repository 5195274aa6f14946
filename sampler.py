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
from torch import Tensor
from tqdm import tqdm

from model import Segment, Transformer

PREFILL_TOKENS = 16384  # prompts are computed in batches of about so many tokens
ROOM = 0.25  # groups are admitted when this share of the rows is free, so that prompts are computed together


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    ids: list[int]  # includes the end token, if one was sampled
    logprobs: list[float]  # nats, of each id under the distribution it was drawn from (temperature 1 if greedy)
    finished: bool  # an end token was sampled; False: the length limit cut it


def uniforms(seed: int, key: int, sample: int, count: int) -> np.ndarray:
    """The numbers in (0, 1) that decide positions 0 .. count - 1 of one completion; float64 [count]."""
    counter = np.random.Philox(key=[seed % 2**64, key % 2**64], counter=[0, sample, 0, 0])
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

    Rows of a group are neighbours. All rows write the same column in a step, so a row admitted at column `start`
    begins there and what lies before is masked. Prompt columns may have holes (see `prefill`), also masked.
    """

    def __init__(self, device: torch.device):
        self.device, self.width = device, 0
        self.prompt: list[tuple[Tensor, Tensor]] = []  # by layer, [groups, kv_heads, P, head_dim]
        self.own: list[tuple[Tensor, Tensor]] = []  # by layer, [rows, kv_heads, capacity, head_dim]
        self.valid = torch.zeros(0, 0, dtype=torch.bool, device=device)  # prompt columns that count, [groups, P]
        self.counts: list[int] = []  # rows of each group
        self.starts: list[int] = []  # first column of each row
        self.position = torch.zeros(0, dtype=torch.long, device=device)  # of the next token, [rows]

    def admit(self, prompts: Segment, counts: Sequence[int]) -> None:
        """Adds the prompts of a segment as groups, with counts[i] rows each."""
        layers = [prompts.all_keys(layer) for layer in range(len(prompts.keys))]
        valid = prompts.valid(prompts.keys[0].shape[2])
        if not self.prompt:
            self.prompt = [tuple(t[:0] for t in pair) for pair in layers]
            self.own = [tuple(t.new_zeros(0, t.shape[1], 0, t.shape[3]) for t in pair) for pair in layers]
        rows = sum(counts)
        self.prompt = [tuple(_stack(a, b) for a, b in zip(old, new)) for old, new in zip(self.prompt, layers)]
        self.valid = _stack(self.valid[:, None, :, None], valid[:, None, :, None])[:, 0, :, 0]
        self.own = [tuple(torch.cat((t, t.new_zeros(rows, *t.shape[1:]))) for t in pair) for pair in self.own]
        self.position = torch.cat((self.position, torch.tensor(
            [end for end, count in zip(prompts.ends, counts) for _ in range(count)], device=self.device)))
        self.counts += counts
        self.starts += [self.width] * rows
        self._index()

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows, groups without rows, and columns that no row uses."""
        group_of = [group for group, count in enumerate(self.counts) for _ in range(count)]
        counts = [0] * len(self.counts)
        for row in rows:
            counts[group_of[row]] += 1
        groups = [group for group, count in enumerate(counts) if count]
        self.starts = [self.starts[row] for row in rows]
        unused = min(self.starts, default=self.width)
        self.starts = [start - unused for start in self.starts]
        self.width -= unused
        index, kept = (torch.tensor(i, dtype=torch.long, device=self.device) for i in (rows, groups))
        self.own = [tuple(t[index, :, unused:] for t in pair) for pair in self.own]
        self.position = self.position[index]
        if len(groups) < len(self.counts):
            self.valid = self.valid[kept]
            used = int(self.valid.any(0).nonzero().max()) + 1 if groups else 0
            self.valid = self.valid[:, :used]
            self.prompt = [tuple(t[kept, :, :used] for t in pair) for pair in self.prompt]
        self.counts = [counts[group] for group in groups]
        self._index()

    def _index(self) -> None:
        """Where each row stands in the [groups, slots] layout of the product with the prompts, and the masks."""
        slots = max(self.counts, default=0)
        first = np.cumsum([0] + self.counts)
        grid = [[first[g] + min(s, count - 1) for s in range(slots)] for g, count in enumerate(self.counts)]
        place = [g * slots + s for g, count in enumerate(self.counts) for s in range(count)]
        full = all(count == slots for count in self.counts)  # then the layout is the order of the rows
        self.slots = None if full else torch.tensor(grid, device=self.device)
        self.place = None if full else torch.tensor(place, device=self.device)
        self.prompt_mask = self.own_mask = None
        if not bool(self.valid.all()):
            self.prompt_mask = _mask(self.valid)[:, None, None]  # [groups, 1, 1, P]
        if any(self.starts):
            columns = torch.arange(max(self.starts), device=self.device)
            self.own_mask = _mask(columns >= torch.tensor(self.starts, device=self.device)[:, None])[:, None, None]

    def positions(self, width: int) -> Tensor:
        """Opens the next column, and says at which position of its text each row's token stands: [rows, 1]."""
        assert width == 1, "a DecodeCache takes one token per row"
        if self.width == self.own[0][0].shape[2]:
            room = max(32, self.width // 2)
            self.own = [tuple(torch.cat((t, t.new_zeros(*t.shape[:2], room, t.shape[3])), dim=2) for t in pair)
                        for pair in self.own]
        self.width += 1
        self.position = self.position + 1
        return self.position[:, None] - 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [rows, heads, 1, d], k and v [rows, kv_heads, 1, d] -> [rows, 1, heads * d]: one softmax over both parts."""
        rows, heads, _, d = q.shape
        (prompt_k, prompt_v), (own_k, own_v) = self.prompt[layer], self.own[layer]
        own_k[:, :, self.width - 1], own_v[:, :, self.width - 1] = k[:, :, 0], v[:, :, 0]
        kv_heads, groups = k.shape[1], len(self.counts)
        q = (q * d**-0.5).view(rows, kv_heads, heads // kv_heads, d)
        own, own_total = _attend_part(q, own_k[:, :, : self.width], own_v[:, :, : self.width], self.own_mask)
        grid = (q if self.slots is None else q[self.slots]).view(groups, -1, kv_heads, heads // kv_heads, d)
        grid = grid.transpose(1, 2).reshape(groups, kv_heads, -1, d)  # all queries of a group on its one prompt
        shared, total = _attend_part(grid, prompt_k, prompt_v, self.prompt_mask)
        shared, total = (t.view(groups, kv_heads, -1, heads // kv_heads, t.shape[-1]).transpose(1, 2).flatten(0, 1)
                         for t in (shared, total))
        if self.place is not None:
            shared, total = shared[self.place], total[self.place]
        return torch.lerp(own, shared, torch.sigmoid(total - own_total).to(q.dtype)).reshape(rows, 1, heads * d)


def _attend_part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over a part of the keys, and the logarithm of its softmax denominator, [..., queries, d] and [..., 1].

    Two parts join as lerp(a, b, sigmoid(log_total_b - log_total_a)).
    """
    scores = (q @ k.mT).float()
    if mask is not None:
        scores[..., : mask.shape[-1]] += mask
    peak = scores.amax(-1, keepdim=True)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    return (weights.to(v.dtype) @ v) / total.to(v.dtype), peak + total.log()


def _mask(valid: Tensor) -> Tensor:
    return torch.zeros(valid.shape, device=valid.device).masked_fill_(~valid, float("-inf"))


def _stack(a: Tensor, b: Tensor) -> Tensor:
    """Concatenates [n, h, T, d] tensors of different T along n; new columns are zero."""
    width = max(a.shape[2], b.shape[2])
    return torch.cat([torch.nn.functional.pad(t, (0, 0, 0, width - t.shape[2])) for t in (a, b)])


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


class _Batch:
    """The rows being decoded: what they have sampled so far and to whom each belongs."""

    def __init__(self, model: Transformer, limit: int, temperature: float, eos_ids: Sequence[int], seed: int):
        self.model, self.device = model, model.head.device
        self.limit, self.temperature, self.seed = limit, temperature, seed
        self.eos = torch.tensor(sorted(eos_ids), device=self.device)
        self.cache = DecodeCache(self.device)
        self.owners: list[tuple[int, int]] = []  # (prompt, sample) of each row
        self.columns: list[tuple[Tensor, Tensor]] = []  # token and log-probability of each row, by column
        self.uniform = torch.zeros(0, limit, dtype=torch.float64, device=self.device)  # [rows, limit]
        self.length = torch.zeros(0, dtype=torch.long, device=self.device)  # of finished rows; 0 while running
        self.age = torch.zeros(0, dtype=torch.long, device=self.device)  # tokens sampled so far, [rows]

    def admit(self, jobs, prompts, keys) -> None:
        """Computes the prompts of the jobs (prompt, first sample, samples) and samples each row's first token."""
        for indices, segment, hidden in prefill(self.model, [prompts[job[0]] for job in jobs], self.device):
            chosen = [jobs[i] for i in indices]
            self.cache.admit(segment, [count for _, _, count in chosen])
            owners = [(prompt, first + s) for prompt, first, count in chosen for s in range(count)]
            numbers = np.stack([uniforms(self.seed, keys[p], s, self.limit) for p, s in owners])
            group = [g for g, (_, _, count) in enumerate(chosen) for _ in range(count)]
            logits = self.model.logits(hidden)[torch.tensor(group, device=self.device)]
            fresh = self._draw(logits, torch.from_numpy(numbers[:, 0]).to(self.device))
            old = len(self.owners)
            self.owners += owners
            self.uniform = torch.cat((self.uniform, torch.from_numpy(numbers).to(self.device)))
            self.length = torch.cat((self.length, torch.isin(fresh[0], self.eos).long()))
            self.age = torch.cat((self.age, torch.ones(len(owners), dtype=torch.long, device=self.device)))
            columns = self.columns or [tuple(t[:0] for t in fresh)]
            empty = [tuple(t.new_zeros(len(owners)) for t in fresh)] * (len(columns) - 1)
            assert len(columns) == self.cache.width + 1 and len(columns[0][0]) == old
            self.columns = [tuple(map(torch.cat, zip(a, b))) for a, b in zip(columns, [*empty, fresh])]

    def _draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        return draw(logits, uniform, self.temperature)

    def step(self) -> None:
        """One more token for every row."""
        hidden = self.model(self.columns[-1][0][:, None], self.cache)[:, 0]
        uniform = self.uniform.gather(1, self.age.clamp_max(self.limit - 1)[:, None])[:, 0]
        token, logprob = self._draw(self.model.logits(hidden), uniform)
        self.columns.append((token, logprob))
        self.age = self.age + 1
        ended = torch.isin(token, self.eos) & (self.length == 0)
        self.length = torch.where(ended, self.age, self.length)

    def harvest(self) -> list[tuple[int, int, Completion]]:
        """Takes out the rows that are done: (prompt, sample, Completion). The only synchronisation with the host."""
        length, age = self.length.tolist(), self.age.tolist()
        done = [row for row in range(len(age)) if 0 < length[row] <= self.limit or age[row] >= self.limit]
        if not done:
            return []
        index = torch.tensor(done, device=self.device)
        ids, logprobs = (torch.stack(part, dim=1)[index].tolist() for part in zip(*self.columns))
        out = []
        for row, its_ids, its_logprobs in zip(done, ids, logprobs):
            finished = 0 < length[row] <= self.limit
            span = slice(self.cache.starts[row], self.cache.starts[row] + (length[row] if finished else self.limit))
            out.append((*self.owners[row], Completion(its_ids[span], its_logprobs[span], finished)))
        gone = set(done)
        self.keep([row for row in range(len(age)) if row not in gone])
        return out

    def keep(self, rows: list[int]) -> None:
        before = self.cache.width
        self.cache.keep(rows)
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.columns = [tuple(t[index] for t in pair) for pair in self.columns[before - self.cache.width:]]
        self.uniform, self.length, self.age = self.uniform[index], self.length[index], self.age[index]
        self.owners = [self.owners[row] for row in rows]


@torch.no_grad()
def generate(model: Transformer, prompts: Sequence[Sequence[int]], *, samples: int = 1, max_new_tokens: int,
             temperature: float = 1.0, eos_ids: Sequence[int], seed: int = 0, keys: Sequence[int] | None = None,
             max_rows: int | None = None, progress: bool = False,
             timing: dict[str, float] | None = None) -> list[list[Completion]]:
    """Samples `samples` completions of every prompt (token ids); returns them as [prompt][sample].

    temperature 0 is greedy. keys: one integer per prompt (default: its index) which, with `seed` and the number of
    the sample, decides its randomness. max_rows: completions decoded at once (default: all). timing, if given,
    receives seconds and tokens of prefill and decoding. Raises ValueError for an empty prompt or an unusable limit.
    """
    keys = list(range(len(prompts))) if keys is None else list(keys)
    max_rows = max_rows or max(1, len(prompts) * samples)
    if len(keys) != len(prompts) or not all(prompts) or min(samples, max_new_tokens) < 1 or temperature < 0:
        raise ValueError("generate needs non-empty prompts, one key each, samples and max_new_tokens >= 1, temperature >= 0")
    waiting = deque(sorted(((i, first, min(max_rows, samples - first)) for i in range(len(prompts))
                            for first in range(0, samples, max_rows)), key=lambda job: -len(prompts[job[0]])))
    results: list[list] = [[None] * samples for _ in prompts]
    batch = _Batch(model, max_new_tokens, temperature, eos_ids, seed)
    check_every = 1 if batch.device.type == "cpu" else 16  # asking an accelerator whether rows are done makes it wait
    spent = timing if timing is not None else {}
    spent |= {"prefill_seconds": 0.0, "prefill_tokens": 0, "decode_seconds": 0.0, "decode_tokens": 0}
    bar = tqdm(total=len(prompts) * samples, desc="sampling", unit="completion", disable=not progress, leave=False)
    while waiting or batch.owners:
        begin, jobs, tokens = time.perf_counter(), [], 0
        room = max_rows - len(batch.owners)
        while waiting and waiting[0][2] <= room and (room >= ROOM * max_rows or jobs) and tokens < PREFILL_TOKENS:
            jobs.append(waiting.popleft())
            room, tokens = room - jobs[-1][2], tokens + len(prompts[jobs[-1][0]])
        if jobs:
            batch.admit(jobs, prompts, keys)
            spent["prefill_tokens"] += tokens
        else:
            for _ in range(check_every):
                batch.step()
        ended = batch.harvest()
        for prompt, sample, completion in ended:
            results[prompt][sample] = completion
        phase = "prefill_seconds" if jobs else "decode_seconds"
        spent[phase] += time.perf_counter() - begin
        spent["decode_tokens"] += sum(len(completion.ids) for _, _, completion in ended)
        bar.update(len(ended))
        if progress and ended:
            bar.set_postfix_str(f"prefill {spent['prefill_tokens'] / max(spent['prefill_seconds'], 1e-9):,.0f} tok/s, "
                                f"decode {spent['decode_tokens'] / max(spent['decode_seconds'], 1e-9):,.0f} tok/s")
    bar.close()
    return results
