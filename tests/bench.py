"""Speed and memory, beside transformers and TRL where they can be imported. No test asserts any of it.

    python tests/bench.py [--only rollout accelerator decode ...] [--quick] [--json FILE]

Whatever is compared is measured in one run, in turns, after one turn that does not count; figures are medians, and
only their ratios mean anything on a machine that others use. Same weights (through save_pretrained), prompts, dtype
and threads on both sides. Peak memory is that of a fresh process above what it held before the work (VmHWM: Linux).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import ModelConfig, Transformer, read_config  # noqa: E402
from rpt import Group, Method, completion_logprobs, group_advantages, token_logprobs, update  # noqa: E402
from sampler import Completion, _Batch, generate, prefill  # noqa: E402
from tests.rivals import in_transformers, trl_steps, trl_trainer  # noqa: E402

SHAPE = {"model_type": "qwen2", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024,
         "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False,
         "max_position_embeddings": 4096}
PROMPTS, GROUP, NEW = 8, 8, 128
LEARNING_RATE = 1e-5


def policy(**shape) -> Transformer:
    """The same weights in every process."""
    torch.manual_seed(0)
    return Transformer(ModelConfig.from_dict(SHAPE | shape))


def questions(count: int, length: int, vocabulary: int = SHAPE["vocab_size"]) -> list[list[int]]:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator("cpu").manual_seed(1)).tolist()


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


def ours(model: Transformer, prompts: list[list[int]], samples: int = GROUP, new: int = NEW, **more) -> int:
    """Samples; returns how many tokens."""
    out = generate(model, prompts, samples=samples, max_new_tokens=new, **{"eos_ids": []} | more)
    return sum(len(c.ids) for group in out for c in group)


def child(work: str, *arguments: object, command: Sequence[str] = (sys.executable,)) -> dict:
    """What a measurement in a process of its own prints last."""
    run = subprocess.run([*command, __file__, "--child", work, *map(str, arguments)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{work} {arguments} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def peak(work: Callable[[], object], warm_up: Callable[[], object]) -> dict:
    """MiB by which `work` raises the highest memory of this process, and its seconds."""
    def highest() -> float:  # not ru_maxrss, which begins with what the parent process had
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return int(status["VmHWM"].split()[0]) / 1024

    warm_up()
    before, begin = highest(), time.perf_counter()
    result = work()
    return {"seconds": time.perf_counter() - begin, "mib": highest() - before, "result": result}


# ---------------------------------------------------------------------------------------------- rollout and decode


def rollout(quick: bool) -> dict[str, float]:
    """Tokens per second of sampling: 8 prompts x 8 samples of 128 tokens, and 1 x 1."""
    return sampling(policy(), ((PROMPTS, GROUP, 256), (PROMPTS, GROUP, 1024), (1, 1, 256)), 1 if quick else 3)


def accelerator(quick: bool) -> dict[str, float]:
    """The same on an accelerator: 1.5 B random weights in bfloat16, R1-Distill-Qwen's shape."""
    if not torch.accelerator.is_available():
        return {"accelerators": 0}
    device = torch.accelerator.current_accelerator()
    config = Path(__file__).resolve().parent.parent / "paper" / "configs" / "r1-distill-qwen-1.5b"
    with device:
        model = Transformer(read_config(config)).bfloat16()
    return sampling(model, ((1, 1, 512), (8, GROUP, 512), (32, GROUP, 512), (32, GROUP, 1024)), 1 if quick else 3)


def sampling(model: Transformer, cases: Sequence[tuple[int, int, int]], repeats: int) -> dict[str, float]:
    """Tokens per second, ours and transformers', of (prompts, samples, length of a prompt)."""
    rival, table = in_transformers(model), {}
    for count, samples, length in cases:
        prompts = questions(count, length)
        work = {"ours": lambda: ours(model, prompts, samples)}
        if rival is not None:
            ids = torch.tensor(prompts, device=rival.device)
            work["transformers"] = lambda: rival.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                min_new_tokens=NEW, max_new_tokens=NEW, num_return_sequences=samples, pad_token_id=0)
        name = f"prompt {length}, {count} x {samples}"
        for who, seconds in in_turns(repeats, **work).items():
            table[f"{name}: {who}, tokens/s"] = count * samples * NEW / seconds
        if rival is not None:
            table[f"{name}: ours / transformers"] = (
                table[f"{name}: ours, tokens/s"] / table[f"{name}: transformers, tokens/s"])
    return table


@torch.no_grad()
def prefix(quick: bool) -> dict[str, float]:
    """Computing 8 prompts that share their beginning, against 8 that share nothing: how many times as fast."""
    model, table = policy(), {}
    for length, common in ((256, 128), (256, 230), (1024, 512), (1024, 960)):
        first, *rest = questions(8, length)
        prompts = {"apart": [first, *rest], "alike": [first, *(first[:common] + run[common:] for run in rest)]}
        seconds = in_turns(1 if quick else 5, **{name: lambda runs=runs: list(prefill(model, runs))
                                                 for name, runs in prompts.items()})
        table[f"{common} of {length} tokens in common: apart / alike"] = seconds["apart"] / seconds["alike"]
    return table


def products(model: Transformer, rows: int) -> tuple[Callable[[], None], int]:
    """The matrix products with weights of one decode step, alone, and their floating-point operations."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {size: torch.randn(rows, size) for size in {layer.in_features for layer in layers}}

    def work() -> None:
        for layer in layers:
            F.linear(inputs[layer.in_features], layer.weight)
    return work, sum(2 * rows * layer.weight.numel() for layer in layers)


@torch.no_grad()
def decode(quick: bool) -> dict[str, float]:
    """One decode step at 64 rows in the middle of 128 tokens, its share of two ceilings of this machine."""
    model, table = policy(), {}
    rows, big, wide = PROMPTS * GROUP, torch.randn(2**26), torch.randn(2048, 2048)
    work, operations = products(model, rows)
    for length in (256, 1024):
        batch = _Batch(model, 4096, 1.0, [], 0)
        batch.admit([(i, range(GROUP)) for i in range(PROMPTS)], questions(PROMPTS, length), range(PROMPTS))
        for _ in range(NEW // 2 - 16):
            batch.step()
        step = in_turns(8 if quick else 30, step=batch.step, products=work, copy=big.clone, square=lambda: wide @ wide)
        width = batch.cache.cohorts[0].capacity
        cached = 2 * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * 32 * (PROMPTS * length + rows * width)
        moved = 4 * (sum(p.numel() for p in model.parameters()) + cached)
        table |= {f"prompt {length}: a step, ms": 1e3 * step["step"],
                  f"prompt {length}: its matrix products alone, ms": 1e3 * step["products"],
                  f"prompt {length}: decode / rate of its products": step["products"] / step["step"],
                  f"prompt {length}: its products, GFLOP/s": operations / step["products"] / 1e9,
                  f"prompt {length}: square products, GFLOP/s": 2 * 2048**3 / step["square"] / 1e9,
                  f"prompt {length}: read by a step, GB/s": moved / step["step"] / 1e9,
                  f"prompt {length}: memory copy, GB/s": 8 * 2**26 / step["copy"] / 1e9}
    return table


def ragged(quick: bool) -> dict[str, float]:
    """Time per useful token of lengths with an end after each token of probability 1/64, and of equal lengths of 64."""
    model, counts = policy(), {}
    prompts, limit = questions(16 if quick else 96, 256), 512

    def uneven() -> None:  # a model that knows nothing: each token is about equally probable
        counts["ragged"] = ours(model, prompts, new=limit, eos_ids=range(SHAPE["vocab_size"] // 64), max_rows=64)

    def even() -> None:
        counts["equal"] = ours(model, prompts, new=64, max_rows=64)
    seconds = in_turns(1 if quick else 3, ragged=uneven, equal=even)
    table = {f"{name}: us per token": 1e6 * seconds[name] / counts[name] for name in seconds}
    return table | {"completions": len(prompts) * GROUP, "ragged: mean length": counts["ragged"] / len(prompts) / GROUP,
                    "ragged / equal": table["ragged: us per token"] / table["equal: us per token"]}


# ---------------------------------------------------------------------------------------------- training


def group(number: int, prompt: list[int], completions: list[Completion]) -> Group:
    rewards = [float(s % 2) for s in range(len(completions))]
    advantages = group_advantages(torch.tensor([rewards]))[0].tolist()
    return Group((0, number), None, prompt, completions, [b""] * len(completions), rewards, advantages)


def training(model: Transformer, share: bool, prompt: int = 1024, new: int = NEW,
             size: int = GROUP) -> Callable[[], None]:
    """Forward and backward of one group's log-probabilities: its prompt once, or once per completion."""
    ids = questions(size + 1, max(prompt, new), model.config.vocab_size)
    whole = group(0, ids[0][:prompt], [Completion(run[:new], [0.0] * new, False) for run in ids[1:]])
    signs = torch.tensor(whole.advantages, dtype=torch.float32).repeat_interleave(new)

    def shared() -> None:
        model.zero_grad()
        logprobs, _ = completion_logprobs(model, [(whole, list(range(size)))], 1.0)
        (logprobs * signs).sum().backward()

    def repeated() -> None:
        model.zero_grad()
        rows = torch.tensor([whole.prompt + c.ids for c in whole.completions])
        hidden = model(rows)[:, prompt - 1: -1].reshape(-1, model.config.hidden_size)
        logprobs, _ = token_logprobs(model, hidden, rows[:, prompt:].reshape(-1))
        (logprobs * signs).sum().backward()
    return shared if share else repeated


def train(quick: bool) -> dict[str, float]:
    """A group of 8, prompt 1,024, completions of 128: sharing the prompt against repeating it."""
    model, gradients = policy(), []
    for share in (True, False):
        training(model, share)()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    seconds = in_turns(1 if quick else 3, shared=training(model, True), repeated=training(model, False))
    memory = {name: child("train", share)["mib"] for name, share in (("shared", 1), ("repeated", 0))}
    difference = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    return {**{f"{name}: s": value for name, value in seconds.items()},
            **{f"{name}: peak MiB": value for name, value in memory.items()},
            "repeated / shared": seconds["repeated"] / seconds["shared"],
            "relative difference of gradients": difference}


def our_step(model: Transformer, optimizer: torch.optim.Optimizer, prompts: list[list[int]], eos: int) -> None:
    out = generate(model, prompts, samples=GROUP, max_new_tokens=NEW, eos_ids=[eos])
    update(model, [optimizer], [group(n, *pair) for n, pair in enumerate(zip(prompts, out))], Method(grad_clip=1.0))


def step(quick: bool) -> dict[str, float]:
    """One whole step, sampling and update: 8 prompts of 256 tokens, G = 8, 128 new tokens, AdamW."""
    model, prompts, seconds = policy(), questions(PROMPTS, 256), {"ours": [], "TRL": []}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    try:
        trainer = trl_trainer(model, prompts, GROUP, NEW, LEARNING_RATE, 2 if quick else 4)
    except ImportError:
        one = in_turns(1 if quick else 3, ours=lambda: our_step(model, optimizer, prompts, 0))["ours"]
        return {"ours: s per step": one}
    for name, time_taken in trl_steps(trainer, lambda: our_step(model, optimizer, prompts, 0)):
        seconds[name].append(time_taken)
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {**{f"{name}: s per step": s for name, s in median.items()}, "TRL / ours": median["TRL"] / median["ours"]}


# ---------------------------------------------------------------------------------------------- memory and growth


def head_work(chunked: bool, tokens: int, gradients: list | None = None) -> Callable[[], dict[str, float]]:
    """Log-probabilities and their gradients, which are appended to `gradients`, if given."""
    torch.manual_seed(0)
    model = policy(vocab_size=151936, hidden_size=896, num_hidden_layers=1, tie_word_embeddings=True)
    hidden, targets = torch.randn(tokens, 896, requires_grad=True), torch.randint(151936, (tokens,))
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
    """Log-probabilities of 4,096 tokens from 896 hidden channels over 151,936 tokens, forward and backward."""
    tokens = 512 if quick else 4096
    table = {}
    for name, chunked in (("ours", 1), ("plain log_softmax", 0)):
        out = child("head", chunked, tokens)
        table |= {f"{name}: peak MiB": out["mib"], f"{name}: s": out["seconds"],
                  f"{name}: mean log-probability": out["result"]["value"]}
    table["plain / ours: peak"] = table["plain log_softmax: peak MiB"] / table["ours: peak MiB"]
    found: list[list[torch.Tensor]] = [[], []]
    for chunked in (0, 1):
        head_work(bool(chunked), 300, found[chunked])()  # the same tensors, drawn twice
    for name, a, b in zip(("log-probabilities", "gradients by hidden", "gradients by the head"), *found):
        table[f"relative difference of {name}, 300 tokens"] = ((a - b).norm() / b.norm()).item()
    return table


def growth(quick: bool) -> dict[str, float]:
    """How cost grows, from 4 prompts of 256 tokens x 8 samples x 32 new tokens: seconds of sampling, then training."""
    table, usual = {}, {"samples": 8, "length": 256, "new": 32, "vocab_size": 4096}
    for name, values in (("samples", (2, 8, 32)), ("length", (64, 256, 1024)), ("new", (16, 32, 128)),
                         ("vocab_size", (512, 4096, 32768))):
        for value in values:
            at = usual | {name: value}
            model = policy(vocab_size=at["vocab_size"])
            prompts = questions(4, at["length"], at["vocab_size"])
            seconds = in_turns(1 if quick else 3, sampling=lambda: ours(model, prompts, at["samples"], at["new"]),
                               training=training(model, True, at["length"], at["new"], at["samples"]))
            table |= {f"{name} {value}: {what}, s": s for what, s in seconds.items()}
    for processes in (1, 2):
        command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        table[f"processes {processes}, 1 thread each: tokens/s"] = child("process", command=command)["tokens_per_s"]
    return table


def one_of_several() -> dict:
    """This process's share of 8 prompts x 8 samples x 128 tokens; the slowest process counts."""
    import torch.distributed as dist
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model, mine = policy(), questions(PROMPTS, 256)[dist.get_rank()::dist.get_world_size()]
    ours(model, mine, new=4)
    begin = time.perf_counter()
    ours(model, mine)
    seconds = torch.tensor([time.perf_counter() - begin])
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.destroy_process_group()
    return {"tokens_per_s": PROMPTS * GROUP * NEW / float(seconds)}


def main() -> None:
    sections = {f.__name__: f for f in (rollout, accelerator, prefix, decode, ragged, train, step, logprobs, growth)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--quick", action="store_true", help="one turn of each, and less work")
    parser.add_argument("--json", type=Path, default=Path(__file__).resolve().parent.parent / "runs" / "bench.json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        work, *rest = args.child
        if work == "train":
            model = policy()
            print(json.dumps(peak(training(model, rest[0] == "1"), training(model, True, 16, 8))))
        elif work == "head":
            print(json.dumps(peak(head_work(rest[0] == "1", int(rest[1])), lambda: None)))
        else:
            print(json.dumps(one_of_several()))
        return
    machine, tables = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": "float32"}, {}
    for name in args.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        tables[name] = sections[name](args.quick)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(machine | tables, indent=2) + "\n")  # after each section: they take minutes
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for name, table in tables.items():
        print(f"\n{sections[name].__doc__}")
        print("\n".join(f"  {key:<58} {value:>12,.4g}" for key, value in table.items()))


if __name__ == "__main__":
    main()
