"""Evaluation: the measurements of the paper's tables and figures, each with an interval.

    python eval.py runs/toy                                a run, on what it was never trained on
    python eval.py MODEL_DIR --corpus FILE                 next-token accuracy of any model
    python eval.py MODEL_DIR --corpus FILE --perplexity    its perplexity, on held-out documents
    python eval.py MODEL_DIR --answers FILE --samples 4    questions with answers, such as GSM8K
    python eval.py MODEL_DIR --choices FILE                multiple choice, in MMLU-Pro's format

First the entropy of text under a proxy model, from which questions are chosen (paper, section 3.2);
then the measurements on a model; then the statistics, which need numpy alone.
"""

import argparse
import fcntl
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import (DROPPED, HELD_OUT, TRAIN, Corpus, PositionFilter, Question, QuestionSet,
                  Tokenizer, answer_sets, check_same_tokens, check_vocabulary, file_rows,
                  fingerprint, load_corpus, prompt_ids, read_corpus, select_positions)
from model import (DTYPES, ModelConfig, Transformer, all_gather, choose_device, load_pretrained,
                   rank_and_world, read_config, read_json, resolve, unsharded)
from reward import answer_match, extract_prediction, prefix_match
from rpt import Method, Policy, option, token_logprobs
from sampler import generate, last_hidden, pad

SPLITS = {"easy": 0.5, "medium": 1.0, "hard": 1.5}  # entropy above, in nats; nested (table 1)
BATCH_TOKENS = 16384  # padded, of a forward pass without gradient
PART_WINDOWS = 256  # of each process between two writes of the entropy pass

# --------------------------------------------------------------------------------------- entropy


@dataclass(frozen=True)
class Proxy:
    """The model whose entropies select positions, and how it reads."""

    model: str | Path  # directory or hub id
    cache: Path  # folder of the entropies, shared by all runs
    window: int  # tokens; a longer document is read in windows
    device: torch.device
    dtype: torch.dtype


def question_sets(corpus: Corpus, proxy: Proxy,
                  filter: PositionFilter) -> tuple[QuestionSet, QuestionSet, str]:
    """The questions to train on, those of held-out documents (entropy above 0.5 nats, elsewhere the
    same filter), and a table of what was kept. ValueError if nothing is left to ask."""
    lengths, documents = np.diff(corpus.starts), np.bincount(corpus.split, minlength=3)
    if lengths.max() <= filter.min_context:
        raise ValueError(f"no document is longer than --min-context {filter.min_context} tokens")
    entropy = corpus_entropy(proxy, corpus)
    easy = replace(filter, kind="threshold", value=SPLITS["easy"])
    train = select_positions(corpus, entropy, filter, TRAIN)
    held = select_positions(corpus, entropy, easy, HELD_OUT)
    splits = [f"{np.sum(entropy[held.positions] > nats):,} above {nats}"
              for nats in SPLITS.values()]
    text = (f"documents: {documents[TRAIN]:,} to train on, {documents[HELD_OUT]:,} held out, "
            f"{documents[DROPPED]:,} near-duplicates dropped; {len(entropy):,} tokens\n"
            f"questions: {len(train):,} by {filter.kind} {filter.value:g} in {filter.region}; "
            f"held out {', '.join(splits)} nats")
    if documents[TRAIN] and not len(train):
        raise ValueError(f"no position is left to ask about\n{text}")
    return train, held, text


def corpus_entropy(proxy: Proxy, corpus: Corpus) -> np.ndarray:
    """Entropy of each token of the corpus under the proxy: float32, nats, aligned with its tokens.

    Measured once for all runs: the file in the proxy's cache is named by the content of what
    matters. ValueError if the proxy's ids mean something else.
    """
    directory = resolve(proxy.model)
    check_same_tokens(corpus.tokenizer, Tokenizer.from_dir(directory), directory)
    longest = min(proxy.window, int(np.diff(corpus.starts).max())) + len(corpus.tokenizer.bos)
    check_length(read_config(directory), longest, f"{directory}: a window of the corpus")
    name = all_gather(rank_and_world()[0] == 0 and fingerprint(
        *sorted(directory.glob("*.safetensors")), directory / "config.json", corpus.fingerprint,
        corpus.tokenizer.bos, proxy.window, proxy.dtype))[0]
    return measure_entropy(lambda: load_pretrained(directory, proxy.device, proxy.dtype), corpus,
                           proxy.cache / f"entropy-{name}.f32", proxy.window)


def measure_entropy(load: Callable[[], Transformer], corpus: Corpus, file: Path,
                    window: int) -> np.ndarray:
    """The entropies in `file`, which is measured first if it is not there or of a wrong length.

    One process holds the lock, and looks only then. What it measures is written beside the file, in
    the order of the corpus, so an interrupted pass goes on where it was, and it takes the file's
    name when it is complete. nan where no token precedes.
    """
    first, part = rank_and_world()[0] == 0, file.with_suffix(".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "a") as lock:
        while not all_gather(not first or locked(lock))[0]:  # nobody waits longer than a second
            time.sleep(1)
        there = first and file.exists() and file.stat().st_size == 4 * len(corpus.tokens)
        if not all_gather(there)[0]:
            entropy_pass(load(), corpus, part, window)
            if first:
                part.rename(file)
            all_gather(None)
    return np.memmap(file, np.float32, mode="r")


def locked(lock: TextIO) -> bool:
    """Takes the lock on an open file unless somebody has it; closing the file gives it back."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def entropy_pass(model: Transformer, corpus: Corpus, part: Path, window: int) -> None:
    """Writes the entropies that `part` lacks, some windows at a time: the same ones after an
    interruption, so that they round alike."""
    done = all_gather(part.stat().st_size // 4 if part.exists() else 0)[0]
    done = done if done <= len(corpus.tokens) else 0
    (rank, world), every = rank_and_world(), windows(corpus, range(len(corpus.starts) - 1), window)
    with tqdm(total=len(corpus.tokens), initial=done, unit="tok", unit_scale=True, desc="entropy",
              disable=rank > 0) as bar:
        while pieces := list(islice(every, PART_WINDOWS * world)):
            if pieces[-1].end <= done:
                continue
            values = window_values(model, corpus, pieces, next_token_entropy, bar)
            if rank == 0:
                with open(part, "r+b" if part.exists() else "wb") as out:
                    out.seek(4 * pieces[0].want)
                    out.write(np.concatenate(values).tobytes())
                    out.truncate()  # nothing stands behind what was measured
                    os.fsync(out.fileno())
            bar.update(pieces[-1].end - bar.n)


class Window(NamedTuple):
    """A stretch of a document, by indices of the corpus's tokens."""

    document: int
    begin: int
    want: int  # what precedes is only read
    end: int


def windows(corpus: Corpus, documents: Sequence[int], window: int) -> Iterator[Window]:
    """Each document in windows of at most `window` tokens that overlap by half."""
    for document in documents:
        start, stop = map(int, corpus.starts[document: document + 2])
        ends = [*range(start + window, stop, max(window // 2, 1)), stop]
        for want, end in zip([start, *ends], ends):
            yield Window(document, max(start, end - window), want, end)


@torch.no_grad()
def window_values(model: Transformer, corpus: Corpus, pieces: Sequence[Window], measure: Callable,
                  bar: tqdm | None = None) -> list[np.ndarray]:
    """A figure of each wanted token of each window, float32; nan where no token precedes.

    measure(model, ids [B, T]) -> [B, T] says it of the token *after* each. Every process computes
    its share and gets all.
    """
    (rank, world), mine = rank_and_world(), {}
    own = range(len(pieces))[rank::world]
    for batch in batches({n: pieces[n].end - pieces[n].begin for n in own}):
        ids = [corpus.tokens[pieces[n].begin: pieces[n].end].tolist() for n in batch]
        bos = [[] if corpus.is_chat[pieces[n].document] else corpus.tokenizer.bos for n in batch]
        padded = pad([[*b, *i] for b, i in zip(bos, ids)], model.head.device)
        rows = measure(model, padded).float().cpu().numpy()
        rows = np.pad(rows, ((0, 0), (1, 0)), constant_values=np.nan)  # of the token at, not after
        for n, b, i, row in zip(batch, bos, ids, rows):
            mine[n] = row[len(b):][pieces[n].want - pieces[n].begin: len(i)]
            if bar is not None:
                bar.update(world * len(mine[n]))
    values = {n: row for share in all_gather(mine) for n, row in share.items()}
    return [values[n] for n in range(len(pieces))]


def batches(lengths: dict[int, int]) -> Iterator[list[int]]:
    """Keys of like length, longest first, in batches of at most BATCH_TOKENS padded tokens."""
    order = sorted(lengths, key=lambda n: -lengths[n])
    while order:
        size = max(1, BATCH_TOKENS // max(lengths[order[0]], 1))
        yield order[:size]
        order = order[size:]


def next_token_entropy(model: Transformer, ids: Tensor, top_k: int = 16) -> Tensor:
    """ids [B, T] -> [B, T]: entropy in nats of the token after each position.

    Over the model's `top_k` most probable tokens, renormalised; of a uniform top 16 it is
    ln 16 = 2.77. The head is applied to 512 positions at a time: with 152 thousand tokens those
    logits already take 300 MB.
    """
    top_k, hidden = min(top_k, model.config.vocab_size), model(ids).flatten(0, 1)
    logits = torch.cat([model.logits(h).topk(top_k).values for h in hidden.split(512)])
    return torch.special.entr(logits.softmax(-1)).sum(-1).view(ids.shape)


def next_token_loss(model: Transformer, ids: Tensor) -> Tensor:
    """ids [B, T] -> [B, T]: -log P in nats of the token after each position; 0 after the last."""
    logprobs, _ = token_logprobs(model, model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return torch.nn.functional.pad(-logprobs.view(len(ids), -1), (0, 1))


def check_length(config: ModelConfig, tokens: int, what: str) -> None:
    """ValueError if a model has fewer positions than it would be given tokens."""
    if tokens > config.max_position_embeddings:
        raise ValueError(f"{what} has up to {tokens:,} tokens, but the model only "
                         f"{config.max_position_embeddings:,} positions; lower --max-prompt or "
                         "--max-response")


# ---------------------------------------------------------------------------------- measurements


def subset(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """`count` of the questions, the same for every model, in their order."""
    chosen = np.random.default_rng([seed, 11]).permutation(len(questions))[:count]
    return [questions[int(n)] for n in sorted(chosen)]


def evaluate(policy: Policy, questions: Sequence[Question], method: Method, samples: int = 1,
             seed: int = 0, out: TextIO | None = None, progress: bool = False) -> list[dict]:
    """One record a question: whether standard prediction is right, where there is a next token, and
    what `samples` reasoned responses say, sampled at the method's temperature.

    Every process calls it and gets all records. They are also written to `out`, a JSON line each,
    as they come: whenever each process has decoded four times `max_rows` responses.
    """
    (rank, world), records = rank_and_world(), []
    some = max(1, 4 * method.max_rows // samples) * world
    with unsharded(policy.model):
        for begin in range(0, len(questions), some):
            numbers = range(begin, min(begin + some, len(questions)))
            mine = records_of(policy, {n: questions[n] for n in numbers[rank::world]}, method,
                              samples, seed, progress and rank == 0)
            found = {record["question"]: record for share in all_gather(mine) for record in share}
            records += [found[n] for n in numbers]
            if out and rank == 0:
                write_records(records[begin:], out)
    return records


def write_records(records: Sequence[dict], out: TextIO) -> None:
    """Appends JSON lines."""
    out.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
    out.flush()


def records_of(policy: Policy, questions: dict[int, Question], method: Method, samples: int,
               seed: int, progress: bool) -> list[dict]:
    """The records of questions by number, which decides with the seed what is sampled."""
    tokenizer, records = policy.tokenizer, []
    prompts = [prompt_ids(tokenizer, question, method.template, method.max_prompt)
               for question in questions.values()]
    groups = generate(
        policy.model, prompts, keys=[1 << 60 | n for n in questions], progress=progress,
        samples=samples, max_new_tokens=method.max_response, temperature=method.temperature,
        eos_ids=tokenizer.eos_ids, seed=seed, max_rows=method.max_rows,
        cache_tokens=method.cache_tokens or None)
    standard = standard_predictions(policy, questions.values(), method.max_prompt)
    for (n, question), group, token in zip(questions.items(), groups, standard):
        responses = [tokenizer.bytes_of(c.ids[:-1] if c.finished else c.ids) for c in group]
        said = [extract_prediction(r) if c.finished else None for r, c in zip(responses, group)]
        record = {"question": n, "document": question.document, "position": question.position,
                  "truth": question.answer or text(b"".join(question.truth[:4])),
                  "reasoning": [score(prediction, question) for prediction in said],
                  "vote": score(majority_vote(said), question),
                  "parsed": [float(prediction is not None) for prediction in said],
                  "length": [len(c.ids) for c in group], "responses": list(map(text, responses))}
        if question.answer is None:
            record["standard"] = score(token, question)
        if math.isfinite(question.entropy):
            record["entropy"] = question.entropy
        records.append(record)
    return records


def text(content: bytes) -> str:
    """Bytes as JSON can hold them."""
    return content.decode(errors="backslashreplace")


def standard_predictions(policy: Policy, questions: Sequence[Question], window: int) -> list[bytes]:
    """Plain next-token prediction (argmax) at each question: the bytes of the predicted token.

    A context beyond `window` tokens loses its beginning, as a prompt's does.
    """
    contexts = [[*policy.tokenizer.bos, *question.context[-window:]] for question in questions]
    return list(map(policy.tokenizer.token_bytes, likeliest(policy.model, contexts)))


@torch.no_grad()
def likeliest(model: Transformer, contexts: Sequence[Sequence[int]],
              allowed: Sequence[Sequence[int]] | None = None) -> list[int]:
    """The likeliest token after each context; of those that it allows, if so, the index."""
    found = [0] * len(contexts)
    for batch in batches({n: len(context) for n, context in enumerate(contexts)}):
        logits = model.logits(last_hidden(model, [contexts[n] for n in batch]))
        for n, row in zip(batch, logits):
            found[n] = int((row if allowed is None else row[allowed[n]]).argmax())
    return found


def score(prediction: bytes | None, question: Question) -> float:
    """1 if a prediction is right: it is the question's answer, or else a prefix of the truth that
    ends with one of its tokens. So too for standard prediction, whose token may span two."""
    if question.answer is not None:
        return answer_match(prediction, question.answer)
    return prefix_match(prediction, question.truth)


def answer_questions(file: str, tokenizer: Tokenizer) -> list[Question]:
    """Problem and answer rows, such as GSM8K's, as questions, none without a file; a ValueError for
    a row without answer."""
    return answer_sets(file, tokenizer, holdout=0, seed=0)[0] if file else []


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question."""

    question: str
    options: tuple[str, ...]
    answer: int  # index of the right option

    @property
    def prompt(self) -> str:
        """The question and its options, a line each: (A) ..."""
        lines = [f"({letter}) {option}" for letter, option in zip(ascii_uppercase, self.options)]
        return "\n".join([self.question, *lines])


def read_choices(file: str) -> list[Choice]:
    """JSON lines in MMLU-Pro's format: question, options, answer_index; none without a file. A
    ValueError names file and line."""
    choices = []
    for row, where in file_rows(Path(file)) if file else ():
        row = row if isinstance(row, dict) else {}
        question, options, answer = map(row.get, ("question", "options", "answer_index"))
        if not (isinstance(question, str) and isinstance(options, list) and type(answer) is int
                and 0 <= answer < len(options) <= len(ascii_uppercase)):
            raise ValueError(f"{where}: expected question, options (at most 26) and answer_index")
        choices.append(Choice(question, tuple(map(str, options)), answer))
    return choices


def multiple_choice(policy: Policy, choices: Sequence[Choice], method: Method, samples: int = 1,
                    seed: int = 0, out: TextIO | None = None,
                    progress: bool = False) -> list[dict]:
    """Zero-shot (paper, table 3): `standard`, the likeliest letter behind "Answer:"; `reasoning`,
    the boxed letter. Records as of `evaluate`."""
    tokenizer = policy.tokenizer
    letters = [tokenizer.encode_inside(f" {letter}") for letter in ascii_uppercase]
    last = [ids[-1] for ids in letters]  # what comes before it, if anything, is the same for all
    prompts = [tokenizer.bos + tokenizer.encode(choice.prompt + "\nAnswer:") + letters[0][:-1]
               for choice in choices]
    with unsharded(policy.model):
        found = likeliest(policy.model, prompts, [last[: len(c.options)] for c in choices])
    questions = [Question(tuple(tokenizer.encode(choice.prompt)), (), n, 0,
                          answer=ascii_uppercase[choice.answer])
                 for n, choice in enumerate(choices)]
    records = evaluate(policy, questions, replace(method, template="plain"), samples, seed,
                       progress=progress)
    for record, choice, option in zip(records, choices, found):
        record["standard"] = float(option == choice.answer)
    if out and rank_and_world()[0] == 0:
        write_records(records, out)
    return records


def perplexity(model: Transformer, corpus: Corpus, window: int,
               split: int = HELD_OUT) -> list[float | None]:
    """[mean, low, high] of exp(mean of -log P(token | what precedes)) over a split's tokens, of a
    prompt and response the response's, read as in the entropy pass. The interval is over
    documents. ValueError if there is none."""
    pieces = list(windows(corpus, np.flatnonzero(corpus.split == split), window))
    with unsharded(model):
        found = window_values(model, corpus, pieces, next_token_loss)
    values, documents = [], []
    for piece, losses in zip(pieces, found):
        first = corpus.regions[piece.document] if corpus.is_chat[piece.document] else 0
        losses = losses[max(first - piece.want, 0):]
        values += losses[np.isfinite(losses)].tolist()  # not of a first token
        documents += [piece.document] * (len(values) - len(documents))
    return [x if x is None else math.exp(x) for x in bootstrap_interval(values, documents)]


# ---------------------------------------------------------------------------------------- tables


def summary(records: Sequence[dict]) -> dict:
    """By split its number of questions and [mean, low, high] of each measure over them, intervals
    over documents. Questions without an entropy are one split, "all"."""
    plain = all("entropy" in record for record in records)
    out = {}
    for split, threshold in (SPLITS if plain else {"all": 0.0}).items():
        chosen = [r for r in records if not plain or r["entropy"] > threshold]
        documents = [record["document"] for record in chosen]
        measured = list(map(measures, chosen))
        out[split] = {"questions": len(chosen)} | {
            name: bootstrap_interval([m[name] for m in measured], documents)
            for name in (measured[0] if measured else ())}
    return out


def measures(record: dict) -> dict[str, float]:
    """What one record says, over its samples."""
    names = ("standard", "reasoning", "parsed", "length")
    out = {name: float(np.mean(record[name])) for name in names if name in record}
    if (samples := len(record["reasoning"])) > 1:
        right = int(sum(record["reasoning"]))
        out |= {"majority vote": record["vote"],
                f"pass@{samples}": pass_at_k(right, samples, samples)}
    return out


def table(models: dict[str, dict], title: str = "accuracy") -> str:
    """The form of the paper's tables for summaries by model name."""
    splits = next(iter(models.values()))
    lines = [f"{title} in %, length in tokens, with 95 % intervals",
             row("", [f"{split} ({of['questions']})" for split, of in splits.items()])]
    for measure in dict.fromkeys(name for of in splits.values() for name in of):
        for model, of in models.items() if measure != "questions" else ():
            factor = 1 if measure == "length" else 100
            cells = [shown(each.get(measure), factor) for each in of.values()]
            lines.append(row(f"{model}, {measure}", cells))
    return "\n".join(lines)


def row(name: str, cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"{name:26}" + "".join(f"{cell:>22}" for cell in cells)


def shown(interval: Sequence[float | None] | None, factor: float) -> str:
    """mean [low, high]; - for what was not measured."""
    mean, *bounds = [f"{factor * x:.1f}" for x in interval or () if x is not None] or "-"
    return f"{mean} [{', '.join(bounds)}]" if bounds else mean


def growth(folder: Path) -> str:
    """How reward and response length went in a run, and what it knew before and after."""
    rows, evals = ([json.loads(line) for line in (folder / name).read_text().splitlines()]
                   for name in ("metrics.jsonl", "evals.jsonl"))
    some = [rows[i] for i in sorted({round(x) for x in np.linspace(0, len(rows) - 1, 9)})]
    lines = [f"{key:>10}" + "".join(f"{row.get(key, math.nan):8.4g}" for row in some)
             for key in ("step", "reward", "length")]
    for exam in [name for name in (evals[0] if evals else ()) if name != "step"]:
        sat = [row for row in evals if exam in row]
        lines.append(table({f"step {row['step']}": row[exam] for row in (sat[0], sat[-1])}, exam))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ statistics


def bootstrap_interval(values: Sequence[float], clusters: Sequence[int], level: float = 0.95,
                       resamples: int = 2000,
                       seed: int = 0) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of `values` [N] by the percentile bootstrap over whole clusters [N].

    Positions of one document are not independent, so documents are what is drawn with replacement.
    Every value weighs the same: a resample's mean is its sum of values over its number of values.
    One cluster shows no spread: (mean, None, None). ValueError for no values, or unequal lengths.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values) or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} cluster labels; give one or "
                         "more values, and one label for each")
    _, member = np.unique(np.asarray(clusters), return_inverse=True)  # [N]
    sums, counts = np.bincount(member, weights=values), np.bincount(member)  # [K], [K]
    mean, draws = float(values.mean()), len(counts)
    if draws == 1:
        return mean, None, None
    drawn = np.random.default_rng(seed).multinomial(draws, [1 / draws] * draws, size=resamples)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [(1 - level) / 2, (1 + level) / 2])
    return mean, float(low), float(high)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Chance that k of `samples` completions, drawn without replacement, hold a correct one
    (arXiv 2107.03374). ValueError unless 1 <= k <= samples and 0 <= correct <= samples."""
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError("pass@k needs 1 <= k <= samples and 0 <= correct <= samples, "
                         f"but got k={k}, correct={correct}, samples={samples}")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_vote(predictions: Sequence[bytes | None]) -> bytes | None:
    """The most frequent prediction; of equals the first seen. None does not vote."""
    votes = Counter(prediction for prediction in predictions if prediction is not None)
    return max(votes, key=votes.__getitem__, default=None)  # a Counter keeps the order


# ---------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Asked:
    """What models are asked, in training and afterwards."""

    corpus: str = option("", ".jsonl, .jsonl.gz or .txt, a folder of them, or a data set's hub id; "
                             "rows of text, problem and solution, problem and answer (rlvr), "
                             "prompt and response (ntp)")
    answers: str = option("", "rows of problem and answer, asked before and after a run or here")
    choices: str = option("", "multiple choice: rows of question, options, answer_index; likewise")
    proxy: str = option("", "model whose entropy selects positions (default: the model itself)")
    region: str = option("all", "ask everywhere, or only behind the problem of a document",
                         choices=("all", "solution"))
    min_context: int = option(1, "tokens that precede a question, at least", at_least=1)
    max_context: int = option(0, "and at most; 0: any number", at_least=0)
    holdout: int = option(200, "documents never trained on", at_least=0)
    seed: int = option(0, "decides the order of the data and every sampled token", at_least=0)
    dtype: str = option("float32", "of the computation", choices=("float32", "bfloat16"))
    device: str = option("", "cpu or cuda (also for ROCm); default: the accelerator if any")
    cache: str = option("", "folder of tokenised corpora and entropies (default: beside the run)")


@dataclass(frozen=True)
class Measure(Asked):
    """What is measured on a model, beside the method."""

    perplexity: bool = option(False, "perplexity of the held-out documents instead")
    questions: int = option(500, "questions that are asked", at_least=1)
    samples: int = option(1, "responses to each; above 1 also pass@k and majority", at_least=1)
    out: str = option("", "file for the records, a JSON line each")


METHOD = [field for field in fields(Method) if field.name in (
    "template", "temperature", "max_prompt", "max_response", "max_rows", "cache_tokens")]
OF_RUN = ("corpus", "proxy", "region", "min_context", "max_context", "seed", "dtype", "cache",
          *(field.name for field in METHOD))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. What a run's run.json says stands in for the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a run's folder, or a model directory or hub id")
    add_options(parser, [*fields(Measure), *METHOD], {})
    folder = Path(parser.parse_args(argv).directory)
    try:
        run = read_run(folder) if (folder / "run.json").is_file() else {}
        parser.set_defaults(**{name: run[name] for name in OF_RUN if run})
        args = parser.parse_args(argv)
        print(measured(folder, run, options_of(Measure, args), options_of(Method, args)))
    except KeyboardInterrupt:
        sys.exit("eval.py: interrupted; entropies that are there are not measured again")
    except (ValueError, OSError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def add_options(parser, described: Sequence[Field], defaults: dict) -> None:
    """A command-line option for each field that was made by `option`. parser: or a group of it."""
    for field in described:
        how = dict(type=field.type, choices=field.metadata.get("choices"))
        if field.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + field.name.replace("_", "-"),
                            default=defaults.get(field.name, field.default),
                            help=f"{field.metadata['help']} (%(default)r)", **how)


def options_of(kind: type, args: argparse.Namespace):
    """The options as a `kind`; ValueError for a number that is out of its field's range."""
    options = kind(**{f.name: getattr(args, f.name) for f in fields(kind) if f.name in args})
    for field in fields(kind):
        value, limits = getattr(options, field.name), field.metadata
        kept = {"at_least": lambda limit: value >= limit, "above": lambda limit: value > limit,
                "at_most": lambda limit: value <= limit}
        broken = [f"{name.replace('_', ' ')} {limits[name]}" for name, holds in kept.items()
                  if name in limits and not holds(limits[name])]
        if broken or field.type is float and not math.isfinite(value):
            raise ValueError(f"--{field.name.replace('_', '-')} {value}: must be "
                             f"{' and '.join(broken) or 'a finite number'}")
    return options


def read_run(folder: Path) -> dict:
    """run.json, where paths that are relative to the folder are found, and defaults filled in."""
    run = read_json(folder / "run.json")
    for name in ("model", "corpus", "proxy", "cache"):
        if run[name] and (folder / run[name]).exists():
            run[name] = str(folder / run[name])
    return run | {"proxy": run["proxy"] or run["model"],
                  "cache": run["cache"] or str(folder.parent / "cache")}


def measured(folder: Path, run: dict, options: Measure, method: Method) -> str:
    """Evaluates a model, or that of a run on what it was not trained on; the result as text."""
    if options.out:
        open(options.out, "a").close()  # a bad place is found before the work
    source = resolve(folder / "model" if run else folder)
    config, tokenizer = read_config(source), Tokenizer.from_dir(source)
    check_vocabulary(tokenizer, config.vocab_size, source)
    check_length(config, method.max_prompt + method.max_response, f"{source}: prompt and response")
    how = choose_device(options.device), DTYPES[options.dtype]
    cache = Path(options.cache or "runs/cache")
    ask, title = evaluate, "questions with answers"
    if options.choices:
        ask, title, questions = multiple_choice, "multiple choice", read_choices(options.choices)
    elif options.answers:
        questions = answer_questions(options.answers, tokenizer)
        method = replace(method, template="plain")
    elif not options.corpus:
        raise ValueError("--corpus is missing: a file or folder of .jsonl or .txt, or a hub id")
    elif run.get("stage") == "rlvr":
        train, questions, _ = answer_sets(options.corpus, tokenizer, run["holdout"], run["seed"])
        check_corpus(run, fingerprint(*((q.context, q.answer) for q in (*train, *questions))))
    else:
        corpus = load_corpus(options.corpus, tokenizer, cache,
                             # of a run never others: it was trained on them
                             run.get("holdout", options.holdout), run.get("seed", options.seed))
        check_corpus(run, corpus.fingerprint)
        if options.perplexity:
            found = perplexity(load_pretrained(source, *how), corpus, method.max_prompt)
            return f"{folder.name}: perplexity of held-out documents {found}"
        proxy = Proxy(options.proxy or source, cache, method.max_prompt, *how)
        where = PositionFilter(min_context=options.min_context, max_context=options.max_context,
                               region=options.region)
        title, (_, questions, _) = "next-token accuracy", question_sets(corpus, proxy, where)
    policy = Policy(load_pretrained(source, *how), tokenizer)
    questions = subset(questions, options.questions, options.seed)
    with open(options.out or os.devnull, "w") as out:
        records = ask(policy, questions, method, options.samples, options.seed, out, progress=True)
    return table({folder.name: summary(records)}, title)


def check_corpus(run: dict, fingerprint: str) -> None:
    """ValueError if a run was trained on another corpus: it may have seen what is held out here."""
    if run and run["inputs"]["corpus"] != fingerprint:
        raise ValueError(f"{run['corpus']}: the run was trained on another content; name that one "
                         "by --corpus, or give the folder model/ of the run in place of the run")


if __name__ == "__main__":
    main()
