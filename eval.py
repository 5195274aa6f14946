"""Evaluation: the measurements of the paper's tables and figures, each with an interval.

    python eval.py runs/toy                          a run, on what it was never trained on
    python eval.py MODEL --corpus FILE --samples 8   any model, with majority vote and pass@8
    python eval.py MODEL --answers FILE              problems with answers, such as GSM8K

The options are train.py's, because an evaluation is what a run of no steps does.

First the entropy of text under a proxy model, from which questions are chosen (paper, section 3.2);
then the measurements on a model; then the statistics, which need numpy alone.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Corpus, Question, Tokenizer, read_json
from model import (DTYPES, Transformer, all_gather, is_first, load_pretrained, pad,
                   rank_and_world, resolve, unsharded)
from reward import REWARDS, extract_prediction, prefix_match, value
from rpt import Group, Method, Policy, option, pack, rollout

SPLITS = {"easy": 0.5, "medium": 1.0, "hard": 1.5}  # entropy above, in nats; nested (table 1)
BATCH_TOKENS = 16384  # padded, of a forward pass without gradient
EVALUATION = 2**20  # stands for the step in the random keys of an evaluation
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
DEVICE = "cpu" if ACCELERATOR is None or ACCELERATOR.type == "mps" else ACCELERATOR.type


@dataclass(frozen=True)
class Task(Method):
    """What a model is asked, during training and afterwards."""

    model: str = option("", "model directory or hub id")
    corpus: str = option("", ".jsonl or .txt, a folder of them, or a dataset of the hub")
    answers: str = option("", "files of problems with answers, separated by commas, to be asked at "
                              "each evaluation")
    proxy: str = option("", "model whose entropy selects positions (default: the model itself)")
    min_entropy: float = option(0.5, "nats above which a position is asked about", least=0)
    region: str = option("all", "ask everywhere, or only in the solution or response of a document",
                         choices=("all", "solution"))
    min_context: int = option(1, "tokens that precede a question, at least")
    holdout: int = option(200, "documents never trained on", least=0)
    eval_questions: int = option(500, "questions of each kind in an evaluation", least=0)
    samples: int = option(1, "responses to each; above 1 also majority vote and pass@k")
    seed: int = option(0, "decides the order of the data and every sampled token", least=0)
    date: str = option("", "YYYY-MM-DD, for chat templates that show it (default: when it began)")
    dtype: str = option("float32", "of the computation; on a CPU without AVX-512 bfloat16 is slow",
                        choices=("float32", "bfloat16"))
    device: str = option(DEVICE, "cuda is also ROCm's name", choices=("cpu", DEVICE))
    cache: str = option("runs/cache", "folder of the entropies")


# --------------------------------------------------------------------------------------- entropy


def fingerprint(*parts) -> str:
    """Return a short name for the content of some arrays or bytes."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def corpus_entropy(task: Task, corpus: Corpus) -> np.ndarray:
    """Return the entropy of each token of the corpus under the proxy, float32 [N], in nats.

    It is measured once for all runs, because the file is named by the content of what is measured.
    """
    directory = resolve(task.proxy)
    proxy = Tokenizer(directory)
    if any(proxy.token_bytes(id) != corpus.tokenizer.token_bytes(id)
           for id in np.unique(corpus.tokens).tolist()):
        raise ValueError(f"{directory}: to this proxy some tokens of the corpus mean other bytes; "
                         "use one that shares the policy's tokens")
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    about = [hashlib.file_digest(open(file, "rb"), "blake2b").digest() for file in files]
    about += [corpus.tokens, corpus.starts, f"{corpus.tokenizer.bos} {task.dtype}".encode()]
    file = Path(task.cache) / f"entropy-{fingerprint(*about)}.npy"
    if not all_gather(file.exists())[0]:
        model = load_pretrained(directory, task.device, DTYPES[task.dtype])
        values = entropies(model, corpus)
        if is_first():
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(aside := file.with_suffix(f".{os.getpid()}.npy"), values)
            aside.rename(file)
        all_gather(None)
    return np.load(file)


@torch.no_grad()
def entropies(model: Transformer, corpus: Corpus) -> np.ndarray:
    """Return the entropy of each token given what precedes it, float32 [N]; nan where nothing does.

    It is over the 16 most probable tokens, renormalized: at most ln 16 = 2.77 nats. Processes
    share the documents.
    """
    (rank, world), lengths = rank_and_world(), np.diff(corpus.starts)
    values = np.full(len(corpus.tokens), np.nan, np.float32)
    mine = range(rank, len(lengths), world)
    batches = pack(mine, lambda document: lengths[document], BATCH_TOKENS, padding=1.0)
    for batch in tqdm(batches, "entropy", disable=rank > 0):
        texts = [[*([] if corpus.is_chat[d] else corpus.tokenizer.bos), *corpus.ids(d)]
                 for d in batch]
        for d, text, hidden in zip(batch, texts, model(pad(texts, model.head.device))):
            logits = [model.logits(h).topk(16).values for h in hidden[: len(text) - 1].split(512)]
            found = torch.special.entr(torch.cat(logits).softmax(-1)).sum(-1)
            end = corpus.starts[d + 1]
            values[end - len(found): end] = found.cpu()
    for part in all_gather(values):
        np.copyto(values, part, where=np.isfinite(part))
    return values


# ---------------------------------------------------------------------------------- measurements


def evaluate(policy: Policy, questions: Sequence[Question], task: Task,
             exam: Callable | None = None) -> list[dict]:
    """Return a record of each question: what task.samples reasoned responses earn, and whether
    standard prediction, plain argmax, is right.

    exam: a reward (default: the next token or the answer is right). Every process calls this and
    gets all records.
    """
    exam = exam or REWARDS["prefix" if questions[0].truth else "answer"]
    (rank, world), records = rank_and_world(), []
    mine = {(EVALUATION, 0, n): questions[n] for n in range(rank, len(questions), world)}
    with unsharded(policy.model):
        for group in rollout(policy, mine, replace(task, group_size=task.samples), exam, task.seed):
            records.append(record(group, policy.tokenizer))
            if truth := group.question.truth:
                token = int(policy.next_logits(group.question).argmax())
                records[-1]["standard"] = prefix_match(policy.tokenizer.token_bytes(token), truth)
    return gather_records(records)


def examine(policy: Policy, exams: dict[str, tuple[Sequence[Question], Task]], step: int,
            out: Path) -> dict[str, dict]:
    """Log the records of each exam to records.jsonl; returns their summaries."""
    found = {}
    for name, (questions, task) in exams.items():
        if questions:
            records = evaluate(policy, questions, task)
            log(out / "records.jsonl", step, *({"exam": name} | record for record in records))
            found[name] = summary(records)
    return found


def gather_records(records: list[dict]) -> list[dict]:
    """Return the records of all processes in the order of their questions."""
    return sorted((r for part in all_gather(records) for r in part), key=lambda r: r["question"])


def record(group: Group, tokenizer: Tokenizer) -> dict:
    """Describe a question and the responses to it: a line of rollouts.jsonl or records.jsonl."""
    question, completions = group.question, group.completions
    predictions = [extract_prediction(response) if c.finished else None
                   for response, c in zip(group.responses, completions)]
    return {"question": group.number, "document": question.document,
            "position": question.position, "entropy": question.entropy,
            "context": to_text(tokenizer.bytes_of(question.context[-48:])),
            "truth": question.answer or to_text(b"".join(question.truth[:4])),
            "rewards": group.rewards, "predictions": list(map(to_text, predictions)),
            "responses": list(map(to_text, group.responses)), "kept": group.kept,
            "finished": [c.finished for c in completions], "prompt_tokens": len(group.prompt),
            "tokens": [len(c.ids) for c in completions]}


def log(file: Path, step: int, *rows: dict) -> None:
    """Append rows about a step to a log (rank 0 only)."""
    if is_first():
        try:
            with open(file, "a") as out:
                for row in rows:
                    out.write(json.dumps({"step": step} | row, allow_nan=False) + "\n")
        except OSError as error:
            sys.exit(f"train.py: error: {file} cannot be written ({error}); the same command goes "
                     "on from the last checkpoint")


def to_text(content: bytes | None) -> str | None:
    """Return bytes in a form that JSON can hold."""
    return None if content is None else content.decode(errors="backslashreplace")


# ------------------------------------------------------------------------------------ statistics


@lru_cache(4)  # many measures have the same clusters, and drawing is slow
def resample(clusters: int, resamples: int) -> np.ndarray:
    """Return how often each resample holds each cluster [resamples, clusters]."""
    return np.random.default_rng(0).multinomial(clusters, [1 / clusters] * clusters, resamples)


def bootstrap_interval(values: Sequence[float], clusters: Sequence[int],
                       resamples: int = 2000) -> tuple[float, float, float]:
    """Return (mean, low, high) of values [N], low and high by the 95 % percentile bootstrap.

    Whole clusters are resampled, because positions of one document are not independent. Every value
    weighs the same. With few clusters the interval is too narrow; with one it has no width.
    """
    _, member = np.unique(clusters, return_inverse=True)  # [N]
    sums, counts = np.bincount(member, weights=values), np.bincount(member)  # [clusters]
    drawn = resample(len(sums), resamples)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [0.025, 0.975])
    return float(np.mean(values)), float(low), float(high)


def measures(record: dict) -> dict[str, float]:
    """Return what one record says, as means over its responses."""
    rewards, said = record["rewards"], record["predictions"]
    found = {"standard": record.get("standard"), "reasoning": np.mean(rewards),
             "parsed": np.mean([prediction is not None for prediction in said]),
             "length": np.mean(record["tokens"])}
    if len(rewards) > 1:
        # Spellings of an answer vote together, but next tokens must be equal byte for byte.
        same = value if record["entropy"] is None else str
        votes = [None if prediction is None else same(prediction) for prediction in said]
        winner = Counter(vote for vote in votes if vote is not None).most_common(1)
        found["majority vote"] = rewards[votes.index(winner[0][0])] if winner else 0.0
        found[f"pass@{len(rewards)}"] = max(rewards)
    return {name: float(x) for name, x in found.items() if x is not None}


def summary(records: Sequence[dict]) -> dict:
    """Return for each split its number of questions and (mean, low, high) of each measure."""
    splits, out = SPLITS if records[0]["entropy"] is not None else {"all": -1.0}, {}
    for split, nats in splits.items():
        chosen = [record for record in records if (record["entropy"] or 0.0) > nats]
        rows, documents = list(map(measures, chosen)), [record["document"] for record in chosen]
        out[split] = {"questions": len(rows)} | {
            name: bootstrap_interval([row[name] for row in rows], documents)
            for name in (rows[0] if rows else ())}
    return out


def table(models: dict[str, dict], title: str = "accuracy") -> str:
    """Format summaries by model name in the form of the paper's tables."""
    splits = next(iter(models.values()))
    rows = [["", *(f"{split} ({of['questions']})" for split, of in splits.items())]]
    names = (name for each in models.values() for of in each.values() for name in of)
    for name in list(dict.fromkeys(names))[1:]:
        for model, of in models.items():
            factor = 1 if name == "length" else 100
            cells = (show_interval(split.get(name), factor) for split in of.values())
            rows.append([f"{model}, {name}", *cells])
    lines = [f"{name:26}" + "".join(f"{cell:>22}" for cell in cells) for name, *cells in rows]
    return "\n".join([f"{title} in %, length in tokens, with 95 % intervals", *lines])


def show_interval(interval: Sequence[float] | None, factor: float = 1.0, digits: int = 1) -> str:
    """Format (mean, low, high) as mean [low, high]; "-" if it was not measured."""
    if interval is None:
        return "-"
    mean, low, high = (f"{factor * x:.{digits}f}" for x in interval)
    return f"{mean} [{low}, {high}]"


def growth(folder: Path) -> str:
    """Format how reward and length went in a run, and what it knew before and after."""
    rows, evals = ([json.loads(line) for line in (folder / name).read_text().splitlines()]
                   for name in ("metrics.jsonl", "evals.jsonl"))
    rows, lines = [row for row in rows if "reward" in row], []
    some = [rows[round(n)] for n in np.linspace(0, len(rows) - 1, min(9, len(rows)))]
    for name in ("step", "reward", "length") if rows else ():
        lines.append(f"{name:>10}" + "".join(f"{row[name]:8.4g}" for row in some))
    for exam in list(evals[0])[1:]:
        ends = {f"step {row['step']}": row[exam] for row in (evals[0], evals[-1])}
        lines.append(table(ends, exam))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- command line


def parser_of(kind: type, description: str) -> argparse.ArgumentParser:
    """Return a parser with an option for each field that rpt.option made."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(kind):
        how = {"type": field.type} | field.metadata
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction, "help": how["help"]}
        elif field.type in (int, float):
            least = how.pop("least", 1 if field.type is int else 1e-9)
            how["type"] = partial(number_of, field.type, least)
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **how)
    return parser


def number_of(kind: type, least: float, text: str) -> float:
    """Read a finite number of at least `least`."""
    if not least <= (number := kind(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least {least}")
    return number


def main() -> None:
    """Run the command line. What run.json says replaces the defaults."""
    import train  # which imports this module
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    run = read_json(folder / "run.json")
    run.pop("device", None)  # it may be another machine's
    model, out = (folder / "model", folder / "eval") if run else (folder, "runs/eval")
    train.main([f"--model={model}", f"--out={out}", "--steps=0", *options], defaults=run)


if __name__ == "__main__":
    main()
