"""The paper in miniature: every table and figure on the toy world, with the controls its critics asked for.

    python -m paper.miniature                  three seeds, from nothing; report.html, results.json, figures
    python -m paper.miniature --quick          one seed, fewer questions
    python -m paper.miniature --seeds 0        one seed; several processes may share the folder, then run all seeds

Each experiment is a few calls of train.py and eval.py; a real model and corpus go through the same ones. What an
experiment found is kept in its own file, so an interrupted run goes on with the next experiment. Numbers are means
over seeds; intervals are 95 % bootstrap intervals over the documents of all seeds, and say nothing of other worlds.
"""

import argparse
import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import eval as evaluation
import train
from data import Question, Tokenizer
from model import load_pretrained
from paper import report
from rpt import Method

CPU = torch.device("cpu")
VARIANTS = {  # name -> what is changed in the toy recipe; the base model and everything else stay
    "first-token reward": ["--reward", "first-token"],
    "dense reward": ["--reward", "dense"],
    "conditional dense reward": ["--reward", "conditional-dense"],
    "control: format reward": ["--reward", "format"],
    "control: random positions": ["--selector", "random", "--select", "0.15"],
    "option: information gain (RLP)": ["--reward", "gain", "--no-scale-by-std"],
    "option: auxiliary next-token loss (RMT)": ["--ntp-weight", "0.1"],
    "option: easy groups kept less often": ["--no-keep-easy"],
}


@dataclasses.dataclass
class Lab:
    """One seed's folder and the sizes of its experiments."""

    root: Path
    seed: int
    quick: bool

    @property
    def questions(self) -> int:
        return 150 if self.quick else 300

    def path(self, name: str) -> Path:
        return self.root / f"seed{self.seed}" / re.sub(r"\W+", "-", name)

    def train(self, name: str, *options: object) -> Path:
        """Runs train.py into its own folder; the folder."""
        out = self.path(name)
        with open(self.root / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            train.main([*map(str, options), "--seed", str(self.seed), "--out", str(out)])
        return out

    def from_base(self, name: str, *options: object, base: str = "toy/base") -> Path:
        """The same, from this seed's base model on its corpus."""
        return self.train(name, "--model", self.path("toy").parent / base / "model", "--corpus",
                          self.path("toy") / "world" / "corpus.jsonl", *options)

    def held_out(self) -> tuple[Tokenizer, list[Question], Method]:
        """The toy run's held-out questions, as it made them."""
        run, method, _ = train.parse(["--seed", str(self.seed)])
        base = self.path("toy") / "base" / "model"
        tokenizer = Tokenizer.from_dir(base)
        _, held, _ = data.question_sets(
            tokenizer, data.read_corpus(self.path("toy") / "world" / "corpus.jsonl"), base, self.path("toy") / "cache",
            holdout=run.holdout, selector=run.selector, value=run.select, min_context=run.min_context, part=run.part,
            seed=run.seed, window=method.max_prompt, device=CPU, dtype=torch.float32)
        return tokenizer, evaluation.subset(held, self.questions, self.seed), method

    def measure(self, folder: Path, samples: int = 1, **changes: object) -> list[dict]:
        """Accuracies of the model in a folder on the held-out questions."""
        tokenizer, questions, method = self.held_out()
        return evaluation.evaluate(load_pretrained(folder / "model"), tokenizer, questions,
                                   dataclasses.replace(method, **changes), samples, self.seed)


# ---------------------------------------------------------------------------------------------- experiments


def table_1(lab: Lab) -> dict:
    """Base and RPT, standard and reasoning, pass@8 and majority vote; and the run's curve of accuracy."""
    run = lab.train("toy", "--eval-every", 4, "--eval-questions", lab.questions)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    spent = np.cumsum([row["flops"] for row in rows])
    evals = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    curve = [{"flops": float(spent[e["step"] - 1]), "step": e["step"]}
             | {s: e[s]["reasoning"] for s in evaluation.SPLITS} for e in evals]
    return {"base": lab.measure(run / "base", 8), "RPT": lab.measure(run, 8), "curve": curve,
            "length": [row["length"] for row in rows], "reward": [row["reward"] for row in rows]}


def matched_ntp(lab: Lab) -> dict:
    """Continual next-token prediction on the same corpus with the FLOPs that RPT took."""
    spent = sum(json.loads(line)["flops"] for line in (lab.path("toy") / "metrics.jsonl").read_text().splitlines())
    probe = lab.from_base("ntp probe", "--stage", "ntp", "--steps", 2)
    each = np.mean([json.loads(line)["flops"] for line in (probe / "metrics.jsonl").read_text().splitlines()])
    steps = max(2, round(spent / each))
    records = lab.measure(lab.from_base("ntp", "--stage", "ntp", "--steps", steps, "--save-every", 10**6))
    return {"steps": steps, "records": records}


def variants(lab: Lab) -> dict:
    """RPT with another reward, another selection of positions, or an option of later work."""
    return {name: lab.measure(lab.from_base(name, *options)) for name, options in VARIANTS.items()}


def table_2(lab: Lab) -> dict:
    """RL with verifiable rewards, from three starting points: accuracy on held-out questions before and after."""
    answers, out = lab.path("toy") / "world" / "answers.jsonl", {}
    for name, base in (("base", "toy/base"), ("continual next-token training", "ntp"), ("RPT", "toy")):
        start = lab.path("toy").parent / base
        run = lab.train(f"rlvr from {name}", "--stage", "rlvr", "--model", start / "model", "--corpus", answers,
                        "--steps", 20)
        tokenizer = Tokenizer.from_dir(run / "model")
        _, held, _ = data.answer_sets(tokenizer, data.read_corpus(answers), 500, lab.seed)
        _, method, _ = train.parse(["--stage", "rlvr", "--model", "-", "--corpus", "-"])
        out[name] = [evaluation.evaluate(load_pretrained(folder / "model"), tokenizer, held[: lab.questions], method,
                                         1, lab.seed) for folder in (start, run)]
    return out


def table_3(lab: Lab) -> dict:
    """Zero-shot multiple choice on stories that were never trained on."""
    tokenizer, _, method = lab.held_out()
    documents = data.read_corpus(lab.path("toy") / "world" / "corpus.jsonl")
    _, held, _ = data.split_holdout(documents, 500, lab.seed)
    texts = {document.text for document in held}
    stories = [story for story in data.toy_stories(4500, 1000 + lab.seed) if story.text in texts][: lab.questions]
    choices = [evaluation.Choice(s.problem + data.TOY_QUESTION, tuple(s.cups), s.cups.index(s.ball[-1]))
               for s in stories]
    return {name: evaluation.multiple_choice(load_pretrained(lab.path("toy").parent / folder / "model"), tokenizer,
                                             choices, method, lab.seed)
            for name, folder in (("base", "toy/base"), ("continual next-token training", "ntp"), ("RPT", "toy"))}


def templates(lab: Lab) -> dict:
    """random@1 and pass@8 of the base model before training, per prompt template."""
    few = dataclasses.replace(lab, quick=True)
    return {name: few.measure(lab.path("toy") / "base", 8, template=name, max_prompt=448)
            for name in data.TEMPLATES if name != "plain"}


def patterns(lab: Lab) -> dict:
    """How far thoughts go: full, partial or no chain, at the beginning and the end of RPT; and the paper's keywords."""
    rows = [json.loads(line) for line in (lab.path("toy") / "rollouts.jsonl").read_text().splitlines()]
    last, out = max(row["step"] for row in rows), {}
    for name, some in (("first 5 steps", [r for r in rows if r["step"] < 5]),
                       ("last 5 steps", [r for r in rows if r["step"] > last - 5])):
        kinds = [chain_kind(row) for row in some]
        out[name] = {kind: [float(k == kind) for k in kinds] for kind in ("full", "partial", "none")} | {
            "documents": [row["document"] for row in some],
            "keywords": evaluation.reasoning_patterns([row["response"] for row in some])}
    return out


def chain_kind(row: dict) -> str:
    """Whether a response's thought goes through all swaps of its story."""
    swaps = len(re.findall(r" \d [A-H] [A-H]\.", row["context"]))
    said = len(re.findall(r" \d [A-H] [A-H] [A-H]\.", row["response"].split("</think>")[0]))
    return "none" if not said else "full" if said == swaps else "partial"


EXPERIMENTS: dict[str, Callable[[Lab], dict]] = {
    "table 1": table_1, "matched ntp": matched_ntp, "variants": variants, "table 2": table_2, "table 3": table_3,
    "templates": templates, "patterns": patterns}


# ---------------------------------------------------------------------------------------------- what they show


def interval(values: Sequence[float], documents: Sequence[object]) -> str:
    """A mean in % with its 95 % interval."""
    labels = {document: n for n, document in enumerate(dict.fromkeys(documents))}
    mean, low, high = evaluation.bootstrap_interval(list(values), [labels[d] for d in documents])
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def pooled(found: list[dict], *keys: object) -> list[dict]:
    """Records of all seeds, documents told apart by seed."""
    out = []
    for seed, each in enumerate(found):
        for key in keys:
            each = each[key]
        out += [record | {"document": (seed, record["document"])} for record in each]
    return out


def accuracies(name: str, records: Sequence[dict], measure: str) -> list[str]:
    """A table row: accuracy per split."""
    cells = []
    for threshold in evaluation.SPLITS.values():
        some = [record for record in records if record["entropy"] > threshold]
        values = {"standard": lambda r: r["standard"], "reasoning": lambda r: np.mean(r["reasoning"]),
                  "vote": lambda r: r["vote"], "pass": lambda r: float(max(r["reasoning"]))}[measure]
        cells.append(interval([values(r) for r in some], [r["document"] for r in some]))
    return [name, *cells]


def section(title: str, text: str, head: list[str], rows: list[list[str]], figure: dict | None = None) -> dict:
    """A part of results.json."""
    return {"title": title, "text": text, "table": {"head": head, "rows": rows}} | (
        {"figure": figure} if figure else {})


def scaling_section(found: list[dict]) -> dict:
    """P(C) = A / C^alpha + P*, fitted per split to the means over seeds of the accuracy at each checkpoint."""
    curves, rows, series = [each["curve"] for each in found], [], []
    compute = np.mean([[point["flops"] for point in curve] for curve in curves], axis=0)
    for split in evaluation.SPLITS:
        accuracy = np.mean([[point[split][0] for point in curve] for curve in curves], axis=0)
        A, alpha, P_star, r2 = evaluation.fit_power_law(compute, accuracy)
        bounds = evaluation.power_law_intervals(compute, accuracy)
        cell = {key: f"{value:.3g} [{bounds[key][0]:.3g}, {bounds[key][1]:.3g}]" for key, value in
                (("A", A), ("alpha", alpha), ("P_star", P_star))}
        rows.append([split, str(len(compute)), cell["A"], cell["alpha"], cell["P_star"], f"{r2:.3f}"])
        fine = np.geomspace(compute[0], compute[-1], 60)
        series += [{"name": split, "x": compute.tolist(), "y": accuracy.tolist(), "kind": "points"},
                   {"name": f"{split}, fit", "x": fine.tolist(), "y": (A * fine**-alpha + P_star).tolist(),
                    "kind": "line"}]
    figure = {"title": "Accuracy against compute", "x": "training FLOPs of RPT", "y": "next-token reasoning accuracy",
              "log_x": True, "series": series}
    return section("Scaling", "P(C) = A / C^alpha + P*, least squares on the mean over seeds at each checkpoint, with "
                   "residual-bootstrap intervals.", ["split", "checkpoints", "A", "alpha", "P*", "R²"], rows, figure)


def sections(found: dict[str, list[dict]]) -> list[dict]:
    """Everything that was measured, as tables and figures."""
    head = ["", *(f"{split} (> {t} nats)" for split, t in evaluation.SPLITS.items())]
    base, after = (pooled(found["table 1"], name) for name in ("base", "RPT"))
    measures = (("standard", "standard (argmax)"), ("reasoning", "reasoning"), ("vote", "reasoning, majority of 8"),
                ("pass", "reasoning, pass@8"))
    one = [accuracies(f"{name}, {label}", records, key) for key, label in measures
           for name, records in (("base", base), ("RPT", after))]
    ntp = pooled(found["matched ntp"], "records")
    steps = ", ".join(str(each["steps"]) for each in found["matched ntp"])
    one += [accuracies("continual next-token training, standard", ntp, "standard"),
            accuracies("continual next-token training, reasoning", ntp, "reasoning")]
    parse = {name: 100 * np.mean([np.mean(r["parsed"]) for r in records])
             for name, records in (("base", base), ("RPT", after))}
    lengths = (np.mean([each["length"] for each in found["table 1"]], axis=0),
               np.mean([each["reward"] for each in found["table 1"]], axis=0))
    time = list(range(len(lengths[0])))
    out = [section("Table 1: next-token accuracy",
                   f"In %, on held-out documents. Responses that hold a prediction: base {parse['base']:.1f} %, "
                   f"RPT {parse['RPT']:.1f} %. The next-token baseline had the FLOPs of RPT ({steps} steps).",
                   head, one,
                   {"title": "Response length during RPT", "x": "step", "y": "tokens", "log_x": False,
                    "series": [{"name": "mean response length", "x": time, "y": lengths[0].tolist(), "kind": "line"}]}),
           scaling_section(found["table 1"])]
    differences = []
    for name, records in [("RPT, prefix reward", after),
                          *((name, pooled(found["variants"], name)) for name in VARIANTS)]:
        differences.append(accuracies(name, records, "reasoning")
                           + [f"{np.mean([np.mean(r['length']) for r in records]):.1f}"])
    out.append(section("Rewards, controls and options of later work",
                       "Reasoning accuracy in % after the same number of steps from the same base models.",
                       [*head, "length"], differences))
    two = []
    for name in found["table 2"][0]:
        pair = [pooled(found["table 2"], name, when) for when in (0, 1)]
        two.append([name, *(interval([np.mean(r["reasoning"]) for r in records], [r["document"] for r in records])
                            for records in pair)])
    out.append(section("Table 2: RL with verifiable rewards afterwards",
                       "Accuracy in % on held-out question-answer pairs, before and after 20 steps.",
                       ["start", "before", "after"], two))
    three = []
    for name in found["table 3"][0]:
        records = pooled(found["table 3"], name)
        three.append([name, *(interval([np.mean(r[key]) for r in records], [r["document"] for r in records])
                              for key in ("standard", "reasoning"))])
    out.append(section("Table 3: zero-shot multiple choice",
                       "Accuracy in % on stories of 3 to 8 cups; chance is about 20 %.",
                       ["model", "standard", "reasoning"], three))
    four = []
    for name in found["templates"][0]:
        records = pooled(found["templates"], name)
        documents = [r["document"] for r in records]
        four.append([name, interval([np.mean(r["reasoning"]) for r in records], documents),
                     interval([float(max(r["reasoning"])) for r in records], documents)])
    out.append(section("Prompt templates before training",
                       "The base model has seen only the toy's own template; the paper's are foreign to it.",
                       ["template", "random@1", "pass@8"], four))
    five, words = [], []
    for name in found["patterns"][0]:
        rows = [(seed, each[name]) for seed, each in enumerate(found["patterns"])]
        documents = [(seed, d) for seed, each in rows for d in each["documents"]]
        five.append([name, *(interval([v for _, each in rows for v in each[kind]], documents)
                             for kind in ("full", "partial", "none"))])
        words.append(f"{name}: {max(max(each['keywords'].values()) for _, each in rows):.0%}")
    out.append(section("Reasoning patterns",
                       "Share of responses in % whose thought follows all swaps, some, or none. The paper's six "
                       f"keyword groups occur in at most: {'; '.join(words)}: the toy's thoughts have no words.",
                       ["", "full chain", "partial", "none"], five))
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer questions")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="seeds (0 1 2; quick: 0)")
    parser.add_argument("--out", default="", help="folder (runs/miniature, or runs/quick)")
    parser.add_argument("--figures", default="", help="folder for the figures as SVG (none)")
    args = parser.parse_args(argv)
    root = Path(args.out or ("runs/quick" if args.quick else "runs/miniature"))
    seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    found: dict[str, list[dict]] = {name: [] for name in EXPERIMENTS}
    bar = tqdm(total=len(seeds) * len(EXPERIMENTS), desc="miniature", unit="experiment")
    for seed in seeds:
        lab = Lab(root, seed, args.quick)
        for name, experiment in EXPERIMENTS.items():
            bar.set_postfix_str(f"seed {seed}: {name}")
            file = lab.path("results") / f"{name}.json"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                train.write_json(file, experiment(lab))
            found[name].append(json.loads(file.read_text()))
            bar.update()
    bar.close()
    results = {"title": f"The paper in miniature, seeds {', '.join(map(str, seeds))}", "sections": sections(found)}
    train.write_json(root / "results.json", results)
    text = "\n\n".join(markdown(part) for part in results["sections"])
    (root / "results.md").write_text(text + "\n")
    report.main([str(root)])
    if args.figures:
        Path(args.figures).mkdir(parents=True, exist_ok=True)
        (Path(args.figures) / "results.md").write_text(text + "\n")
        for part in results["sections"]:
            if "figure" in part:
                name = re.sub(r"\W+", "-", part["figure"]["title"].lower())
                (Path(args.figures) / f"{name}.svg").write_text(report.svg(part["figure"]))
    print(text)


def markdown(part: dict) -> str:
    """A section as Markdown."""
    lines = [part["table"]["head"], ["---"] * len(part["table"]["head"]), *part["table"]["rows"]]
    return f"**{part['title']}.** {part['text']}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
