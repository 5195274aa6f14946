"""Speed and memory, beside transformers and TRL where they can be imported. No test asserts any of
it.

    python tests/bench.py [--only rollout update corpus ...] [--quick] [--json FILE]

Whatever is compared is measured in one run, in turns, after one turn that does not count; figures
are medians, and only their ratios mean anything on a machine that others use. Same weights (through
save_pretrained), prompts, dtype and threads on both sides. Peak memory is that of a fresh process
above what it held before the work (VmHWM, or RssAnon where files are mapped: Linux). `corpus` needs
RPT_TEST_ASSETS, a folder with data/omni_math_rule.jsonl and tokenizers/deepseek_r1_distill_qwen.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import rpt  # noqa: E402
from model import ModelConfig, PrefixCache, Transformer, read_config  # noqa: E402
from rpt import Group, Method, Response, accumulate, token_logprobs  # noqa: E402
from sampler import Batch, Completion, Job, Sampling, generate, last_hidden  # noqa: E402
from tests.rivals import in_transformers, trl_steps, trl_trainer, versions  # noqa: E402

SHAPE = {"model_type": "qwen2", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024,
         "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
         "tie_word_embeddings": False, "max_position_embeddings": 4096}
PROMPTS, GROUP, NEW = 8, 8, 128
MEAN, LIMIT = 64, 512  # of ragged completions: an end after each token with probability 1 / MEAN
LEARNING_RATE = 1e-5


def policy(**shape) -> Transformer:
    """The same weights in every process."""
    torch.manual_seed(0)
    return Transformer(ModelConfig.from_dict(SHAPE | shape))


def questions(count: int, length: int, vocabulary: int = SHAPE["vocab_size"]) -> list[list[int]]:
    """Random prompts, the same in every process."""
    generator = torch.Generator("cpu").manual_seed(1)
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()


def in_turns(repeats: int, **candidates: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each candidate."""
    seconds = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, work in candidates.items():
            begin = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def ours(model: Transformer, prompts: list[list[int]], samples: int = GROUP, new: int = NEW,
         **more) -> int:
    """Samples; returns how many tokens."""
    out = generate(model, prompts, samples=samples, max_new_tokens=new, **{"eos_ids": []} | more)
    return sum(len(c.ids) for group in out for c in group)


def child(work: str, *arguments: object) -> dict:
    """What a measurement in a process of its own prints last."""
    command = [sys.executable, __file__, "--child", work, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{work} {arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory(name: str) -> float:
    """MiB of this process, by a name of /proc/self/status."""
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return int(status[name].split()[0]) / 1024


def peak(work: Callable[[], object], warm_up: Callable[[], object]) -> dict:
    """MiB by which `work` raises the highest memory of this process, and its seconds."""
    warm_up()
    before, begin = memory("VmHWM"), time.perf_counter()  # not ru_maxrss, which begins with the
    result = work()                                       # parent's
    return {"seconds": time.perf_counter() - begin, "mib": memory("VmHWM") - before,
            "result": result}


def flat_gradient(model: Transformer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative, in norm."""
    return float((a - b).norm() / b.norm())


# -------------------------------------------------------------------------- rollout and decode


def rollout(quick: bool) -> dict[str, float]:
    """Tokens per second of sampling: 8 prompts x 8 samples of 128 tokens, and 1 x 1."""
    cases = ((PROMPTS, GROUP, 256), (PROMPTS, GROUP, 1024), (1, 1, 256))
    return sampling(policy(), cases, 1 if quick else 3)


def accelerator(quick: bool) -> dict[str, float]:
    """Sampling and training on an accelerator: 1.5 B random weights in bfloat16, R1's shape."""
    if not torch.accelerator.is_available():
        return {"accelerators": 0}
    device = torch.accelerator.current_accelerator()
    with device:
        model = Transformer(read_config(ROOT / "paper/configs/r1-distill-qwen-1.5b")).bfloat16()
    groups = ragged_groups(32, (300, 700), 500, 2048)
    tokens = sum(len(c.ids) for group in groups for c in group.completions)
    method = Method(micro_tokens=16384 if quick else 32768, grad_clip=1.0)
    examples = rpt.policy_examples(groups, method, tokens, len(groups) * GROUP)

    def training() -> None:
        accumulate(model, examples, method)
        torch.accelerator.synchronize()
    seconds = in_turns(1, training=training)["training"]
    model.zero_grad()
    cases = ((1, 1, 512), (8, GROUP, 512), (32, GROUP, 512), (32, GROUP, 1024))
    return {"training: tokens/s": tokens / seconds} | sampling(model, cases, 1 if quick else 3)


def sampling(model: Transformer, cases: Sequence[tuple[int, int, int]],
             repeats: int) -> dict[str, float]:
    """Tokens per second, ours and transformers', of (prompts, samples, length of a prompt)."""
    rival, table = in_transformers(model), {}
    for count, samples, length in cases:
        prompts = questions(count, length)
        work = {"ours": lambda: ours(model, prompts, samples)}
        if rival is not None:
            ids = torch.tensor(prompts, device=rival.device)
            work["transformers"] = lambda: rival.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
                temperature=1.0, min_new_tokens=NEW, max_new_tokens=NEW,
                num_return_sequences=samples, pad_token_id=0)
        name, rates = f"prompt {length}, {count} x {samples}", {}
        for who, seconds in in_turns(repeats, **work).items():
            rates[who] = table[f"{name}: {who}, tokens/s"] = count * samples * NEW / seconds
        if rival is not None:
            table[f"{name}: ours / transformers"] = rates["ours"] / rates["transformers"]
    return table


def products(model: Transformer, rows: int) -> tuple[Callable[[], None], int]:
    """The matrix products with weights of one decode step, alone, and their operations."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {size: torch.randn(rows, size) for size in {layer.in_features for layer in layers}}

    def work() -> None:
        for layer in layers:
            F.linear(inputs[layer.in_features], layer.weight)
    return work, sum(2 * rows * layer.weight.numel() for layer in layers)


@torch.no_grad()
def decode(quick: bool) -> dict[str, float]:
    """One decode step at 64 rows in the middle of 128 tokens, its share of two ceilings of this
    machine."""
    model, table = policy(), {}
    rows, big, wide = PROMPTS * GROUP, torch.randn(2**26), torch.randn(2048, 2048)
    work, operations = products(model, rows)
    for length in (256, 1024):
        batch = Batch(model, questions(PROMPTS, length), range(PROMPTS),
                      Sampling(max_new_tokens=4096, eos_ids=[], samples=GROUP))
        batch.admit([Job(i, range(GROUP)) for i in range(PROMPTS)])

        def step() -> None:
            if not batch.cache.free:
                batch.make_room()
            batch.step()
        for _ in range(NEW // 2 - 16):
            step()
        seconds = in_turns(8 if quick else 30, step=step, products=work, copy=big.clone,
                           square=lambda: wide @ wide)
        per_token = 2 * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * 32
        held = sum(p.numel() for p in model.parameters()) + per_token * batch.cache.tokens()
        table |= {f"prompt {length}: {name}": value for name, value in {
            "a step, ms": 1e3 * seconds["step"],
            "its matrix products alone, ms": 1e3 * seconds["products"],
            "decode / rate of its products": seconds["products"] / seconds["step"],
            "its products, GFLOP/s": operations / seconds["products"] / 1e9,
            "square products, GFLOP/s": 2 * 2048**3 / seconds["square"] / 1e9,
            "read by a step, GB/s": 4 * held / seconds["step"] / 1e9,
            "memory copy, GB/s": 8 * 2**26 / seconds["copy"] / 1e9}.items()}
    return table


def ragged(quick: bool) -> dict[str, float]:
    """Time per useful token of lengths with an end after each token of probability 1/64, and of
    equal lengths of 64."""
    model, counts = policy(), {}
    prompts, ends = questions(16 if quick else 96, 256), range(SHAPE["vocab_size"] // MEAN)

    def uneven() -> None:  # a model that knows nothing: each token is about equally probable
        counts["ragged"] = ours(model, prompts, new=LIMIT, eos_ids=ends, max_rows=64)

    def even() -> None:
        counts["equal"] = ours(model, prompts, new=MEAN, max_rows=64)
    seconds = in_turns(1 if quick else 3, ragged=uneven, equal=even)
    table = {f"{name}: us per token": 1e6 * seconds[name] / counts[name] for name in seconds}
    return table | {
        "completions": len(prompts) * GROUP,
        "ragged: mean length": counts["ragged"] / len(prompts) / GROUP,
        "ragged / equal": table["ragged: us per token"] / table["equal: us per token"]}


# ------------------------------------------------------------------------------------ training


def group(number: int, prompt: list[int], completions: list[Completion]) -> Group:
    """Every other completion is right."""
    rewards = [float(s % 2) for s in range(len(completions))]
    advantages = rpt.group_advantages(torch.tensor([rewards]))[0].tolist()
    return Group((0, number), None, prompt, completions, [b""] * len(completions), rewards,
                 advantages)


def training(model: Transformer, share: bool, prompt: int = 1024, new: int = NEW,
             size: int = GROUP) -> Callable[[], None]:
    """The gradient of one group: its prompt once, or once per completion."""
    first, *rest = questions(size + 1, max(prompt, new), model.config.vocab_size)
    completions = [Completion(ids[:new], [0.0] * new, False) for ids in rest]
    whole = group(0, first[:prompt], completions)
    responses = [Response(c.ids, c.logprobs, advantage, 1.0)
                 for c, advantage in zip(completions, whole.advantages)]
    signs = torch.tensor(whole.advantages, dtype=torch.float32).repeat_interleave(new)

    def shared() -> None:
        model.zero_grad()
        accumulate(model, [(whole.prompt, responses)], Method(temperature=1.0))

    def repeated() -> None:
        model.zero_grad()
        rows = torch.tensor([whole.prompt + c.ids for c in completions])
        hidden = model(rows)[:, prompt - 1: -1].reshape(-1, model.config.hidden_size)
        logprobs, _ = token_logprobs(model, hidden, rows[:, prompt:].reshape(-1))
        (-logprobs * signs).sum().backward()
    return shared if share else repeated


def train(quick: bool) -> dict[str, float]:
    """A group of 8, prompt 1,024, completions of 128: sharing the prompt against repeating it."""
    model, gradients = policy(), []
    for share in (True, False):
        training(model, share)()
        gradients.append(flat_gradient(model))
    seconds = in_turns(1 if quick else 3, shared=training(model, True),
                       repeated=training(model, False))
    return {**{f"{name}: s": value for name, value in seconds.items()},
            "shared: peak MiB": child("train", 1)["mib"],
            "repeated: peak MiB": child("train", 0)["mib"],
            "repeated / shared": seconds["repeated"] / seconds["shared"],
            "relative difference of gradients": difference(*gradients)}


def ragged_groups(count: int, prompt: tuple[int, int], mean: int, limit: int) -> list[Group]:
    """Groups of prompts of even lengths and responses of exponential ones."""
    random = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return random.integers(0, SHAPE["vocab_size"], length).tolist()
    groups = []
    for n in range(count):
        lengths = np.minimum(1 + random.exponential(mean, GROUP).astype(int), limit)
        completions = [Completion(ids(n), [-8.0] * n, True) for n in lengths.tolist()]
        groups.append(group(n, ids(random.integers(*prompt)), completions))
    return groups


RAGGED = 8, (150, 350), 100, LIMIT
METHOD = Method(micro_tokens=8192, temperature=1.0)


def padded_batches(groups: Sequence[Group], budget: int) -> list[list[tuple]]:
    """(group, completion, advantage), groups of like length together, in batches of a padded prompt
    for each group and a padded row for each completion, of at most `budget` tokens."""
    parts = [[]]
    for g in sorted(groups, key=lambda g: max(len(c.ids) for c in g.completions)):
        for c, advantage in zip(g.completions, g.advantages):
            batch = [*parts[-1], (g, c, advantage)]
            prompts = {h.number: len(h.prompt) for h, *_ in batch}
            size = len(prompts) * max(prompts.values())
            if size + len(batch) * max(len(c.ids) for _, c, _ in batch) <= budget:
                parts[-1] = batch
            else:
                parts.append([(g, c, advantage)])
    return parts


def padded_gradient(model: Transformer, groups: Sequence[Group]) -> None:
    """The gradient of an update as rpt.py computes it, but by padded batches."""
    tokens = sum(len(c.ids) for g in groups for c in g.completions)
    for batch in padded_batches(groups, METHOD.micro_tokens):
        prompts = {g.number: g.prompt for g, *_ in batch}
        prefix = PrefixCache(list(map(len, prompts.values())), model.head.device)
        last = last_hidden(model, list(prompts.values()), prefix)
        rows = [(list(prompts).index(g.number), Response(c.ids, c.logprobs, advantage, 1 / tokens))
                for g, c, advantage in batch]
        logprobs, _ = rpt.response_logprobs(model, prefix, last, rows, METHOD.temperature)
        advantages = torch.cat([torch.full((len(c.ids),), a) for _, c, a in batch])
        weights = torch.full_like(advantages, 1 / tokens)
        rpt.policy_loss(logprobs, logprobs.detach(), advantages, weights).backward()


def an_update(model: Transformer, padded: bool, groups: Sequence[Group]) -> Callable[[], None]:
    """A whole update: gradients of all groups, clipping, one step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def without_padding() -> None:
        rpt.update(model, optimizer, groups, METHOD)

    def with_padding() -> None:
        padded_gradient(model, groups)
        torch.nn.utils.clip_grad_norm_(model.parameters(), METHOD.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return with_padding if padded else without_padding


def update(quick: bool) -> dict[str, float]:
    """A whole update on 8 groups of 8: prompts of 150 to 350 tokens, responses exponential with
    mean 100, at most 512; against padded batches of the same budget, 8,192 tokens."""
    model, groups = policy(), ragged_groups(*RAGGED)
    tokens = sum(len(c.ids) for g in groups for c in g.completions)
    examples = rpt.policy_examples(groups, METHOD, tokens, len(groups) * GROUP)
    accumulate(model, examples, METHOD)
    gradients = [flat_gradient(model)]
    model.zero_grad()
    padded_gradient(model, groups)
    gradients.append(flat_gradient(model))
    model.zero_grad()
    slices = [part for _, parts in rpt.training_batches(examples, METHOD.micro_tokens)
              for part in parts]
    computed = sum(len(part) * max(len(r.ids) for _, r in part) for part in slices)
    padded = padded_batches(groups, METHOD.micro_tokens)
    padded_computed = sum(len(b) * max(len(c.ids) for _, c, _ in b) for b in padded)
    seconds = in_turns(1 if quick else 5, ours=an_update(model, False, groups),
                       padded=an_update(model, True, groups))
    return {"response tokens": tokens,
            "ours: s": seconds["ours"], "padded: s": seconds["padded"],
            "padded / ours": seconds["padded"] / seconds["ours"],
            "ours: useful share": tokens / computed,
            "padded: useful share": tokens / padded_computed,
            "ours: peak MiB": child("update", 0)["mib"],
            "padded: peak MiB": child("update", 1)["mib"],
            "relative difference of gradients": difference(*gradients)}


def our_step(model: Transformer, optimizer: torch.optim.Optimizer, prompts: list[list[int]],
             new: int) -> None:
    """Sampling and update; token 0 ends a completion."""
    out = generate(model, prompts, samples=GROUP, max_new_tokens=new, eos_ids=[0])
    groups = [group(n, *pair) for n, pair in enumerate(zip(prompts, out))]
    rpt.update(model, optimizer, groups, METHOD)


def step(quick: bool) -> dict[str, float]:
    """One whole step, sampling and update: 8 prompts of 256 tokens, G = 8, AdamW. Equal lengths:
    128 new tokens. Ragged: an end of probability 1/64 (a vocabulary of 64), at most 512."""
    table = {}
    for name, vocabulary, new in (("", SHAPE["vocab_size"], NEW), ("ragged, ", MEAN, LIMIT)):
        model, prompts = policy(vocab_size=vocabulary), questions(PROMPTS, 256, vocabulary)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

        def one() -> None:
            our_step(model, optimizer, prompts, new)
        try:
            trainer = trl_trainer(model, prompts, GROUP, new, LEARNING_RATE, 2 if quick else 4)
        except ImportError:
            table[f"{name}ours: s per step"] = in_turns(1 if quick else 3, ours=one)["ours"]
            continue
        found = trl_steps(trainer, one)
        median = {who: statistics.median([s for w, s in found if w == who][1:])
                  for who in ("ours", "TRL")}
        table |= {f"{name}{who}: s per step": s for who, s in median.items()}
        table[f"{name}TRL / ours"] = median["TRL"] / median["ours"]
    return table


# ----------------------------------------------------------------------------- memory and text


def head_work(chunked: bool, tokens: int,
              gradients: list | None = None) -> Callable[[], dict[str, float]]:
    """Log-probabilities and their gradients, which are appended to `gradients`, if given."""
    torch.manual_seed(0)
    model = policy(vocab_size=151936, hidden_size=896, num_hidden_layers=1,
                   tie_word_embeddings=True)
    hidden = torch.randn(tokens, 896, requires_grad=True)
    targets = torch.randint(151936, (tokens,))
    model.head.grad = torch.zeros_like(model.head)

    def work() -> dict[str, float]:
        if chunked:
            logprobs, _ = token_logprobs(model, hidden, targets)
        else:
            logprobs = model.logits(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        logprobs.mean().backward()
        if gradients is not None:
            gradients.extend((logprobs.detach(), hidden.grad, model.head.grad))
        return {"value": logprobs.mean().item()}
    return work


def logprobs(quick: bool) -> dict[str, float]:
    """Log-probabilities of 4,096 tokens from 896 hidden channels over 151,936 tokens, forward and
    backward."""
    tokens, table = 512 if quick else 4096, {}
    for name, chunked in (("ours", 1), ("plain log_softmax", 0)):
        out = child("head", chunked, tokens)
        table |= {f"{name}: peak MiB": out["mib"], f"{name}: s": out["seconds"],
                  f"{name}: mean log-probability": out["result"]["value"]}
    table["plain / ours: peak"] = table["plain log_softmax: peak MiB"] / table["ours: peak MiB"]
    found: list[list[torch.Tensor]] = [[], []]
    for chunked in (0, 1):
        head_work(bool(chunked), 300, found[chunked])()  # the same tensors, drawn twice
    for name, a, b in zip(("log-probabilities", "gradients by hidden", "gradients by the head"),
                          *found):
        table[f"relative difference of {name}, 300 tokens"] = difference(a, b)
    return table


def entropy(quick: bool) -> dict[str, float]:
    """Tokens per second of the entropy pass over documents of 50 to 2,000 tokens in windows of
    1,024, against a plain forward with logits on the same batches."""
    model, random = policy(), np.random.default_rng(0)
    starts = np.concatenate(([0], random.integers(50, 2000, 8 if quick else 40).cumsum()))
    tokens, count = random.integers(0, SHAPE["vocab_size"], starts[-1]), len(starts) - 1
    corpus = data.Corpus(SimpleNamespace(bos=[]), tokens.astype(np.uint32), starts, starts[:-1],
                         np.zeros(count, bool), np.zeros(count, np.int8), "")
    pieces = list(evaluation.windows(corpus, range(count), 1024))
    rival = in_transformers(model)

    class Forward:
        head = model.head

        def __call__(self, ids: torch.Tensor) -> torch.Tensor:
            model.logits(model(ids)) if rival is None else rival(ids)
            return ids[..., None].float()

    def ours() -> None:
        evaluation.window_values(model, corpus, pieces, evaluation.next_token_entropy)

    def plain() -> None:
        evaluation.window_values(Forward(), corpus, pieces, lambda _, hidden, tokens: hidden[:, 0])
    name = "our model's plain forward" if rival is None else "transformers' forward"
    seconds = in_turns(1 if quick else 3, ours=ours, plain=plain)
    return {"ours: tokens/s": len(tokens) / seconds["ours"],
            f"{name}: tokens/s": len(tokens) / seconds["plain"],
            f"ours / {name}": seconds["plain"] / seconds["ours"]}


class Watch:
    """Seconds and the highest RssAnon (MiB) of what runs within it: mapped files do not count."""

    def __enter__(self) -> "Watch":
        self.mib, self.begin, self.over = 0.0, time.perf_counter(), threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()
        return self

    def look(self) -> None:
        while not self.over.wait(0.01):
            self.mib = max(self.mib, memory("RssAnon"))

    def __exit__(self, *_) -> None:
        self.seconds = time.perf_counter() - self.begin
        self.over.set()
        self.thread.join()
        self.mib = max(self.mib, memory("RssAnon"))


def numbered_rows(source: Path, file: Path, size: int) -> None:
    """Writes `size` bytes of rows by numbering those of a corpus again and again."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    with open(file, "w") as out:
        for n in range(10**9):
            row = rows[n % len(rows)]
            out.write(json.dumps({"problem": f"{n}. {row['problem']}",
                                  "solution": f"{n}. {row['solution']}"}) + "\n")
            if out.tell() >= size:
                break


def corpus_work(megabytes: int) -> dict[str, float]:
    """Tokenises, splits and selects in this process; 0: one document of a million tokens."""
    assets, table = Path(os.environ["RPT_TEST_ASSETS"]), {}
    source = assets / "data" / "omni_math_rule.jsonl"
    tokenizer = data.Tokenizer.from_dir(assets / "tokenizers" / "deepseek_r1_distill_qwen")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "corpus.jsonl"
        if megabytes:
            numbered_rows(source, file, megabytes * 10**6)
        else:
            texts = [json.loads(line)["solution"] for line in source.read_text().splitlines()]
            file.write_text(json.dumps({"text": "\n".join(texts)[:2_800_000]}) + "\n")
        with Watch() as tokenise:
            corpus = data.load_corpus(file, tokenizer, folder, 0, 0)
        with Watch() as split:
            texts = (lambda: (document.text for document in data.documents(file)))
            parts = data.split_documents(texts, 200 if megabytes else 0, 0)
        corpus = replace(corpus, split=parts)
        values = np.memmap(Path(folder) / "entropy", np.float32, "w+", shape=len(corpus.tokens))
        values[:] = np.random.default_rng(0).exponential(0.7, len(values))
        with Watch() as select:
            kept = data.select_positions(corpus, values, data.PositionFilter(region="solution"))
        table = {"million tokens": len(corpus.tokens) / 1e6, "million positions": len(kept) / 1e6}
    for name, watch in (("tokenise", tokenise), ("split", split), ("select", select)):
        table |= {f"{name}, s": watch.seconds, f"{name}, peak RssAnon MiB": watch.mib}
    return table


def corpus(quick: bool) -> dict[str, float]:
    """A corpus of OmniMATH's rows, numbered again and again, with random entropies; peak anonymous
    memory is of the whole process. And one document of a million tokens."""
    if not os.environ.get("RPT_TEST_ASSETS"):
        return {"RPT_TEST_ASSETS is not set": 0}
    table = {}
    for megabytes in (5, 10) if quick else (25, 100, 0):
        name = f"{megabytes} MB" if megabytes else "one document"
        table |= {f"{name}: {key}": value for key, value in child("corpus", megabytes).items()}
    return table


def child_main(work: str, *arguments: str) -> dict:
    """A measurement in a process of its own, see `child`."""
    first = int(arguments[0])
    if work == "corpus":
        return corpus_work(first)
    if work == "head":
        return peak(head_work(first == 1, int(arguments[1])), lambda: None)
    model = policy()
    if work == "train":
        return peak(training(model, first == 1), training(model, True, 16, 8))
    small = ragged_groups(1, (8, 9), 4, 8)
    an_update(model, first == 1, small)()
    return peak(an_update(model, first == 1, ragged_groups(*RAGGED)), lambda: None)


def main() -> None:
    sections = {f.__name__: f for f in (rollout, accelerator, decode, ragged, train, update, step,
                                        logprobs, entropy, corpus)}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--quick", action="store_true", help="one turn of each, and less work")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench.json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child_main(*args.child)))
        return
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": "float32"}
    machine, tables = machine | versions(), {}
    for name in args.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        tables[name] = sections[name](args.quick)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        # after each section: they take minutes
        args.json.write_text(json.dumps(machine | tables, indent=2) + "\n")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for name, table in tables.items():
        print(f"\n{sections[name].__doc__}")
        print("\n".join(f"  {key:<58} {value:>12,.4g}" for key, value in table.items()))


if __name__ == "__main__":
    main()
