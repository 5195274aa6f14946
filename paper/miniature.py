"""The paper in miniature: its tables and figures on toy worlds, and its critics' controls.

    python -m paper.miniature                  seeds 0, 1, 2, each with a base of its own
    python -m paper.miniature --quick          seed 0 alone

It only runs the commands that a reader would: toy.make, train.py, the recipes, eval.py, two at a
time, in a folder for each seed; log.txt there has all of them. A real model and corpus go through
the same ones. What is finished is not done again.

Every model sits the same exams: the next tokens of held-out stories, and what no run but RLVR was
trained on, questions with answers and multiple choice. Intervals are 95 % bootstrap intervals over
the documents of all seeds, differences are paired by question; they say nothing of other worlds.
What comes out are results.json, results.md, a figure and report.html; paper/results keeps them.
The course of RPT: `python -m paper.report runs/miniature/[0-2]/rpt`.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np

import train
from eval import SPLITS, bootstrap_interval, measures
from paper import report
from paper.figure import svg
from paper.patterns import reasoning_patterns
from paper.scaling import fit_power_law, power_law_intervals
from toy import make

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"base": "base", "ntp": "continual next-token training", "sft": "Mixed SFT", "rpt": "RPT"}
STORIES = "--corpus world/corpus.jsonl"
ON_TOY = ("--recipe toy --model base/model --answers= --choices= --cache cache --device cpu "
          f"--save-every 1000000 --eval-questions 0 {STORIES}")
VARIANTS = {  # RPT with another reward, control, or an option of later work
    "first-token-reward": f"train {ON_TOY} --reward first-token",
    "dense-reward": f"train {ON_TOY} --reward dense",
    "conditional-dense-reward": f"train {ON_TOY} --reward conditional-dense",
    "format-only-reward": f"train {ON_TOY} --reward format",
    "random-positions": f"train {ON_TOY} --filter random --filter-value 0.15",
    "information-gain": f"paper.recipes.information_gain {ON_TOY} --no-scale-by-std",
    "auxiliary-loss": f"paper.recipes.auxiliary_loss {ON_TOY}",
    "easy-groups-less-often": f"paper.recipes.easy_groups {ON_TOY}",
}
RLVR = f"train {ON_TOY} --stage rlvr --corpus world/answers-train.jsonl --holdout 0 --steps 10"
RUNS = VARIANTS | {"rpt": f"train {ON_TOY} --eval-every 4 --eval-questions 500",
                   **{f"rlvr-{name}": f"{RLVR} --model {name}/model" for name in MODELS}}
NTP = f"train {ON_TOY} --stage ntp --questions 64"
CONTROLS = {  # for RPT's FLOPs: the same stories, or fresh rows of the base's own mixture
    "ntp": NTP, "sft": f"{NTP} --corpus world/lessons.jsonl --holdout 0"}
SHARES = (0.1, 0.25, 0.5, 1.0)  # of those FLOPs, after which the controls are examined
ORDER = (("base",), ("rpt", "rlvr-base", *VARIANTS), ("ntp", "sft", "rlvr-rpt"),
         ("rlvr-ntp", "rlvr-sft"))  # each needs what precedes
EXAMS = {"next-token": f"{STORIES} --samples 8",
         "answers": "--answers world/held.jsonl --samples 4",
         "choices": "--choices world/choices.jsonl --samples 2"}
ASKED = ("--template toy --max-prompt 256 --max-response 96 --device cpu --region solution "
         "--holdout 500 --proxy base/model --cache cache")
TEMPLATES = {f"template-{name}": f"{STORIES} --samples 8 --questions 100 --template {name} "
             "--max-prompt 416" for name in ("toy", "v0", "v1", "v2", "v3", "v4", "v5", "v6")}
WORLD = ("A shell game told in text, see toy/make.py. The base has learned from an annotator who "
         "after each swap takes any cup with probability 0.15 and goes on from there: something to "
         "mend. RPT sees plain stories only. It shows what the method does to a model "
         "that can reason but does it badly. It is no finding about language.")


# ------------------------------------------------------------------------------------- the runs


def command(folder: Path, line: str) -> str:
    """What a module's command prints, in a seed's folder; RuntimeError if it fails."""
    words = f"{line} --seed {folder.name}".split()
    with open(folder / "log.txt", "a") as log:
        log.write(f"python -m {' '.join(words)}\n")
    here = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, env=here, text=True,
                          capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{folder}: python -m {' '.join(words)}\n{done.stderr[-2000:]}")
    return done.stdout


def exam(folder: Path, name: str, file: str, line: str) -> None:
    """Asks a model; the records are complete or absent."""
    out = folder / name / f"{file}.jsonl"
    if not out.exists():
        command(folder, f"eval {name}/model {ASKED} --out {name}/part {line}")
        (folder / name / "part").rename(out)


def build(folder: Path, name: str) -> None:
    """Trains a model of a seed, and examines it."""
    if name in CONTROLS:
        matched(folder, name)
    elif not (folder / name / "model").exists() and name in RUNS:
        command(folder, f"{RUNS[name]} --out {name}")
    elif not (folder / name / "model").exists():
        world(folder)
    for file, line in (EXAMS | (TEMPLATES if name == "base" else {})).items():
        exam(folder, name, file, line)
    if name in MODELS:
        exam(folder, name, "perplexity", f"{STORIES} --perplexity")


def world(folder: Path) -> None:
    """The texts, the base, and fresh rows of the mixture that the base was trained on."""
    seed, texts = int(folder.name), folder / "world"
    random, known = Random(f"more lessons {seed}"), make.write_texts(texts, seed)
    answers = list(report.read_lines(texts / "answers.jsonl"))
    make.write_rows(texts / "held.jsonl", answers[:500])
    make.write_rows(texts / "answers-train.jsonl", answers[500:])
    make.write_rows(texts / "lessons.jsonl", (make.lesson(random, known) for _ in range(30_000)))
    if seed:
        command(folder, "toy.make --out world")
    else:  # toy/ is what seed 0 makes, in seven minutes
        shutil.copytree(ROOT / "toy" / "base", texts / "base")
    (folder / "base").mkdir(exist_ok=True)
    (texts / "base").rename(folder / "base" / "model")


def matched(folder: Path, name: str) -> None:
    """A control that takes the FLOPs of RPT, examined on the way (arXiv 2608.23256)."""
    run = f"{CONTROLS[name]} --out {name}"
    if not (folder / name / "metrics.jsonl").exists():
        command(folder, f"{run} --steps 2")
    steps = flops(folder, "rpt")[-1] / flops(folder, name)[1] * 2
    for share in SHARES:
        if not (folder / name / f"{share}.jsonl").exists():
            command(folder, f"{run} --steps {max(2, round(share * steps))}")
            exam(folder, name, str(share), STORIES)


def flops(folder: Path, name: str) -> np.ndarray:
    """What a run has spent after each step."""
    return np.cumsum([row["flops"] for row in report.read_lines(folder / name / "metrics.jsonl")])


# ------------------------------------------------------------------------------- what they show


class Findings:
    """What was measured, over all seeds."""

    def __init__(self, folders: Sequence[Path]):
        self.folders = folders

    def rows(self, file: str) -> list[dict]:
        """The rows of a file of each seed; documents are told apart by seed."""
        return [row | {"document": (int(folder.name) << 32) + row.get("document", 0)}
                for folder in self.folders for row in report.read_lines(folder / f"{file}.jsonl")]

    def values(self, file: str, measure: str, nats: float = 0.0) -> tuple[list, list]:
        """Of each question of an exam a measure, shares in %, and its document."""
        rows = [row for row in self.rows(file) if row.get("entropy", 9.0) > nats]
        factor = 1 if measure == "length" else 100
        return [factor * measures(row)[measure] for row in rows], [r["document"] for r in rows]

    def cell(self, file: str, measure: str = "reasoning", nats: float = 0.0) -> str:
        """A mean with its interval."""
        return shown(bootstrap_interval(*self.values(file, measure, nats)))

    def splits(self, name: str, measure: str = "reasoning") -> list[str]:
        """Accuracy of next tokens by split."""
        return [self.cell(f"{name}/next-token", measure, nats) for nats in SPLITS.values()]

    def claim(self, what: str, first: tuple, second: tuple) -> list[str]:
        """Whether the first is above the second."""
        (a, documents), (b, _) = self.values(*first), self.values(*second)
        gap = bootstrap_interval(np.subtract(a, b), documents)
        word = "shown" if gap[1] > 0 else "the opposite" if gap[2] < 0 else "not shown"
        return [what, self.cell(*first), self.cell(*second), shown(gap), word]


def shown(interval: Sequence[float], form: str = ".1f") -> str:
    """mean [low, high]"""
    mean, low, high = (format(x, form) for x in interval)
    return f"{mean} [{low}, {high}]"


def section(title: str, text: str, head: Sequence[str], rows: Sequence[Sequence],
            *figures: dict) -> dict:
    """A part of the results."""
    return {"title": title, "text": text, "table": {"head": head, "rows": rows}, "figures": figures}


def claims(found: Findings) -> dict:
    """The signs of the paper, and of RPT beside Mixed SFT (not in it), with their figures."""
    rows = []
    for split, nats in SPLITS.items():
        for measure in ("standard", "reasoning"):
            rows.append(found.claim(f"{split}: RPT's reasoning above the base's {measure}",
                                    ("rpt/next-token", "reasoning", nats),
                                    ("base/next-token", measure, nats)))
    for exam, prefix in (("answers", ""), ("answers", "rlvr-"), ("choices", "")):
        for name in ("base", "ntp", "sft"):
            first, second = (f"{prefix}{each}/{exam}" for each in ("rpt", name))
            rows.append(found.claim(f"{first} above {second}", (first, "reasoning"),
                                    (second, "reasoning")))
    return section("Claims", WORLD, ["claim", "first", "second", "paired difference", ""], rows)


def tables(found: Findings) -> list[dict]:
    """Tables 1 to 3, perplexity, variants, templates."""
    head = ["", *(f"{split} (> {nats} nats)" for split, nats in SPLITS.items())]
    one = [[f"{title}, {measure}", *found.splits(name, measure)] for name, title in MODELS.items()
           for measure in ("standard", "reasoning", "majority vote", "pass@8")]
    two, three = [], []
    for name, title in MODELS.items():
        two.append([title, found.cell(f"{name}/answers"), found.cell(f"rlvr-{name}/answers")])
        three.append([title, found.cell(f"{name}/choices", "standard"),
                      found.cell(f"{name}/choices"), perplexity(found.folders, name)])
    variants = [[name, *found.splits(name), found.cell(f"{name}/answers"),
                 found.cell(f"{name}/choices"), found.cell(f"{name}/next-token", "length")]
                for name in ("base", "rpt", *VARIANTS)]
    four = [[name, found.cell(f"base/{name}"), found.cell(f"base/{name}", "pass@8")]
            for name in TEMPLATES]
    return [section("Table 1: next-token accuracy",
                    "In %, on held-out stories. The controls had RPT's FLOPs.", head, one),
            section("Table 2: RL with verifiable rewards afterwards",
                    "Questions with answers, in %, the mean of 4 samples; 10 steps of RL.",
                    ["start", "before", "after"], two),
            section("Table 3: multiple choice, and perplexity",
                    "Zero-shot, in %; perplexity of held-out stories.",
                    ["", "standard", "reasoning", "perplexity"], three),
            section("Rewards, controls and options of later work",
                    "Reasoning in % after as many steps of as many questions from the same bases.",
                    [*head, "answers", "choices", "tokens"], variants),
            section("Prompt templates before training", "The base knows only the toy's own.",
                    ["template", "random@1", "pass@8"], four)]


def perplexity(folders: Sequence[Path], name: str) -> str:
    """Its logarithm is averaged over seeds, which are independent."""
    found = [json.loads((folder / name / "perplexity.jsonl").read_text()) for folder in folders]
    mean, *bounds = np.log(found).mean(0)
    return shown(np.exp([mean, *(mean + (bounds - mean) / len(folders) ** 0.5)]), ".3f")


def scaling(found: Findings) -> dict:
    """P(C) = A / C^alpha + P*, fitted per split to the means over seeds at each checkpoint from a
    tenth of the run on, where the paper's first point is."""
    evals = [list(report.read_lines(folder / "rpt" / "evals.jsonl")) for folder in found.folders]
    evals = [rows[len(rows) // 10:] for rows in evals]
    steps = [row["step"] - 1 for row in evals[0]]
    compute = np.mean([flops(folder, "rpt")[steps] for folder in found.folders], 0)
    rows, series = [], []
    for split in SPLITS:
        accuracy = np.mean([[row["held-out"][split]["reasoning"][0] for row in each]
                            for each in evals], 0)
        A, alpha, limit, r2 = fit_power_law(compute, accuracy)
        bounds = power_law_intervals(compute, accuracy)
        rows.append([split, len(compute), int((accuracy < 0.95 * accuracy[-1]).sum()),
                     shown((A, *bounds["A"]), ".3g"), shown((alpha, *bounds["alpha"]), ".3g"),
                     shown((limit, *bounds["P_star"]), ".3g"), f"{r2:.3f}"])
        fit = A * compute**-alpha + limit
        series += [{"name": split, "x": compute.tolist(), "y": accuracy.tolist(), "kind": "points"},
                   {"name": split, "x": compute.tolist(), "y": fit.tolist()}]
    for name in CONTROLS:
        accuracy = [np.mean(found.values(f"{name}/{share}", "reasoning", 0.5)[0]) / 100
                    for share in SHARES]
        series.append({"name": f"{MODELS[name]}, easy", "y": accuracy,
                       "x": [share * float(compute[-1]) for share in SHARES]})
    figure = {"title": "Accuracy against compute", "x": "training FLOPs", "log_x": True,
              "y": "next-token reasoning accuracy", "series": series}
    return section("Scaling", "P(C) = A / C^alpha + P*, least squares on the means over seeds from "
                   "a tenth of the run on, with residual-bootstrap intervals; unsaturated: below "
                   "95 % of the last accuracy.",
                   ["split", "checkpoints", "unsaturated", "A", "alpha", "P*", "R²"], rows, figure)


def patterns(found: Findings) -> dict:
    """How far thoughts go through the swaps, and the paper's keywords."""
    rows, lines = found.rows("rpt/rollouts"), []
    steps = max(row["step"] for row in rows) + 1
    for first in (0, steps - 5):
        some = [row for row in rows if first <= row["step"] < first + 5]
        kinds, documents = [chain(row) for row in some], [row["document"] for row in some]
        cells = [shown(bootstrap_interval([100.0 * (each == kind) for each in kinds], documents))
                 for kind in ("full", "partial", "none")]
        words = reasoning_patterns([row["response"] for row in some]).values()
        lines.append([f"steps {first} to {first + 4}", *cells, f"{100 * max(words):.1f}"])
    return section("Reasoning patterns",
                   "Responses in % whose thought follows all swaps, some or none, and the most "
                   "frequent of the paper's six keyword groups: the toy's thoughts have no words.",
                   ["", "full chain", "partial", "none", "keywords"], lines)


def chain(row: dict) -> str:
    """How much of its story's swaps a response's thought goes through."""
    swaps = len(re.findall(r" \d \w \w\.", row["context"]))
    said = len(re.findall(r" \d \w \w \w\.", row["response"].split("</think>")[0]))
    return "none" if not said else "full" if said == swaps else "partial"


def markdown(part: dict) -> str:
    """A section as Markdown."""
    head, rows = part["table"].values()
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return f"## {part['title']}\n\n{part['text']}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", dest="seeds", action="store_const", const=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/miniature"))
    args = parser.parse_args()
    folders = [args.out.resolve() / str(seed) for seed in args.seeds]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        for names in ORDER:
            parts = [(folder, name) for name in names for folder in folders]
            list(pool.map(build, *zip(*parts)))
    found = Findings(folders)
    sections = [claims(found), *tables(found), scaling(found), patterns(found)]
    title = f"The paper in miniature, seeds {', '.join(map(str, args.seeds))}"
    train.write_json(args.out / "results.json", {"title": title, "sections": sections})
    (args.out / "results.md").write_text("\n".join([f"# {title}\n", *map(markdown, sections)]))
    for figure in (figure for part in sections for figure in part["figures"]):
        name = figure["title"].lower().replace(" ", "-")
        (args.out / f"{name}.svg").write_text(svg(figure))
    report.main([str(args.out)])


if __name__ == "__main__":
    main()
