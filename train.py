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
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import eval as evaluation
import rpt
from data import PositionFilter, Question, Tokenizer, fingerprint
from model import (DTYPES, Transformer, all_gather, all_sum, choose_device, forward_flops,
                   load_weights, rank_and_world, read_config, read_json, resolve, save_pretrained)
from reward import REWARDS, extract_prediction
from rpt import Group, Method, Policy, Response, accumulate, option, optimizer_step

STRIKES = 3  # steps in a row that may be skipped for a non-finite number before the run stops
PATIENCE = 3  # steps in a row without an informative group before a warning
TOY = Path(__file__).resolve().parent / "toy"


@dataclass(frozen=True)
class Run(evaluation.Asked):
    """Everything about a run that is not the method itself."""

    recipe: str = option("", "defaults for all other options; without one `toy`, or `small` where "
                             "a model or corpus is named", choices=("", "toy", "small", "paper"))
    stage: str = option("rpt", "RPT, next-token prediction, or RL with verifiable rewards",
                        choices=("rpt", "ntp", "rlvr"))
    model: str = option("", "model directory or hub id to start from")
    out: str = option("", "folder of the run (default: runs/RECIPE)")
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
    eval_every: int = option(0, "steps between evaluations on held-out questions; 0: only before "
                                "and after", at_least=0)
    eval_questions: int = option(500, "held-out questions of an evaluation; 0: none at all",
                                 at_least=0)
    save_every: int = option(20, "steps between checkpoints", at_least=1)
    keep: int = option(2, "newest checkpoints kept", at_least=1)
    shard_group: int = option(0, "processes that share one copy of the weights; 0: all", at_least=0)
    checkpoint_activations: bool = option(False, "keep only the inputs of blocks, compute the rest "
                                                 "again")
    log_questions: int = option(-1, "questions of each step whose rollouts are logged; -1: all",
                                at_least=-1)
    show: int = option(0, "print this many rollouts of every step", at_least=0)


RECIPES: dict[str, dict] = {
    "toy": dict(model=str(TOY / "base"), corpus=str(TOY / "corpus.jsonl"), out="runs/toy",
                answers=str(TOY / "answers.jsonl"), choices=str(TOY / "choices.jsonl"),
                questions=32, max_prompt=256, max_response=96, template="toy", micro_tokens=8192,
                region="solution", lr=5e-4, weight_decay=0.0, beta2=0.99, steps=80, holdout=500),
    "small": dict(questions=16, max_prompt=1024, max_response=512, lr=1e-5, beta2=0.99,
                  micro_tokens=8192, region="solution", out="runs/small"),
    "paper": dict(lr=1e-6, steps=1000, dynamic_from=500, dtype="bfloat16", out="runs/paper",
                  checkpoint_activations=True, min_context=16, grad_clip=0.2),
}
STAGES = {"rlvr": dict(template="plain", reward="answer")}  # whatever the recipe
# What a resumed run may change, and paths: what they hold is compared by content.
FREE = ("recipe", "steps", "save_every", "keep", "show", "log_questions", "eval_every", "device",
        "out", "cache", "micro_tokens", "max_rows", "cache_tokens", "shard_group", "answers",
        "choices", "checkpoint_activations", "eval_questions", "model", "corpus", "proxy")


# ------------------------------------------------------------------------------------- arguments


def parse(argv: Sequence[str] | None = None) -> tuple[Run, Method]:
    """The command line: an option per field of Run and Method, the recipe's values as defaults."""
    argv = sys.argv[1:] if argv is None else list(argv)
    pick = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("recipe", "stage", "model", "corpus"):
        pick.add_argument(f"--{name}", default="")
    picked, _ = pick.parse_known_args(argv)
    recipe = picked.recipe or ("small" if picked.model or picked.corpus else "toy")
    defaults = RECIPES.get(recipe, {}) | STAGES.get(picked.stage, {}) | {"recipe": recipe}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, title in ((Run, "the run"), (Method, "the method")):
        group = parser.add_argument_group(title)
        evaluation.add_options(group, dataclasses.fields(kind), defaults)
    args = parser.parse_args(argv)
    try:
        run, method = evaluation.options_of(Run, args), evaluation.options_of(Method, args)
        contradiction(run)
    except ValueError as error:
        parser.error(str(error))
    return run, method


def contradiction(run: Run) -> None:
    """ValueError for options that cannot stand together."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    wrong = {
        "--model is missing: a model directory or hub id": not run.model,
        "--corpus is missing: a .jsonl or .txt file, a folder of them, or a hub id": not run.corpus,
        f"--filter-value {run.filter_value}: a share is above 0 and at most 1":
            run.filter != "threshold" and not 0 < run.filter_value <= 1,
        f"--reward {run.reward}: questions with answers have no next token, use answer or format":
            run.stage == "rlvr" and run.reward not in ("answer", "format"),
        f"--reward {run.reward}: positions of a text have no answer, use --stage rlvr":
            run.stage == "rpt" and run.reward == "answer",
        f"--max-context {run.max_context}: below --min-context {run.min_context}":
            0 < run.max_context < run.min_context,
        "--holdout 0: nothing to evaluate on; with --eval-questions 0 that is no question":
            run.stage != "ntp" and run.holdout == 0 < run.eval_questions,
        f"--shard-group {run.shard_group}: does not divide the {world} processes":
            run.shard_group and world % run.shard_group}
    if problem := next((sentence for sentence, holds in wrong.items() if holds), None):
        raise ValueError(problem)


@dataclass(frozen=True)
class Setup:
    """What every stage begins with."""

    run: Run
    method: Method
    device: torch.device
    source: Path  # the model's directory
    tokenizer: Tokenizer

    @property
    def out(self) -> Path:
        return Path(self.run.out)

    @property
    def cache(self) -> Path:
        return Path(self.run.cache or self.out.parent / "cache")


def prepare(run: Run, method: Method) -> Setup:
    """Finds the model and checks what can be checked before anything is written."""
    device = choose_device(run.device)
    needed = method.max_prompt + (0 if run.stage == "ntp" else method.max_response)
    source, tokenizer = evaluation.find_model(run.model, needed)
    if run.stage != "ntp":
        data.prompt_ids(tokenizer, Question((), (), 0, 0), method.template, method.max_prompt)
    evaluation.answer_questions(run.answers, tokenizer)  # read again when they are asked
    evaluation.read_choices(run.choices, tokenizer)
    out = Path(run.out).absolute()
    place = next(folder for folder in (out, *out.parents) if folder.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"--out {run.out}: {place} cannot be written")
    if problem := belongs_elsewhere(Path(run.out), settings(run, method), {}):
        raise ValueError(problem)
    return Setup(run, method, device, source, tokenizer)


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
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    world = dist.get_world_size()
    size = run.shard_group or world
    shape, names = ((world,), ("shard",))
    if size < world:
        shape, names = ((world // size, size), ("replicate", "shard"))
    precision = MixedPrecisionPolicy(param_dtype=DTYPES[run.dtype], reduce_dtype=torch.float32,
                                     cast_forward_inputs=False)
    how = dict(mesh=init_device_mesh(device_type, shape, mesh_dim_names=names), mp_policy=precision)
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


# -------------------------------------------------------------------------------- the run's folder


def settings(run: Run, method: Method) -> dict:
    """All options by name."""
    return dataclasses.asdict(run) | dataclasses.asdict(method)


def step_of(checkpoint: Path) -> int:
    """The number of steps behind a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path.glob("checkpoints/step-*"), key=step_of)


def begun(path: Path) -> bool:
    """A run has finished a step here, even if its checkpoint was found damaged and set aside."""
    return any(path.glob("checkpoints/*step-*"))


def belongs_elsewhere(path: Path, options: dict, inputs: dict[str, str]) -> str | None:
    """Why a run's folder cannot be gone on with, or None. Without a finished step it is free."""
    file = path / "run.json"
    if not file.exists() or not begun(path):
        return None
    before = read_json(file)
    changed = [f"{name} was {before.get(name)!r}, now {value!r}"
               for name, value in sorted(options.items())
               if before.get(name) != value and name not in FREE]
    changed += [f"the content of the {name} is another one" for name, value in inputs.items()
                if before.get("inputs", {}).get(name) != value]
    if changed:
        return (f"{path} belongs to another configuration ({', '.join(changed)}); "
                "choose another --out or delete it")
    return None


@contextlib.contextmanager
def replacing(place: Path) -> Iterator[Path]:
    """A folder for all processes to write to, beside `place`, that takes its place when
    complete."""
    aside, first = place.with_name("unfinished"), rank_and_world()[0] == 0
    if first and aside.exists():
        shutil.rmtree(aside)
    all_gather(None)
    yield aside
    all_gather(None)
    if first:
        if place.exists():
            shutil.rmtree(place)
        aside.rename(place)
    all_gather(None)


class RunFolder(contextlib.ExitStack):
    """Checkpoints and logs of one run. What is written is complete or invisible, whenever the
    process dies.

    A checkpoint has the checksums of its files. It remembers how long the logs were, so a resumed
    run cuts off what an interrupted one wrote after it, and writes the same again.
    """

    LOGS = ("metrics.jsonl", "rollouts.jsonl", "evals.jsonl")

    def __init__(self, path: Path, options: dict, inputs: dict[str, str]):
        super().__init__()
        self.path, (self.rank, self.world) = path, rank_and_world()
        try:
            problem = self._claim(options, inputs) if self.rank == 0 else None
        except OSError as error:
            problem = f"{path}: cannot be written ({error.strerror})"
        if problem := all_gather(problem)[0]:
            self.close()
            raise ValueError(problem)

    def _claim(self, options: dict, inputs: dict[str, str]) -> str | None:
        """Locks the folder until this is closed; what speaks against writing to it, or None."""
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = self.enter_context(open(self.path / "lock", "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return f"{self.path}: another run is writing to this folder"
        problem = belongs_elsewhere(self.path, options, inputs)
        if problem:
            return problem
        for name in ("model", "corpus", "proxy", "cache", "answers", "choices"):
            if options[name] and Path(options[name]).exists():  # the folder may move with its world
                options[name] = os.path.relpath(options[name], self.path)
        write_json(self.path / "run.json", options | {"inputs": inputs})

    def log(self, name: str, *rows: dict | None) -> None:
        """Appends rows to a log (first process only); what is not finite is left out."""
        finite = [{name: value for name, value in row.items()
                   if not isinstance(value, float) or math.isfinite(value)} for row in rows if row]
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in finite]
        if self.rank == 0 and lines:
            with open(self.path / name, "a") as out:
                out.write("".join(lines))

    def save(self, step: int, keep: int, patience: dict, state: Callable[[], dict]) -> None:
        """A checkpoint of `state()` after `step` steps; the newest `keep` stay."""
        import torch.distributed.checkpoint as dcp
        with replacing(self.path / "checkpoints" / f"step-{step:06d}") as aside:
            dcp.save(state(), checkpoint_id=aside)
            mine = [*aside.glob(f"__{self.rank}_*"), *([aside / ".metadata"] * (self.rank == 0))]
            parts = all_gather({file.name: file_digest(file) for file in mine})
            if self.rank == 0:
                about = {"step": step, "patience": patience, "logs": {}, "files": ChainMap(*parts)}
                for name in self.LOGS:
                    with open(self.path / name, "ab") as log:
                        os.fsync(log.fileno())
                        about["logs"][name] = log.tell()
                write_json(aside / "state.json", about | {"files": dict(about["files"])})
        for old in checkpoints(self.path)[:-keep] if self.rank == 0 else []:
            shutil.rmtree(old)

    def resume(self, load: Callable[[Path], None]) -> tuple[int, dict]:
        """Loads the newest intact checkpoint and cuts the logs to it; (steps done, patience).

        A damaged one is set aside, under another name. ValueError if there are checkpoints and none
        is intact: to begin again would lose what the logs say.
        """
        places, about = checkpoints(self.path), {"step": 0, "patience": {}, "logs": {}}
        all_gather(None)  # everyone has looked
        for place in reversed(places):
            if problem := next(filter(None, all_gather(self._damage(place))), None):
                print0(f"{place.name} is damaged ({problem}): set aside, using the one before it")
                if self.rank == 0:
                    place.rename(place.with_name(f"damaged-{time.time_ns()}-{place.name}"))
                continue
            load(place)
            about = json.loads((place / "state.json").read_text())
            print0(f"{self.path}: going on after step {about['step']}")
            break
        else:
            if begun(self.path):
                raise ValueError(f"{self.path}/checkpoints: no checkpoint is intact; mend one, or "
                                 "choose another --out")
        for name in self.LOGS if self.rank == 0 else ():
            with open(self.path / name, "ab") as log:
                log.truncate(min(log.tell(), about["logs"].get(name, 0)))
        all_gather(None)
        return about["step"], about["patience"]

    def _damage(self, place: Path) -> str | None:
        """What is wrong with a checkpoint's files; each process reads its share."""
        try:
            files = json.loads((place / "state.json").read_text())["files"]
            mine = sorted(files)[self.rank:: self.world]
            wrong = [name for name in mine if file_digest(place / name) != files[name]]
        except (OSError, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        return f"checksum of {wrong[0]}" if wrong else None


def file_digest(file: Path) -> str:
    """BLAKE2 of a file's content."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "blake2b").hexdigest()


def write_json(file: Path, value: object) -> None:
    """Writes a small file completely or not at all."""
    aside = file.with_name(file.name + ".new")
    with open(aside, "w") as out:
        json.dump(value, out, indent=1, allow_nan=False)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(file)


def print0(text: str) -> None:
    """Prints a line, once for all processes, without breaking a progress bar."""
    if rank_and_world()[0] == 0:
        tqdm.write(text)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that the first SIGTERM or SIGINT joins, as a request to stop after the step. A second
    one, a second later, acts at once: torchrun passes a Ctrl-C on that we have had already."""
    requests: list[int] = []
    began: list[float] = []

    def note(number: int, frame) -> None:
        if not began or time.monotonic() < began[0] + 1:
            began.append(time.monotonic())
            return requests.append(number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = {each: signal.signal(each, note) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requests
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# ---------------------------------------------------------------------------- figures of a step


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all processes' groups, those that dynamic sampling replaced among them: what the
    policy said and earned. `informative_expected` is the mean of 1 - p^G - (1 - p)^G, p being a
    question's pass rate."""
    said = [(reward, reward >= 1, len(c.ids), not c.finished,
             c.finished and extract_prediction(text) is not None)
            for group in groups
            for reward, text, c in zip(group.rewards, group.responses, group.completions)]
    asked = []
    for group in groups:
        size = len(group.rewards)
        p = sum(reward >= 1 for reward in group.rewards) / size
        asked.append((group.kept, p == 1, p == 0, 1 - p**size - (1 - p) ** size))
    said, asked = np.array(said).reshape(-1, 5), np.array(asked).reshape(-1, 4)
    responses, drawn, *sums = all_sum(len(said), len(asked), *said.sum(0), *asked.sum(0))
    names = ("reward", "accuracy", "length", "truncated", "parsed", "kept", "all_right",
             "all_wrong", "informative_expected")
    means = np.array(sums) / np.repeat((max(responses, 1), max(drawn, 1)), (5, 4))
    longest = max(all_gather(max(said[:, 2], default=0.0)))
    return dict(zip(names, means.tolist())) | {
        "groups": drawn, "responses": responses, "length_max": float(longest)}


def costs(model: Transformer, groups: Sequence[Group], method: Method, timing: dict) -> dict:
    """What a step took: tokens and FLOPs of all processes, and the seconds of the slowest one."""
    trained = [group for group in groups if group.kept and group.informative]
    flops = group_flops(model, groups) + 3 * method.updates * group_flops(model, trained)
    learned = method.updates * sum(len(c.ids) for group in trained for c in group.completions)
    tokens = all_sum(timing["prefill_tokens"], timing["decode_tokens"], learned, flops)
    names = ("prefill", "decode", "train")
    seconds = [timing["prefill_seconds"], timing["decode_seconds"], timing["train"]]
    slowest = [max(column) for column in zip(*all_gather([timing["rollout"], *seconds]))]
    speeds = {f"{name}_tokens_per_s": n / max(s, 1e-9)
              for name, n, s in zip(names, tokens, slowest[1:])}
    return {"prefill_tokens": tokens[0], "decode_tokens": tokens[1], "flops": tokens[3],
            "time": dict(zip(("rollout", *names), slowest)) | speeds}


def group_flops(model: Transformer, groups: Sequence[Group]) -> float:
    """Floating-point operations of a forward pass over groups, each prompt computed once."""
    total = 0.0
    for group in groups:
        prompt, tokens = len(group.prompt), sum(len(c.ids) for c in group.completions)
        attended = prompt + tokens / len(group.completions) / 2
        total += forward_flops(model.config, prompt, prompt / 2)
        total += forward_flops(model.config, tokens, attended)
    return total


def rollout_rows(step: int, groups: Sequence[Group], policy: Policy, limit: int) -> list[dict]:
    """What rollouts.jsonl says about a step, a row per response, of all processes."""
    def text(content: bytes | None) -> str | None:
        return None if content is None else content.decode(errors="backslashreplace")

    rows = []
    for group in groups:
        question = group.question
        about = {"step": step, "question": list(group.number), "document": question.document,
                 "position": question.position, "entropy": question.entropy, "kept": group.kept,
                 "context": text(policy.tokenizer.bytes_of(question.context[-48:])),
                 "truth": question.answer or text(b"".join(question.truth[:4]))}
        for c, response, reward, advantage in zip(
                group.completions, group.responses, group.rewards, group.advantages):
            said = {"response": text(response), "reward": reward, "advantage": advantage,
                    "prediction": text(extract_prediction(response)) if c.finished else None,
                    "finished": c.finished, "tokens": len(c.ids)}
            rows.append(about | said)
    rows = [row for part in all_gather(rows) for row in part]
    rows = [row for row in rows if limit < 0 or row["question"][1] < limit]
    return sorted(rows, key=lambda row: row["question"])


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


class Patience:
    """Ends a run whose numbers are not finite, and says once that steps teach nothing."""

    def __init__(self, strikes: int = 0, idle: int = 0):
        self.strikes = strikes  # steps in a row that were skipped
        self.idle = idle  # steps in a row without an informative group

    def see(self, step: int, metrics: dict) -> None:
        """FloatingPointError after STRIKES skipped steps in a row; a warning joins the metrics."""
        self.strikes = self.strikes + 1 if metrics["skipped"] else 0
        if self.strikes:
            print0(f"step {step}: a loss, gradient or log-probability is not finite; "
                   "the weights stay as they were")
        if self.strikes == STRIKES:
            raise FloatingPointError(
                f"{STRIKES} steps in a row had a non-finite loss, gradient or log-probability: "
                "lower --lr; the same command goes on from the last good checkpoint")
        self.idle = 0 if metrics.get("informative", 1) else self.idle + 1
        if self.idle == PATIENCE:
            metrics["warning"] = (f"no group was informative for {PATIENCE} steps, nothing is "
                                  f"learned: {nothing_learned(metrics)}")
            print0(f"step {step}: {metrics['warning']}")


def nothing_learned(metrics: dict) -> str:
    """The likely reason why no group of a step was informative."""
    if metrics["parsed"] == 0:
        return "no response holds a prediction that can be read; a cold start teaches the format"
    if metrics["truncated"] == 1:
        return "no response ends within --max-response"
    if metrics["all_right"] == 1:
        return "every response is right; the questions are too easy"
    return "the rewards of each group are equal"


# ------------------------------------------------------------------------------------------ stages


def training_state(model: Transformer, optimizer: torch.optim.Optimizer,
                   extra: dict[str, torch.nn.Module]) -> dict:
    """What a checkpoint holds: weights, moments, and the weights of whatever else is kept."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    weights, moments = get_state_dict(model, optimizer)
    more = {name: module.state_dict() for name, module in extra.items()}
    return {"model": weights, "optimizer": moments} | ({"extra": more} if more else {})


def load_state(place: Path, model: Transformer, optimizer: torch.optim.Optimizer,
               extra: dict[str, torch.nn.Module]) -> None:
    """Reads a checkpoint back, into any number of processes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict
    state = training_state(model, optimizer, extra)
    dcp.load(state, checkpoint_id=place)
    set_state_dict(model, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"])


def train(setup: Setup, inputs: dict[str, str], one_step: Callable,
          evaluate: Callable[[Policy, int], dict | None],
          extra: Callable[[Policy], dict] | None = None) -> Policy:
    """The loop of every stage: step, logs, evaluation, checkpoint; the policy is also exported.

    inputs: fingerprints of what the run is made of. one_step(policy, optimizer, step) gives groups
    and metrics; evaluate(policy, step) a row of evals.jsonl, before the first step and after each
    --eval-every; extra(policy) further modules by name that a checkpoint has to hold.
    """
    run, options = setup.run, settings(setup.run, setup.method)
    with RunFolder(setup.out, options, inputs) as folder, stop_requests() as requests:
        policy = Policy(build(setup.source, run, setup.device), setup.tokenizer)
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=run.lr,
                                      betas=(0.9, run.beta2), weight_decay=run.weight_decay)
        trained = policy.model, optimizer, extra(policy) if extra else {}
        begin, seen = folder.resume(lambda place: load_state(place, *trained))
        if begin == 0:
            folder.log("evals.jsonl", evaluate(policy, 0))
        patience = Patience(**seen)
        bar = tqdm(total=run.steps, initial=begin, desc=run.stage, unit="step",
                   disable=folder.rank > 0, mininterval=0.5)
        for step in range(begin, run.steps):
            groups, metrics = one_step(policy, optimizer, step)
            rows, done = rollout_rows(step, groups, policy, run.log_questions), step + 1
            patience.see(step, metrics)
            folder.log("rollouts.jsonl", *rows)
            folder.log("metrics.jsonl", {"step": step} | metrics)
            if done == run.steps or run.eval_every and done % run.eval_every == 0:
                folder.log("evals.jsonl", evaluate(policy, done))
            show(run, step, rows, metrics, bar)
            stopping = max(all_gather(max(requests, default=0)))
            if stopping or done == run.steps or done % run.save_every == 0:
                folder.save(done, run.keep, vars(patience), lambda: training_state(*trained))
            if stopping and done < run.steps:
                print0(f"stopped by {signal.Signals(stopping).name} after step {step}; "
                       "the same command goes on from there")
                sys.exit(128 + stopping)
        bar.close()
        export(policy, setup.out / "model")
    return policy


def export(policy: Policy, directory: Path) -> None:
    """The trained model as a Hugging Face directory, complete or absent."""
    with replacing(directory) as aside:
        save_pretrained(policy.model, aside, policy.tokenizer)
    print0(f"model written to {directory}")


def next_token_step(model: Transformer, optimizer: torch.optim.Optimizer,
                    sequences: Sequence[tuple[Sequence[int], int]], method: Method) -> dict:
    """One step of next-token prediction on (ids, first) pairs, the same list on every process: the
    paper's baseline, and supervised training. Each token from index `first` on, at least 1, counts
    the same.

    It is the gradient of a policy that is rewarded for what stands there: what precedes `first` is
    the prompt, what follows a response whose advantage is 1.
    """
    (rank, world), begin = rank_and_world(), time.perf_counter()
    trained = sum(len(ids) - max(first, 1) for ids, first in sequences)
    total = sum(len(ids) for ids, _ in sequences)
    examples = []
    for ids, first in sequences[rank::world]:
        response = ids[max(first, 1):]
        learned = Response(response, [0.0] * len(response), advantage=1.0, weight=1 / trained)
        examples.append((ids[: max(first, 1)], [learned]))
    optimizer.zero_grad(set_to_none=True)
    plain = dataclasses.replace(method, temperature=1.0, updates=1)
    metrics = optimizer_step(model, optimizer, accumulate(model, examples, plain), method.grad_clip)
    if not metrics["skipped"]:
        metrics["loss"] = metrics["nll"]
    seconds = time.perf_counter() - begin
    return metrics | {"flops": 3 * forward_flops(model.config, total, total / len(sequences) / 2),
                      "time": {"train": seconds, "train_tokens_per_s": trained / seconds}}


def check_left(count: int, run: Run) -> None:
    """ValueError if what is held out leaves nothing."""
    if not count:
        raise ValueError(f"{run.corpus}: --holdout {run.holdout} leaves no document to train on")


def ntp_stage(setup: Setup) -> Policy:
    """Next-token prediction on a corpus: plain text, or the responses of prompt and response
    rows."""
    run, method = setup.run, setup.method
    corpus = data.load_corpus(run.corpus, setup.tokenizer, setup.cache, run.holdout, run.seed)
    sequences = data.sequences(corpus, method.max_prompt)
    check_left(len(sequences), run)

    def one_step(policy: Policy, optimizer: torch.optim.Optimizer, step: int) -> tuple[list, dict]:
        chosen = data.random_indices(len(sequences), run.seed, step, 0, method.questions)
        batch = [sequences[n] for n in chosen]
        return [], next_token_step(policy.model, optimizer, batch, method)

    def evaluate(policy: Policy, step: int) -> dict | None:
        if not (run.eval_questions and run.holdout):
            return None
        found = evaluation.perplexity(policy.model, corpus, method.max_prompt)
        print0("step {}: held-out perplexity {:.3f}".format(step, found[0]))
        return {"step": step, "perplexity": found}

    inputs = {"corpus": corpus.fingerprint, "model": fingerprint(setup.source)}
    return train(setup, inputs, one_step, evaluate)


def rl_stage(setup: Setup, reward: Callable, one_step: Callable,
             extra: Callable[[Policy], dict] | None) -> Policy:
    """RPT on the selected positions of a corpus (rpt), or on its questions and answers (rlvr); then
    the table of accuracies before and after."""
    run, method, tokenizer = setup.run, setup.method, setup.tokenizer
    inputs = {"model": fingerprint(setup.source)}
    if run.stage == "rlvr":
        questions, held, about = data.answer_sets(run.corpus, tokenizer, run.holdout, run.seed)
        check_left(len(questions), run)
        inputs["corpus"] = fingerprint(*((q.context, q.answer) for q in (*questions, *held)))
    else:
        corpus = data.load_corpus(run.corpus, tokenizer, setup.cache, run.holdout, run.seed)
        check_left((corpus.split == data.TRAIN).sum(), run)
        proxy = resolve(run.proxy or setup.source)
        where = PositionFilter(run.filter, run.filter_value, run.min_context, run.max_context,
                               run.region, run.seed)
        questions, held, about = evaluation.question_sets(
            corpus, evaluation.Proxy(proxy, setup.cache, method.max_prompt, setup.device,
                                     DTYPES[run.dtype]), where)
        inputs |= {"corpus": corpus.fingerprint, "proxy": fingerprint(proxy)}
    print0(about)

    def step_of_run(policy: Policy, optimizer: torch.optim.Optimizer,
                    step: int) -> tuple[list[Group], dict]:
        def draw(step: int, retry: int) -> list[Question]:
            chosen = data.random_indices(len(questions), run.seed, step, retry, method.questions)
            return [questions[n] for n in chosen]
        groups, metrics = one_step(policy, optimizer, draw, step, method, reward, run.seed)
        costs_of = costs(policy.model, groups, method, metrics["time"])
        return groups, metrics | rollout_metrics(groups) | costs_of

    exams = Exams(setup, evaluation.subset(held, run.eval_questions, run.seed))
    policy = train(setup, inputs, step_of_run, exams.sit, extra)
    print0(evaluation.growth(setup.out))
    return policy


class Exams:
    """What a run is asked: held-out questions, and before and after also --answers and
    --choices."""

    def __init__(self, setup: Setup, held: Sequence[Question]):
        self.run, count = setup.run, setup.run.eval_questions
        plain = dataclasses.replace(setup.method, template="plain")
        answers = evaluation.answer_questions(self.run.answers, setup.tokenizer)
        choices = evaluation.read_choices(self.run.choices, setup.tokenizer)
        self.exams = {"held-out": (held, setup.method), "answers": (answers[:count], plain),
                      "choices": (choices[:count], plain)}

    def sit(self, policy: Policy, step: int) -> dict | None:
        """A row of evals.jsonl: a summary by exam."""
        summaries = {}
        for name, (questions, method) in self.exams.items():
            if len(questions) and (name == "held-out" or step in (0, self.run.steps)):
                records = evaluation.evaluate(policy, questions, method, seed=self.run.seed)
                summaries[name] = evaluation.summary(records)
        return {"step": step} | summaries if summaries else None


def main(argv: Sequence[str] | None = None, reward: Callable | None = None,
         one_step: Callable = rpt.rpt_step, extra: Callable[[Policy], dict] | None = None) -> None:
    """The command line. A program of your own may bring a reward(responses, question, policy), a
    step with rpt_step's arguments, and extra(policy): modules by name that checkpoints hold too."""
    run, method = parse(argv)
    from torch.distributed.checkpoint.api import CheckpointException  # takes a second to import
    warnings.filterwarnings("ignore", module="torch.distributed")  # that there is one process
    try:
        setup = prepare(run, method)
        start(run, setup.device)
        if run.stage == "ntp":
            ntp_stage(setup)
        else:
            rl_stage(setup, reward or REWARDS[run.reward], one_step, extra)
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; the same command goes on from what is there")
    except torch.OutOfMemoryError as error:
        sys.exit(f"train.py: error: out of memory ({str(error).splitlines()[0]}): lower "
                 "--micro-tokens, --max-rows or --cache-tokens; the same command goes on from the "
                 "last checkpoint")
    except (ValueError, OSError, FloatingPointError, CheckpointException) as error:
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        all_gather(None)  # everyone is done: leave now, later torch's threads abort the teardown
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
