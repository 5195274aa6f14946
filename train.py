"""Train by Reinforcement Pre-Training: `torchrun train.py` shows it on the toy world in toy/.

    torchrun train.py                                    RPT on the toy, then accuracies
    python train.py --model ID --corpus FILE --out DIR                  a small real language model
    torchrun --nproc-per-node 8 train.py --recipe paper --model ID --corpus ID --out DIR
    python train.py --stage ntp --model ID --corpus FILE --out DIR      next-token training: plain
                                                         text, or rows of prompt and response
    python train.py --stage rlvr --model ID --corpus FILE --out DIR     RL with verifiable rewards

The same command again continues from the last checkpoint. SIGTERM and Ctrl-C finish the step and
write one; torchrun kills 30 s after SIGTERM, so set --save-every where a step takes longer. Master
weights, their gradients and the reductions of these are float32; the computation is in --dtype. A
program of your own may call `main` with a reward or a step: see paper/recipes.
"""

import atexit
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from data import (Question, Tokenizer, answer_questions, load_corpus, prompt_ids, random_indices,
                  read_json, select_positions, sequences)
from eval import (SPLITS, Task, corpus_entropy, examine, fingerprint, gather_records, growth, log,
                  measures, parser_of, record)
from model import (DTYPES, ModelConfig, Transformer, all_gather, is_first, load_weights,
                   read_config, resolve, save_pretrained)
from reward import REWARDS
from rpt import Policy, next_token_step, option, rpt_step

PATIENCE = 3  # non-finite steps in a row end a run; so many without a gradient print a warning
LOGS = ("metrics.jsonl", "rollouts.jsonl", "evals.jsonl", "records.jsonl")
TOY = Path(__file__).resolve().parent / "toy"


@dataclass(frozen=True)
class Run(Task):
    """All options of a run: the method, what models are asked, and these."""

    recipe: str = option("", "defaults for all other options; without one `toy`, or `small` if a "
                             "model or corpus is named", choices=("", "toy", "small", "paper"))
    stage: str = option("rpt", "RPT, next-token prediction, or RL with verifiable rewards",
                        choices=("rpt", "ntp", "rlvr"))
    out: str = option("", "folder of the run (default: runs/ and the recipe or the program)")
    steps: int = option(100, "optimizer steps; 0 only evaluates", least=0)
    reward: str = option("prefix", "reward function, by its name in reward.py", choices=REWARDS)
    lr: float = option(1e-6, "AdamW's learning rate")
    weight_decay: float = option(0.01, "decoupled weight decay", least=0)
    beta2: float = option(0.999, "AdamW's second-moment decay")
    eval_every: int = option(0, "steps between evaluations; 0: only before and after", least=0)
    save_every: int = option(20, "steps between checkpoints")
    checkpoint_activations: bool = option(False, "keep only the inputs of blocks; compute the "
                                                 "rest again in the backward pass")
    tokens: str = option("", "hash of the corpus and of what is held out; run.json remembers it")


RECIPES = {
    "toy": dict(model=str(TOY / "base"), corpus=str(TOY / "corpus.jsonl"),
                answers=f"{TOY}/answers.jsonl,{TOY}/choices.jsonl", questions=32, max_prompt=256,
                max_response=96, template="toy", micro_tokens=8192, region="solution", lr=5e-4,
                weight_decay=0.0, beta2=0.99, steps=80, holdout=500),
    "small": dict(questions=16, max_prompt=1024, max_response=512, lr=1e-5, beta2=0.99,
                  micro_tokens=8192, cache_tokens=65536, region="solution"),
    "paper": dict(steps=1000, dynamic_from=500, dtype="bfloat16", checkpoint_activations=True,
                  min_context=16, grad_clip=0.2),
}
STAGES = {"rlvr": dict(template="plain", reward="answer", answers="")}  # whatever the recipe
FREE = {"recipe", "steps", "save_every", "eval_every", "eval_questions", "samples", "answers", "lr",
        "device", "cache", "corpus", "out", "micro_tokens", "max_rows", "cache_tokens",
        "checkpoint_activations"}  # what a resumed run may change; the corpus is known by its hash


def parse(argv: Sequence[str] | None = None, defaults: dict | None = None) -> Run:
    """Read the command line: an option per field of Run, with the recipe's values as defaults."""
    parser, given = parser_of(Run, __doc__), defaults or {}
    parser.set_defaults(**given)
    named, _ = parser.parse_known_args(argv)
    recipe = named.recipe or ("small" if named.model or named.corpus else "toy")
    program = Path(sys.argv[0]).stem
    out = f"runs/{recipe if program == 'train' else program}"
    parser.set_defaults(**{"recipe": recipe, "out": out} | RECIPES[recipe]
                        | STAGES.get(named.stage, {}) | given)
    run = Run(**vars(parser.parse_args(argv)))
    run = replace(run, proxy=run.proxy or run.model)
    if not run.model or not run.corpus and (run.steps or run.stage != "rpt"):
        parser.error("--model and --corpus are needed, each a path or a hub id")
    if (run.reward == "answer") != (run.stage == "rlvr"):
        parser.error("--reward answer is for --stage rlvr, and the others are for --stage rpt")
    if run.steps and not run.temperature:
        parser.error("--temperature 0 is for evaluations: greedy responses are all equal")
    return run


# -------------------------------------------------------------------------- processes and shards


def start(run: Run) -> torch.device:
    """Join the process group, if there are several processes or --dtype is not float32."""
    local, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(run.device, None if run.device == "cpu" else local)
    if device.type != "cpu":
        torch.accelerator.set_device_index(local)
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    if world > 1:
        dist.init_process_group(backend)
    elif run.dtype != "float32":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        return device
    # After a collective has returned, Gloo's threads still release its tensors. With torch 2.14
    # they abort the process if the interpreter has ended by then, so wait a moment at exit.
    atexit.register(time.sleep, 0.2)
    return device


def build(run: Run, config: ModelConfig, device: torch.device) -> Transformer:
    """Load the model with float32 master weights, each process its own shards."""
    with torch.device("meta"):
        model = Transformer(config)
    if dist.is_initialized():  # sharding among one float32 process costs a fifth on the toy
        shard(model, DTYPES[run.dtype], device.type)
    model.to_empty(device=device)
    load_weights(model, resolve(run.model))
    for block in model.model.layers:
        block.checkpoint_activations = run.checkpoint_activations
    return model


def shard(model: Transformer, dtype: torch.dtype, device_type: str) -> None:
    """Apply FSDP2: each block is a group; embedding, norm and head are another one.

    Gradients are summed in float32. toy/mini.py's `main` holds the whole model instead.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                     cast_forward_inputs=False)
    for module in (*model.model.layers, model):  # the head is used after the forward pass
        fully_shard(module, mesh=mesh, mp_policy=precision,
                    reshard_after_forward=module is not model)
        module.set_gradient_divide_factor(1.0)  # the loss is divided by all processes' tokens
        module.set_force_sum_reduction_for_comms(True)


# -------------------------------------------------------------------------------- the run's folder


def claim(run: Run) -> tuple[IO, Run]:
    """Lock the run's folder; returns the open lock, and the run with its date.

    Raise ValueError if another run writes there, or if the processes do not see the same folder.
    """
    out, file, problem = Path(run.out), Path(run.out, "lock"), ""
    out.mkdir(parents=True, exist_ok=True)
    mark, today = all_gather((os.urandom(8).hex(), date.today().isoformat()))[0]
    lock = open(file, "a")
    if is_first():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write_text(mark)
        except OSError as error:
            problem = f"--out {out}: cannot lock this folder; is another run using it? ({error})"
    problem = all_gather(problem)[0]
    if not problem and {mark} != set(all_gather(file.read_text())):
        problem = f"--out {out}: the processes see different folders; choose one that all share"
    if problem:
        raise ValueError(problem)
    return lock, replace(run, date=run.date or read_json(out / "run.json").get("date", today))


def identify(run: Run, tokens: str) -> None:
    """Write run.json. `tokens` is the hash of what the run reads and holds out. Raise ValueError if
    the folder holds checkpoints of another run."""
    out = Path(run.out)
    if run.tokens not in ("", tokens):
        raise ValueError(f"{run.corpus}: not the text of this run, or --seed or --holdout differ "
                         "and hold out other documents; --tokens= accepts that")
    options = asdict(run) | {"tokens": tokens}
    before = read_json(out / "run.json") if list(out.glob("checkpoints/step-*")) else {}
    changed = [f"{name} {before[name]!r}, now {options.get(name)!r}"
               for name in before if name not in FREE and before[name] != options.get(name)]
    if changed:
        raise ValueError(f"{out} belongs to a run with {'; '.join(changed)}; choose another --out")
    all_gather(None)  # everyone has looked
    if is_first():
        aside = out / "run.json.new"
        aside.write_text(json.dumps(options, indent=1))
        aside.rename(out / "run.json")


@contextmanager
def replacing(place: Path) -> Iterator[Path]:
    """Yield a folder for all processes to write to, which replaces `place` when it is complete."""
    aside = place.with_name("unfinished")
    if is_first():
        shutil.rmtree(aside, ignore_errors=True)
    all_gather(None)
    try:
        yield aside
    except BaseException as error:  # a full disk has many names; torch's is no Exception
        shutil.rmtree(aside, ignore_errors=True)
        reason = str(error).splitlines()[-1]  # torch's exception begins with a traceback
        sys.exit(f"train.py: error: {place} cannot be written ({reason})")
    all_gather(None)
    if is_first():
        os.sync()  # the logs too
        shutil.rmtree(place, ignore_errors=True)
        aside.rename(place)
    all_gather(None)


def state_of(out: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> dict:
    """Return what a checkpoint holds: weights, moments, and the lengths of the logs."""
    weights, moments = get_state_dict(model, optimizer)
    sizes = {name: (out / name).stat().st_size for name in LOGS if (out / name).exists()}
    return {"model": weights, "optimizer": moments, "logs": all_gather(sizes)[0]}


def save(out: Path, step: int, state: dict) -> None:
    """Write a checkpoint, and delete all but the newest two."""
    with replacing(out / "checkpoints" / f"step-{step:09d}") as aside:
        dcp.save(state, checkpoint_id=aside)
    for old in sorted(out.glob("checkpoints/step-*"))[:-2] if is_first() else ():
        shutil.rmtree(old)


def resume(run: Run, model: Transformer, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint and cut the logs to its lengths; returns the next step."""
    out = Path(run.out)
    state = state_of(out, model, optimizer)
    for moments in optimizer.state.values():
        moments["step"].zero_()  # torch made the moments by a step with learning rate 0
    places = sorted(out.glob("checkpoints/step-*"))
    if places:  # into the tensors themselves, so that --lr stays free
        dcp.load(state, checkpoint_id=places[-1])
    for name in LOGS if is_first() else ():
        with open(out / name, "a") as file:
            file.truncate(state["logs"].get(name, 0) if places else 0)
    return int(places[-1].name.removeprefix("step-")) if places else 0


# ---------------------------------------------------------------------------- figures of a step


def rollout_metrics(records: Sequence[dict]) -> dict[str, float]:
    """Return means over a step's rollouts, including those that dynamic sampling replaced."""
    rows = [measures(r) | {"reward": np.mean(r["rewards"]), "finished": np.mean(r["finished"])}
            for r in records]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def show(bar: tqdm, step: int, records: Sequence[dict], metrics: dict) -> None:
    """Show the figures of a step in the progress bar, and a rollout of the first and last step."""
    for r in records[:1] if step in (0, bar.total - 1) and is_first() else ():
        bar.write(f"step {step}, a rollout:\n  ...{r['context']!r}\n  response "
                  f"{r['responses'][0]!r}\n  truth {r['truth']!r}, reward {r['rewards'][0]}")
    bar.set_postfix({name: f"{metrics[name]:.4g}" for name in (
        "reward", "parsed", "length", "nll", "grad_norm") if name in metrics})


def watch(bar: tqdm, step: int, metrics: dict, in_a_row: Counter) -> None:
    """Stop a run after PATIENCE non-finite steps; warn when no group has carried a gradient for as
    many. in_a_row counts both kinds of steps."""
    in_a_row["skipped"] = in_a_row["skipped"] + 1 if metrics.get("skipped") else 0
    in_a_row["idle"] = 0 if metrics.get("informative", 1) else in_a_row["idle"] + 1
    if in_a_row["skipped"] == PATIENCE:
        sys.exit(f"train.py: error: {PATIENCE} steps in a row had a loss or gradient that is not "
                 "finite, and changed nothing; the same command with a lower --lr goes on from the "
                 "last checkpoint")
    if in_a_row["idle"] == PATIENCE and is_first():
        reasons = {("finished", 0): "no response ends within --max-response",
                   ("parsed", 0): "no response boxes anything; worked_start's stage format helps",
                   ("reward", 0): "every prediction that can be read is wrong",
                   ("reward", 1): "every reward is 1"}
        reason = next((text for (name, x), text in reasons.items() if metrics.get(name) == x),
                      "some groups are all right, the others all wrong")
        bar.write(f"step {step}: nothing was learned in {PATIENCE} steps, because the rewards of "
                  f"each group are equal; {reason}")


# ------------------------------------------------------------------------------------------ stages


def train(run: Run, policy: Policy, items: Sequence, exams: dict, one_step: Callable,
          reward: Callable | None = None) -> None:
    """Run the loop of every stage: step, logs, evaluation, checkpoint; export the policy."""
    out, in_a_row, requests = Path(run.out), Counter(), []
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=run.lr, betas=(0.9, run.beta2),
                                  weight_decay=run.weight_decay)
    begin = resume(run, policy.model, optimizer)

    def draw(step: int, retry: int) -> list:
        chosen = random_indices(len(items), run.seed, step, retry, run.questions)
        return [items[n] for n in chosen]

    def evaluate(step: int) -> None:
        log(out / "evals.jsonl", step, examine(policy, exams, step, out))

    if begin == 0:
        evaluate(0)
    for number in (signal.SIGTERM, signal.SIGINT):  # finish the step, then stop
        signal.signal(number, lambda number, _: requests.append(number))
    bar = tqdm(range(begin, run.steps), run.stage, run.steps, initial=begin, unit="step",
               disable=not (run.steps and is_first()))
    for step in bar:
        groups, metrics = one_step(policy, optimizer, draw, step, run, reward, run.seed)
        records = gather_records([record(g, policy.tokenizer) for g in groups])
        metrics |= rollout_metrics(records) if records else {}
        log(out / "rollouts.jsonl", step, *records)
        log(out / "metrics.jsonl", step, metrics)
        show(bar, step, records, metrics)
        watch(bar, step, metrics, in_a_row)
        done = step + 1
        if done == run.steps or run.eval_every and done % run.eval_every == 0:
            evaluate(done)
        stopping = max(all_gather(max(requests, default=0)))
        if done < run.steps and (stopping or done % run.save_every == 0):
            save(out, done, state_of(out, policy.model, optimizer))
            if stopping:
                sys.exit(128 + stopping)
    if begin < run.steps:
        with replacing(out / "model") as aside:
            save_pretrained(policy.model, aside, policy.tokenizer)
        save(out, run.steps, state_of(out, policy.model, optimizer))  # which says that all is done
    signal.signal(signal.SIGINT, signal.default_int_handler)


def prepare(run: Run, tokenizer: Tokenizer) -> tuple[Sequence, dict]:
    """Return what the run trains on, and its exams: questions and their task by name.

    It trains on the documents of a corpus (ntp), on selected positions of it (rpt) or on its
    problems with answers (rlvr). RL is examined on what is held out, and on --answers.
    """
    items, held, exams = [], [], {}
    if run.stage == "rlvr":
        items, held = answer_questions(run.corpus, tokenizer, run.max_prompt, run.holdout, run.seed)
        identify(run, fingerprint(str((items, held)).encode()))
    elif run.corpus:
        corpus = load_corpus(run.corpus, tokenizer, run.holdout, run.seed, run.max_prompt)
        identify(run, fingerprint(corpus.tokens, corpus.held))
        if run.stage == "ntp" and run.steps:
            return sequences(corpus), exams
        entropy = corpus_entropy(run, corpus)
        items, held = (select_positions(corpus, entropy, held, nats, run.region, run.min_context)
                       for held, nats in ((False, run.min_entropy), (True, SPLITS["easy"])))
    prompt_ids(tokenizer, Question((), (), 0, 0), run.template, run.max_prompt)  # or raise
    if is_first():
        print(f"questions: {len(items):,} to train on, {len(held):,} held out")
    chosen = random_indices(len(held), run.seed, 0, 0, min(run.eval_questions, len(held)))
    exams["held-out"] = [held[n] for n in sorted(chosen)], run
    for file in map(Path, filter(None, run.answers.split(","))):
        problems, _ = answer_questions(file, tokenizer, run.max_prompt)
        name = str(file) if file.stem in exams else file.stem
        exams[name] = problems[: run.eval_questions], replace(run, template="plain")
    return items, exams


def main(argv: Sequence[str] | None = None, reward: Callable | None = None,
         one_step: Callable | None = None, defaults: dict | None = None) -> None:
    """Run the command line.

    A program of your own may bring a reward(responses, question, policy), a step with rpt_step's
    arguments, and defaults of options.
    """
    run = parse(argv, defaults)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may not know UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:  # what a user can mend is one sentence; an error of a reader's own reward is a traceback
        device = start(run)
        lock, run = claim(run)  # until the end
        tokenizer = Tokenizer(resolve(run.model), run.date)
        config = read_config(resolve(run.model))
        longest = run.max_prompt + (0 if run.stage == "ntp" else run.max_response)
        if longest > config.max_position_embeddings or len(tokenizer) > config.vocab_size:
            raise ValueError(f"{run.model}: too few positions ({config.max_position_embeddings}) "
                             "for --max-prompt and --max-response, or too few embeddings "
                             f"({config.vocab_size}) for the tokenizer")
        items, exams = prepare(run, tokenizer)
        if run.steps and not len(items):
            raise ValueError("nothing is left to train on; lower --min-entropy, --min-context or "
                             "--holdout, or use --region all")
        policy = Policy(build(run, config, device), tokenizer)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: error: {error}")
    one_step = one_step or (next_token_step if run.stage == "ntp" else rpt_step)
    train(run, policy, items, exams, one_step, reward or REWARDS[run.reward])
    if is_first():
        print(growth(Path(run.out)))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
