r"""One page about a run: report.html, self-contained, for a laptop or a phone, light or dark.

    python -m paper.report runs/toy [--out FILE]

It shows what the folder holds and passes over what it does not: results.json (sections that another program wrote),
run.json, table.json, the curves of metrics.jsonl and evals.jsonl, the responses of rollouts.jsonl.

What a model or a corpus wrote is hostile until escaped. It enters the page as HTML or SVG text through `escape`, or as
JSON through `embed`, which leaves no `<` for the HTML parser; the page's one script puts it into text nodes, and the
content security policy allows no other script and nothing from elsewhere. Left out: live updates, a server.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paper.figure import escape, number, svg

PAGE_BYTES = 4_000_000  # of rollouts in the page
TEXT_CHARS = 30_000  # of one text in the page
STEPS = 12  # of the run in the page at least; below that, fewer questions of each
CURVE_POINTS = 600
OUTCOMES = ("right", "wrong", "unparsable")

# title, y axis, {series: key in metrics.jsonl}, what else `svg` should know
CURVES: tuple[tuple[str, str, dict[str, str], dict[str, Any]], ...] = (
    ("Reward", "mean of a step", {"reward": "reward"}, {"y_range": [0, 1]}),
    ("Accuracy of rollouts", "share", {"responses": "accuracy", "questions": "solved"}, {"y_range": [0, 1]}),
    ("Groups without a gradient", "share", {"all right": "all_right", "all wrong": "all_wrong"}, {"y_range": [0, 1]}),
    ("Format", "share of responses", {"with a prediction": "parsed", "cut off": "truncated"}, {"y_range": [0, 1]}),
    ("Response length", "tokens", {"mean": "length", "longest": "length_max"}, {"y_range": [0]}),
    ("Entropy of the policy", "nats per token", {"entropy": "entropy"}, {"y_range": [0]}),
    ("Loss", "", {"loss": "loss"}, {}),
    ("Gradient norm", "before clipping", {"norm": "grad_norm"}, {"y_range": [0]}),
    ("Sampler against trainer", "|difference of log-probability|, nats",
     {"mean": "logprob_diff", "largest": "logprob_diff_max"}, {"log_y": True}),
    ("Speed", "tokens per second", {"decode": "decode_tokens_per_s", "train": "train_tokens_per_s"}, {"y_range": [0]}),
)
CSS = """
:root{color-scheme:light dark;--bg:#f6f7f8;--card:#fff;--ink:#1d2229;--muted:#5c6570;--rule:#e2e5e9;--accent:#0072b2;
--soft:#f3f5f7;--right:#08795a;--wrong:#b8480c;--unparsable:#6a6f78;--mark:#ffe9a0}
@media(prefers-color-scheme:dark){:root{--bg:#101317;--card:#181c22;--ink:#e4e8ec;--muted:#99a3ae;--rule:#2a3038;
--accent:#56b4e9;--soft:#1f242b;--right:#41c596;--wrong:#f18d52;--unparsable:#a3aab3;--mark:#5d4d12}}
*{box-sizing:border-box}[hidden]{display:none!important}body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;overflow-wrap:anywhere}figure{margin:0}
main{max-width:1120px;margin:0 auto;padding:40px 20px 80px}p{max-width:72ch;margin:0 0 14px}summary{cursor:pointer}
h1{font-size:30px;line-height:1.2;margin:0 0 6px}h2{font-size:21px;margin:52px 0 12px}
.quiet,summary{color:var(--muted);font-size:14.5px}.plot{display:block;width:100%;height:auto}
.tiles,.plots,.responses{display:grid;gap:14px;margin:18px 0;grid-template-columns:repeat(auto-fit,minmax(160px,1fr))}
.plots{grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.plots>:only-child{max-width:600px;grid-column:1/-1}
.card{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px 18px;min-width:0}
.card.scroll{overflow-x:auto;padding:4px 18px}.plots .card{padding:12px 10px 6px}
.tile{font-size:13.5px;line-height:1.4;color:var(--muted)}
.tile b{display:block;font-size:20px;font-weight:600;color:var(--ink);white-space:nowrap}
table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums;overflow-wrap:normal}
td,th{padding:9px 24px 9px 0;text-align:left;vertical-align:top;border-top:1px solid var(--rule);font-weight:400}
thead th{color:var(--muted);border:0}th,.n{white-space:nowrap}td:not(.n){min-width:16em}
.tools{display:flex;flex-wrap:wrap;gap:8px;position:sticky;top:0;background:var(--bg);padding:10px 0}
button,select{font:inherit;font-size:14.5px;min-height:40px;color:inherit;background:var(--card);padding:5px 11px;
border:1px solid var(--rule);border-radius:8px;cursor:pointer}:focus-visible{outline:2px solid var(--accent)}
button[aria-pressed=true]{border-color:var(--accent);color:var(--accent)}.question{margin:14px 0}
.text{white-space:pre-wrap;unicode-bidi:isolate;font:13.5px/1.6 ui-monospace,Menlo,Consolas,monospace}
.context,.response .text{max-height:18em;overflow:auto}
.context{background:var(--soft);border-radius:8px;padding:12px 14px;margin-top:8px}.facts{margin-bottom:4px}
.caret{display:inline-block;width:3px;height:1.3em;margin:0 1px;vertical-align:-.25em;background:var(--accent)}
.text+.text{margin-top:8px}
.truth,.tag{color:var(--muted)}mark{background:var(--mark);color:inherit;border-radius:3px;font-weight:700}
.responses{gap:10px;margin:12px 0 0;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
.response{border:1px solid var(--rule);border-left:4px solid var(--k);border-radius:8px;padding:9px 12px;min-width:0}
.facts{display:flex;flex-wrap:wrap;gap:0 12px;color:var(--muted);font-size:13px}.facts b{color:var(--k)}
.right{--k:var(--right)}.wrong{--k:var(--wrong)}.unparsable{--k:var(--unparsable)}
@media(max-width:520px){main{padding:26px 14px 60px}h1{font-size:25px}.card{padding:12px 14px}.tools{gap:6px}}
"""

SCRIPT = r"""
"use strict";
const KINDS = ["right", "wrong", "unparsable"], PAGE = 8, $ = id => document.getElementById(id);
const questions = JSON.parse($("data").textContent), steps = [...new Set(questions.map(q => q.step))];
let wanted = -1, found = [], drawn = 0;
const fixed = x => x === null ? "unknown" : String(+x.toFixed(2)).replace("-", "\u2212");
function make(tag, kind, ...children) {
  const node = document.createElement(tag);
  node.className = kind;
  const control = /[\0-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]/g;  // the last two turn text around
  const picture = c => c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : "\ufffd";
  node.append(...children.map(child => typeof child === "string" ? child.replace(control, picture) : child));
  return node;
}
function response([kind, text, reward, prediction, advantage, finished, tokens]) {
  const thought = text.lastIndexOf("</think>"), parts = [];
  const box = prediction === null ? -1 : text.lastIndexOf("\\boxed{" + prediction + "}") + 7;
  let at = 0;
  if (thought >= 0) parts.push(text.slice(0, thought), make("span", "tag", text.slice(thought, at = thought + 8)));
  if (box > at + 6) parts.push(text.slice(at, box), make("mark", "", text.slice(box, at = box + prediction.length)));
  parts.push(text.slice(at), text ? "" : make("span", "tag", "(empty)"));
  const facts = ["reward " + fixed(reward), "advantage " + fixed(advantage), tokens + " tokens"];
  const line = make("div", "facts", make("b", "", KINDS[kind]), ...facts.map(fact => make("span", "", fact)));
  if (!finished) line.append(make("b", "", "not finished"));
  return make("div", "response " + KINDS[kind], line, make("div", "text", ...parts));
}
function card(q) {
  const chosen = q.responses.filter(r => wanted < 0 || r[0] === wanted), right = q.responses.filter(r => r[0] === 0);
  const shown = chosen.length < q.responses.length ? `, ${chosen.length} shown` : "";
  return make("article", "card question",
    make("div", "quiet", `${q.about}: ${right.length} of ${q.responses.length} right${shown}`),
    make("div", "text context", q.context, make("span", "caret"), make("span", "truth", q.truth)),
    make("div", "responses", ...chosen.map(response)));
}
function more() {
  $("questions").append(...found.slice(drawn, drawn += PAGE).map(card));
  $("more").hidden = drawn >= found.length;
}
function show() {
  const at = $("step").selectedIndex, here = questions.filter(q => !at || q.step === steps[at - 1]);
  const kinds = here.flatMap(q => q.responses.map(r => r[0]));
  found = here.filter(q => wanted < 0 || q.responses.some(r => r[0] === wanted));
  for (const button of document.querySelectorAll(".tools button")) {
    const kind = +button.value, count = kinds.filter(k => kind < 0 || k === kind).length;
    button.textContent = `${kind < 0 ? "all" : KINDS[kind]} ${count.toLocaleString("en")}`;
    button.setAttribute("aria-pressed", String(kind === wanted));
    button.onclick = () => { wanted = kind; show(); };
  }
  $("questions").replaceChildren(found.length ? "" : "None here.");
  drawn = 0;
  more();
}
for (const step of steps) $("step").append(new Option("step " + step));
$("step").onchange = show;
$("more").onclick = more;
$("browser").hidden = false;
show();
"""


def embed(value: object) -> str:
    """JSON for a script element: no character of it means anything to HTML, and a lone surrogate survives."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def evenly(items: Sequence, count: int) -> list:
    """At most `count` items at even distances, the first and the last among them."""
    if count >= len(items):
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)] if count > 1 else [items[-1]]


def read_lines(path: Path) -> Iterator[dict]:
    """The rows of a .jsonl file, none if there is no file; a last line cut in the middle is ignored."""
    with open(path if path.exists() else os.devnull, "rb") as file:
        for n, line in enumerate(file, 1):
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError):
                if line.endswith(b"\n"):
                    raise ValueError(f"{path}, line {n}: not a JSON object; mend or remove the line") from None


def read_json(path: Path) -> dict:
    """The object in a .json file, {} if there is no file."""
    try:
        return dict(json.loads(path.read_bytes())) if path.exists() else {}
    except (ValueError, TypeError):
        raise ValueError(f"{path}: not a JSON object; write it again or remove it") from None


def section(given: dict) -> str:
    """HTML of {"title", "text", "table": {"head", "rows"}, "figure" or "figures"}, each of them optional."""
    parts = [f"<h2>{escape(given['title'])}</h2>"] if given.get("title") else []
    parts += [f"<p>{escape(p)}</p>" for p in re.split(r"\n\s*\n", str(given.get("text") or "")) if p.strip()]
    if table := given.get("table"):
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.get("head") or [])
        rows = ["".join(f'<td class="{"n" if len(str(cell)) < 30 else ""}">{escape(cell)}</td>' for cell in row)
                for row in table.get("rows") or []]
        parts.append(f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>'
                     f'{"".join(f"<tr>{row}</tr>" for row in rows)}</tbody></table></div>')
    figures = [figure for figure in (given.get("figure"), *(given.get("figures") or [])) if figure]
    size = (400, 260) if len(figures) > 1 else (480, 320)
    plots = "".join(f'<figure class="card">{svg(figure, *size)}</figure>' for figure in figures)
    return f'<section>{"".join(parts)}{plots and f"""<div class="plots">{plots}</div>"""}</section>'


def spread(value: object, measure: str) -> str:
    """[mean, low, high] as text, in per cent, or in tokens if it is a length; "" if it is no such list."""
    if not isinstance(value, list) or len(value) != 3 or None in map(number, value):
        return ""
    mean, low, high = value if measure == "length" else (100 * x for x in value)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def accuracy_section(table: dict) -> list[dict]:
    """The form of the paper's table 1, from {model: {split: {measure: [mean, low, high]}}}."""
    splits: dict = next(iter(table.values()), {})
    measures = dict.fromkeys(m for values in splits.values() for m, value in values.items() if spread(value, m))
    rows = [[f"{model}, {measure}", *(spread(of.get(split, {}).get(measure), measure) for split in splits)]
            for measure in measures for model, of in table.items()]
    text = "On held-out text, in per cent, length in tokens, with 95 % intervals over documents."
    head = ["", *(f"{split}, {values.get('questions', '?')} questions" for split, values in splits.items())]
    return [{"title": "Next-token accuracy", "text": text, "table": {"head": head, "rows": rows}}] if rows else []


def curve_sections(metrics: list[dict], evals: list[dict]) -> list[dict]:
    """What happened during training, and the evaluations on held-out text in between."""
    training, rows = [], evenly(metrics, CURVE_POINTS)
    for title, unit, keys, more in CURVES:
        series = [{"name": name, "x": [row.get("step") for row in rows], "y": [number(row.get(key)) for row in rows]}
                  for name, key in keys.items() if any(number(row.get(key)) is not None for row in rows)]
        training += [{"title": title, "x": "step", "y": unit, "series": series, **more}] if series else []
    held_out, splits = {}, {split: of for split, of in (evals[-1] if evals else {}).items() if isinstance(of, dict)}
    for measure, split in ((m, split) for split, of in splits.items() for m, value in of.items() if spread(value, m)):
        values = [row.get(split, {}).get(measure) or [None] * 3 for row in evals]
        figure = held_out.setdefault(measure, {"title": measure.capitalize(), "x": "step", "y": "mean", "series": []})
        figure["series"].append({"name": split, "x": [row.get("step") for row in evals]} |
                                dict(zip(("y", "low", "high"), map(list, zip(*values)))))
    thinned = f"{len(rows):,} of {len(metrics):,} steps, evenly spaced." if len(rows) < len(metrics) else ""
    return [s for s in ({"title": "Training", "text": thinned, "figures": training},
                        {"title": "Evaluations on held-out text", "figures": list(held_out.values())}) if s["figures"]]


def compact(rows: list[dict]) -> dict:
    """A question, and its responses as [outcome, text, reward, prediction, advantage, finished, tokens]."""
    def text(value: object) -> str:
        whole, half = str(value), TEXT_CHARS // 2
        return whole if len(whole) <= TEXT_CHARS else f"{whole[:half]}\n[... left out ...]\n{whole[-half:]}"

    first, responses = rows[0], []
    about = ", ".join(f"{key} {first.get(key)}" for key in ("step", "question", "document", "position"))
    about += "" if number(first.get("entropy")) is None else f", {first['entropy']:.2f} nats"
    for row in rows:
        reward, prediction = number(row.get("reward")), row.get("prediction")
        outcome = 2 if prediction is None else 0 if (reward or 0) >= 1 else 1
        responses.append([outcome, text(row.get("response", "")), reward, prediction and text(prediction),
                          number(row.get("advantage")), bool(row.get("finished")), number(row.get("tokens"))])
    return {"step": number(first.get("step")), "about": text(about), "context": text(first.get("context", "")),
            "truth": text(first.get("truth", "")), "responses": responses}


def sample_rollouts(path: Path) -> tuple[list[dict], str]:
    """The questions of rollouts.jsonl that fit into PAGE_BYTES, and a sentence on what was left out.

    Whole steps at even distances, or questions at even distances if fewer than STEPS whole steps fit.
    """
    def name(row: dict) -> tuple[float | None, str]:
        return number(row.get("step")), json.dumps(row.get("question"))

    sizes: dict[tuple[float | None, str], int] = {}  # bytes in the page
    for row in read_lines(path):
        new = compact([row]) if name(row) not in sizes else compact([row])["responses"]
        sizes[name(row)] = sizes.get(name(row), 0) + len(embed(new).encode())
    kept, steps = list(sizes), dict.fromkeys((step for step, _ in sizes), 0)
    for (step, _), size in sizes.items():
        steps[step] += size
    if sum(steps.values()) > PAGE_BYTES:
        fit = PAGE_BYTES // max(steps.values())
        some = set(evenly(list(steps), fit))
        kept = ([key for key in kept if key[0] in some] if fit >= STEPS
                else evenly(kept, PAGE_BYTES // max(sizes.values())))
    chosen: dict[tuple[float | None, str], list[dict]] = {key: [] for key in kept}
    for row in read_lines(path):
        if name(row) in chosen:
            chosen[name(row)].append(row)
    note = (f" To keep the page small these are {len(kept):,} of {len(sizes):,} questions, evenly spaced, from "
            f"{len({step for step, _ in kept}):,} of {len(steps):,} steps.")
    return [compact(rows) for rows in chosen.values()], note if len(kept) < len(sizes) else ""


def browser(path: Path) -> str:
    """The rollouts: data, controls and script, and a few of them for a reader without JavaScript."""
    questions, note = sample_rollouts(path)
    if not questions:
        return ""
    buttons = "".join(f'<button value="{kind}"></button>' for kind in range(-1, len(OUTCOMES)))
    still = "".join(
        f'<article class="card question"><p class="quiet">{escape(q["about"])}</p><div class="text context">'
        f'{escape(q["context"])}<span class="caret"></span><span class="truth">{escape(q["truth"])}</span></div>'
        + "".join(f'<div class="text">{OUTCOMES[kind]}: {escape(text)}</div>' for kind, text, *_ in q["responses"])
        + "</article>" for q in evenly(questions, 4))
    return (
        f"<section><h2>Rollouts</h2><p>{sum(len(q['responses']) for q in questions):,} responses to {len(questions):,} "
        f"questions.{note} The bar marks the spot to predict, and the grey text after it is what the document says. A "
        f"response is right if its reward is at least 1, unparsable if it holds no prediction.</p>"
        f'<noscript>{still}</noscript><div id="browser" hidden><div class="tools">{buttons}<select id="step" '
        f'aria-label="step"><option>all steps</option></select></div><div id="questions"></div><p><button id="more">'
        f'show more</button></p></div></section><script type="application/json" id="data">{embed(questions)}</script>'
        f"<script>{SCRIPT}</script>")


def header(run: dict, metrics: list[dict], table: dict, title: str) -> str:
    """What the run is, and the figures to know first."""
    stages = {"rpt": "Reinforcement Pre-Training", "ntp": "Next-token training", "rlvr": "RL with verifiable rewards"}
    facts = ", ".join(f"{key.replace('_', ' ')} {run[key]}" for key in (
        "stage", "model", "seed", "steps", "reward", "questions", "group_size", "lr") if run.get(key) not in (None, ""))
    tiles, window, models = [], max(1, min(10, len(metrics) // 10)), list(table)
    for split in table[models[0]] if len(models) > 1 else ():
        ends = table[models[0]][split].get("standard"), table[models[-1]].get(split, {}).get("reasoning")
        if all(spread(end, "") for end in ends):
            tiles.append((f"accuracy in %, {split}", f"{100 * ends[0][0]:.0f} → {100 * ends[1][0]:.0f}",
                          f"{models[0]} standard → {models[-1]} reasoning"))
    for name, key in (("reward", "reward"), ("response tokens", "length"), ("entropy", "entropy"), ("loss", "loss")):
        values = [value for row in metrics if (value := number(row.get(key))) is not None]
        if values and len(tiles) < 6:
            first, last = (sum(part) / len(part) for part in (values[:window], values[-window:]))
            digits = 1 if last >= 10 else 2
            tiles.append((name, f"{first:.{digits}f} → {last:.{digits}f}", f"first and last {window} steps"))
    cards = "".join(f'<div class="card tile">{escape(name)}<b>{escape(value)}</b>{escape(note)}</div>'
                    for name, value, note in tiles)
    settings = section({"table": {"head": ["setting", "value"], "rows": run.items()}})
    details = f"<details><summary>All settings</summary>{settings}</details>" if run else ""
    title = title or stages.get(run.get("stage"), "A run")
    return (f'<header><h1>{escape(title)}</h1><p class="quiet">{escape(facts)}</p>'
            f'<div class="tiles">{cards}</div>{details}</header>')


def page(folder: Path) -> str:
    """The page about a run. Raises ValueError if there is nothing to show, or if a file is not what its name says."""
    metrics = [row | (row.get("time") or {}) for row in read_lines(folder / "metrics.jsonl")]
    evals = list(read_lines(folder / "evals.jsonl"))
    run, table, results = (read_json(folder / name) for name in ("run.json", "table.json", "results.json"))
    if not metrics and not results:
        raise ValueError(f"{folder}: neither metrics.jsonl nor results.json to show; give the folder of a run")
    title = str(results.get("title", ""))
    sections = [*(results.get("sections") or []), *accuracy_section(table), *curve_sections(metrics, evals)]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
              "base-uri 'none'; form-action 'none'")
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
            f'content="{policy}"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title or folder.resolve().name)}</title><style>{CSS}</style></head><body><main>"
            f"{header(run, metrics, table, title)}{''.join(map(section, sections))}"
            f"{browser(folder / 'rollouts.jsonl')}</main></body></html>\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m paper.report", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/toy")
    parser.add_argument("--out", type=Path, help="file to write (report.html in the folder)")
    args = parser.parse_args(argv)
    out = args.out or args.run / "report.html"
    try:
        text = page(args.run)
        out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
