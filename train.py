"""Trains by Reinforcement Pre-Training: `torchrun train.py` shows all of it on an embedded toy world.

    torchrun train.py                                  the toy: world, weak base model, RPT, table of accuracies
    torchrun --nproc-per-node 8 train.py --recipe paper --model DIR --corpus FILE --out DIR      the paper's run
    python train.py --stage ntp --model DIR --corpus FILE --out DIR           continual next-token prediction
    python train.py --stage rlvr --model DIR --corpus FILE --out DIR          RL with verifiable rewards
    python train.py --recipe paper --model DIR --plan                         what it would take, without hardware

The same command again goes on after the last checkpoint. Master weights, gradients and reductions are float32; the
computation is in --dtype.
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
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import eval as evaluation
from data import Question, Tokenizer, check_vocabulary, question_sets, read_corpus
from model import (DTYPES, ModelConfig, Transformer, all_gather, forward_flops, load_weights, rank_and_world,
                   read_config, resolve, save_pretrained)
from reward import REWARDS, extract_prediction
from rpt import Group, Method, head_chunk, ntp_step, option, rpt_step

STRIKES = 3  # steps in a row that may be skipped for a non-finite number before the run stops


@dataclass(frozen=True)
class Run:
    """Everything about a run that is not the method itself."""

    recipe: str = option("toy", "defaults for all other options", choices=("toy", "paper"))
    stage: str = option("rpt", "RPT, plain next-token prediction, or RL with verifiable rewards",
                        choices=("rpt", "ntp", "rlvr"))
    model: str = option("", "model directory or hub id to start from; recipe toy makes its own")
    corpus: str = option("", ".jsonl (text, or problem and solution; rlvr: problem and answer), .txt, or a folder")
    proxy: str = option("", "model whose entropy selects positions (default: --model)")
    out: str = option("runs/toy", "folder of the run")
    seed: int = option(0, "decides the order of the data and every sampled token")
    steps: int = option(100, "optimizer steps")
    reward: str = option("prefix", "reward function, by its name in reward.py", choices=REWARDS)
    selector: str = option("threshold", "which positions are asked about", choices=("threshold", "top", "random"))
    select: float = option(0.5, "selector threshold: nats; top, random: share of the positions")
    part: str = option("all", "ask everywhere, or only behind the problem of a document", choices=("all", "solution"))
    min_context: int = option(1, "tokens that precede a question, at least")
    holdout: int = option(200, "documents never trained on")
    optimizer: str = option("adamw", "AdamW, or Muon for the matrices of the blocks", choices=("adamw", "muon"))
    lr: float = option(1e-6, "learning rate; with Muon that of the matrices, the rest has 0.003")
    decay: float = option(0.0, "share of the steps, at the end, over which it falls to 0")
    weight_decay: float = option(0.01, "decoupled weight decay")
    beta2: float = option(0.999, "AdamW's second-moment decay")
    eval_every: int = option(0, "steps between evaluations on held-out questions; 0: only the toy's own table")
    eval_questions: int = option(500, "held-out questions of an evaluation")
    save_every: int = option(20, "steps between checkpoints")
    keep: int = option(2, "newest checkpoints kept")
    dtype: str = option("float32", "of the computation", choices=DTYPES)
    device: str = option("", "cpu or cuda (also for ROCm); default: the accelerator if there is one")
    shard_group: int = option(0, "processes that share one copy of the weights; 0: all (hybrid sharding otherwise)")
    checkpoint_activations: bool = option(False, "keep only the inputs of blocks and compute the rest again")
    compile: bool = option(False, "torch.compile the blocks and decoding: fewer kernels, after minutes of compilation")
    log_questions: int = option(-1, "questions of each step whose rollouts are logged, to bound the log; -1: all")
    show: int = option(0, "print this many rollouts of every step")
    plan: bool = option(False, "print what the run would take, without hardware, and stop")


@dataclass(frozen=True)
class Plan:
    """What --plan assumes about the machine and the text."""

    processes: int = option(0, "accelerators; 0: 1, 8 and 64")
    memory: int = option(0, "GB of each; 0: 80 and 192")
    tflops: float = option(400.0, "sustained TFLOP/s of each in matrix products")
    bandwidth: float = option(2000.0, "sustained GB/s of each one's memory")
    prompt_tokens: int = option(600, "mean length of a prompt")
    response_tokens: int = option(900, "mean length of a response")


RECIPES: dict[str, dict] = {
    "toy": dict(questions=32, max_prompt=256, max_response=64, template="toy", micro_tokens=8192, part="solution",
                lr=5e-4, weight_decay=0.0, beta2=0.99, steps=60, holdout=500),
    "paper": dict(lr=1e-6, steps=1000, dynamic_from=500, dtype="bfloat16", checkpoint_activations=True,
                  out="runs/paper", min_context=16, grad_clip=0.2),
}
STAGES = {"rlvr": dict(template="plain", reward="answer")}  # whatever the recipe
TOY_BASE = dict(stage="ntp", steps=600, questions=64, optimizer="muon", lr=0.015, decay=0.3, save_every=100)
TOY_MODEL = dict(model_type="qwen2", hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True)


def parse(argv: list[str] | None = None) -> tuple[Run, Method, Plan]:
    """The command line: one option per field of Run, Method and Plan, with the recipe's values as defaults."""
    pick = argparse.ArgumentParser(add_help=False)
    pick.add_argument("--recipe", default="toy")
    pick.add_argument("--stage", default="rpt")
    picked, _ = pick.parse_known_args(argv)
    recipe = RECIPES.get(picked.recipe, {}) | STAGES.get(picked.stage, {})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    kinds = {Run: "the run", Method: "the method", Plan: "what --plan assumes"}
    for kind, title in kinds.items():
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(kind):
            how = (dict(action=argparse.BooleanOptionalAction) if field.type is bool else
                   dict(type=field.type, choices=field.metadata.get("choices")))
            group.add_argument("--" + field.name.replace("_", "-"), default=recipe.get(field.name, field.default),
                               help=f"{field.metadata['help']} (%(default)r)", **how)
    values = vars(parser.parse_args(argv))
    if problem := check(argparse.Namespace(**values)):
        parser.error(problem)
    return tuple(kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)}) for kind in kinds)


def check(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, in one sentence, or None."""
    for name in ("questions", "max_prompt", "max_response", "updates", "micro_tokens", "max_rows", "steps",
                 "save_every", "keep", "holdout", "min_context", "eval_questions"):
        if getattr(args, name) < 1:
            return f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1"
    for name in ("seed", "max_refills", "eval_every", "show", "shard_group", "clip_low", "clip_high", "decay"):
        if not getattr(args, name) >= 0:
            return f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative"
    laws = {
        f"--group-size {args.group_size}: a group needs at least 2 responses to compare": args.group_size >= 2,
        f"--reward {args.reward}: questions with answers have no next token, use answer or format":
            args.stage != "rlvr" or args.reward not in ("prefix", "first-token", "dense", "conditional-dense", "gain"),
        f"--temperature {args.temperature}: must be above 0, a greedy policy has no gradient": args.temperature > 0,
        "--model is missing: a model directory or hub id":
            args.model or (args.recipe == "toy" and args.stage == "rpt" and not args.corpus),
        "--corpus is missing: a .jsonl or .txt file, or a folder of them": not args.model or args.corpus or args.plan}
    return next((sentence for sentence, kept in laws.items() if not kept), None)


# ---------------------------------------------------------------------------------------------- processes and shards


def start(run: Run) -> torch.device:
    """This process's device; joins the process group where there are several processes or the masters are sharded."""
    kind = run.device or (torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu")
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
    if kind != "cpu":
        torch.accelerator.set_device_index(device.index)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or run.dtype != "float32":
        store, rank, world = next(dist.rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
        # torchrun keeps its store when it restarts the processes, with the addresses of the dead in it
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return device


def shard_size(run: Run, world: int) -> int:
    """How many of the `world` processes share one copy of the weights."""
    if run.shard_group and world % run.shard_group:
        raise ValueError(f"--shard-group {run.shard_group} does not divide the {world} processes")
    return run.shard_group or world


def shard(model: Transformer, run: Run, device_type: str) -> None:
    """FSDP2: each block a group, embedding, final norm and head another; gradients are summed in float32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    world = dist.get_world_size()
    size = shard_size(run, world)
    shape, names = ((world,), ("shard",)) if size == world else ((world // size, size), ("replicate", "shard"))
    how = dict(mesh=init_device_mesh(device_type, shape, mesh_dim_names=names), mp_policy=MixedPrecisionPolicy(
        param_dtype=DTYPES[run.dtype], reduce_dtype=torch.float32, cast_forward_inputs=False))
    for block in model.model.layers:
        fully_shard(block, **how)
    fully_shard(model, **how, reshard_after_forward=False)  # the head is used after the forward
    for module in (model, *model.model.layers):  # the loss is divided by the tokens of all processes: never average
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def build(directory: Path, run: Run, device: torch.device) -> Transformer:
    """The model with float32 master weights, read from the files straight into this process's shards."""
    with torch.device("meta"):
        model = Transformer(read_config(directory))
    if dist.is_initialized():  # one process in float32 shards nothing: on the toy that would cost a fifth of a step
        shard(model, run, device.type)
    model.to_empty(device=device)
    load_weights(model, directory)
    for block in model.model.layers:
        block.checkpoint_activations = run.checkpoint_activations
    if run.compile:
        model.compile_blocks()
    return model


def make_optimizers(model: Transformer, run: Run) -> list[torch.optim.Optimizer]:
    """AdamW on everything, or Muon on the blocks' matrices and AdamW on the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2] if run.optimizer == "muon" else []
    chosen = set(map(id, matrices))
    rest, rate = [p for p in model.parameters() if id(p) not in chosen], 0.003 if matrices else run.lr
    adamw = torch.optim.AdamW([{"params": rest, "peak": rate}], betas=(0.9, run.beta2), weight_decay=run.weight_decay)
    muon = [{"params": matrices, "peak": run.lr}]
    return [adamw, torch.optim.Muon(muon, weight_decay=run.weight_decay)] if matrices else [adamw]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, run: Run) -> None:
    """A plateau at the peak, and a linear fall over the last `decay` of the steps."""
    fall = run.decay * run.steps
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak"] * (min(1.0, (run.steps - step) / fall) if fall else 1.0)


# ---------------------------------------------------------------------------------------------- the run's folder


@contextlib.contextmanager
def replacing(place: Path) -> Iterator[Path]:
    """A folder for all processes to write to, beside `place`, that takes its place when it is complete."""
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
    """Checkpoints and logs of one run. What is written is complete or invisible, whenever the process dies.

    A checkpoint has the checksums of its files. It remembers how long the logs were, so a resumed run cuts off what
    an interrupted one wrote after it, and writes the same again.
    """

    LOGS = ("metrics.jsonl", "rollouts.jsonl", "evals.jsonl")

    def __init__(self, path: Path, settings: dict):
        super().__init__()
        self.path, (self.rank, self.world) = path, rank_and_world()
        try:
            problem = self._claim(settings) if self.rank == 0 else None
        except OSError as error:
            problem = f"{path}: cannot be written ({error.strerror})"
        if problem := all_gather(problem)[0]:
            self.close()
            raise ValueError(problem)

    def _claim(self, settings: dict) -> str | None:
        """Locks the folder until this object is closed; what speaks against writing to it, or None."""
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = self.enter_context(open(self.path / "lock", "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return f"{self.path}: another run is writing to this folder"
        file = self.path / "run.json"
        if not file.exists():
            return write_json(file, settings)
        before = json.loads(file.read_text())
        changed = [f"{name} was {before.get(name)!r}, now {value!r}" for name, value in sorted(settings.items())
                   if before.get(name) != value and name not in FREE]
        if changed:
            return (f"{self.path} belongs to another configuration ({', '.join(changed)}); "
                    "choose another --out or delete it")

    def log(self, name: str, rows: list[dict]) -> None:
        """Appends rows to a log (first process only)."""
        if self.rank == 0 and rows:
            with open(self.path / name, "a") as out:
                out.write("".join(json.dumps(row) + "\n" for row in rows))

    def save(self, step: int, keep: int, strikes: int, *trained) -> None:
        """A checkpoint of what is `trained` (see training_state) after `step` steps; the newest `keep` stay."""
        import torch.distributed.checkpoint as dcp
        with replacing(self.path / "checkpoints" / f"step-{step:06d}") as aside:
            dcp.save(training_state(*trained), checkpoint_id=aside)
            mine = [*aside.glob(f"__{self.rank}_*"), *([aside / ".metadata"] if self.rank == 0 else [])]
            parts = all_gather({file.name: file_digest(file) for file in mine})
            if self.rank == 0:
                state = {"step": step, "strikes": strikes, "logs": {}, "files": dict(ChainMap(*parts))}
                for name in self.LOGS:
                    with open(self.path / name, "ab") as log:
                        os.fsync(log.fileno())
                        state["logs"][name] = log.tell()
                write_json(aside / "state.json", state)
        for old in sorted(self.path.glob("checkpoints/step-*"))[: -keep] if self.rank == 0 else []:
            shutil.rmtree(old)

    def resume(self, model: Transformer, optimizers: list, average: Transformer | None) -> tuple[int, int]:
        """Loads the newest intact checkpoint, cuts the logs to it; (steps done, strikes), (0, 0) without one."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict
        state = {"step": 0, "strikes": 0, "logs": dict.fromkeys(self.LOGS, 0)}
        for place in sorted(self.path.glob("checkpoints/step-*"), reverse=True):
            if problem := next(filter(None, all_gather(self._damage(place))), None):
                say(f"{place.name} is damaged ({problem}): using the one before it")
                continue
            state, stored = json.loads((place / "state.json").read_text()), training_state(model, optimizers, average)
            dcp.load(stored, checkpoint_id=place)
            set_state_dict(model, optimizers, model_state_dict=stored["model"], optim_state_dict=stored["optimizers"])
            say(f"{self.path}: going on after step {state['step']}")
            break
        for name, size in state["logs"].items() if self.rank == 0 else ():
            with open(self.path / name, "ab") as log:
                log.truncate(size)
        all_gather(None)
        return state["step"], state["strikes"]

    def _damage(self, place: Path) -> str | None:
        """What is wrong with a checkpoint's files; each process reads its share."""
        try:
            files = json.loads((place / "state.json").read_text())["files"]
            wrong = [name for name in sorted(files)[self.rank:: self.world] if file_digest(place / name) != files[name]]
        except (OSError, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        return f"checksum of {wrong[0]}" if wrong else None


FREE = ("steps", "save_every", "keep", "show", "log_questions", "eval_every", "plan", "device", "out", "micro_tokens",
        "max_rows", "cache_tokens", "shard_group", "checkpoint_activations",
        "compile")  # options that a resumed run may change


def training_state(model: Transformer, optimizers: list, average: Transformer | None) -> dict:
    """What a checkpoint holds: weights, moments, and the averaged weights if the reward needs them."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    weights, moments = get_state_dict(model, optimizers)
    return {"model": weights, "optimizers": moments} | ({"average": average.state_dict()} if average else {})


def file_digest(file: Path) -> str:
    """BLAKE2 of a file's content."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "blake2b").hexdigest()


def write_json(file: Path, value: object) -> None:
    """Writes a small file completely or not at all."""
    aside = file.with_name(file.name + ".new")
    with open(aside, "w") as out:
        json.dump(value, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(file)


def say(text: str) -> None:
    """Prints a line, once for all processes, without breaking a progress bar."""
    if rank_and_world()[0] == 0:
        tqdm.write(text)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that the first SIGTERM or SIGINT joins, as a request to stop after the step; a second one acts at once."""
    requests: list[int] = []

    def note(number: int, frame) -> None:
        requests.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.signal(each, note) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requests
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# ---------------------------------------------------------------------------------------------- stages


def rollout_rows(step: int, groups: list[Group], tokenizer: Tokenizer, limit: int) -> list[dict]:
    """What rollouts.jsonl says about a step, one row per response, of all processes; `limit`: see log_questions."""
    text = lambda content: None if content is None else content.decode(errors="backslashreplace")  # noqa: E731
    rows = [{"step": step, "question": list(g.number), "document": q.document, "position": q.position,
             "entropy": q.entropy if math.isfinite(q.entropy) else None,
             "context": text(tokenizer.bytes_of(q.context[-48:])), "truth": text(b"".join(q.truth[:4])),
             "response": text(response), "reward": reward, "prediction": text(extract_prediction(response)),
             "advantage": advantage, "finished": c.finished, "tokens": len(c.ids)}
            for g in groups if limit < 0 or g.number[1] < limit for q in [g.question] for response, reward, advantage, c
            in zip(g.responses, g.rewards, g.advantages, g.completions)]
    return sorted((row for part in all_gather(rows) for row in part), key=lambda row: row["question"])


def show(run: Run, step: int, rows: list[dict], metrics: dict, bar: tqdm) -> None:
    """Some of a step's rollouts, and its figures in the progress bar."""
    for row in rows[: run.show if run.show else step in (0, run.steps - 1)]:
        say(f"step {step}, a rollout:\n  ...{row['context'][-160:]!r}\n  truth {row['truth']!r}; reward "
            f"{row['reward']:g}, advantage {row['advantage']:+.2f}, {row['tokens']} tokens\n"
            f"  response {row['response']!r}")
    figures = {"reward": "reward", "accuracy": "accuracy", "length": "length", "loss": "loss", "gradient": "grad_norm"}
    speeds = {key: metrics["time"].get(f"{key}_tokens_per_s") for key in ("decode", "train")}
    bar.set_postfix({name: f"{metrics[key]:.3g}" for name, key in figures.items() if key in metrics}
                    | {key: f"{speed:,.0f} tok/s" for key, speed in speeds.items() if speed}, refresh=False)
    bar.update()


def train(run: Run, method: Method, source: Path, tokenizer: Tokenizer, device: torch.device, one_step: Callable,
          evaluate: Callable[[Transformer], dict] | None = None) -> Transformer:
    """The loop of every stage: learning rate, step, logs, checkpoint; the model, which is also exported.

    one_step(step, model, optimizers, average) gives groups and metrics; evaluate(model) a row of evals.jsonl.
    """
    with RunFolder(Path(run.out), dataclasses.asdict(run) | dataclasses.asdict(method)) as folder:
        model = build(source, run, device)
        average = build(source, run, device) if run.reward == "gain" and run.stage != "ntp" else None
        trained = model, make_optimizers(model, run), average
        begin, strikes = folder.resume(*trained)
        bar = tqdm(total=run.steps, initial=begin, desc=run.stage, unit="step", disable=folder.rank > 0,
                   mininterval=0.5)
        with stop_requests() as requests:
            for step in range(begin, run.steps):
                set_learning_rate(trained[1], step, run)
                groups, metrics = one_step(step, *trained)
                rows = rollout_rows(step, groups, tokenizer, run.log_questions)
                folder.log("rollouts.jsonl", rows)
                folder.log("metrics.jsonl", [{"step": step} | metrics])
                if evaluate and run.eval_every and (step + 1) % run.eval_every == 0:
                    folder.log("evals.jsonl", [{"step": step + 1} | evaluate(model)])
                show(run, step, rows, metrics, bar)
                strikes = strikes + 1 if metrics["skipped"] else 0
                if strikes:
                    say(f"step {step}: a loss, gradient or log-probability is not finite; "
                        "the weights stay as they were")
                if strikes == STRIKES:
                    raise FloatingPointError(
                        f"{STRIKES} steps in a row had a non-finite loss, gradient or log-probability: "
                        f"lower --lr; the last good checkpoint is in {folder.path}/checkpoints")
                stopping = max(all_gather(max(requests, default=0)))
                if stopping or (step + 1) % run.save_every == 0 or step + 1 == run.steps:
                    folder.save(step + 1, run.keep, strikes, *trained)
                if stopping:
                    name = signal.Signals(stopping).name
                    say(f"stopped by {name} after step {step}; the same command goes on from there")
                    sys.exit(128 + stopping)
        bar.close()
        export(model, tokenizer, Path(run.out) / "model")
    return model


def export(model: Transformer, tokenizer: Tokenizer, directory: Path) -> None:
    """The trained model as a Hugging Face directory, complete or absent."""
    with replacing(directory) as aside:
        save_pretrained(model, aside, tokenizer)
    say(f"model written to {directory}")


def ntp_stage(run: Run, method: Method, device: torch.device, runs: list[list[int]] | None = None) -> Transformer:
    """Next-token prediction on the training documents of a corpus, or on given runs in their order."""
    source = resolve(run.model)
    tokenizer = Tokenizer.from_dir(source)
    check_vocabulary(tokenizer, read_config(source).vocab_size, source)
    texts = runs or []
    if not runs:
        documents, _, _ = data.split_holdout(read_corpus(run.corpus), run.holdout, run.seed)
        for ids in tokenizer.encode_batch([document.text for document in documents]):
            ids = tokenizer.bos + ids + tokenizer.eos_ids[:1]
            texts += [ids[i: i + method.max_prompt] for i in range(0, len(ids), method.max_prompt)]
    if not any(len(ids) > 1 for ids in texts):
        raise ValueError(f"{run.corpus}: no document is left to train on beside {run.holdout} held-out ones")

    def batch(step: int) -> list[list[int]]:
        n = method.questions
        return runs[step * n: (step + 1) * n] if runs else [
            texts[i] for i in data.draw(len(texts), run.seed, step, 0, n)]

    return train(run, method, source, tokenizer, device, lambda step, model, optimizers, average: (
        [], ntp_step(model, optimizers, batch(step), method)))


def rl_stage(run: Run, method: Method, device: torch.device) -> tuple[Transformer, Tokenizer, list[Question]]:
    """RPT on the selected positions of a corpus (rpt), or on its questions and answers (rlvr)."""
    source = resolve(run.model)
    tokenizer = Tokenizer.from_dir(source)
    check_vocabulary(tokenizer, read_config(source).vocab_size, source)
    documents = read_corpus(run.corpus)
    if len(documents) <= run.holdout:
        raise ValueError(f"{run.corpus}: {len(documents)} documents, of which --holdout {run.holdout} "
                         "leaves none to train on")
    if run.stage == "rlvr":
        questions, held, table = data.answer_sets(tokenizer, documents, run.holdout, run.seed)
    else:
        questions, held, table = question_sets(
            tokenizer, documents, run.proxy or source, Path(run.out) / "cache", holdout=run.holdout,
            selector=run.selector, value=run.select, min_context=run.min_context, part=run.part, seed=run.seed,
            window=method.max_prompt, device=device, dtype=DTYPES[run.dtype])
    say(table)
    held = evaluation.subset(held, run.eval_questions, run.seed)

    def draw(step: int, retry: int) -> list[Question]:
        return [questions[n] for n in data.draw(len(questions), run.seed, step, retry, method.questions)]

    model = train(
        run, method, source, tokenizer, device,
        lambda step, model, optimizers, average: rpt_step(
            model, tokenizer, optimizers, draw, step, method, REWARDS[run.reward], run.seed, average),
        lambda model: evaluation.summary(evaluation.evaluate(model, tokenizer, held, method, seed=run.seed)))
    return model, tokenizer, held


def toy(run: Run, method: Method, device: torch.device) -> None:
    """The whole story in miniature: a world, a weak reasoner pre-trained on it, RPT, and the table of accuracies."""
    out, tokenizer = Path(run.out), data.toy_tokenizer()
    world, base = out / "world", dataclasses.replace(run, **{k: v for k, v in TOY_BASE.items() if k != "questions"},
                                                     model=str(out / "world" / "init"), out=str(out / "base"))
    if rank_and_world()[0] == 0 and not (world / "corpus.jsonl").exists():
        data.write_toy(world, run.seed)
    all_gather(None)
    documents = read_corpus(world / "corpus.jsonl")
    _, held, _ = data.split_holdout(documents, run.holdout, run.seed)
    if not (out / "base" / "model" / "config.json").exists():
        torch.manual_seed(run.seed)
        config = ModelConfig.from_dict(TOY_MODEL | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_ids[0]})
        export(Transformer(config), tokenizer, world / "init")
        ntp = dataclasses.replace(method, questions=TOY_BASE["questions"])
        texts = frozenset(document.text for document in held)
        stories = data.toy_stories(base.steps * ntp.questions, seed=1 + run.seed, exclude=texts)
        say(f"pre-training a weak base model on {len(stories):,} stories and thoughts, by next-token prediction")
        ntp_stage(base, ntp, device, data.toy_runs(tokenizer, stories, run.seed))
    say("reinforcement pre-training of the base model")
    run = dataclasses.replace(run, model=str(out / "base" / "model"), corpus=str(world / "corpus.jsonl"))
    model, tokenizer, questions = rl_stage(run, method, device)
    after = evaluation.evaluate(model, tokenizer, questions, method, seed=run.seed)
    before = evaluation.evaluate(build(resolve(run.model), run, device), tokenizer, questions, method, seed=run.seed)
    if rank_and_world()[0] == 0:
        write_json(out / "table.json", {"base": evaluation.summary(before), "rpt": evaluation.summary(after)})
    say(evaluation.growth(out / "metrics.jsonl"))
    say(evaluation.table({"base": before, "RPT": after}))


# ---------------------------------------------------------------------------------------------- the plan


def plan(run: Run, method: Method, machine: Plan) -> str:
    """Bytes of each process, work and time of a step, and what to change where it does not fit."""
    c = read_config(resolve(run.model))
    with torch.device("meta"):
        model = Transformer(c)
    lines = [f"{c.model_type}, {c.num_hidden_layers} layers, hidden {c.hidden_size}; {method.questions} questions x "
             f"{method.group_size} responses; prompts of {machine.prompt_tokens} and responses of "
             f"{machine.response_tokens} tokens on average; {machine.tflops:g} TFLOP/s, {machine.bandwidth:g} GB/s"]
    for processes in [machine.processes] if machine.processes else [1, 8, 64]:
        for memory in [machine.memory] if machine.memory else [80, 192]:
            lines += _plan_one(run, method, machine, model, processes, memory)
    return "\n".join(lines)


def _plan_one(run: Run, method: Method, machine: Plan, model: Transformer, processes: int, memory: int) -> list[str]:
    c, width, gb, usable = model.config, DTYPES[run.dtype].itemsize, 1e9, 0.92 * memory * 1e9
    whole = sum(p.numel() for p in model.parameters())
    mine = sum(-(-len(p) // shard_size(run, processes)) * p[0].numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    gathered = whole - (c.num_hidden_layers - 2) * block  # the root stays, and a block is fetched while one computes
    kv_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * width
    tokens = method.micro_tokens
    inner = tokens * (6 * c.hidden_size + 2 * c.num_attention_heads * c.head_dim + 4 * c.intermediate_size) * width
    kept = tokens * (c.hidden_size * width + kv_token / c.num_hidden_layers) if run.checkpoint_activations else inner
    parts = {
        "master weights": 4 * mine, "gradients": 4 * mine, "optimizer": 8 * mine, "rollout weights": width * whole,
        "gathered weights and gradients": 2 * width * gathered, "activations": c.num_hidden_layers * kept + inner,
        "logits and head gradient": 4 * c.vocab_size * (4 * head_chunk(c.vocab_size) + c.hidden_size)}
    fixed = parts["master weights"] + parts["optimizer"] + parts["rollout weights"]
    training = sum(parts.values()) - parts["rollout weights"]
    rows = min(method.max_rows, -(-method.questions * method.group_size // processes))
    worst = rows * method.max_response + -(-rows // method.group_size) * method.max_prompt
    cache = min(worst, method.cache_tokens or worst)
    out = [f"\n{processes} x {memory} GB, GB per process: " + ", ".join(f"{k} {v / gb:.1f}" for k, v in parts.items()),
           f"  rollout {(fixed + cache * kv_token) / gb:.1f} with a KV cache of {cache * kv_token / gb:.1f} "
           f"({cache:,} tokens); training {training / gb:.1f}"]
    if usable - fixed < kv_token * (method.max_prompt + method.max_response):
        out.append("  DOES NOT FIT: weights and optimizer leave no room for a KV cache: more processes, accelerators "
                   "with more memory, or a smaller model")
    elif cache * kv_token > usable - fixed:
        cache = int((usable - fixed) / kv_token) // 1000 * 1000
        out.append(f"  DOES NOT FIT as it is: --cache-tokens {cache} makes the rollout fit")
    if training > usable:
        less = max(1024, int(tokens * (1 - (training - usable) / parts["activations"])))
        fits = training - parts["activations"] * (1 - less / tokens) < usable
        out.append("  DOES NOT FIT: training needs " + (f"--micro-tokens {less // 1024 * 1024}" if fits else
                   ("" if run.checkpoint_activations else "--checkpoint-activations or ") + "more processes"))
    share, group = method.questions / processes, method.group_size
    prompt, response = machine.prompt_tokens, machine.response_tokens
    prefill = share * forward_flops(c, prompt, prompt / 2)
    decode = share * group * forward_flops(c, response, prompt + response / 2)
    learn = (4 if run.checkpoint_activations else 3) * method.updates * (prefill + decode)
    live = max(1, min(rows, cache // (response + prompt // group + 1)))
    read = share * group * response / live * (width * whole + live * kv_token * (prompt / group + response / 2))
    seconds = [prefill / machine.tflops / 1e12, max(decode / machine.tflops / 1e12, read / machine.bandwidth / 1e9),
               learn / machine.tflops / 1e12]
    return [*out, f"  a step: {method.questions * (prompt + group * response):,} tokens, "
            f"{processes * (prefill + decode + learn):.2e} FLOP; about {sum(seconds):,.0f} s "
            f"(prefill {seconds[0]:,.0f}, decode {seconds[1]:,.0f} with {live} rows at a time, "
            f"training {seconds[2]:,.0f} if every group is informative)"]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    run, method, machine = parse(argv)
    from torch.distributed.checkpoint.api import CheckpointException  # see model.py
    warnings.filterwarnings("ignore", module="torch.distributed")  # that there is one process is no news
    try:
        if run.plan:
            return print(plan(run, method, machine))
        device = start(run)
        if not run.model:
            toy(run, method, device)
        elif run.stage == "ntp":
            ntp_stage(run, method, device)
        else:
            rl_stage(run, method, device)
    except torch.OutOfMemoryError as error:
        sys.exit(f"train.py: error: out of memory ({str(error).splitlines()[0]}): lower --micro-tokens, --max-rows or "
                 "--cache-tokens; the same command goes on from the last checkpoint")
    except (ValueError, OSError, FloatingPointError, CheckpointException) as error:
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        all_gather(None)  # everyone is done: leave at once, for now and then torch's threads abort the teardown
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
