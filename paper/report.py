"""One page about a run, or about several side by side: self-contained, for a laptop or a phone.

    python -m paper.report RUN [RUN ...] [--out FILE]          report.html in the first folder

It shows what the folders hold and passes over what they do not: results.json (sections that another
program wrote), run.json (of several runs first where they differ), the exams of evals.jsonl, the
curves of metrics.jsonl, and of the first run the responses of rollouts.jsonl. Under each figure its
values open as text, and the files themselves are linked.

What a model or a corpus wrote is hostile until escaped. It enters the page as HTML or SVG text
through `escape`, or as JSON through `embed`, which leaves no `<` for the HTML parser; the page's
one script, report.js, puts it into text nodes, and the content security policy allows no other
script and nothing from elsewhere. Left out: live updates, a server.
"""

import argparse
import base64
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from paper.figure import escape, number, svg

PAGE_BYTES = 4_000_000  # of rollouts in the page, about
TEXT_CHARS = 30_000  # of one text in the page
CSS, SCRIPT = (Path(__file__).with_name(f"report.{kind}").read_text() for kind in ("css", "js"))

CURVES = (  # title, y axis, keys of metrics.jsonl
    ("Reward", "mean of a step", "reward"),
    ("Accuracy of rollouts", "share of responses", "accuracy"),
    ("Groups", "share; expected informative: 1 − p^G − (1 − p)^G",
     "all_right all_wrong informative_expected"),
    ("Format", "share of responses", "parsed truncated"),
    ("Response length", "tokens", "length length_max"),
    ("Entropy of the policy", "nats per token", "entropy"),
    ("Loss", "", "loss"),
    ("Gradient norm", "before clipping", "grad_norm"),
    ("Sampler against trainer", "|difference of log-probability|, nats",
     "logprob_diff logprob_diff_max"),
    ("Speed", "tokens per second", "decode_tokens_per_s train_tokens_per_s"),
)


@dataclass(frozen=True)
class Logs:
    """What a run's folder says."""

    name: str
    label: str  # before each of its names in a legend or table
    settings: dict  # run.json
    metrics: list[dict]
    evals: list[dict]  # {"step": n, exam: {split: {measure: [mean, low, high]}}}


# -------------------------------------------------------------------------------------- reading


def read_lines(path: Path) -> Iterator[dict]:
    """The rows of a .jsonl file, none if there is no file; a last line that was cut is ignored."""
    with open(path if path.exists() else os.devnull, "rb") as file:
        for n, line in enumerate(file, 1):
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError):
                if line.endswith(b"\n"):
                    raise ValueError(f"{path}, line {n}: not a JSON object; mend or remove the "
                                     "line") from None


def read_json(path: Path) -> dict:
    """The object in a .json file, {} if there is no file."""
    try:
        return dict(json.loads(path.read_bytes())) if path.exists() else {}
    except (ValueError, TypeError):
        raise ValueError(f"{path}: not a JSON object; write it again or remove it") from None


def read_logs(folder: Path, alone: bool) -> Logs:
    """The logs of a run."""
    metrics = [row | (row.get("time") or {}) for row in read_lines(folder / "metrics.jsonl")]
    evals = list(read_lines(folder / "evals.jsonl"))
    for row in evals:
        if "perplexity" in row:  # of stage ntp: no splits
            row["perplexity"] = {"held-out": {"perplexity": row["perplexity"]}}
    name = folder.resolve().name
    label = "" if alone else f"{name}: "
    return Logs(name, label, read_json(folder / "run.json"), metrics, evals)


def interval(value: object) -> list[float | None]:
    """[mean, low, high] if it is such a list, its bounds None where there is no spread; else []."""
    good = isinstance(value, list) and len(value) == 3 and number(value[0]) is not None
    return list(map(number, value)) if good else []


# ------------------------------------------------------------------------------------- sections


def section(given: dict) -> str:
    """HTML of {"title", "text", "table": {"head", "rows"}, "figures"}, each of them optional."""
    parts = [f"<h2>{escape(given['title'])}</h2>"] if given.get("title") else []
    paragraphs = re.split(r"\n\s*\n", str(given.get("text") or ""))
    parts += [f"<p>{escape(text)}</p>" for text in paragraphs if text.strip()]
    if table := given.get("table"):
        parts.append(table_html(table.get("head") or [], table.get("rows") or []))
    figures = given.get("figures") or []
    size = (400, 260) if len(figures) > 1 else (480, 320)
    plots = [f'<figure class="card">{svg(figure, *size)}{as_text(figure)}</figure>'
             for figure in figures]
    return f'<section>{"".join(parts)}<div class="plots">{"".join(plots)}</div></section>'


def as_text(figure: dict) -> str:
    """The values of a figure, at about a dozen places from the first to the last, to be opened."""
    series = figure.get("series") or []
    points = [dict(zip(map(number, of.get("x") or []), map(number, of.get("y") or [])))
              for of in series]
    places = sorted({x for of in points for x in of if x is not None})
    some = {places[len(places) * n // 12] for n in range(12)} | {places[-1]} if places else ()
    rows = [[x, *(of.get(x) for of in points)] for x in sorted(some)]
    rows = [["" if value is None else f"{value:.4g}" for value in row] for row in rows]
    head = [figure.get("x", ""), *(of.get("name", "") for of in series)]
    return f"<details><summary>as text</summary>{table_html(head, rows)}</details>"


def table_html(head: Sequence, rows: Sequence[Sequence]) -> str:
    """A table in a card; a cell that is not long stays on one line."""
    first = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = ""
    for row in rows:
        kinds = ["n" if len(str(cell)) < 30 else "" for cell in row]
        cells = [f'<td class="{k}">{escape(cell)}</td>' for k, cell in zip(kinds, row)]
        body += f"<tr>{''.join(cells)}</tr>"
    return (f'<div class="card scroll"><table><thead><tr>{first}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def shown(value: object, measure: str) -> str:
    """[mean, low, high] in per cent, or as it is where it is no share; "" for anything else."""
    factor = 1 if measure in ("length", "perplexity") else 100
    mean, *bounds = [f"{factor * x:.1f}" for x in interval(value) if x is not None] or [""]
    return f"{mean} [{', '.join(bounds)}]" if bounds else mean


def curve(name: str, rows: Sequence[dict], values: Sequence) -> dict:
    """A series of figures, which are numbers or [mean, low, high], over the steps of rows."""
    points = [interval(value) or [number(value), None, None] for value in values]
    y, low, high = map(list, zip(*points))
    return {"name": name, "x": [row.get("step") for row in rows], "y": y, "low": low, "high": high}


def curve_section(runs: Sequence[Logs]) -> dict:
    """What happened during training."""
    figures = []
    for title, unit, keys in CURVES:
        series = [curve(run.label + key.replace("_", " "), run.metrics,
                        [row.get(key) for row in run.metrics])
                  for run in runs for key in keys.split()
                  if any(key in row for row in run.metrics)]
        if series:
            figures.append({"title": title, "x": "step", "y": unit, "series": series,
                            "log_y": "logprob" in keys})
    return {"title": "Training", "figures": figures}


def exam_section(runs: Sequence[Logs], exam: str) -> dict:
    """Of an exam, as of the held-out questions, a table of its first and last time in each run, and
    curves."""
    sat = [(run, [row for row in run.evals if exam in row]) for run in runs]
    sat = [(run, rows) for run, rows in sat if rows]
    splits, figures = sat[0][1][0][exam], []
    lines = [[f"{run.label}questions", *(rows[0][exam].get(split, {}).get("questions", "?")
                                         for split in splits)] for run, rows in sat]
    for measure in dict.fromkeys(name for of in splits.values() for name in of):
        if measure == "questions":
            continue
        series = []
        for run, rows in sat:
            found = {split: [row[exam].get(split, {}).get(measure) for row in rows]
                     for split in splits}
            series += [curve(run.label + split, rows, of) for split, of in found.items()]
            for n in sorted({0, len(rows) - 1}):
                cells = [shown(of[n], measure) for of in found.values()]
                lines.append([f"{run.label}step {rows[n].get('step')}, {measure}", *cells])
        figures.append({"title": measure, "x": "step", "series": series})
    return {"title": f"Exam: {exam}", "table": {"head": ["", *splits], "rows": lines},
            "figures": figures,
            "text": "In per cent, length in tokens, with 95 % intervals over documents."}


def header(runs: Sequence[Logs], title: str, links: Sequence[str]) -> str:
    """What the runs are, where they differ, and their files."""
    runs = [run for run in runs if run.settings]
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [[name, *(run.settings.get(name, "") for run in runs)] for name in names]
    head = ["setting", *(run.name for run in runs)]
    unlike = [row for row in rows if any(value != row[1] for value in row[2:])]
    files = " ".join(f'<a href="{escape(link)}">{escape(link)}</a>' for link in links)
    return (f"<header><h1>{escape(title)}</h1>{table_html(head, unlike) if unlike else ''}"
            f"<details><summary>All settings</summary>{table_html(head, rows)}</details>"
            f"<details><summary>Files</summary><p>{files}</p></details></header>")


# ------------------------------------------------------------------------------------- rollouts


def embed(value: object) -> str:
    """JSON for a script element: no character of it means anything to HTML, and a lone surrogate
    survives."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda c: f"\\u{ord(c[0]):04x}", text)


def limited(value: object) -> str:
    """A text; one that is too long for a page without its middle."""
    whole, half = str(value), TEXT_CHARS // 2
    if len(whole) <= TEXT_CHARS:
        return whole
    return f"{whole[:half]}\n[... left out ...]\n{whole[-half:]}"


def question(row: dict, stage: str) -> dict:
    """What a row of rollouts.jsonl says about its question; what is not finite was not logged."""
    about = [f"{key} {row.get(key)}" for key in ("step", "question", "document", "position")]
    if number(row.get("entropy")) is not None:
        about.append(f"{row['entropy']:.2f} nats")
    if row.get("kept") is False:
        about.append("replaced by dynamic sampling")
    truth = str(row.get("truth", ""))
    if stage == "rlvr":
        truth = f"\nexpected answer: {truth}"
    return {"step": number(row.get("step")), "about": limited(", ".join(about)),
            "context": limited(row.get("context", "")), "truth": limited(truth), "responses": []}


def response(row: dict) -> list:
    """[outcome, text, reward, prediction, advantage, finished, tokens] as report.js takes it."""
    reward, prediction = number(row.get("reward")), row.get("prediction")
    outcome = 2 if prediction is None else int((reward or 0) < 1)
    return [outcome, limited(row.get("response", "")), reward, prediction and limited(prediction),
            number(row.get("advantage")), bool(row.get("finished")), number(row.get("tokens"))]


def sample_rollouts(path: Path, stage: str = "") -> tuple[list[dict], int]:
    """Evenly spaced questions of rollouts.jsonl with their responses, about PAGE_BYTES of them, and
    of how many."""
    numbers: dict[str, int] = {}
    found: dict[int, dict] = {}
    every = math.ceil(path.stat().st_size / PAGE_BYTES) if path.exists() else 1
    for row in read_lines(path):
        name = json.dumps([row.get("step"), row.get("question")])
        number = numbers.setdefault(name, len(numbers))
        if number % every == 0:
            found.setdefault(number, question(row, stage))["responses"].append(response(row))
    return list(found.values()), len(numbers)


def browser(path: Path, stage: str) -> str:
    """The rollouts: data, controls and script."""
    questions, count = sample_rollouts(path, stage)
    if not questions:
        return ""
    return (
        f"<section><h2>Rollouts</h2><p>{len(questions):,} of {count:,} questions, "
        "evenly spaced. The bar marks the spot to predict, and the grey text after it is what the "
        "document says. A response is right if its reward is at least 1, unparsable if it holds no "
        "prediction.</p><noscript><p>They are shown by a script.</p></noscript>"
        '<div id="browser" hidden><div class="tools"><button value="-1"></button>'
        '<button value="0"></button><button value="1"></button><button value="2"></button>'
        '<select id="step" aria-label="step"><option>all steps</option></select></div>'
        '<div id="questions"></div><p><button id="more">show more</button></p></div></section>'
        f'<script type="application/json" id="data">{embed(questions)}</script>'
        f"<script>{SCRIPT}</script>")


# ----------------------------------------------------------------------------------------- page


def page(folders: Sequence[Path], place: Path | None = None) -> str:
    """The page about runs, to be put in the folder `place` (the first run's). ValueError if one has
    nothing to show, or if a file is not what its name says."""
    runs = [read_logs(folder, len(folders) == 1) for folder in folders]
    results = [read_json(folder / "results.json") for folder in folders]
    for folder, run, given in zip(folders, runs, results):
        if not run.metrics and not given:
            raise ValueError(f"{folder}: neither metrics.jsonl nor results.json to show; give the "
                             "folder of a run")
    title = results[0].get("title") or ", ".join(run.name for run in runs)
    exams = dict.fromkeys(name for run in runs for row in run.evals
                          for name, of in row.items() if isinstance(of, dict))
    sections = [part for given in results for part in given.get("sections") or []]
    sections += [exam_section(runs, exam) for exam in exams]
    sections += [curve_section(runs)] if any(run.metrics for run in runs) else []
    links = [quote(os.path.relpath(file, place or folders[0])) for folder in folders
             for file in sorted(folder.glob("*.json*"))]
    rollouts = browser(folders[0] / "rollouts.jsonl", runs[0].settings.get("stage", ""))
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = ("default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
              f"form-action 'none'; script-src 'sha256-{digest}'")
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
            f"{header(runs, title, links)}{''.join(map(section, sections))}{rollouts}"
            "</main></body></html>\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m paper.report",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, such as runs/toy")
    parser.add_argument("--out", type=Path, help="file to write (report.html in the first folder)")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "report.html"
    try:
        out.write_text(page(args.runs, out.parent), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
