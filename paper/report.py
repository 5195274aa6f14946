"""Draw one page about a run, or about several side by side: one HTML file without a script.

    python -m paper.report RUN [RUN ...] [--out FILE]          report.html in the first folder
    python -m paper.report RUN --out FILE.svg                  reward and accuracy in one figure

It shows the evaluations of evals.jsonl, the curves of metrics.jsonl, the options of run.json, and
the rollouts of the first run. Text of a model or a corpus enters it through `escape` only.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import islice
from pathlib import Path

import eval as evaluation
from data import read_json

PAGE_BYTES = 4_000_000  # of rollouts in a page, about
CURVES = {"reward": "mean reward", "length": "tokens of a response",
          "entropy": "entropy of the policy, nats", "parsed": "share that can be read",
          "finished": "share that ended", "informative": "groups with a gradient",
          "nll": "nats of a trained token",
          "grad_norm": "gradient norm", "logprob_diff": "sampler against trainer, nats"}
DASHES = ("none", "6 3", "2 3", "8 3 2 3")
COLOURS = 5
SVG_STYLE = """
.plot{color:#6e7781;font:13px system-ui,sans-serif}.plot text{fill:currentColor}
.grid{stroke:currentColor;stroke-opacity:.2}.line{fill:none;stroke:var(--c);stroke-width:2}
.dot{fill:var(--c)}.c0{--c:#0072b2}.c1{--c:#d55e00}.c2{--c:#009e73}.c3{--c:#b5578f}.c4{--c:#a67c00}
@media(prefers-color-scheme:dark){.plot{color:#9198a1}
.c0{--c:#56b4e9}.c1{--c:#f0803c}.c2{--c:#2fc194}.c3{--c:#dd8fbb}.c4{--c:#e0b040}}"""
STYLE = """
:root{color-scheme:light dark;--right:#08795a;--wrong:#b8480c;--unreadable:#6a6f78}
@media(prefers-color-scheme:dark){:root{--right:#41c596;--wrong:#f18d52;--unreadable:#a3aab3}}
body{max-width:1100px;margin:auto;padding:20px;font:16px/1.5 system-ui,sans-serif}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:12px}
.plot{width:100%;height:auto}.wide{overflow-x:auto}td{padding:4px 20px 4px 0;vertical-align:top;
border-top:1px solid #8885;white-space:nowrap}summary{cursor:pointer;padding:3px 0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;font-size:13px;margin:8px 0}
.answer{border-left:4px solid var(--c);padding-left:10px}.answer b{color:var(--c)}
.right{--c:var(--right)}.wrong{--c:var(--wrong)}.unreadable{--c:var(--unreadable)}"""


def read_rows(file: Path, every: int = 1) -> list[dict]:
    """Return each `every`-th row of a .jsonl file, or none if there is no file. Leave out a last
    line that is still being written."""
    if not file.exists():
        return []
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, 0, None, every) if line.endswith("\n")]


# --------------------------------------------------------------------------------------- figures


def axis(values: Sequence[float], start: float, end: float) -> tuple[Callable, list[float]]:
    """Return a map from values to pixels, and the round numbers to be marked."""
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    unit = 10.0 ** math.floor(math.log10(high - low))
    step = min((unit, unit / 2, unit / 5), key=lambda size: abs((high - low) / size - 5))
    marks = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda value: start + (value - low) / (high - low) * (end - start), marks


def svg(title: str, lines: dict[str, Sequence[tuple]], x: str = "step") -> str:
    """Return an SVG of named curves, each a sequence of points (x, y). Several curves get a legend,
    and a curve of one point is a dot."""
    width, top = 480, 36 + 18 * len(lines) * (len(lines) > 1)
    bottom = top + 200
    across, down = zip(*(point for curve in lines.values() for point in curve))
    x_of, x_marks = axis(across, 64, width - 12)
    y_of, y_marks = axis(down, bottom, top)
    parts = [f'<text x="8" y="20">{escape(title)}</text>']
    for mark in y_marks:
        parts.append(f'<path class="grid" d="M60 {y_of(mark):.1f}H{width}"/><text x="56" '
                     f'y="{y_of(mark) + 4:.1f}" text-anchor="end">{mark:.4g}</text>')
    for mark in x_marks:
        parts.append(f'<text x="{x_of(mark):.1f}" y="{bottom + 20}" text-anchor="middle">'
                     f"{mark:.6g}</text>")
    for n, (name, curve) in enumerate(lines.items()):
        style = f'class="line c{n % COLOURS}" stroke-dasharray="{DASHES[n % len(DASHES)]}"'
        path = " ".join(f"{x_of(a):.1f},{y_of(b):.1f}" for a, b in curve)
        parts.append(f'<polyline {style} points="{path}"/>')
        for a, b in curve if len(curve) == 1 else ():
            parts.append(f'<circle class="dot c{n % COLOURS}" cx="{x_of(a):.1f}" '
                         f'cy="{y_of(b):.1f}" r="4"/>')
        if len(lines) > 1:
            y = 38 + 18 * n
            parts.append(f'<path {style} d="M8 {y}h24"/><text x="38" y="{y + 4}">{escape(name)}'
                         "</text>")
    parts.append(f'<text x="{width / 2}" y="{bottom + 38}" text-anchor="middle">{escape(x)}</text>')
    size = f'width="{width}" height="{bottom + 46}" viewBox="0 0 {width} {bottom + 46}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" aria-label='
            f'"{escape(title)}" {size}><style>{SVG_STYLE}</style>{"".join(parts)}</svg>')


def curves(runs: dict[str, Path]) -> Iterator[str]:
    """Yield a figure for each of CURVES, with a line for each run."""
    metrics = {name: read_rows(folder / "metrics.jsonl") for name, folder in runs.items()}
    for key, title in CURVES.items():
        lines = {name: curve for name, rows in metrics.items()
                 if (curve := [(row["step"], row[key]) for row in rows if key in row])}
        if lines:
            yield svg(title, lines)


def picture(folder: Path) -> str:
    """Return an SVG for a README: a run's reward and held-out accuracy against the step."""
    rows, evals = (read_rows(folder / name) for name in ("metrics.jsonl", "evals.jsonl"))
    if not rows or not evals or "reward" not in rows[0]:
        raise ValueError(f"{folder}: no rewards and evaluations to draw")
    lines = {"RPT, mean reward of a step": [(row["step"], row["reward"]) for row in rows]}
    for split in evals[0]["held-out"]:
        lines[f"RPT, accuracy on held-out positions, {split}"] = [
            (row["step"], row["held-out"][split]["reasoning"][0]) for row in evals]
    return svg("Reinforcement Pre-Training: reasoning about the next token", lines)


# ---------------------------------------------------------------------------------- tables, text


def table(rows: Iterable[Iterable]) -> str:
    """Return rows of cells as HTML."""
    lines = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return f'<div class="wide"><table><tr>{"<tr>".join(lines)}</table></div>'


def exams(runs: dict[str, Path]) -> Iterator[str]:
    """Yield a table of each exam, with the first and the last evaluation of each run."""
    sat = []
    for name, folder in runs.items():
        rows = read_rows(folder / "evals.jsonl")
        sat += [(f"{name}, step {row['step']}", row) for row in rows[:1] + rows[1:][-1:]]
    for exam in dict.fromkeys(key for _, row in sat for key in row if key != "step"):
        text = evaluation.table({name: row[exam] for name, row in sat if exam in row}, exam)
        title, *lines = text.splitlines()
        yield f"<h3>{escape(title)}</h3>{table(re.split('  +', line) for line in lines)}"


def options(runs: dict[str, Path]) -> str:
    """Return a table of the runs' options, those that differ first."""
    known = [read_json(folder / "run.json") for folder in runs.values()]
    rows = [[name, *(row.get(name) for row in known)] for name in known[0]]
    rows.sort(key=lambda row: row[1:] == row[1:2] * len(runs))
    return table([["option", *runs], *rows])


def rollouts(file: Path) -> Iterator[str]:
    """Yield questions, evenly spaced, each with its responses."""
    size = file.stat().st_size if file.exists() else 0
    for row in read_rows(file, 1 + size // PAGE_BYTES):
        rewards = row["rewards"]
        yield (f"<details><summary>step {row['step']}, question {row['question'][1:]}, document "
               f"{row['document']}: {sum(r >= 1 for r in rewards)} of {len(rewards)} right"
               f"{'' if row['kept'] else ', replaced'}</summary>"
               f"<pre>{escape(row['context'])}<mark>{escape(row['truth'])}</mark></pre>")
        for reward, prediction, response, finished, tokens in zip(
                rewards, row["predictions"], row["responses"], row["finished"], row["tokens"]):
            kind = "right" if reward >= 1 else "wrong"
            if prediction is None:
                kind = "unreadable"
            yield (f'<pre class="answer {kind}"><b>{kind}</b>, reward {reward:.3g}, {tokens} tokens'
                   f"{'' if finished else ', not finished'}, boxed {escape(repr(prediction))}\n"
                   f"{escape(response)}</pre>")
        yield "</details>"


def page(folders: Sequence[Path]) -> str:
    """Return the page. Raise ValueError for a folder that has nothing to show."""
    runs = {str(folder): folder for folder in folders}
    for folder in folders:
        if not (folder / "metrics.jsonl").exists():
            raise ValueError(f"{folder}: no metrics.jsonl; give the folder of a run")
    title = escape(", ".join(runs))
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv='
            '"Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
            f"<details><summary>Options</summary>{options(runs)}</details>"
            f"<h2>Evaluations</h2>{''.join(exams(runs))}<h2>Training</h2>"
            f"<div class=\"plots\">{''.join(curves(runs))}</div><h2>Rollouts of "
            f"{escape(str(folders[0]))}</h2><p>What is marked follows, or is the answer.</p>"
            f"{''.join(rollouts(folders[0] / 'rollouts.jsonl'))}</body></html>\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m paper.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, such as runs/toy")
    parser.add_argument("--out", type=Path, help="file (default: report.html in the first folder); "
                        "of a .svg the figure of a README, of the first run")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "report.html"
    try:
        text = picture(args.runs[0]) if out.suffix == ".svg" else page(args.runs)
        out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"paper.report: error: {error}")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
