"""Evaluation: the measurements of the paper's tables and figures, each with an interval.

    python eval.py runs/toy                                     the accuracies of a run, on its held-out documents
    python eval.py MODEL_DIR --corpus FILE                      those of any model, on any corpus
    python eval.py MODEL_DIR --choices FILE                     zero-shot multiple choice, on rows in MMLU-Pro's format

First the measurements on a model, then the statistics, which need numpy alone.
"""

import argparse
import json
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import torch

from data import TEMPLATES, Question, Tokenizer, file_rows, prompt_ids, question_sets, read_corpus
from model import DTYPES, Transformer, all_gather, load_pretrained, rank_and_world, read_json, resolve
from reward import answer_match, extract_prediction, prefix_match
from rpt import Group, Method, completion_logprobs, unsharded
from sampler import Completion, generate, last_hidden

OUR_OWN = ("questions", "device", "out")  # options that do not mean here what they mean to train.py
SPLITS = {"easy": 0.5, "medium": 1.0, "hard": 1.5}  # nats; entropy above, so each contains the next (paper, table 1)

# ---- measurements


def subset(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """`count` of the questions, the same for every model, in their order."""
    chosen = np.random.default_rng([seed, 11]).permutation(len(questions))[:count]
    return [questions[int(n)] for n in sorted(chosen)]


@torch.no_grad()
def standard_predictions(model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question], window: int,
                         batch_tokens: int = 16384) -> list[bytes]:
    """Plain next-token prediction (argmax) at each question's position: the bytes of the predicted token.

    A context beyond `window` tokens loses its beginning, as a prompt's does.
    """
    runs = [[*tokenizer.bos, *question.context[-window:]] for question in questions]
    out: list[bytes] = [b""] * len(runs)
    order = sorted(range(len(runs)), key=lambda i: len(runs[i]))
    while order:
        size = max(1, batch_tokens // len(runs[order[-1]]))
        batch, order = order[-size:], order[:-size]
        hidden = last_hidden(model, [runs[i] for i in batch])
        for i, token in zip(batch, model.logits(hidden).argmax(-1).tolist()):
            out[i] = tokenizer.token_bytes(token)
    return out


def evaluate(model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question], method: Method, samples: int = 1,
             seed: int = 0, progress: bool = False) -> list[dict]:
    """One record a question: whether standard prediction is right, and what `samples` reasoned responses predict.

    Every process calls it and gets all records. Responses are sampled at the method's temperature.
    """
    rank, world = rank_and_world()
    mine, records = list(enumerate(questions))[rank::world], []
    with unsharded(model):
        standard = standard_predictions(model, tokenizer, [question for _, question in mine], method.max_prompt)
        prompts = [prompt_ids(tokenizer, question, method.template, method.max_prompt) for _, question in mine]
        groups = generate(model, prompts, samples=samples, max_new_tokens=method.max_response,
                          temperature=method.temperature, eos_ids=tokenizer.eos_ids, seed=seed,
                          keys=[1 << 60 | n for n, _ in mine], max_rows=method.max_rows,
                          cache_tokens=method.cache_tokens or None, progress=progress and rank == 0)
    for (n, question), token, group in zip(mine, standard, groups):
        said = [extract_prediction(tokenizer.bytes_of(c.ids[:-1])) if c.finished else None for c in group]
        records.append({
            "question": n, "document": question.document, "entropy": question.entropy,
            "standard": float(token in question.truth[:1]), "reasoning": [score(p, question) for p in said],
            "vote": score(majority_vote(said), question), "parsed": [float(p is not None) for p in said],
            "length": [len(c.ids) for c in group]})
    return sorted((record for part in all_gather(records) for record in part), key=lambda record: record["question"])


def score(prediction: bytes | None, question: Question) -> float:
    """1 if a prediction is right: an exact prefix of the truth, or the answer of a question that has one."""
    if question.answer is not None:
        return answer_match(prediction, question.answer)
    return prefix_match(prediction, question.truth)


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question."""

    question: str
    options: tuple[str, ...]
    answer: int  # index of the right option

    @property
    def prompt(self) -> str:
        """The question and its options, a line each: (A) ..."""
        return "\n".join([self.question, *(f"({x}) {text}" for x, text in zip(ascii_uppercase, self.options))])


def read_choices(file: Path) -> list[Choice]:
    """JSON lines in MMLU-Pro's format: question, options, answer_index; a ValueError names file and line."""
    choices = []
    for row, where in file_rows(file):
        question, options, answer = map((row if isinstance(row, dict) else {}).get,
                                        ("question", "options", "answer_index"))
        if not (isinstance(question, str) and isinstance(options, list) and isinstance(answer, int)
                and 0 <= answer < len(options) <= len(ascii_uppercase)):
            raise ValueError(f"{where}: expected question, options (at most 26) and answer_index")
        choices.append(Choice(question, tuple(map(str, options)), answer))
    if not choices:
        raise ValueError(f"{file}: no questions")
    return choices


@torch.no_grad()
def option_likelihoods(model: Transformer, prompt: Sequence[int], options: Sequence[Sequence[int]]) -> list[float]:
    """log P(option | prompt) in nats for each option (token ids); the prompt is computed once."""
    completions = [Completion(list(ids), [0.0] * len(ids), True) for ids in options]
    group = Group((0, 0), Question((), (), 0, 0), list(prompt), completions, [], [], [])
    logprobs, _ = completion_logprobs(model, [(group, list(range(len(options))))], temperature=1.0)
    return [part.sum().item() for part in logprobs.split([len(ids) for ids in options])]


def multiple_choice(model: Transformer, tokenizer: Tokenizer, choices: Sequence[Choice], method: Method,
                    seed: int = 0) -> list[dict]:
    """Zero-shot (paper, table 3): `standard`, the likeliest letter behind "Answer:"; `reasoning`, the boxed letter."""
    letters = [tokenizer.encode(f" {letter}") for letter in ascii_uppercase]
    questions = [Question(tuple(tokenizer.encode(c.prompt)), (), n, 0, answer=ascii_uppercase[c.answer])
                 for n, c in enumerate(choices)]
    records = evaluate(model, tokenizer, questions, replace(method, template="plain"), seed=seed)
    with unsharded(model):
        for record, choice in zip(records, choices):
            prompt = tokenizer.bos + tokenizer.encode(choice.prompt + "\nAnswer:")
            scores = option_likelihoods(model, prompt, letters[: len(choice.options)])
            record["standard"] = float(int(np.argmax(scores)) == choice.answer)
    return records


def summary(records: Sequence[dict]) -> dict:
    """Per split: [mean, low, high] of each measure over the split's questions, intervals over documents."""
    out = {}
    for split, threshold in SPLITS.items():
        chosen = [record for record in records if record["entropy"] > threshold]
        samples = len(chosen[0]["reasoning"]) if chosen else 1
        measures = {name: [np.mean(r[name]) for r in chosen] for name in ("standard", "reasoning", "parsed", "length")}
        if samples > 1:
            measures["majority vote"] = [r["vote"] for r in chosen]
            measures[f"pass@{samples}"] = [pass_at_k(int(sum(r["reasoning"])), samples, samples) for r in chosen]
        documents = [record["document"] for record in chosen]
        out[split] = {"questions": len(chosen)} | {k: bootstrap_interval(v, documents) for k, v in measures.items()}
    return out


def table(models: dict[str, Sequence[dict]]) -> str:
    """The form of the paper's table 1 for records by model name."""
    shown = {name: summary(records) for name, records in models.items()}
    counts = next(iter(shown.values()))
    lines = ["next-token accuracy in %, with 95 % intervals over documents",
             " " * 26 + "".join(f"{split + ' (' + str(counts[split]['questions']) + ')':>22}" for split in SPLITS)]
    measures = [m for m in counts["easy"] if m not in ("questions", "parsed", "length")]
    for measure in measures:
        for name, splits in shown.items():
            cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in splits[split][measure])) for split in SPLITS]
            lines.append(f"{name + ', ' + measure:26}" + "".join(f"{cell:>22}" for cell in cells))
    for name, splits in shown.items():
        parsed, length = splits["easy"]["parsed"][0], splits["easy"]["length"][0]
        lines.append(f"{name}: {100 * parsed:.1f} % of responses hold a prediction; mean length {length:.1f} tokens")
    return "\n".join(lines)


def choice_table(models: dict[str, Sequence[dict]]) -> str:
    """The form of the paper's table 3 for records of `multiple_choice` by model name."""
    lines = ["multiple-choice accuracy in %, with 95 % intervals over questions"]
    for measure in ("standard", "reasoning"):
        for name, records in models.items():
            values = [np.mean(record[measure]) for record in records]
            mean, low, high = (100 * x for x in bootstrap_interval(values, range(len(values))))
            lines.append(f"{name + ', ' + measure:26}{mean:6.1f} [{low:.1f}, {high:.1f}]   ({len(values)} questions)")
    return "\n".join(lines)


def growth(metrics: Path) -> str:
    """How reward and response length went in a run, from its metrics.jsonl."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [rows[i] for i in sorted({round(x) for x in np.linspace(0, len(rows) - 1, 9)})]
    shown = (("step", "step", 0), ("reward", "reward", 2), ("length, tokens", "length", 1))
    return "\n".join(f"{name:>16}" + "".join(f"{row[key]:8.{digits}f}" for row in rows) for name, key, digits in shown)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. What a run's run.json says stands in for the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a run's folder, or a model directory or hub id")
    for name, default, text, *choices in (
            ("corpus", "", ".jsonl, .txt or folder"),
            ("choices", "", "multiple-choice questions instead: .jsonl of question, options, answer_index"),
            ("proxy", "", "model whose entropy makes the splits; by default the model itself"),
            ("template", "v0", "prompt template", TEMPLATES), ("temperature", 0.8, "of the responses"),
            ("max-prompt", 4096, "tokens"), ("max-response", 8192, "tokens"), ("seed", 0, "of everything"),
            ("min-context", 1, "tokens before a question"), ("part", "all", "where to ask", ("all", "solution")),
            ("dtype", "float32", "of the computation", DTYPES), ("holdout", 200, "documents to ask about"),
            ("questions", 500, "held-out questions"), ("device", "", "cpu or cuda (also for ROCm); default: the accelerator if there is one"),
            ("samples", 1, "responses to each question; above 1 also pass@k and majority vote"),
            ("out", "", "file for the records, one JSON object a line"),
            ("cache", "", "folder for entropies; by default the run's, else runs/cache")):
        parser.add_argument(f"--{name}", type=type(default), default=default, choices=choices[0] if choices else None,
                            help=f"{text} ({default})" if default != "" else text)
    warnings.filterwarnings("ignore", module="torch.distributed")  # that there is one process is no news
    folder = Path(parser.parse_args(argv).directory)
    try:
        run = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
        parser.set_defaults(**{k: v for k, v in run.items() if k not in OUR_OWN})
        print(report(parser.parse_args(argv), run))
    except (ValueError, FileNotFoundError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def default_device(name: str = "") -> torch.device:
    """The device of that name; of none, the accelerator if there is one."""
    if name or not torch.accelerator.is_available():
        return torch.device(name or "cpu")
    return torch.accelerator.current_accelerator()


def report(args: argparse.Namespace, run: dict) -> str:
    """Evaluates as the command line says; the table as text. run: the settings in run.json, {} for a model."""
    if not (args.corpus or args.choices):
        raise ValueError("--corpus is missing: a .jsonl or .txt file, or a folder of them")
    choices = read_choices(Path(args.choices)) if args.choices else []
    folder, device, dtype = Path(args.directory), default_device(args.device), DTYPES[args.dtype]
    source = resolve(folder / "model" if run else folder)
    tokenizer = Tokenizer.from_dir(source)
    method = Method(**{field.name: getattr(args, field.name, field.default) for field in fields(Method)})
    if choices:
        model = load_pretrained(source, device, dtype)
        records, show = multiple_choice(model, tokenizer, choices, method, args.seed), choice_table
    else:
        _, held, _ = question_sets(
            tokenizer, read_corpus(args.corpus), args.proxy or run.get("model") or source,
            Path(args.cache or (folder / "cache" if run else "runs/cache")), selector="threshold", value=0.5,
            holdout=run.get("holdout", args.holdout), seed=run.get("seed", args.seed),  # what a run was not trained on
            min_context=args.min_context, part=args.part, window=args.max_prompt, device=device, dtype=dtype)
        model, show = load_pretrained(source, device, dtype), table
        records = evaluate(model, tokenizer, subset(held, args.questions, args.seed), method, args.samples, args.seed,
                           progress=True)
    if args.out:
        Path(args.out).write_text("".join(json.dumps(record) + "\n" for record in records))
    return show({folder.name: records})


# ---- statistics

LEVEL = 0.95  # of every interval
RESAMPLES = 2000  # of the bootstrap over documents
ALPHA_RANGE = (1e-3, 10.0)  # below, A / C^alpha is a straight line in log C; above, a step at the smallest compute

# The keyword groups of the paper's analysis of reasoning patterns, in its wording.
PATTERNS = {
    "transition": ("alternatively", "think differently"),
    "reflection": ("wait", "initial answer", "original answer", "looking back", "thought process"),
    "breakdown": ("break down", "break this down"),
    "hypothesis": ("probably", "something like"),
    "divergent thinking": ("etc.", "or something", "either", "sometimes it refers", "otherwise", "exploring",
                           "options"),
    "deduction": ("summarize", "conclusion", "conclude", "finally", "logically", "consequently"),
}


def bootstrap_interval(values: Sequence[float], clusters: Sequence[int], level: float = LEVEL,
                       resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of `values` [N] by the percentile bootstrap over whole clusters `clusters` [N].

    Positions of one document are not independent, so documents are what is drawn with replacement. Every value
    weighs the same: a resample's mean is its sum of values over its number of values. No value gives (nan, nan, nan);
    a single cluster shows no spread between clusters, so it gives (mean, nan, nan). ValueError if lengths differ.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} cluster labels; give one label for each value.")
    _, member = np.unique(np.asarray(clusters), return_inverse=True)  # [N]
    sums, counts = np.bincount(member, weights=values), np.bincount(member)  # [K], [K]
    mean = float(values.mean()) if len(values) else math.nan
    if len(counts) < 2:
        return mean, math.nan, math.nan
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=resamples)  # [resamples, K]
    low, high = np.quantile((draws @ sums) / (draws @ counts), [(1 - level) / 2, (1 + level) / 2])
    return mean, float(low), float(high)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Chance that k of `samples` completions, drawn without replacement, hold a correct one (arXiv 2107.03374).

    ValueError unless 1 <= k <= samples and 0 <= correct <= samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@k needs 1 <= k <= samples and 0 <= correct <= samples, "
                         f"but got k={k}, correct={correct}, samples={samples}.")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_vote(predictions: Sequence[bytes | None]) -> bytes | None:
    """The most frequent prediction; of equals the first seen. None (no answer) does not vote; all None gives None."""
    votes = Counter(prediction for prediction in predictions if prediction is not None)
    return max(votes, key=votes.__getitem__, default=None)  # a Counter keeps the order in which keys were first seen


def fit_power_law(compute: Sequence[float], accuracy: Sequence[float]) -> tuple[float, float, float, float]:
    """(A, alpha, P_star, r2) of P(C) = A / C^alpha + P_star by least squares; the paper's scaling law.

    `compute` [N] in any positive unit (FLOPs, steps), `accuracy` [N] in any unit; A < 0 where accuracy rises. alpha is
    searched in ALPHA_RANGE: a value at an end says that the points do not determine it. ValueError for
    fewer than 4 points, a compute that is not positive, a value that is not finite, or nothing that varies.
    """
    log_compute, accuracy = _check_points(compute, accuracy)
    (A,), (alpha,), (P_star,), (fitted,) = _fit_rows(log_compute, accuracy[None])
    r2 = 1 - ((accuracy - fitted) ** 2).sum() / ((accuracy - accuracy.mean()) ** 2).sum()
    return float(A), float(alpha), float(P_star), float(r2)


def power_law_intervals(compute: Sequence[float], accuracy: Sequence[float], level: float = LEVEL,
                        resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Percentile intervals of "A", "alpha" and "P_star" of `fit_power_law`, by residual bootstrap.

    Residuals of the fit are drawn with replacement, put on the fitted curve, and the law is fitted again. They are
    widened by sqrt(N / (N - 3)) first, for three fitted parameters make them too small. Assumes equal noise at every
    point. In simulation 95 % intervals hold the truth in 93 % of cases with 16 points, in 87 % with the paper's six.
    """
    log_compute, accuracy = _check_points(compute, accuracy)
    fitted = _fit_rows(log_compute, accuracy[None])[-1][0]
    residuals = (accuracy - fitted) * math.sqrt(len(accuracy) / (len(accuracy) - 3))
    drawn = np.random.default_rng(seed).choice(residuals, size=(resamples, len(residuals)))  # [resamples, N]
    *parameters, _ = _fit_rows(log_compute, fitted + drawn)
    bounds = np.quantile(parameters, [(1 - level) / 2, (1 + level) / 2], axis=1).tolist()  # [2][3]: lows, highs
    return dict(zip(("A", "alpha", "P_star"), zip(*bounds)))


def reasoning_patterns(responses: Sequence[str]) -> dict[str, float]:
    """Share in [0, 1] of responses that hold a keyword of each group of PATTERNS; nan without responses.

    A keyword counts in any case, as whole words: neither "waiting" nor "await" is "wait", nor "neither" "either". Any
    white space may part the words of a keyword. Inflections count only where the paper lists them.
    """
    shares = {}
    for group, keywords in PATTERNS.items():
        words = "|".join(map(re.escape, keywords)).replace("\\ ", r"\s+")
        # Not \b: behind the dot of "etc." it would ask for a letter.
        pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
        hits = [pattern.search(response) is not None for response in responses]
        shares[group] = sum(hits) / len(hits) if hits else math.nan
    return shares


def _check_points(compute: Sequence[float], accuracy: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(log compute, accuracy), both float64 [N], or the ValueError that says why no power law fits them."""
    compute, accuracy = np.asarray(compute, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    if compute.shape != accuracy.shape or compute.size < 4:
        need = "4 or more points (compute, accuracy)"
    elif not (np.isfinite(compute).all() and np.isfinite(accuracy).all() and (compute > 0).all()):
        need = "finite points at positive compute"
    elif len(np.unique(compute)) < 3 or np.ptp(accuracy) == 0:
        need = "3 or more values of compute and 2 or more of accuracy"
    else:
        return np.log(compute), accuracy
    raise ValueError(f"A power law needs {need}, but got {compute.tolist()} and {accuracy.tolist()}.")


def _fit_rows(log_compute: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Least-squares (A, alpha, P_star) each [R], and fitted values [R, N], for R data sets `rows` [R, N] at once.

    For a given alpha the law is a line in (C^-alpha - 1) / alpha, which, unlike C^-alpha, stays well conditioned as
    alpha goes to 0. C is in units of the smallest compute, so no power overflows. That leaves one search, over alpha.
    """
    shifted = log_compute - log_compute.min()  # [N], >= 0
    mean = rows.mean(axis=1, keepdims=True)  # [R, 1]

    def line(alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slope [R, 1], intercept [R, 1] and fitted values [R, N] at alpha [R, 1]."""
        basis = np.expm1(-alpha * shifted) / alpha  # [R, N]
        middle = basis.mean(axis=1, keepdims=True)
        slope = ((basis - middle) * (rows - mean)).sum(1, keepdims=True) / ((basis - middle) ** 2).sum(1, keepdims=True)
        return slope, mean - slope * middle, mean + slope * (basis - middle)

    def error(log_alpha: np.ndarray) -> np.ndarray:  # [R, 1]; from residuals, as a difference would cancel
        return ((rows - line(np.exp(log_alpha))[-1]) ** 2).sum(axis=1, keepdims=True)

    grid = np.linspace(*np.log(ALPHA_RANGE), 150)
    best = np.argmin([error(np.full_like(mean, point)) for point in grid], axis=0)  # [R, 1]
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(50):  # the bracket ends 0.12 * golden^50 = 4e-12 wide, relative to alpha
        left, right = high - golden * (high - low), low + golden * (high - low)
        keep_left = error(left) < error(right)
        low, high = np.where(keep_left, low, left), np.where(keep_left, right, high)
    alpha = np.exp((low + high) / 2)
    slope, intercept, fitted = line(alpha)
    A, P_star = slope / alpha * np.exp(alpha * log_compute.min()), intercept - slope / alpha
    return A[:, 0], alpha[:, 0], P_star[:, 0], fitted


if __name__ == "__main__":
    main()
