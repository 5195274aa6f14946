"""The paper in miniature: its tables and figures on toy worlds, and its critics' controls.

    python -m paper.miniature                  seeds 0, 1, 2, each with a base of its own
    python -m paper.miniature --quick          seed 0 alone

It only runs the commands that a reader would run, two at a time: toy.make, train.py, the recipes
and eval.py. Each seed has a folder whose log.txt lists them. Finished parts are not run again. A
real model and corpus go through the same commands.

Every model sits the same exams: the next tokens of held-out stories, problems with answers, and
multiple choice. No run trains on any of these texts. Intervals are 95 % bootstrap intervals over
the documents of all seeds, and differences are paired by question. They say nothing about other
worlds.

It writes results.md and a figure; paper/results has those of three seeds. To draw the course of
RPT: `python -m paper.report runs/miniature/[0-2]/rpt`.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from random import Random

import numpy as np

from eval import SPLITS, summary, table
from paper.compare import differences
from paper.flops import spend
from paper.report import read_rows, svg
from toy import make

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("base", "ntp", "sft", "rpt")
# In a command @ is the folder of a seed.
STORIES = "--corpus @/world/corpus.jsonl"
ON_TOY = ("--recipe toy --model @/base/model --answers= --cache @/cache --device cpu "
          f"--save-every 1000000 --eval-questions 0 {STORIES}")
VARIANTS = {  # RPT with another reward, control, or an option of later work
    "first-token-reward": f"train {ON_TOY} --reward first-token",
    "dense-reward": f"train {ON_TOY} --reward dense",
    "conditional-dense-reward": f"train {ON_TOY} --reward conditional-dense",
    "format-only-reward": f"paper.recipes.format_only {ON_TOY}",
    "random-positions": f"paper.recipes.random_positions {ON_TOY}",
    "information-gain": f"paper.recipes.information_gain {ON_TOY} --no-scale-by-std",
    "auxiliary-loss": f"paper.recipes.auxiliary_loss {ON_TOY}",
    "easy-groups-less-often": f"paper.recipes.easy_groups {ON_TOY}",
}
RLVR = f"train {ON_TOY} --stage rlvr --corpus @/world/train.jsonl --holdout 0 --steps 10"
RUNS = VARIANTS | {"rpt": f"train {ON_TOY} --eval-every 4 --eval-questions 500",
                   **{f"rlvr-{name}": f"{RLVR} --model @/{name}/model" for name in MODELS}}
NTP = f"train {ON_TOY} --stage ntp --questions 64"
CONTROLS = {"ntp": "continual next-token training", "sft": "Mixed SFT"}
RUNS |= {  # for RPT's FLOPs: the same stories, or fresh rows of the base's own mixture
    "ntp": NTP, "sft": f"{NTP} --corpus @/world/lessons.jsonl --holdout 0"}
SHARES = (0.1, 0.25, 0.5, 1.0)  # of those FLOPs, after which the controls are examined
ORDER = (("base",), ("rpt", "rlvr-base", *VARIANTS), ("ntp", "sft", "rlvr-rpt"),
         ("rlvr-ntp", "rlvr-sft"))  # each needs those before it
EXAMS = {"next-token": f"{STORIES} --samples 8",
         "answers": "--answers @/world/held.jsonl --samples 4",
         "choices": "--answers @/world/choices.jsonl --samples 2"}
ASKED = ("--template toy --max-prompt 256 --max-response 96 --device cpu --region solution "
         "--holdout 500 --proxy @/base/model --cache @/cache")
WORLD = ("A shell game told in text, see toy/make.py. The base has learned from an annotator who "
         "after each swap takes any cup with probability 0.15 and goes on from there: something to "
         "mend. RPT sees plain stories only. It shows what the method does to a model "
         "that can reason but does it badly. It is no finding about language.")


# ------------------------------------------------------------------------------------- the runs


def command(folder: Path, line: str) -> str:
    """Run a module's command for a seed. Return what it prints. Raise RuntimeError if it fails."""
    words = [word.replace("@", str(folder)) for word in f"{line} --seed {folder.name}".split()]
    with open(folder / "log.txt", "a") as log:
        print("python -m", *words, file=log)
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"python -m {' '.join(words)}\n{done.stderr[-2000:]}")
    return done.stdout


def exam(folder: Path, name: str, file: str, line: str) -> None:
    """Examine a model, unless it was done before."""
    out = folder / name / file
    if not out.exists():
        shutil.rmtree(part := folder / name / "part", ignore_errors=True)
        command(folder, f"eval @/{name}/model {ASKED} --out {part} {line}")
        part.rename(out)


def build(folder: Path, name: str) -> None:
    """Train a model of a seed, and examine it."""
    if name in CONTROLS:
        match_compute(folder, name)
    elif not (folder / name / "model").exists():
        if name in RUNS:
            command(folder, f"{RUNS[name]} --out @/{name}")
        else:
            make_world(folder)
    for file, line in EXAMS.items():
        exam(folder, name, file, line)
    file = folder / name / "perplexity.txt"
    if name in MODELS and not file.exists():
        file.write_text(command(folder, f"paper.perplexity @/{name}/model {ASKED} {STORIES}"))


def make_world(folder: Path) -> None:
    """Write the texts, the base, and fresh rows of the mixture that the base was trained on."""
    seed, texts = int(folder.name), folder / "world"
    random, known = Random(f"more lessons {seed}"), make.write_texts(texts, seed)
    answers = read_rows(texts / "answers.jsonl")
    make.write_rows(texts / "held.jsonl", answers[:500])
    make.write_rows(texts / "train.jsonl", answers[500:])
    make.write_rows(texts / "lessons.jsonl", (make.lesson(random, known) for _ in range(30_000)))
    if seed:
        command(folder, "toy.make --out @/world")
    else:  # toy/ is what seed 0 makes, in seven minutes
        shutil.copytree(ROOT / "toy" / "base", texts / "base")
    (folder / "base").mkdir(exist_ok=True)
    (texts / "base").rename(folder / "base" / "model")


def match_compute(folder: Path, name: str) -> None:
    """Train a control for RPT's FLOPs, and examine it on the way (arXiv 2608.23256)."""
    run = f"{RUNS[name]} --out @/{name}"
    if not (folder / name / "metrics.jsonl").exists():
        command(folder, f"{run} --steps 2")
    steps = spend(folder / "rpt").sum() / spend(folder / name).mean()
    for share in SHARES:
        if not (folder / name / str(share)).exists():
            command(folder, f"{run} --steps {round(share * steps)}")
            exam(folder, name, str(share), STORIES)


# ------------------------------------------------------------------------------- what they show


def read_records(folders: Sequence[Path], name: str) -> list[dict]:
    """Return the records of an exam of all seeds, each document named after its seed."""
    return [row | {"document": f"{folder.name} {row['document']}"} for folder in folders
            for row in read_rows(folder / name / "records.jsonl")]


def markdown(text: str) -> str:
    """Turn a table of eval.py into Markdown."""
    title, *lines = text.splitlines()
    rows = [f"| {' | '.join(re.split('  +', line))} |" for line in lines]
    rule = "|---" * (rows[0].count("|") - 1) + "|"
    return "\n".join([f"## {title}\n", rows[0], rule, *rows[1:], ""])


def tables(folders: Sequence[Path]) -> Iterator[str]:
    """Yield tables 1 to 3, and those of other rewards, controls and options of later work."""
    after = [f"rlvr-{name}" for name in MODELS]  # table 2
    for title, names in (("models", [*MODELS, *after]), ("variants", ["base", "rpt", *VARIANTS])):
        for exam in EXAMS:
            found = {name: summary(read_records(folders, f"{name}/{exam}")) for name in names}
            yield markdown(table(found, f"{exam}: {title},"))
    yield "## Perplexity of held-out stories\n"
    for folder in folders:
        yield from ((folder / name / "perplexity.txt").read_text() for name in MODELS)


def claims(folders: Sequence[Path]) -> Iterator[str]:
    """Yield how much better RPT is than the base, and than the controls (not in the paper)."""
    yield "## Paired differences in points: RPT is B\n"
    for stage, exams in (("", EXAMS), ("rlvr-", ["answers"])):
        for exam, name in product(exams, ("base", "ntp", "sft")):
            both = (read_records(folders, f"{stage}{each}/{exam}") for each in (name, "rpt"))
            for line in differences(*both):
                yield f"* {exam}, A is {stage}{name}: {line}"


def figure(folders: Sequence[Path]) -> str:
    """Draw accuracy against training FLOPs: means over seeds of RPT at each checkpoint, and of the
    controls at each share of RPT's FLOPs."""
    evals = [read_rows(folder / "rpt" / "evals.jsonl")[1:] for folder in folders]  # from a step on
    steps = [row["step"] - 1 for row in evals[0]]
    compute = np.mean([spend(folder / "rpt").cumsum()[steps] for folder in folders], 0)
    lines = {}
    for split in SPLITS:
        accuracy = np.mean([[row["held-out"][split]["reasoning"][0] for row in each]
                            for each in evals], 0)
        lines[f"RPT, {split}"] = [*zip(np.log10(compute), 100 * accuracy)]
    for name, title in CONTROLS.items():
        found = [summary(read_records(folders, f"{name}/{share}")) for share in SHARES]
        lines[f"{title}, easy"] = [
            (np.log10(share * compute[-1]), 100 * of["easy"]["reasoning"][0])
            for share, of in zip(SHARES, found)]
    return svg("Next-token reasoning on held-out stories, accuracy in %", lines,
               "log10 of training FLOPs")


def main() -> None:
    """Run the command line."""
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
            list(pool.map(build, *zip(*((folder, name) for name in names for folder in folders))))
    title = f"# The paper in miniature, seeds {', '.join(map(str, args.seeds))}\n\n{WORLD}\n"
    parts = [title, *tables(folders), *claims(folders), ""]
    (args.out / "results.md").write_text("\n".join(parts))
    (args.out / "accuracy-against-compute.svg").write_text(figure(folders))


if __name__ == "__main__":
    main()
