"""Measure speed and memory, beside transformers and TRL where they can be imported. No test asserts
any of it.

    python tests/bench.py [--only rollout update corpus ...] [--quick] [--json FILE]
    python tests/bench.py --only rollout --against DIR      and by DIR/tests/bench.py, in turns

Whatever is compared is measured in one run, in turns, after one turn that does not count. Figures
are medians, and only their ratios mean anything on a machine that others use. Both sides have the
same weights (through save_pretrained), prompts, dtype and threads. Peak memory is that of a fresh
process above what it held before the work (VmHWM: Linux). `corpus` needs RPT_TEST_ASSETS, a folder
with data/omni_math_rule.jsonl and tokenizers/deepseek_r1_distill_qwen.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import rpt  # noqa: E402
from model import ModelConfig, Prompts, Transformer, last_hidden, pad, read_config  # noqa: E402
from rpt import Example, Group, Method, Response, accumulate, pack, token_logprobs  # noqa: E402
from sampler import Completion, generate  # noqa: E402
from tests.rivals import in_transformers, trl_steps, trl_trainer, versions  # noqa: E402

SHAPE = {"model_type": "qwen2", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024,
         "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
         "tie_word_embeddings": False, "max_position_embeddings": 4096}
PROMPTS, GROUP, NEW = 8, 8, 128
MEAN, LIMIT = 64, 512  # of ragged completions: an end after each token with probability 1 / MEAN
LEARNING_RATE = 1e-5


def policy(**shape) -> Transformer:
    """Return a model with the same weights in every process."""
    torch.manual_seed(0)
    return Transformer(ModelConfig.from_dict(SHAPE | shape))


def questions(count: int, length: int, vocabulary: int = SHAPE["vocab_size"]) -> list[list[int]]:
    """Return random prompts, the same in every process."""
    generator = torch.Generator("cpu").manual_seed(1)
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()


def in_turns(repeats: int, **candidates: Callable[[], object]) -> dict[str, float]:
    """Return the median seconds of each candidate."""
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
    """Sample; returns how many tokens."""
    out = generate(model, prompts, samples=samples, max_new_tokens=new, **{"eos_ids": []} | more)
    return sum(len(c.ids) for group in out for c in group)


def child(work: str, *arguments: object) -> dict:
    """Return what a measurement in a process of its own prints last."""
    command = [sys.executable, __file__, "--child", work, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{work} {arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def highest() -> float:
    """Return the highest memory that this process ever held, in MiB."""
    with open("/proc/self/status") as file:  # ru_maxrss would begin with the parent's
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


def peak(work: Callable[[], object]) -> dict[str, float]:
    """Return by how many MiB `work` raises the highest memory of this process, and its seconds."""
    before, begin = highest(), time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - begin, "mib": highest() - before}


def flat_gradient(model: Transformer) -> torch.Tensor:
    """Return all gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return a relative difference in norm."""
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------- rollout


def rollout(quick: bool) -> dict[str, float]:
    """Tokens per second of sampling: 8 prompts x 8 samples of 128 tokens, and 1 x 1."""
    cases = ((PROMPTS, GROUP, 256), (PROMPTS, GROUP, 1024), (1, 1, 256))
    return sampling(policy(), cases, 1 if quick else 3)


def accelerator(quick: bool) -> dict[str, float]:
    """Sampling and training on an accelerator: 1.5 B random weights in bfloat16, R1's shape."""
    if not torch.accelerator.is_available():
        return {"accelerators": 0}
    with torch.accelerator.current_accelerator():
        model = Transformer(read_config(ROOT / "paper/configs/r1-distill-qwen-1.5b")).bfloat16()
    groups = ragged_groups(32, (300, 700), 500, 2048)
    method, examples = Method(micro_tokens=16384 if quick else 32768), examples_of(groups)

    def training() -> None:
        accumulate(model, examples, method)
        torch.accelerator.synchronize()
    seconds = in_turns(1, training=training)["training"]
    model.zero_grad()
    cases = ((1, 1, 512), (8, GROUP, 512), (32, GROUP, 512), (32, GROUP, 1024))
    return {"training: tokens/s": tokens_of(groups) / seconds} | sampling(
        model, cases, 1 if quick else 3)


def sampling(model: Transformer, cases: Sequence[tuple[int, int, int]],
             repeats: int) -> dict[str, float]:
    """Return tokens per second, ours and transformers', of (prompts, samples, prompt length)."""
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
        "ragged: mean length": counts["ragged"] / len(prompts) / GROUP,
        "ragged / equal": table["ragged: us per token"] / table["equal: us per token"]}


# ------------------------------------------------------------------------------------ training


def ragged_groups(count: int, prompt: tuple[int, int], mean: int, limit: int) -> list[Group]:
    """Return groups of prompts of even lengths and responses of exponential ones."""
    random = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return random.integers(0, SHAPE["vocab_size"], length).tolist()
    groups = []
    for n in range(count):
        lengths = np.minimum(1 + random.exponential(mean, GROUP).astype(int), limit)
        completions = [Completion(ids(n), [-8.0] * n, True) for n in lengths.tolist()]
        groups.append(group(n, ids(random.integers(*prompt)), completions))
    return groups


def group(number: int, prompt: list[int], completions: list[Completion]) -> Group:
    """Return a group of which every other completion is right."""
    rewards = [float(s % 2) for s in range(len(completions))]
    return Group((0, 0, number), None, prompt, completions, [b""] * len(completions), rewards)


def tokens_of(groups: Sequence[Group]) -> int:
    """Return the number of response tokens."""
    return sum(len(c.ids) for g in groups for c in g.completions)


def examples_of(groups: Sequence[Group]) -> list[Example]:
    """Return what rpt.update trains on."""
    weight, examples = 1 / tokens_of(groups), []
    for g in groups:
        advantages = rpt.group_advantages(torch.tensor([g.rewards]))[0].tolist()
        examples.append((g.prompt, [Response(c.ids, c.logprobs, advantage, weight)
                                    for c, advantage in zip(g.completions, advantages)]))
    return examples


RAGGED = 8, (150, 350), 100, LIMIT
METHOD = Method(micro_tokens=8192, temperature=1.0)


def padded_batches(examples: Sequence[Example], budget: int) -> list[list[tuple[int, Response]]]:
    """Return batches of (number of the example, response), groups of like length together: a padded
    prompt for each group and a padded row for each response, of at most `budget` tokens."""
    parts = [[]]
    order = sorted(range(len(examples)), key=lambda n: max(len(r.ids) for r in examples[n][1]))
    for n, response in ((n, response) for n in order for response in examples[n][1]):
        batch = [*parts[-1], (n, response)]
        prompts = {m: len(examples[m][0]) for m, _ in batch}
        size = len(prompts) * max(prompts.values())
        if size + len(batch) * max(len(r.ids) for _, r in batch) <= budget:
            parts[-1] = batch
        else:
            parts.append([(n, response)])
    return parts


def padded_gradient(model: Transformer, examples: Sequence[Example]) -> None:
    """Compute the gradient of an update as rpt.py does, but by padded batches."""
    for batch in padded_batches(examples, METHOD.micro_tokens):
        numbers = list(dict.fromkeys(n for n, _ in batch))
        prompts = [examples[n][0] for n in numbers]
        cache = Prompts(list(map(len, prompts)), model.head.device)
        last = last_hidden(model, prompts, cache)
        part = [(numbers.index(n), response) for n, response in batch]
        rpt.add_gradient(model, cache, last, part, METHOD)


def an_update(model: Transformer, padded: bool, groups: Sequence[Group]) -> Callable[[], None]:
    """Return a whole update: gradients of all groups, clipping, one step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def without_padding() -> None:
        rpt.update(model, optimizer, groups, METHOD)

    def with_padding() -> None:
        padded_gradient(model, examples_of(groups))
        torch.nn.utils.clip_grad_norm_(model.parameters(), METHOD.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return with_padding if padded else without_padding


def update(quick: bool) -> dict[str, float]:
    """A whole update on 8 groups of 8: prompts of 150 to 350 tokens, responses exponential with
    mean 100, at most 512; against padded batches of the same budget, 8,192 tokens."""
    model, groups, gradients, computed = policy(), ragged_groups(*RAGGED), [], []
    examples, usual = examples_of(groups), rpt.add_gradient

    def counted(model, cache, last, part, method) -> torch.Tensor:
        computed[-1] += len(part) * max(len(response.ids) for _, response in part)
        return usual(model, cache, last, part, method)
    rpt.add_gradient = counted
    for work in (lambda: accumulate(model, examples, METHOD),
                 lambda: padded_gradient(model, examples)):
        computed.append(0)
        work()
        gradients.append(flat_gradient(model))
        model.zero_grad()
    rpt.add_gradient, tokens = usual, tokens_of(groups)
    seconds = in_turns(1 if quick else 5, ours=an_update(model, False, groups),
                       padded=an_update(model, True, groups))
    return {"response tokens": tokens, "ours: s": seconds["ours"], "padded: s": seconds["padded"],
            "padded / ours": seconds["padded"] / seconds["ours"],
            "ours: useful share": tokens / computed[0],
            "padded: useful share": tokens / computed[1],
            "ours: peak MiB": child("update", 0)["mib"],
            "padded: peak MiB": child("update", 1)["mib"],
            "relative difference of gradients": difference(*gradients)}


def our_step(model: Transformer, optimizer: torch.optim.Optimizer, prompts: list[list[int]],
             new: int) -> None:
    """Sample and update; token 0 ends a completion."""
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


def head_work(chunked: bool, tokens: int) -> Callable[[], None]:
    """Return the log-probabilities of tokens from 896 channels, forward and backward."""
    torch.manual_seed(0)
    model = policy(vocab_size=151936, hidden_size=896, num_hidden_layers=1,
                   tie_word_embeddings=True)
    hidden = torch.randn(tokens, 896, requires_grad=True)
    targets = torch.randint(151936, (tokens,))
    model.head.grad = torch.zeros_like(model.head)

    def work() -> None:
        if chunked:
            logprobs, _ = token_logprobs(model, hidden, targets)
        else:
            logprobs = model.logits(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        logprobs.mean().backward()
    return work


def logprobs(quick: bool) -> dict[str, float]:
    """Log-probabilities of 4,096 tokens from 896 hidden channels over 151,936 tokens, forward and
    backward."""
    table = {}
    for name, chunked in (("ours", 1), ("plain log_softmax", 0)):
        out = child("head", chunked, 2048 if quick else 4096)
        table |= {f"{name}: peak MiB": out["mib"], f"{name}: s": out["seconds"]}
    table["plain / ours: peak"] = table["plain log_softmax: peak MiB"] / table["ours: peak MiB"]
    return table


def entropy(quick: bool) -> dict[str, float]:
    """Tokens per second of the entropy pass over documents of 50 to 1,024 tokens, against a plain
    forward with logits on the same batches."""
    model, random = policy(), np.random.default_rng(0)
    starts = np.concatenate(([0], random.integers(50, 1024, 16 if quick else 80).cumsum()))
    tokens = random.integers(0, SHAPE["vocab_size"], starts[-1]).astype(np.uint32)
    no = np.zeros(len(starts) - 1, bool)
    corpus = data.Corpus(SimpleNamespace(bos=[]), tokens, starts, starts[:-1], no, no, no)
    rival, lengths = in_transformers(model), np.diff(starts)

    @torch.no_grad()
    def plain() -> None:
        for batch in pack(range(len(lengths)), lambda d: lengths[d], evaluation.BATCH_TOKENS, 1.0):
            ids = pad([corpus.ids(d) for d in batch], model.head.device)
            model.logits(model(ids)) if rival is None else rival(ids)
    name = "our model's plain forward" if rival is None else "transformers' forward"
    seconds = in_turns(1 if quick else 3, ours=lambda: evaluation.entropies(model, corpus),
                       plain=plain)
    return {"ours: tokens/s": len(tokens) / seconds["ours"],
            f"{name}: tokens/s": len(tokens) / seconds["plain"],
            f"ours / {name}": seconds["plain"] / seconds["ours"]}


def numbered_rows(source: Path, file: Path, size: int) -> None:
    """Write `size` bytes of rows by numbering those of a corpus again and again."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    with open(file, "w") as out:
        for n in range(10**9):
            row = rows[n % len(rows)]
            out.write(json.dumps({"problem": f"{n}. {row['problem']}",
                                  "solution": f"{n}. {row['solution']}"}) + "\n")
            if out.tell() >= size:
                break


def corpus_work(megabytes: int) -> dict[str, float]:
    """Read, tokenise and select in this process."""
    assets, found = Path(os.environ["RPT_TEST_ASSETS"]), []
    tokenizer = data.Tokenizer(assets / "tokenizers" / "deepseek_r1_distill_qwen")
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        numbered_rows(assets / "data" / "omni_math_rule.jsonl", file.name, megabytes * 10**6)
        load = peak(lambda: found.append(data.load_corpus(file.name, tokenizer, 200, 0, 4096)))
    (corpus,) = found
    values = np.random.default_rng(0).exponential(0.7, len(corpus.tokens)).astype(np.float32)
    select = peak(lambda: found.append(data.select_positions(corpus, values, False, 0.5,
                                                             "solution")))
    return {"million tokens": len(corpus.tokens) / 1e6, "million positions": len(found[1]) / 1e6,
            "tokenise, s": load["seconds"], "tokenise, peak MiB": load["mib"],
            "select, s": select["seconds"], "select, peak MiB above that": select["mib"]}


def corpus(quick: bool) -> dict[str, float]:
    """A corpus of OmniMATH's rows, numbered again and again, with random entropies."""
    if not os.environ.get("RPT_TEST_ASSETS"):
        return {"RPT_TEST_ASSETS is not set": 0}
    return {f"{megabytes} MB: {key}": value for megabytes in ((5, 10) if quick else (25, 100))
            for key, value in child("corpus", megabytes).items()}


def child_main(work: str, *arguments: str) -> dict:
    """Make a measurement in a process of its own, see `child`."""
    first = int(arguments[0])
    if work == "corpus":
        return corpus_work(first)
    if work == "head":
        return peak(head_work(first == 1, int(arguments[1])))
    model = policy()
    an_update(model, first == 1, ragged_groups(1, (8, 9), 4, 8))()
    return peak(an_update(model, first == 1, ragged_groups(*RAGGED)))


# ------------------------------------------------------------------------------- command line


def compare(directory: Path, name: str, quick: bool) -> dict[str, float]:
    """Run a section of this benchmark and of another checkout's in turns; returns the medians of
    the figures that both have."""
    tables = {ROOT: [], directory: []}
    for root in [ROOT, directory] * (1 if quick else 3):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, "tests/bench.py", "--only", name, "--json", file.name]
            subprocess.run(command + ["--quick"] * quick, cwd=root, check=True,
                           stdout=subprocess.DEVNULL)
            tables[root].append(json.load(file)[name])
    both = [key for key in tables[ROOT][0] if key in tables[directory][0]]
    return {f"{key}: {root.name}": statistics.median(row[key] for row in rows)
            for key in both for root, rows in tables.items()}


def main() -> None:
    """Run the command line."""
    sections = {f.__name__: f for f in (rollout, accelerator, ragged, update, step, logprobs,
                                        entropy, corpus)}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--quick", action="store_true", help="one turn of each, and less work")
    parser.add_argument("--against", type=Path, help="another checkout, with a tests/bench.py")
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
        tables[name] = (compare(args.against.resolve(), name, args.quick) if args.against
                        else sections[name](args.quick))
        args.json.parent.mkdir(parents=True, exist_ok=True)
        # after each section: they take minutes
        args.json.write_text(json.dumps(machine | tables, indent=2) + "\n")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for name, table in tables.items():
        print(f"\n{sections[name].__doc__}")
        print("\n".join(f"  {key:<58} {value:>12,.4g}" for key, value in table.items()))


if __name__ == "__main__":
    main()
