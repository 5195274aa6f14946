"""Evaluation: the measurements of the paper's tables and figures, each with an interval.

    python eval.py runs/toy                                a run, on what it was never trained on
    python eval.py MODEL_DIR --corpus FILE                 next-token accuracy of any model
    python eval.py MODEL_DIR --corpus FILE --perplexity    its perplexity, on held-out documents
    python eval.py MODEL_DIR --answers FILE --samples 4    questions with answers, such as GSM8K
    python eval.py MODEL_DIR --choices FILE                multiple choice, in MMLU-Pro's format
    python eval.py runs/toy --ask "The ball is now under"  thoughts about what comes next, to read

First the entropy of text under a proxy model, from which questions are chosen (paper, section 3.2);
then the measurements on a model; then the statistics, which need numpy alone.
"""

import argparse
import fcntl
import json
import math
import operator
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import Field, dataclass, fields, replace
from itertools import islice, zip_longest
from pathlib import Path
from string import ascii_uppercase
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import (DROPPED, HELD_OUT, TRAIN, Corpus, PositionFilter, Question, QuestionSet,
                  Tokenizer, answer_sets, check_same_tokens, check_vocabulary, file_rows,
                  fingerprint, load_corpus, prompt_ids, select_positions)
from model import (DTYPES, Transformer, all_gather, choose_device, load_pretrained, rank_and_world,
                   read_config, read_json, resolve, unsharded)
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
    same filter), and a text of what was kept. ValueError if nothing is left to ask."""
    documents = np.bincount(corpus.split, minlength=3)
    if np.diff(corpus.starts).max() <= filter.min_context:  # said before anything is measured
        raise ValueError(f"no document is longer than --min-context {filter.min_context} tokens")
    entropy = corpus_entropy(proxy, corpus)
    easy = replace(filter, kind="threshold", value=SPLITS["easy"])
    train = select_positions(corpus, entropy, filter, TRAIN)
    held = select_positions(corpus, entropy, easy, HELD_OUT)
    text = (f"documents: {documents[TRAIN]:,} to train on, {documents[HELD_OUT]:,} held out, "
            f"{documents[DROPPED]:,} near-duplicates dropped; {len(entropy):,} tokens\n"
            f"questions: {len(train):,} by {filter.kind} {filter.value:g} in {filter.region}; "
            f"held out {len(held):,} above {easy.value} nats")
    if documents[TRAIN] and not len(train):
        raise ValueError("no position is left to ask about; lower --filter-value or --min-context, "
                         f"or use --region all\n{text}")
    return train, held, text


def corpus_entropy(proxy: Proxy, corpus: Corpus) -> np.ndarray:
    """Entropy of each token of the corpus under the proxy: float32, nats, aligned with its tokens;
    nan where no token precedes.

    Measured once for all runs: the file in the proxy's cache is named by the content of what
    matters. What it lacks is measured by whoever holds its lock, the others wait. ValueError if the
    proxy's ids mean something else.
    """
    longest = min(proxy.window, int(np.diff(corpus.starts).max())) + len(corpus.tokenizer.bos)
    directory, tokenizer = find_model(proxy.model, longest)
    check_same_tokens(corpus.tokenizer, tokenizer, directory)
    name = fingerprint(
        *sorted(directory.glob("*.safetensors")), directory / "config.json", corpus.fingerprint,
        corpus.tokenizer.bos, proxy.window, proxy.dtype)
    rank, file = rank_and_world()[0], proxy.cache / f"entropy-{name}.f32"
    proxy.cache.mkdir(parents=True, exist_ok=True)
    with open(file, "ab") as out:
        while not all_gather(rank > 0 or locked(out))[0]:  # nobody waits longer than a second
            time.sleep(1)
        done = all_gather(file.stat().st_size // 4)[0]
        if done != len(corpus.tokens):  # a file that is too long is measured anew
            done = done if done < len(corpus.tokens) else 0
            model = load_pretrained(directory, proxy.device, proxy.dtype)
            entropy_pass(model, corpus, out, done, proxy.window)
        all_gather(None)
    return np.memmap(file, np.float32, mode="r", shape=len(corpus.tokens))


def find_model(name: str | Path, tokens: int) -> tuple[Path, Tokenizer]:
    """The directory and the tokenizer of a model, by its directory or hub id. ValueError if it
    cannot be used for texts of so many tokens."""
    directory = resolve(name)
    config, tokenizer = read_config(directory), Tokenizer.from_dir(directory)
    check_vocabulary(tokenizer, config.vocab_size, directory)
    if tokens > config.max_position_embeddings:
        raise ValueError(f"{directory}: prompt and response have up to {tokens:,} tokens, but the "
                         f"model only {config.max_position_embeddings:,} positions; lower "
                         "--max-prompt or --max-response")
    return directory, tokenizer


def locked(file: BinaryIO) -> bool:
    """Takes the lock on an open file unless somebody has it; closing the file gives it back."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def entropy_pass(model: Transformer, corpus: Corpus, out: BinaryIO, done: int, window: int) -> None:
    """Appends what stands behind the first `done` entropies, in the order of the corpus, some
    windows at a time: the same ones after an interruption, so that they round alike."""
    (rank, world), every = rank_and_world(), windows(corpus, range(len(corpus.starts) - 1), window)
    with tqdm(total=len(corpus.tokens), initial=done, unit="tok", unit_scale=True, desc="entropy",
              disable=rank > 0) as bar:
        while pieces := list(islice(every, PART_WINDOWS * world)):
            if pieces[-1].end <= done:
                continue
            values = window_values(model, corpus, pieces, next_token_entropy)
            if rank == 0:
                out.truncate(4 * pieces[0].want)
                out.write(np.concatenate(values).tobytes())
                out.flush()
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
def window_values(model: Transformer, corpus: Corpus, pieces: Sequence[Window],
                  measure: Callable) -> list[np.ndarray]:
    """A figure of each wanted token of each window, float32; nan where no token precedes.

    measure(model, hidden [N, hidden_size], tokens [N]) says it of tokens and what precedes each.
    Every process computes its share, windows of like length together, and gets all.
    """
    (rank, world), texts = rank_and_world(), []
    mine = pieces[rank::world]
    for piece in mine:
        bos = [] if corpus.is_chat[piece.document] else corpus.tokenizer.bos
        texts.append([*bos, *corpus.tokens[piece.begin: piece.end].tolist()])
    values: list = [None] * len(mine)
    order = sorted(range(len(mine)), key=lambda n: -len(texts[n]))
    while order:
        size = max(1, BATCH_TOKENS // len(texts[order[0]]))
        batch, order = order[:size], order[size:]
        ids = pad([texts[n] for n in batch], model.head.device)
        ends = np.array([len(texts[n]) for n in batch])
        counts = np.array([mine[n].end - mine[n].want for n in batch])
        columns = np.arange(1, ids.shape[1])[:, None]
        wanted = ((columns >= ends - counts) & (columns < ends)).T  # [B, T - 1]
        places = torch.from_numpy(np.flatnonzero(wanted)).to(ids.device)
        hidden = model(ids)[:, :-1].flatten(0, 1)[places]
        found = measure(model, hidden, ids[:, 1:].flatten()[places]).cpu().numpy()
        for n, count, row in zip(batch, counts, np.split(found, wanted.sum(1).cumsum()[:-1])):
            values[n] = np.append(np.float32(math.nan), row)[-count:]
    return gathered(values)


def gathered(mine: list) -> list:
    """What all processes have computed of things that were dealt to them in turn, in order."""
    shares = all_gather(mine)
    return [x for row in zip_longest(*shares) for x in row][: sum(map(len, shares))]


def next_token_entropy(model: Transformer, hidden: Tensor, _=None) -> Tensor:
    """hidden [N, hidden_size] -> [N]: entropy in nats of the token that follows.

    Over the model's 16 most probable tokens, renormalised; where they are equal it is ln 16 = 2.77.
    The head is applied to 512 positions at a time: with 152 thousand tokens those logits already
    take 300 MB.
    """
    logits = torch.cat([model.logits(h).topk(16).values for h in hidden.split(512)])
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def next_token_loss(model: Transformer, hidden: Tensor, tokens: Tensor) -> Tensor:
    """hidden [N, hidden_size], tokens [N] -> [N]: -log P in nats of the token that follows."""
    return -token_logprobs(model, hidden, tokens)[0]


# ---------------------------------------------------------------------------------- measurements


def subset(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """`count` of the questions, the same for every model, in their order."""
    chosen = np.random.default_rng([seed, 11]).permutation(len(questions))[:count]
    return [questions[int(n)] for n in sorted(chosen)]


def evaluate(policy: Policy, questions: Sequence[Question], method: Method, samples: int = 1,
             seed: int = 0, out: TextIO | None = None) -> list[dict]:
    """One record a question: whether standard prediction is right, where the text or the options
    say what could follow, and what `samples` reasoned responses say, sampled at the method's
    temperature.

    Every process calls it and gets all records. They are also written to `out`, a JSON line each,
    whenever each process has decoded four times `max_rows` responses.
    """
    (rank, world), records = rank_and_world(), []
    some = max(1, 4 * method.max_rows // samples) * world
    with unsharded(policy.model):
        for begin in range(0, len(questions), some):
            numbers = range(begin, min(begin + some, len(questions)))[rank::world]
            asked = {n: questions[n] for n in numbers}
            records += gathered(records_of(policy, asked, method, samples, seed))
            if out and rank == 0:
                out.writelines(json.dumps(r, allow_nan=False) + "\n" for r in records[begin:])
                out.flush()
    return records


def records_of(policy: Policy, questions: dict[int, Question], method: Method, samples: int,
               seed: int) -> list[dict]:
    """The records of questions by number, which decides with the seed what is sampled."""
    tokenizer, records = policy.tokenizer, []
    prompts = [prompt_ids(tokenizer, question, method.template, method.max_prompt)
               for question in questions.values()]
    groups = generate(
        policy.model, prompts, keys=[1 << 60 | n for n in questions], samples=samples, seed=seed,
        max_new_tokens=method.max_response, temperature=method.temperature,
        eos_ids=tokenizer.eos_ids, max_rows=method.max_rows,
        cache_tokens=method.cache_tokens or None, progress=rank_and_world()[0] == 0)
    standard = [standard_prediction(policy, question, method.max_prompt)
                if question.truth else None for question in questions.values()]
    for (n, question), group, token in zip(questions.items(), groups, standard):
        responses = [tokenizer.bytes_of(c.ids[:-1] if c.finished else c.ids) for c in group]
        said = [extract_prediction(r) if c.finished else None for r, c in zip(responses, group)]
        record = {"question": n, "document": question.document, "position": question.position,
                  "truth": question.answer or text(b"".join(question.truth[:4])),
                  "reasoning": [score(prediction, question) for prediction in said],
                  "vote": score(majority_vote(said), question),
                  "parsed": [float(prediction is not None) for prediction in said],
                  "length": [len(c.ids) for c in group],
                  "predictions": [p if p is None else text(p) for p in said],
                  "responses": list(map(text, responses))}
        if token is not None:
            record["standard"] = score(token, question)
        if math.isfinite(question.entropy):
            record["entropy"] = question.entropy
        records.append(record)
    return records


def text(content: bytes) -> str:
    """Bytes as JSON can hold them."""
    return content.decode(errors="backslashreplace")


def score(prediction: bytes | None, question: Question) -> float:
    """1 if a prediction is right: it is the question's answer, or else a prefix of the truth that
    ends with one of its tokens. So too for standard prediction, whose token may span two."""
    if question.answer is not None:
        return answer_match(prediction, question.answer)
    return prefix_match(prediction, question.truth)


@torch.no_grad()
def next_token_logits(policy: Policy, question: Question, window: int) -> Tensor:
    """Logits [V] of plain next-token prediction at a question. A context beyond `window` tokens
    loses its beginning, as a prompt's does."""
    context = [*policy.tokenizer.bos, *question.context[-window:]]
    if isinstance(question, Choice):
        context = question.plain
    return policy.model.logits(last_hidden(policy.model, [context]))[0]


def standard_prediction(policy: Policy, question: Question, window: int) -> bytes:
    """The bytes of the token that plain next-token prediction finds likeliest, of a multiple choice
    the letter."""
    logits = next_token_logits(policy, question, window)
    letters = question.letters if isinstance(question, Choice) else ()
    token = max(letters, key=logits.__getitem__) if letters else int(logits.argmax())
    return policy.tokenizer.token_bytes(token)


def answer_questions(file: str, tokenizer: Tokenizer) -> list[Question]:
    """Problem and answer rows, such as GSM8K's, as questions, none without a file; a ValueError for
    a row without answer."""
    return answer_sets(file, tokenizer, holdout=0, seed=0)[0] if file else []


@dataclass(frozen=True)
class Choice(Question):
    """A multiple-choice question with its options, a line each: (A) ... The answer is a letter,
    zero-shot as in the paper's table 3; the truth what stands behind "Answer:" without a thought.
    """

    plain: Sequence[int] = ()  # ids of the question up to that letter
    letters: Sequence[int] = ()  # the id of each option's


def read_choices(file: str, tokenizer: Tokenizer) -> list[Choice]:
    """JSON lines in MMLU-Pro's format: question, options, answer_index; none without a file. A
    ValueError names file and line."""
    letters = [tokenizer.encode_inside(f" {letter}") for letter in ascii_uppercase]
    before, last = letters[0][:-1], [ids[-1] for ids in letters]  # before: the same for all
    choices = []
    for row, where in file_rows(Path(file)) if file else ():
        match row:
            case {"question": str(text), "options": list(options), "answer_index": int(answer)} if (
                    0 <= answer < len(options) <= len(letters)):
                pass
            case _:
                raise ValueError(f"{where}: expected question, options (at most 26) and "
                                 "answer_index")
        for letter, option in zip(ascii_uppercase, options):
            text += f"\n({letter}) {option}"
        plain = [*tokenizer.bos, *tokenizer.encode(text + "\nAnswer:"), *before]
        choices.append(Choice(
            tuple(tokenizer.encode(text)), (tokenizer.token_bytes(last[answer]),), len(choices), 0,
            answer=ascii_uppercase[answer], plain=plain, letters=last[: len(options)]))
    return choices


def ask(policy: Policy, context: str, method: Method, samples: int, seed: int) -> str:
    """What a model says of how a context goes on, to be read: each thought and what it boxed, the
    votes, and beside them the likeliest tokens of plain next-token prediction."""
    question, lines = Question(tuple(policy.tokenizer.encode(context)), (), 0, 0), []
    (record,) = evaluate(policy, [question], method, samples, seed)
    thoughts = zip(record["responses"], record["predictions"])
    for n, (response, prediction) in enumerate(thoughts, 1):
        thought = response.partition("</think>")[0].strip()
        thought = re.sub("(.{1000}).+(.{1000})", r"\1 [...] \2", thought, flags=re.DOTALL)
        lines += [f"{n}. {thought}", f"   boxed {prediction!r}"]
    likely = next_token_logits(policy, question, method.max_prompt).softmax(-1).topk(8)
    left = [f"{count} x {prediction!r}" for prediction, count in votes(record["predictions"])]
    right = [f"{share:.4f} {text(policy.tokenizer.token_bytes(token))!r}"
             for share, token in zip(likely.values.tolist(), likely.indices.tolist())]
    for vote, token in zip_longest(["votes", *left], ["plain next token", *right], fillvalue=""):
        lines.append(f"{vote:40}{token}")
    return "\n".join(lines)


def typed_lines() -> Iterator[str]:
    """What is typed, or else what standard input holds, line by line until its end."""
    prompt = "> " if sys.stdin.isatty() else ""
    with suppress(EOFError):
        while True:
            if line := input(prompt):
                yield line


def perplexity(model: Transformer, corpus: Corpus, window: int) -> list[float | None]:
    """[mean, low, high] of exp(mean of -log P(token | what precedes)) over held-out tokens, of a
    prompt and response the response's, read as in the entropy pass. The interval is over
    documents. ValueError if there is none."""
    pieces = list(windows(corpus, np.flatnonzero(corpus.split == HELD_OUT), window))
    with unsharded(model):
        found = window_values(model, corpus, pieces, next_token_loss)
    first = np.where(corpus.is_chat, corpus.regions, 0)
    values, documents = [], []
    for piece, losses in zip(pieces, found):
        losses = losses[max(first[piece.document] - piece.want, 0):]
        values += losses[np.isfinite(losses)].tolist()  # not of a first token
        documents += [piece.document] * (len(values) - len(documents))
    return [x if x is None else math.exp(x) for x in bootstrap_interval(values, documents)]


# ---------------------------------------------------------------------------------------- tables


def summary(records: Sequence[dict]) -> dict:
    """By split its number of questions and [mean, low, high] of each measure over them, intervals
    over documents. Questions without an entropy are one split, "all"."""
    splits = SPLITS if any("entropy" in record for record in records) else {"all": -1.0}
    out = {}
    for split, nats in splits.items():
        chosen = [record for record in records if record.get("entropy", 0.0) > nats]
        documents = [record["document"] for record in chosen]
        measured = list(map(measures, chosen))
        out[split] = {"questions": len(chosen)}
        for name in measured[0] if measured else ():
            out[split][name] = bootstrap_interval([m[name] for m in measured], documents)
    return out


def measures(record: dict) -> dict[str, float]:
    """What one record says, over its samples."""
    names = ("standard", "reasoning", "parsed", "length")
    out = {name: float(np.mean(record[name])) for name in names if name in record}
    if (samples := len(record["reasoning"])) > 1:
        out |= {"majority vote": record["vote"], f"pass@{samples}": max(record["reasoning"])}
    return out


def table(models: dict[str, dict], title: str = "accuracy") -> str:
    """The form of the paper's tables for summaries by model name."""
    splits = next(iter(models.values()))
    rows = [["", *(f"{split} ({of['questions']})" for split, of in splits.items())]]
    _, *names = next(iter(splits.values()))  # the first split holds the others
    for measure in names:
        factor = 1 if measure == "length" else 100
        for model, of in models.items():
            cells = [shown(each.get(measure), factor) for each in of.values()]
            rows.append([f"{model}, {measure}", *cells])
    lines = [f"{name:26}" + "".join(f"{cell:>22}" for cell in cells) for name, *cells in rows]
    return "\n".join([f"{title} in %, length in tokens, with 95 % intervals", *lines])


def shown(interval: Sequence[float | None] | None, factor: float, digits: int = 1) -> str:
    """mean [low, high]; - for what was not measured."""
    mean, *bounds = [f"{factor * x:.{digits}f}" for x in interval or () if x is not None] or "-"
    return f"{mean} [{', '.join(bounds)}]" if bounds else mean


def growth(folder: Path) -> str:
    """How reward and response length went in a run, and what it knew before and after."""
    rows, evals = ([json.loads(line) for line in (folder / name).read_text().splitlines()]
                   for name in ("metrics.jsonl", "evals.jsonl"))
    rows = [row for row in rows if "reward" in row]  # a step of one's own may not sample
    spaced = np.linspace(0, len(rows) - 1, min(9, len(rows)))
    some = [rows[round(n)] for n in spaced]
    lines = [f"{key:>10}" + "".join(f"{row[key]:8.4g}" for row in some)
             for key in ("step", "reward", "length")]
    for exam in evals[0] if evals else ():
        if exam in evals[-1] and exam != "step":
            sat = {f"step {row['step']}": row[exam] for row in (evals[0], evals[-1])}
            lines.append(table(sat, exam))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ statistics


def bootstrap_interval(values: Sequence[float], clusters: Sequence[int], resamples: int = 2000,
                       seed: int = 0) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of `values` [N] by the 95 % percentile bootstrap over whole clusters [N].

    Positions of one document are not independent, so documents are what is drawn with replacement.
    Every value weighs the same: a resample's mean is its sum of values over its number of values.
    One cluster shows no spread: (mean, None, None). ValueError for no values, or unequal lengths.
    """
    if not len(values):
        raise ValueError("nothing was measured: an interval needs one or more values")
    _, member = np.unique(clusters, return_inverse=True)  # [N]
    sums, counts = np.bincount(member, weights=values), np.bincount(member)  # [K], [K]
    mean, draws = float(np.mean(values)), len(counts)
    if draws == 1:
        return mean, None, None
    drawn = np.random.default_rng(seed).multinomial(draws, [1 / draws] * draws, size=resamples)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [0.025, 0.975])
    return mean, float(low), float(high)


def votes(predictions: Sequence) -> list[tuple]:
    """Each distinct prediction and how often it was made, the most frequent first, of equals the
    first seen. None does not vote."""
    return Counter(each for each in predictions if each is not None).most_common()


def majority_vote(predictions: Sequence[bytes | None]) -> bytes | None:
    """The most frequent prediction; of equals the first seen."""
    return next((prediction for prediction, _ in votes(predictions)), None)


# ---------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Asked:
    """What models are asked, in training and afterwards."""

    corpus: str = option("", ".jsonl, .jsonl.gz or .txt, a folder of them, or a data set's hub id; "
                             "rows of text, problem and solution, problem and answer (rlvr), "
                             "prompt and response (ntp)")
    answers: str = option("", "rows of problem and answer, asked at each evaluation of a run or "
                              "here")
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

    ask: str = option(None, "what comes next in this text: each thought, what it boxes, the votes, "
                            "and plain next-token prediction; without a text of every line that is "
                            "typed", nargs="?", const="")
    perplexity: bool = option(False, "perplexity of the held-out documents instead")
    questions: int = option(500, "questions that are asked", at_least=1)
    samples: int = option(1, "responses to each, with --ask 8; above 1 also pass@k and majority",
                          at_least=1)
    out: str = option("", "file for the records, a JSON line each")


LIMITS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le}
METHOD = [field for field in fields(Method) if field.name in (
    "template", "temperature", "max_prompt", "max_response", "max_rows", "cache_tokens")]
OF_RUN = ("corpus", "proxy", "region", "min_context", "max_context", "seed", "dtype", "cache",
          *(field.name for field in METHOD))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. What a run's run.json says stands in for the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a run's folder, or a model directory or hub id")
    add_options(parser, [*fields(Measure), *METHOD])
    args = parser.parse_args(argv)
    folder = Path(args.directory)
    try:
        run = read_run(folder) if (folder / "run.json").is_file() else {}
        parser.set_defaults(**{name: run[name] for name in OF_RUN if run})
        if args.ask is not None:
            parser.set_defaults(samples=8)
        args = parser.parse_args(argv)
        for text in measured(folder, run, options_of(Measure, args), options_of(Method, args)):
            print(text, flush=True)
    except KeyboardInterrupt:
        sys.exit("eval.py: interrupted; entropies that are there are not measured again")
    except (ValueError, OSError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def add_options(parser: argparse.ArgumentParser, described: Sequence[Field]) -> None:
    """A command-line option for each field that was made by `option`."""
    for field in described:
        how = {key: value for key, value in field.metadata.items() if key not in (*LIMITS, "help")}
        if field.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["type"] = field.type
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default,
                            help=f"{field.metadata['help']} (%(default)r)", **how)


def options_of(kind: type, args: argparse.Namespace):
    """The options as a `kind`; ValueError for a number that is out of its field's range."""
    options = kind(**{f.name: getattr(args, f.name) for f in fields(kind) if f.name in args})
    for field in fields(kind):
        value, limits = getattr(options, field.name), field.metadata
        for name, holds in LIMITS.items():
            if name in limits and not (holds(value, limits[name]) and math.isfinite(value)):
                raise ValueError(f"--{field.name.replace('_', '-')} {value}: must be "
                                 f"{name.replace('_', ' ')} {limits[name]} and finite")
    return options


def read_run(folder: Path) -> dict:
    """run.json, where paths that are relative to the folder are found, and defaults filled in."""
    run = read_json(folder / "run.json")
    for name in ("model", "corpus", "proxy", "cache"):
        if run[name] and (folder / run[name]).exists():
            run[name] = str(folder / run[name])
    return run | {"proxy": run["proxy"] or run["model"],
                  "cache": run["cache"] or folder.parent / "cache"}


def measured(folder: Path, run: dict, options: Measure, method: Method) -> Iterator[str]:
    """What is measured on a model, or on that of a run from what it was not trained on, as text."""
    if options.out:
        open(options.out, "a").close()  # a bad place is found before the work
    asked = options.ask is not None, options.choices, options.answers, options.perplexity
    if sum(map(bool, asked)) > 1 or options.perplexity and run.get("stage") == "rlvr":
        raise ValueError("one of --ask, --choices, --answers and --perplexity at a time, and no "
                         "--perplexity of a run of stage rlvr")
    if run and not (folder / "model").is_dir():
        raise ValueError(f"{folder}: this run has not exported its model yet")
    needed = method.max_prompt + (0 if options.perplexity else method.max_response)
    source, tokenizer = find_model(folder / "model" if run else folder, needed)
    how = choose_device(options.device), DTYPES[options.dtype]
    cache = Path(options.cache or "runs/cache")
    # of a run never others: it was trained on them
    split = run.get("holdout", options.holdout), run.get("seed", options.seed)
    if options.ask is not None:
        policy = Policy(load_pretrained(source, *how), tokenizer)
        for text in [options.ask] if options.ask else typed_lines():
            yield ask(policy, text, method, options.samples, options.seed)
        return
    if options.choices or options.answers:
        method = replace(method, template="plain")
    if options.choices:
        questions = read_choices(options.choices, tokenizer)
    elif options.answers:
        questions = answer_questions(options.answers, tokenizer)
    elif not options.corpus:
        raise ValueError("--corpus is missing: a file or folder of .jsonl or .txt, or a hub id")
    elif run.get("stage") == "rlvr":
        train, questions, _ = answer_sets(options.corpus, tokenizer, *split)
        check_corpus(run, fingerprint(*((q.context, q.answer) for q in (*train, *questions))))
    else:
        corpus = load_corpus(options.corpus, tokenizer, cache, *split)
        check_corpus(run, corpus.fingerprint)
        if options.perplexity:
            found = perplexity(load_pretrained(source, *how), corpus, method.max_prompt)
            Path(options.out or os.devnull).write_text(json.dumps(found) + "\n")
            yield f"{folder.name}: perplexity of held-out documents {shown(found, 1, digits=3)}"
            return
        proxy = Proxy(options.proxy or source, cache, method.max_prompt, *how)
        where = PositionFilter(min_context=options.min_context, max_context=options.max_context,
                               region=options.region)
        _, questions, _ = question_sets(corpus, proxy, where)
    policy = Policy(load_pretrained(source, *how), tokenizer)
    questions = subset(questions, options.questions, options.seed)
    with open(options.out or os.devnull, "w") as out:
        records = evaluate(policy, questions, method, options.samples, options.seed, out)
    yield table({folder.name: summary(records)})


def check_corpus(run: dict, fingerprint: str) -> None:
    """ValueError if a run was trained on another corpus: it may have seen what is held out here."""
    if run and run["inputs"]["corpus"] != fingerprint:
        raise ValueError(f"{run['corpus']}: the run was trained on another content; name that one "
                         "by --corpus, or give the folder model/ of the run in place of the run")


if __name__ == "__main__":
    main()
