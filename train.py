"""Trains by Reinforcement Pre-Training: `torchrun train.py` shows it on the toy world in toy/.

    torchrun train.py                                    RPT on the toy, then accuracies
    python train.py --model ID --corpus FILE --out DIR                  a small real language model
    torchrun --nproc-per-node 8 train.py --recipe paper --model ID --corpus ID --out DIR
    python train.py --stage ntp --model ID --corpus FILE --out DIR      next-token training: plain
                                                         text, or rows of prompt and response
    python train.py --stage rlvr --model ID --corpus FILE --out DIR     RL with verifiable rewards

The same command again goes on after the last checkpoint. Master weights, gradients and reductions
are float32; the computation is in --dtype. A program of your own may call `main` with a reward, a
step or more state of its own: see paper/recipes.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import data
import eval as evaluation
import rpt
from data import PositionFilter, Question, Tokenizer, fingerprint
from model import (DTYPES, Transformer, all_gather, all_sum, choose_device, forward_flops,
                   load_weights, rank_and_world, read_config, read_json, resolve, save_pretrained)
from reward import REWARDS, extract_prediction
from rpt import Group, Method, Policy, Response, accumulate, option, optimizer_step

PATIENCE = 3  # steps in a row: skipped, they end a run; without an informative group, a warning
LOGS = ("metrics.jsonl", "rollouts.jsonl", "evals.jsonl")
TOY = Path(__file__).resolve().parent / "toy"


@dataclass(frozen=True)
class Run(Method, evaluation.Asked):
    """All options of a run: the method, what models are asked, and these."""

    recipe: str = option("", "defaults for all other options; without one `toy`, or `small` where "
                             "a model or corpus is named", choices=("", "toy", "small", "paper"))
    stage: str = option("rpt", "RPT, next-token prediction, or RL with verifiable rewards",
                        choices=("rpt", "ntp", "rlvr"))
    model: str = option("", "model directory or hub id to start from")
    out: str = option("", "folder of the run (default: runs/RECIPE; of another program than this, "
                          "runs/PROGRAM)")
    steps: int = option(100, "optimizer steps", at_least=1)
    reward: str = option("prefix", "reward function, by its name in reward.py", choices=REWARDS)
    filter: str = option("threshold", "which positions are asked about: entropy above a threshold, "
                                      "a share of highest entropy, a random share",
                         choices=("threshold", "top", "random"))
    filter_value: float = option(0.5, "threshold: nats; top, random: share of the positions",
                                 at_least=0)
    lr: float = option(1e-6, "AdamW's learning rate", above=0, at_most=1)
    weight_decay: float = option(0.01, "decoupled weight decay", at_least=0)
    beta2: float = option(0.999, "AdamW's second-moment decay", above=0, at_most=0.99999)
    eval_every: int = option(0, "steps between evaluations; 0: only before and after", at_least=0)
    eval_questions: int = option(500, "held-out questions of an evaluation; 0: none at all",
                                 at_least=0)
    save_every: int = option(20, "steps between checkpoints", at_least=1)
    keep: int = option(2, "newest checkpoints kept", at_least=1)
    shard_group: int = option(0, "processes that share one copy of the weights; 0: all", at_least=0)
    checkpoint_activations: bool = option(False, "keep only the inputs of blocks, compute the rest "
                                                 "again")
    show: int = option(0, "print this many rollouts of every step", at_least=0)

    def __post_init__(self) -> None:
        """ValueError for options that cannot stand together."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        wrong = {
            "--model is missing: a model directory or hub id": not self.model,
            "--corpus is missing: a .jsonl or .txt file, a folder of them, or a hub id":
                not self.corpus,
            f"--filter-value {self.filter_value}: a share is above 0 and at most 1":
                self.filter != "threshold" and not 0 < self.filter_value <= 1,
            f"--reward {self.reward}: an answer is no next token, use the rewards answer or format":
                self.stage == "rlvr" and self.reward not in ("answer", "format"),
            f"--reward {self.reward}: positions of a text have no answer, use --stage rlvr":
                self.stage == "rpt" and self.reward == "answer",
            f"--max-context {self.max_context}: below --min-context {self.min_context}":
                0 < self.max_context < self.min_context,
            f"--shard-group {self.shard_group}: does not divide the {world} processes":
                self.shard_group and world % self.shard_group}
        if problem := next((sentence for sentence, holds in wrong.items() if holds), None):
            raise ValueError(problem)


RECIPES: dict[str, dict] = {
    "toy": dict(model=str(TOY / "base"), corpus=str(TOY / "corpus.jsonl"),
                answers=str(TOY / "answers.jsonl"), choices=str(TOY / "choices.jsonl"),
                questions=32, max_prompt=256, max_response=96, template="toy", micro_tokens=8192,
                region="solution", lr=5e-4, weight_decay=0.0, beta2=0.99, steps=80, holdout=500),
    "small": dict(questions=16, max_prompt=1024, max_response=512, lr=1e-5, beta2=0.99,
                  micro_tokens=8192, cache_tokens=65536, region="solution"),
    "paper": dict(steps=1000, dynamic_from=500, dtype="bfloat16", checkpoint_activations=True,
                  min_context=16, grad_clip=0.2),
}
STAGES = {"rlvr": dict(template="plain", reward="answer")}  # whatever the recipe
# What a resumed run may change, and paths: what they hold is compared by content.
FREE = ("recipe", "steps", "save_every", "keep", "show", "eval_every", "device",
        "out", "cache", "micro_tokens", "max_rows", "cache_tokens", "shard_group", "answers",
        "choices", "checkpoint_activations", "eval_questions", "model", "corpus", "proxy")


# ------------------------------------------------------------------------------------- arguments


def parse(argv: Sequence[str] | None = None) -> Run:
    """The command line: an option per field of Run, with the recipe's values as defaults."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, add_help=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    evaluation.add_options(parser, fields(Run))
    named, _ = parser.parse_known_args(argv)
    recipe = named.recipe or ("small" if named.model or named.corpus else "toy")
    program = Path(sys.argv[0]).stem  # one that changes something has a folder of its own
    parser.set_defaults(recipe=recipe, out=f"runs/{recipe if program == 'train' else program}")
    parser.set_defaults(**RECIPES[recipe] | STAGES.get(named.stage, {}))
    parser.add_argument("-h", "--help", action="help")  # now that it knows the recipe's values
    try:
        return evaluation.options_of(Run, parser.parse_args(argv))
    except ValueError as error:
        parser.error(str(error))


@dataclass(frozen=True)
class Setup:
    """What every stage begins with."""

    run: Run
    device: torch.device
    source: Path  # the model's directory
    proxy: Path
    tokenizer: Tokenizer
    out: Path
    cache: Path
    answers: list[Question]
    choices: list[Question]


def prepare(run: Run) -> Setup:
    """Finds the model and checks what can be checked before any work; makes the run's folder."""
    device = choose_device(run.device)
    needed = run.max_prompt + (0 if run.stage == "ntp" else run.max_response)
    source, tokenizer = evaluation.find_model(run.model, needed)
    if run.stage != "ntp":
        data.prompt_ids(tokenizer, Question((), (), 0, 0), run.template, run.max_prompt)
    answers = evaluation.answer_questions(run.answers, tokenizer)[: run.eval_questions]
    choices = evaluation.read_choices(run.choices, tokenizer)[: run.eval_questions]
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    return Setup(run, device, source, resolve(run.proxy or source), tokenizer, out,
                 Path(run.cache or out.parent / "cache"), answers, choices)


# -------------------------------------------------------------------------- processes and shards


def start(run: Run, device: torch.device) -> None:
    """Joins the process group, where there are several processes or the masters are sharded."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or run.dtype != "float32":
        store, rank, world = dist.HashStore(), 0, 1
        if "RANK" in os.environ:
            store, rank, world = next(dist.rendezvous("env://"))
        # torchrun keeps its store when it restarts the processes, with addresses of the dead in it
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        dist.init_process_group(backend, store=dist.PrefixStore(f"restart {restart}", store),
                                rank=rank, world_size=world)


def shard(model: Transformer, run: Run, device_type: str) -> None:
    """FSDP2: each block a group, embedding, norm and head another; gradients summed in float32."""
    world = dist.get_world_size()
    size = run.shard_group or world
    mesh = init_device_mesh(device_type, (world // size, size),
                            mesh_dim_names=("replicate", "shard"))
    precision = MixedPrecisionPolicy(param_dtype=DTYPES[run.dtype], reduce_dtype=torch.float32,
                                     cast_forward_inputs=False)
    how = dict(mesh=mesh if size < world else mesh["shard"], mp_policy=precision)
    for block in model.model.layers:
        fully_shard(block, **how)
    fully_shard(model, **how, reshard_after_forward=False)  # the head is used after the forward
    for module in (model, *model.model.layers):  # the loss is divided by everyone's tokens already
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def build(directory: Path, run: Run, device: torch.device) -> Transformer:
    """The model with float32 master weights, read from the files into this process's shards."""
    with torch.device("meta"):
        model = Transformer(read_config(directory))
    if dist.is_initialized():  # one float32 process shards nothing: on the toy that costs a fifth
        shard(model, run, device.type)
    model.to_empty(device=device)
    load_weights(model, directory)
    for block in model.model.layers:
        block.checkpoint_activations = run.checkpoint_activations
    return model


def is_first() -> bool:
    """This is the process that writes and speaks for all."""
    return rank_and_world()[0] == 0


def print0(text: str) -> None:
    """Prints a line, once for all processes, without breaking a progress bar."""
    if is_first():
        tqdm.write(text)


# -------------------------------------------------------------------------------- the run's folder
#
# What is written is complete or invisible, whenever a process dies. A checkpoint remembers how long
# the logs were: a resumed run cuts off what an interrupted one wrote after it, and writes the same
# again.


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """A run's folder, locked. ValueError if another run has it."""
    with open(out / "lock", "w") as lock:
        if not all_gather(not is_first() or evaluation.locked(lock))[0]:
            raise ValueError(f"{out}: another run is writing to this folder")
        yield


def identify(setup: Setup, corpus: str, left: int) -> None:
    """Writes run.json: all options, and fingerprints of what the run is made of, `corpus` its
    corpus's. ValueError if none is `left` to train on, or if the folder's run, once a step of it is
    finished, was another one."""
    if not left:
        raise ValueError(f"{setup.run.corpus}: --holdout {setup.run.holdout} leaves no document to "
                         "train on")
    options, file, changed = asdict(setup.run), setup.out / "run.json", []
    if is_first():  # it alone reads the weights, and once where the proxy is the model
        content = cache(fingerprint)
        inputs = {"corpus": corpus, "model": content(setup.source), "proxy": content(setup.proxy)}
        if checkpoints(setup.out):
            before = read_json(file)
            changed = [f"{name} was {before.get(name)!r}, now {value!r}"
                       for name, value in sorted(options.items())
                       if before.get(name) != value and name not in FREE]
            changed += [f"the content of the {name} is another one"
                        for name, value in inputs.items() if before["inputs"].get(name) != value]
    if changed := all_gather(changed)[0]:
        raise ValueError(f"{setup.out} belongs to another configuration ({', '.join(changed)}); "
                         "choose another --out or delete it")
    if is_first():
        for name in ("model", "corpus", "proxy", "cache"):
            if options[name] and Path(options[name]).exists():  # may move together with the folder
                options[name] = os.path.relpath(options[name], setup.out)
        write_json(file, options | {"inputs": inputs})


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(out.glob("checkpoints/step-*"))


def write_json(file: Path, value: object) -> None:
    """Writes a small file completely or not at all."""
    aside = file.with_name(file.name + ".new")
    with open(aside, "w") as out:
        json.dump(value, out, indent=1, allow_nan=False)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(file)


@contextlib.contextmanager
def replacing(place: Path) -> Iterator[Path]:
    """A folder for all processes to write to, beside `place`, that takes its place when
    complete."""
    aside = place.with_name("unfinished")
    if is_first():
        shutil.rmtree(aside, ignore_errors=True)
    all_gather(None)
    yield aside
    all_gather(None)
    if is_first():
        shutil.rmtree(place, ignore_errors=True)
        aside.rename(place)
    all_gather(None)


def log(file: Path, step: int, *rows: dict) -> None:
    """Appends to a log what is not empty of rows about a step (first process only), without numbers
    that are not finite."""
    lines = []
    for row in filter(None, rows):
        finite = {name: value for name, value in row.items()
                  if not isinstance(value, float) or math.isfinite(value)}
        lines.append(json.dumps({"step": step} | finite, allow_nan=False) + "\n")
    if is_first():
        with open(file, "a") as out:
            out.writelines(lines)


def save(out: Path, keep: int, so_far: dict, state: dict) -> None:
    """A checkpoint of `state` and of what there is so_far; the newest `keep` stay."""
    with replacing(out / "checkpoints" / f"step-{so_far['step']:09d}") as aside:
        dcp.save(state, checkpoint_id=aside)
        if is_first():
            logs = {}
            for name in LOGS:
                with open(out / name, "ab") as file:
                    os.fsync(file.fileno())
                    logs[name] = file.tell()
            about = so_far | {"logs": logs, "content": content_of(aside)}
            write_json(aside / "state.json", about)
    if is_first():
        for old in checkpoints(out)[:-keep]:
            shutil.rmtree(old)


def content_of(checkpoint: Path) -> str:
    """A fingerprint of what torch wrote; its files are read side by side."""
    with ThreadPoolExecutor() as pool:
        files = sorted(checkpoint.glob("*.distcp"))
        return fingerprint(*pool.map(fingerprint, [*files, checkpoint / ".metadata"]))


def is_intact(checkpoint: Path) -> bool:
    """Whether a checkpoint's files are those that were written."""
    intact = False
    if is_first():
        with contextlib.suppress(OSError, ValueError):  # what cannot be read is damaged
            intact = read_json(checkpoint / "state.json").get("content") == content_of(checkpoint)
    return all_gather(intact)[0]


def newest_intact(out: Path) -> Path | None:
    """The newest checkpoint that is intact, None before the first; damaged ones are set aside,
    under another name.

    ValueError if there are checkpoints and none is intact: to begin again would lose what the logs
    say.
    """
    places = checkpoints(out)
    damaged = list(itertools.takewhile(lambda place: not is_intact(place), reversed(places)))
    if len(damaged) == len(places) > 0:
        raise ValueError(f"{out}/checkpoints: no checkpoint is intact; mend one, or choose another "
                         "--out")
    for place in damaged:
        print0(f"{place.name} is damaged: set aside, using the one before it")
        if is_first():
            place.rename(place.with_name(f"damaged-{time.time_ns()}-{place.name}"))
    return places[-1 - len(damaged)] if places else None


@dataclass
class Trained:
    """What a checkpoint holds of a policy, by the names and in the shards that torch gives."""

    model: Transformer
    optimizer: torch.optim.Optimizer

    def state_dict(self) -> dict:
        """Weights and moments."""
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": moments}

    def load_state_dict(self, state: dict) -> None:
        """Takes them back, on any number of processes."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])


def resume(out: Path, state: dict) -> dict:
    """Goes back to the newest intact checkpoint and cuts the logs to it; what there was so far."""
    about = {"step": 0, "strikes": 0, "idle": 0, "logs": {}}
    if place := newest_intact(out):
        about = read_json(place / "state.json")
        dcp.load(state, checkpoint_id=place)
        print0(f"{out}: going on after step {about['step']}")
    for name in LOGS if is_first() else ():
        with open(out / name, "ab") as file:
            file.truncate(min(file.tell(), about["logs"].get(name, 0)))
    return about


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT join, as requests to stop after the step. The third acts at
    once: torchrun passes a Ctrl-C on that we have had already."""
    requests: list[int] = []

    def note(number: int, frame) -> None:
        requests.append(number)
        if len(requests) > 2:
            raise KeyboardInterrupt

    before = {each: signal.signal(each, note) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requests
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# ---------------------------------------------------------------------------- figures of a step


def rollout_rows(groups: Sequence[Group], tokenizer: Tokenizer) -> list[dict]:
    """What rollouts.jsonl says about a step, a row per response, of all processes."""
    text, rows = evaluation.text, []
    for group in groups:
        question = group.question
        about = {"question": list(group.number), "document": question.document,
                 "position": question.position, "entropy": question.entropy, "kept": group.kept,
                 "context": text(tokenizer.bytes_of(question.context[-48:])),
                 "truth": question.answer or text(b"".join(question.truth[:4]))}
        for c, response, reward, advantage in zip(
                group.completions, group.responses, group.rewards, group.advantages):
            prediction = extract_prediction(response) if c.finished else None
            rows.append(about | {
                "response": text(response), "reward": reward, "advantage": advantage,
                "prediction": None if prediction is None else text(prediction),
                "finished": c.finished, "tokens": len(c.ids)})
    rows = [row for part in all_gather(rows) for row in part]
    return sorted(rows, key=lambda row: row["question"])


def rollout_metrics(rows: Sequence[dict], group_size: int) -> dict[str, float]:
    """Means over a step's rollouts, those that dynamic sampling replaced among them: what the
    policy said and earned. `informative_expected` is the mean of 1 - p^G - (1 - p)^G, p being a
    question's pass rate."""
    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows])

    right = column("reward") >= 1
    p = right.reshape(-1, group_size).mean(1)  # [Q]
    figures = {
        "reward": column("reward"), "accuracy": right, "length": column("tokens"),
        "truncated": ~column("finished"), "kept": column("kept"),
        "parsed": [row["prediction"] is not None for row in rows],
        "all_right": p == 1, "all_wrong": p == 0,
        "informative_expected": 1 - p**group_size - (1 - p) ** group_size}
    means = {name: float(np.mean(values)) for name, values in figures.items()}
    longest = max(row["tokens"] for row in rows)
    return means | {"groups": len(p), "responses": len(rows), "length_max": longest}


def costs(model: Transformer, groups: Sequence[Group], updates: int, timing: dict) -> dict:
    """What a step took: tokens and FLOPs of all processes, each prompt computed once for its group,
    and the seconds of the slowest one."""
    flops, trained = 0.0, 0
    for group in groups:
        prompt, tokens = len(group.prompt), sum(len(c.ids) for c in group.completions)
        attended = prompt + tokens / len(group.completions) / 2
        forward = (forward_flops(model.config, prompt, prompt / 2)
                   + forward_flops(model.config, tokens, attended))
        learned = updates * (group.kept and group.informative)
        flops += forward * (1 + 3 * learned)
        trained += tokens * learned
    prefill, decode, trained, flops = all_sum(timing["prefill_tokens"], timing["decode_tokens"],
                                              trained, flops)
    parts = all_gather(timing)
    seconds = {name: max(part[name] for part in parts)
               for name in ("rollout", "prefill_seconds", "decode_seconds", "train")}
    speeds = {"prefill_tokens_per_s": prefill / max(seconds["prefill_seconds"], 1e-9),
              "decode_tokens_per_s": decode / max(seconds["decode_seconds"], 1e-9),
              "train_tokens_per_s": trained / max(seconds["train"], 1e-9)}
    return {"prefill_tokens": prefill, "decode_tokens": decode, "flops": flops,
            "time": seconds | speeds}


def show(run: Run, step: int, rows: list[dict], metrics: dict, bar: tqdm) -> None:
    """Some of a step's rollouts, and its figures in the progress bar."""
    for row in rows[: run.show or int(step in (0, run.steps - 1))]:
        print0(f"step {step}, a rollout:\n  ...{row['context'][-160:]!r}\n"
               f"  response {row['response']!r}\n  truth {row['truth']!r}, reward "
               f"{row['reward']}, advantage {row['advantage']}, {row['tokens']} tokens")
    figures = metrics | metrics["time"]
    names = ("reward", "accuracy", "length", "loss", "grad_norm", "decode_tokens_per_s",
             "train_tokens_per_s")
    bar.set_postfix({name: f"{figures[name]:.4g}" for name in names if name in figures},
                    refresh=False)
    bar.update()


def watch(step: int, metrics: dict, so_far: dict) -> None:
    """Ends a run whose numbers are not finite, and says once that steps teach nothing, in the
    metrics too. so_far counts `strikes`, steps in a row that were skipped, and `idle` ones, without
    an informative group. FloatingPointError after PATIENCE strikes."""
    so_far["strikes"] = so_far["strikes"] + 1 if metrics["skipped"] else 0
    so_far["idle"] = 0 if metrics.get("informative", 1) else so_far["idle"] + 1
    if so_far["strikes"]:
        print0(f"step {step}: a loss, gradient or log-probability is not finite; "
               "the weights stay as they were")
    if so_far["strikes"] == PATIENCE:
        raise FloatingPointError(
            f"{PATIENCE} steps in a row had a non-finite loss, gradient or log-probability: "
            "lower --lr; the same command goes on from the last good checkpoint")
    if so_far["idle"] == PATIENCE:
        metrics["warning"] = (f"no group was informative for {PATIENCE} steps, nothing is "
                              f"learned: {nothing_learned(metrics)}")
        print0(f"step {step}: {metrics['warning']}")


def nothing_learned(metrics: dict) -> str:
    """The likely reason why no group of a step was informative."""
    if metrics["truncated"] == 1:  # none of them is read
        return "no response ends within --max-response"
    if metrics["parsed"] == 0:
        return "no response holds a prediction that can be read; a cold start teaches the format"
    if metrics["all_right"] == 1:
        return "every response is right; the questions are too easy"
    return "the rewards of each group are equal"


# ------------------------------------------------------------------------------------------ stages


def train(setup: Setup, items: Sequence, evaluate: Callable[[Policy], dict], one_step: Callable,
          reward: Callable | None = None, extra: Callable[[Policy], dict] | None = None) -> None:
    """The loop of every stage: step, logs, evaluation, checkpoint; the policy is also exported.

    items: what each step draws from. evaluate(policy) gives what evals.jsonl says before the first
    step and after each --eval-every. one_step, reward, extra: see `main`.
    """
    run, out = setup.run, setup.out
    policy = Policy(build(setup.source, run, setup.device), setup.tokenizer)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=run.lr, betas=(0.9, run.beta2),
                                  weight_decay=run.weight_decay)
    state = {"policy": Trained(policy.model, optimizer)} | (extra(policy) if extra else {})
    so_far = resume(out, state)
    if so_far["step"] >= run.steps:
        print0("all its steps are done; after a change of the code choose another --out")

    def draw(step: int, retry: int) -> list:
        chosen = data.random_indices(len(items), run.seed, step, retry, run.questions)
        return [items[n] for n in chosen]

    if so_far["step"] == 0:
        log(out / "evals.jsonl", 0, evaluate(policy))
    with stop_requests() as requests, tqdm(
            total=run.steps, initial=so_far["step"], desc=run.stage, unit="step",
            disable=not is_first(), mininterval=0.5) as bar:
        for step in range(so_far["step"], run.steps):
            groups, metrics = one_step(policy, optimizer, draw, step, run, reward, run.seed)
            if rows := rollout_rows(groups, policy.tokenizer):
                metrics |= rollout_metrics(rows, run.group_size)
                metrics |= costs(policy.model, groups, run.updates, metrics["time"])
            done = so_far["step"] = step + 1
            watch(step, metrics, so_far)
            log(out / "rollouts.jsonl", step, *rows)
            log(out / "metrics.jsonl", step, metrics)
            if done == run.steps or run.eval_every and done % run.eval_every == 0:
                log(out / "evals.jsonl", done, evaluate(policy))
            show(run, step, rows, metrics, bar)
            stopping = max(all_gather(max(requests, default=0)))
            if stopping or done == run.steps or done % run.save_every == 0:
                save(out, run.keep, so_far, state)
            if stopping and done < run.steps:
                print0(f"stopped by {signal.Signals(stopping).name} after step {step}; "
                       "the same command goes on from there")
                sys.exit(128 + stopping)
    with replacing(out / "model") as aside:
        save_pretrained(policy.model, aside, policy.tokenizer)
    print0(f"model written to {out / 'model'}")


def next_token_step(policy: Policy, optimizer: torch.optim.Optimizer,
                    draw: Callable[[int, int], Sequence], step: int, method: Method,
                    *_) -> tuple[list[Group], dict]:
    """A step like rpt_step, of next-token prediction: the paper's baseline, supervised training.

    What is drawn are pairs (ids, first): each token from index `first` on, at least 1, counts the
    same. It is the gradient of a policy that is rewarded for what stands there: what precedes
    `first` is the prompt, what follows a response whose advantage is 1.
    """
    (rank, world), begin = rank_and_world(), time.perf_counter()
    sequences, examples = draw(step, 0), []
    total = sum(len(ids) for ids, _ in sequences)
    trained = total - sum(first for _, first in sequences)
    for ids, first in sequences[rank::world]:
        learned = Response(ids[first:], [0.0] * (len(ids) - first), 1.0, weight=1 / trained)
        examples.append((ids[:first], [learned]))
    optimizer.zero_grad(set_to_none=True)
    figures = accumulate(policy.model, examples, replace(method, temperature=1.0, updates=1))
    metrics = optimizer_step(policy.model, optimizer, figures, method.grad_clip)
    if not metrics["skipped"]:
        metrics["loss"] = metrics["nll"]
    seconds = time.perf_counter() - begin
    flops = 3 * forward_flops(policy.model.config, total, total / len(sequences) / 2)
    return [], metrics | {"flops": flops, "time": {"train": seconds,
                                                   "train_tokens_per_s": trained / seconds}}


def texts(setup: Setup) -> tuple[Sequence, Callable[[Policy], dict]]:
    """What stage ntp trains on and how it is evaluated: plain texts, or the responses of prompt and
    response rows; the perplexity of what is held out."""
    run = setup.run
    corpus = data.load_corpus(run.corpus, setup.tokenizer, setup.cache, run.holdout, run.seed)
    sequences = data.sequences(corpus, run.max_prompt)
    identify(setup, corpus.fingerprint, len(sequences))

    def evaluate(policy: Policy) -> dict:
        if not (run.eval_questions and run.holdout):
            return {}
        found = evaluation.perplexity(policy.model, corpus, run.max_prompt)
        print0(f"held-out perplexity {found[0]:.3f}")
        return {"perplexity": found}

    return sequences, evaluate


def questions(setup: Setup) -> tuple[Sequence[Question], Callable[[Policy], dict]]:
    """What RL trains on and how it is evaluated: the selected positions of a corpus (rpt), or its
    questions and answers (rlvr); those that are held out, --answers and --choices."""
    run, tokenizer = setup.run, setup.tokenizer
    if run.stage == "rlvr":
        asked, held, about = data.answer_sets(run.corpus, tokenizer, run.holdout, run.seed)
        contents = fingerprint(*((q.context, q.answer) for q in (*asked, *held)))
        identify(setup, contents, len(asked))
    else:
        corpus = data.load_corpus(run.corpus, tokenizer, setup.cache, run.holdout, run.seed)
        identify(setup, corpus.fingerprint, (corpus.split == data.TRAIN).sum())
        proxy = evaluation.Proxy(setup.proxy, setup.cache, run.max_prompt, setup.device,
                                 DTYPES[run.dtype])
        where = PositionFilter(run.filter, run.filter_value, run.min_context, run.max_context,
                               run.region, run.seed)
        asked, held, about = evaluation.question_sets(corpus, proxy, where)
    print0(about)
    held = evaluation.subset(held, run.eval_questions, run.seed)
    plain = replace(run, template="plain")
    exams = {"held-out": (held, run), "answers": (setup.answers, plain),
             "choices": (setup.choices, plain)}

    def evaluate(policy: Policy) -> dict:
        found = {}
        for name, (chosen, method) in exams.items():
            if chosen:
                records = evaluation.evaluate(policy, chosen, method, seed=run.seed)
                found[name] = evaluation.summary(records)
        return found

    return asked, evaluate


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the program by one sentence, not a traceback, where its user can do something."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; the same command goes on from what is there")
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        sys.exit(f"train.py: error: out of memory ({str(error).splitlines()[0]}): set or lower "
                 "--micro-tokens, --max-rows or --cache-tokens; the same command goes on from the "
                 "last checkpoint")
    except (ValueError, OSError, FloatingPointError, CheckpointException) as error:
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None, reward: Callable | None = None,
         one_step: Callable = rpt.rpt_step, extra: Callable[[Policy], dict] | None = None) -> None:
    """The command line. A program of your own may bring a reward(responses, question, policy), a
    step with rpt_step's arguments, and extra(policy): modules by name that checkpoints hold too."""
    run = parse(argv)
    warnings.filterwarnings("ignore", module="torch.distributed")  # that there is one process
    with one_sentence():
        setup = prepare(run)
        start(run, setup.device)
        with claimed(setup.out):
            if run.stage == "ntp":
                train(setup, *texts(setup), next_token_step)
            else:
                train(setup, *questions(setup), one_step, reward or REWARDS[run.reward], extra)
                print0(evaluation.growth(setup.out))
    if dist.is_initialized():
        all_gather(None)  # everyone is done: leave now, later torch's threads abort the teardown
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
