"""Measure speed and memory, beside transformers and TRL where they can be imported. No test asserts
any of it.

    python tests/bench.py [--only rollout update step entropy corpus] [--turns 3]

Whatever is compared is measured in one run, in turns, after one turn that does not count. Figures
are medians, and only their ratios mean anything on a machine that others use. Both sides have the
same weights (through save_pretrained), prompts, dtype and threads. Peak memory is that of a fresh
process above what it held before the work (VmHWM: Linux). `corpus` needs RPT_TEST_ASSETS, a folder
with data/omni_math_rule.jsonl and tokenizers/deepseek_r1_distill_qwen.
"""

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import rpt  # noqa: E402
from model import ModelConfig, Prompts, Transformer, last_hidden, pad  # noqa: E402
from rivals import in_transformers, trl_steps, trl_trainer  # noqa: E402
from sampler import Completion, generate  # noqa: E402

SHAPE = {"model_type": "qwen2", "hidden_size": 256, "intermediate_size": 1024,
         "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
         "tie_word_embeddings": False, "max_position_embeddings": 4096}
VOCABULARY, PROMPTS, GROUP, NEW = 4096, 8, 8, 128
MEAN, LIMIT = 64, 512  # of ragged completions: an end after each token with probability 1 / MEAN
METHOD = rpt.Method(micro_tokens=8192, temperature=1.0)
LEARNING_RATE = 1e-5


def policy(vocabulary: int = VOCABULARY) -> Transformer:
    """Return a model with the same weights in every process."""
    torch.manual_seed(0)
    return Transformer(ModelConfig.from_dict(SHAPE | {"vocab_size": vocabulary}))


def random_ids(*shape: int, vocabulary: int = VOCABULARY) -> list:
    """Return random ids, the same in every process."""
    return np.random.default_rng(0).integers(vocabulary, size=shape).tolist()


def in_turns(turns: int, **candidates: Callable[[], object]) -> dict[str, float]:
    """Return the median seconds of each candidate."""
    seconds = {name: [] for name in candidates}
    for _ in range(turns + 1):
        for name, work in candidates.items():
            begin = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def highest() -> float:
    """Return the highest memory that this process ever held, in MiB."""
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the parent's
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def cost(work: Callable[[], object]) -> tuple[object, dict[str, float]]:
    """Return what `work` returns, its seconds, and by how many MiB it raises the highest memory of
    this process."""
    before, begin = highest(), time.perf_counter()
    result = work()
    return result, {"s": time.perf_counter() - begin, "peak MiB": highest() - before}


def in_fresh_process(work: Callable[..., dict], *arguments: object) -> dict[str, float]:
    """Return what a function returns in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


# --------------------------------------------------------------------- sampling and entropy


def rollout(turns: int) -> dict[str, float]:
    """Tokens per second of sampling 128 tokens from each prompt."""
    model, table = policy(), {}
    rival = in_transformers(model)
    for count, samples, length in ((PROMPTS, GROUP, 256), (PROMPTS, GROUP, 1024), (1, 1, 256)):
        prompts = random_ids(count, length)
        work = {"ours": lambda: generate(model, prompts, samples=samples, max_new_tokens=NEW,
                                         eos_ids=[])}
        if rival is not None:
            ids = torch.tensor(prompts)
            work["transformers"] = lambda: rival.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
                temperature=1.0, min_new_tokens=NEW, max_new_tokens=NEW,
                num_return_sequences=samples, pad_token_id=0)
        for who, seconds in in_turns(turns, **work).items():
            name = f"{count} x {samples}, prompts of {length}: {who}, tokens/s"
            table[name] = count * samples * NEW / seconds
    return table


def entropy(turns: int) -> dict[str, float]:
    """Tokens per second of the entropy pass over documents of 50 to 1,024 tokens, and of a plain
    forward with logits on the same batches."""
    model, lengths = policy(), np.random.default_rng(0).integers(50, 1024, 40)
    starts, tokens = np.cumsum([0, *lengths]), np.array(random_ids(lengths.sum()), np.uint32)
    no = np.zeros(len(lengths), bool)
    corpus = data.Corpus(SimpleNamespace(bos=[]), tokens, starts, starts[:-1], no, no, no)
    rival = in_transformers(model)

    @torch.no_grad()
    def plain() -> None:
        documents = range(len(lengths))
        for part in rpt.pack(documents, lambda d: lengths[d], evaluation.BATCH_TOKENS, 1.0):
            rival(pad([corpus.ids(d) for d in part], model.head.device))
    work = {"ours": lambda: evaluation.entropies(model, corpus)}
    if rival is not None:
        work["transformers"] = plain
    seconds = in_turns(turns, **work)
    return {f"{who}, tokens/s": len(tokens) / s for who, s in seconds.items()}


# ------------------------------------------------------------------------------------ training


def group(number: int, prompt: list[int], completions: list[Completion]) -> rpt.Group:
    """Return a group of which every other completion is right."""
    rewards = [float(s % 2) for s in range(len(completions))]
    return rpt.Group((0, 0, number), None, prompt, completions, [b""] * len(completions), rewards)


def ragged_groups() -> list[rpt.Group]:
    """Return groups of prompts of even lengths and responses of exponential ones."""
    random, groups = np.random.default_rng(0), []
    for n in range(PROMPTS):
        lengths = np.minimum(1 + random.exponential(100, GROUP).astype(int), LIMIT)
        completions = [Completion(random_ids(n), [-8.0] * n, True) for n in lengths]
        groups.append(group(n, random_ids(random.integers(150, 350)), completions))
    return groups


def padded_update(model: Transformer, optimizer: torch.optim.Optimizer,
                  groups: Sequence[rpt.Group], method: rpt.Method) -> dict[str, float]:
    """Update as rpt.update does, but by padded batches of whole groups, without detaching."""
    def size(group: rpt.Group) -> int:
        return len(group.prompt) + GROUP * max(len(c.ids) for c in group.completions)

    tokens = sum(len(c.ids) for g in groups for c in g.completions)
    figures = []
    for batch in rpt.pack(groups, size, method.micro_tokens, padding=1.0):
        prompts, rows = [g.prompt for g in batch], []
        for n, g in enumerate(batch):
            advantages = rpt.group_advantages(torch.tensor([g.rewards]))[0].tolist()
            rows += [(n, rpt.Response(c.ids, c.logprobs, advantage, 1 / tokens))
                     for c, advantage in zip(g.completions, advantages)]
        cache = Prompts(list(map(len, prompts)), model.head.device)
        last = last_hidden(model, prompts, cache)
        figures.append(rpt.add_gradient(model, cache, last, rows, method))
    return rpt.optimizer_step(model, optimizer, torch.stack(figures), method.grad_clip)


def updating(which: Callable, groups: Sequence[rpt.Group]) -> Callable[[], dict]:
    """Return a whole update: gradients of all groups, clipping, one step of AdamW."""
    model = policy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    which(model, optimizer, [group(0, [1], [Completion([2], [-8.0], True)] * 2)], METHOD)
    return lambda: which(model, optimizer, groups, METHOD)


def cost_of_update(which: Callable) -> dict[str, float]:
    """Return peak memory of an update in this process, the gradient's norm, and the share of the
    computed response tokens that are real."""
    work = updating(which, ragged_groups())
    with patch.object(rpt, "add_gradient", wraps=rpt.add_gradient) as slices:
        metrics, found = cost(work)
    parts = [call.args[3] for call in slices.call_args_list]
    computed = sum(len(part) * max(len(r.ids) for _, r in part) for part in parts)
    return {"peak MiB": found["peak MiB"], "gradient norm": metrics["grad_norm"],
            "useful share": metrics["trained_tokens"] / computed}


def update(turns: int) -> dict[str, float]:
    """A whole update on 8 groups of 8: prompts of 150 to 350 tokens, responses exponential with
    mean 100, at most 512; against padded batches of the same budget, 8,192 tokens."""
    ways = {"ours": rpt.update, "padded": padded_update}
    groups = ragged_groups()
    seconds = in_turns(turns, **{name: updating(which, groups) for name, which in ways.items()})
    table = {f"{name}, s": s for name, s in seconds.items()}
    for name, which in ways.items():
        found = in_fresh_process(cost_of_update, which)
        table |= {f"{name}, {what}": x for what, x in found.items()}
    return table


def step(turns: int) -> dict[str, float]:
    """Seconds of one whole step, sampling and update: 8 prompts of 256 tokens, G = 8, AdamW. Equal
    lengths: 128 new tokens. Ragged: an end of probability 1/64 (a vocabulary of 64), at most 512.
    """
    table = {}
    for name, vocabulary, new in (("equal", VOCABULARY, NEW), ("ragged", MEAN, LIMIT)):
        model, prompts = policy(vocabulary), random_ids(PROMPTS, 256, vocabulary=vocabulary)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

        def one() -> None:  # token 0 ends a completion
            out = generate(model, prompts, samples=GROUP, max_new_tokens=new, eos_ids=[0])
            rpt.update(model, optimizer, list(map(group, range(PROMPTS), prompts, out)), METHOD)
        try:
            trainer = trl_trainer(model, prompts, GROUP, new, LEARNING_RATE, turns + 1)
            seconds = trl_steps(trainer, one)
        except ImportError:
            seconds = in_turns(turns, ours=one)
        table |= {f"{name}: {who}, s": s for who, s in seconds.items()}
    return table


# ---------------------------------------------------------------------------------------- text


def read_corpus(copies: int) -> dict[str, float]:
    """Read, tokenize and select positions of a corpus in this process."""
    assets = Path(os.environ["RPT_TEST_ASSETS"])
    tokenizer = data.Tokenizer(assets / "tokenizers" / "deepseek_r1_distill_qwen")
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        for _ in range(copies):
            file.write((assets / "data" / "omni_math_rule.jsonl").read_bytes())
        file.flush()
        corpus, load = cost(lambda: data.load_corpus(file.name, tokenizer, 200, 0, 4096))
    values = np.random.default_rng(0).exponential(0.7, len(corpus.tokens)).astype(np.float32)
    _, select = cost(lambda: data.select_positions(corpus, values, False, 0.5, "solution"))
    return ({"million tokens": len(corpus.tokens) / 1e6}
            | {f"tokenize, {what}": x for what, x in load.items()}
            | {f"select, {what} (above that)": x for what, x in select.items()})


def corpus(turns: int) -> dict[str, float]:
    """A corpus of 6 and of 25 times OmniMATH, 4 MB, with random entropies. Once, not in turns."""
    if "RPT_TEST_ASSETS" not in os.environ:
        return {"RPT_TEST_ASSETS is not set": 0}
    return {f"{copies} copies: {what}": x for copies in (6, 25)
            for what, x in in_fresh_process(read_corpus, copies).items()}


def main() -> None:
    """Run the command line."""
    sections = {f.__name__: f for f in (rollout, update, step, entropy, corpus)}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    for name in args.only:
        table = sections[name](args.turns)
        print(f"\n{sections[name].__doc__}")
        for what, x in table.items():
            print(f"  {what:<60} {x:>12,.4g}", flush=True)


if __name__ == "__main__":
    main()
