"""The report as a parser sees it: what a model or a corpus wrote stays text, and every figure is an
SVG file."""

import base64
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from paper import figure, report

HOSTILE = [
    "<script>alert(1)</script>", "</script><script>alert(1)</script>",
    "</SCRIPT ><img src=x onerror=alert(1)>", "<!--<script>", "-->", "]]>", "<![CDATA[",
    "\"'><svg onload=alert(1)>", "' onmouseover='alert(1)", "</noscript><b>", "</style><i>",
    "</title><u>", "&lt;b&gt;&amp;&#60;", "<b>unclosed", "\\boxed{</think>}", "\u2028\u2029",
    "\ud800 alone \udfff", "\x00\x01\x08\x0b\x1b[31m\x7f\x9f", "\ufffe\uffff",
    "\u202eright to left", "{{x}} ${alert(1)} `", "javascript:alert(1)", "中文 🎲 \r\n\t", "",
    "x" * 5000,
]
VOID = {"meta", "br", "hr", "img", "link", "input", "base"}


class Page(HTMLParser):
    """Elements with their attributes and text; raises if tags are not balanced."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.content: list[str] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open, [self.elements[n] for n in self.open]

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes)
        self.elements.append((tag, dict(attributes)))
        self.content.append("")
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.content.append("")

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for n in self.open:
            self.content[n] += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data!r}")

    unknown_decl = handle_pi = handle_comment

    def outline(self):
        return [(tag, *sorted(attributes)) for tag, attributes in self.elements]

    def texts(self, tag: str) -> list[str]:
        return [content for (name, _), content in zip(self.elements, self.content) if name == tag]

    def questions(self) -> list[dict]:
        return json.loads(self.texts("script")[0])


def page(*folders) -> Page:
    return Page(report.page(folders))


def write_run(folder, word=lambda: "plain", steps=6, questions=3, stage="rpt"):
    """A run with every file; each text in it comes from word()."""
    folder.mkdir(exist_ok=True)
    measures = {measure: [0.5, 0.4, 0.6] for measure in ("standard", "reasoning", "length")}
    splits = {split: {"questions": 9} | measures for split in ("easy", "hard")}
    lines = {"metrics": [], "rollouts": [], "evals": []}
    for step in range(steps):
        row = {"step": step, "reward": step / steps, "length": 12.5, "all_right": 0.1,
               "all_wrong": 0.2, "informative_expected": 0.6, "time": {"decode_tokens_per_s": 9e4}}
        if step != 2:  # a step that was skipped has no loss
            row |= {"loss": 0.1, "logprob_diff": 1e-7, "grad_norm": math.nan}
        lines["metrics"].append(row | {word(): word()})
        for number in range(4 * questions):
            prediction = None if number % 4 == 3 else word()
            lines["rollouts"].append({
                "step": step, "question": [0, number // 4], "document": word(), "position": word(),
                "kept": number < 4, "context": word(), "truth": word(), "prediction": prediction,
                "response": word() + "</think>\\boxed{" + str(prediction) + "}", "tokens": 7,
                "reward": float(number % 4 == 0), "finished": number % 4 < 3, word(): word()})
        lines["evals"].append({"step": step, word() or "x": {word(): measures}, "held-out": splits})
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = [{"title": word(), "x": word(), "y": word(), "log_x": True,
                "series": [{"x": [1, 10], "y": [0.1, 0.2], "name": word()}]}]
    table = {"head": [word()] * 2, "rows": [[word(), word()], [word(), word()]]}
    parts = [{"title": word(), "text": word() + "\n\n" + word(), "table": table,
              "figures": figures}]
    (folder / "results.json").write_text(json.dumps({"title": word(), "sections": parts}))
    (folder / "run.json").write_text(json.dumps({"stage": stage, "model": word(), word(): word()}))
    return lines["rollouts"]


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path):
    write_run(tmp_path)
    text = report.page([tmp_path])
    elements = Page(text).elements
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in elements}
    links = [attributes.pop("href") for tag, attributes in elements if tag == "a"]
    assert links == [f"{name}.json{'l' * (name not in ('results', 'run'))}"
                     for name in ("evals", "metrics", "results", "rollouts", "run")]
    names = {name for _, attributes in elements for name in attributes}
    assert not {"src", "href", "xlink:href", "srcset", "action", "data", "style"} & names
    assert not any(name.startswith("on") for name in names)
    assert not re.search(r"url\(|@import|\bfetch\(|XMLHttp|innerHTML|outerHTML|insertAdjacent|"
                         r"\.write\(|eval\(", text)
    assert set(re.findall(r"\w+://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg"}


def test_the_policy_allows_the_one_script_and_nothing_else(tmp_path):
    write_run(tmp_path)
    found = page(tmp_path)
    assert found.texts("script")[1:] == [report.SCRIPT]
    digest = base64.b64encode(hashlib.sha256(report.SCRIPT.encode()).digest()).decode()
    [policy] = [a["content"] for tag, a in found.elements if "http-equiv" in a]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["script-src"] == f"'sha256-{digest}'"
    assert not re.search(r"</script|<!--|<script", report.SCRIPT, re.IGNORECASE)


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_in_every_field_adds_no_element_and_comes_back_unchanged(tmp_path, hostile):
    write_run(tmp_path / "run")
    plain = page(tmp_path / "run").outline()
    rows = write_run(tmp_path / "run", lambda: hostile)
    found = Page(report.page([tmp_path / "run"]).encode().decode())
    assert {each[0] for each in found.outline()} <= {each[0] for each in plain}
    if hostile.strip():  # a blank text has no paragraph
        assert found.outline() == plain
    responses = [response for q in found.questions() for response in q["responses"]]
    assert [r[1] for r in responses] == [row["response"] for row in rows]
    assert [r[3] for r in responses] == [row["prediction"] for row in rows]
    assert [r[0] for r in responses] == [0, 1, 1, 2] * (len(rows) // 4)
    assert [[r[2], r[5]] for r in responses] == [[r["reward"], r["finished"]] for r in rows]
    assert {q["context"] for q in found.questions()} == {hostile}


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_the_script_shows_every_response_in_text_nodes(tmp_path):
    write_run(tmp_path, lambda: "<b>&")
    (tmp_path / "dom.js").write_text("""
        const all = {};
        class Element {
          constructor() { this.children = []; this.selectedIndex = 0; }
          append(...more) { this.children.push(...more); }
          replaceChildren(...now) { this.children = now; }
          setAttribute() {}
          text() { return this.children.map(c => c.text ? c.text() : String(c)).join("|"); }
        }
        globalThis.Option = class extends Element {};
        globalThis.document = {createElement: () => new Element(), querySelectorAll: () => [],
          getElementById: id => all[id] ??= new Element()};
        document.getElementById("data").textContent = JSON.stringify(QUESTIONS);
        SCRIPT
        console.log(all.questions.text());""".replace(
            "QUESTIONS", json.dumps(page(tmp_path).questions())).replace("SCRIPT", report.SCRIPT))
    done = subprocess.run(["node", tmp_path / "dom.js"], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.count("</think>") == 8 * 4  # of the first questions
    assert "<b>&||" in done.stdout and "unparsable" in done.stdout


def test_missing_files_are_absent_sections_and_one_is_enough(tmp_path):
    write_run(tmp_path)
    before = len(page(tmp_path).elements)
    for name in ("rollouts.jsonl", "evals.jsonl", "run.json", "results.json"):
        (tmp_path / name).unlink()
        assert len(page(tmp_path).elements) < before
        before = len(page(tmp_path).elements)
    assert "svg" in {tag for tag, _ in page(tmp_path).elements}


def test_the_files_are_linked_from_where_the_page_is_whatever_their_folder_is_called(tmp_path):
    folder = tmp_path / "javascript:alert(1) #?"
    write_run(folder)
    found = Page(report.page([folder], tmp_path))
    links = [attributes["href"] for tag, attributes in found.elements if tag == "a"]
    assert len(links) == 5 and all(link.startswith("javascript%3Aalert") for link in links)
    assert all((tmp_path / unquote(link)).is_file() for link in links)


def test_each_figures_values_stand_under_it_as_text(tmp_path):
    write_run(tmp_path, steps=40)
    found = Page(report.page([tmp_path]))
    drawn = sum(tag == "svg" for tag, _ in found.elements)
    assert drawn > 5 and found.texts("summary").count("as text") == drawn
    series = {"name": "a", "x": [0, 1, None, 3], "y": [0.5, None, 2, 0.123456]}
    text = report.as_text({"x": "step", "series": [series, {"name": "b", "x": [3], "y": [7]}]})
    cells = re.findall(r"<t[dh](?: [^>]*)?>([^<]*)<", text)
    assert cells == ["step", "a", "b", "0", "0.5", "", "1", "", "", "3", "0.1235", "7"]


def test_several_runs_share_curves_and_tables_by_name(tmp_path):
    for name in ("first", "second"):
        write_run(tmp_path / name)
    (tmp_path / "second" / "run.json").write_text('{"stage": "rpt", "lr": 3e-05}')
    unlike = re.search("<h1>.*?<details>", report.page([tmp_path / "first", tmp_path / "second"]))
    assert re.findall(r"<td[^>]*>([^<]*)<", unlike[0])[:3] == ["model", "plain", ""]
    assert "3e-05" in unlike[0] and "stage" not in unlike[0]
    text = report.page([tmp_path / "first", tmp_path / "second"])
    for name in ("first: reward", "second: reward", "first: easy", "second: step 5, standard"):
        assert f">{name}<" in text
    assert len(page(tmp_path / "first", tmp_path / "second").questions()) == 18  # of the first


def test_verifiable_questions_show_the_expected_answer_and_replaced_ones_say_so(tmp_path):
    write_run(tmp_path, lambda: "D", stage="rlvr")
    first, second, *_ = page(tmp_path).questions()
    assert first["truth"] == "\nexpected answer: D"
    assert "replaced" not in first["about"] and "replaced" in second["about"]


def test_perplexity_is_in_the_page_and_null_is_no_point(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": null, "loss": 1}\n')
    (tmp_path / "evals.jsonl").write_text('{"step": 0, "perplexity": [1.81, 1.7, null]}\n')
    text = report.page([tmp_path])
    assert "1.8 [1.7]" in text and text.count("<svg") == 3


def test_nothing_to_show_is_one_sentence_and_exit_2(tmp_path, capsys):
    for name, file, content in (("empty", "other", ""), ("list", "results.json", "[1, 2"),
                                ("broken", "metrics.jsonl", '{"step": 0}\nnonsense\n{}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
    for name, word in (("absent", "absent"), ("empty", "neither metrics.jsonl nor results.json"),
                       ("broken", "line 2"), ("list", "results.json")):
        assert report.main([str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and word in said


def test_half_a_last_line_is_ignored_and_the_command_writes_where_it_is_told(tmp_path, capsys):
    rows = write_run(tmp_path)
    whole = report.page([tmp_path])
    for name in ("metrics", "rollouts", "evals"):
        with open(tmp_path / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(rows[-1])[:-9])
    assert report.main([str(tmp_path), "--out", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "a.html").read_text() == whole and "a.html" in capsys.readouterr().out


@pytest.mark.parametrize("budget", [4_000_000, 40_000, 6_000])
def test_rollouts_beyond_the_budget_are_sampled_evenly_and_the_page_says_so(tmp_path, monkeypatch,
                                                                            budget):
    write_run(tmp_path, steps=40, questions=5)
    monkeypatch.setattr(report, "PAGE_BYTES", budget)
    questions, count = report.sample_rollouts(tmp_path / "rollouts.jsonl")
    assert count == 200 and all(len(q["responses"]) == 4 for q in questions)
    every = math.ceil((tmp_path / "rollouts.jsonl").stat().st_size / budget)
    assert len(report.embed(questions)) <= budget and len(questions) == math.ceil(200 / every)
    assert [q["step"] for q in questions] == [n // 5 for n in range(0, 200, every)]
    assert f"{len(questions)} of 200 questions" in report.page([tmp_path])


def test_a_long_response_keeps_its_ends(tmp_path):
    write_run(tmp_path, lambda: "a" * 100_000 + "b", steps=1, questions=1)
    text = page(tmp_path).questions()[0]["responses"][0][1]
    assert len(text) < report.TEXT_CHARS + 100 and "left out" in text
    assert text.startswith("a" * 999) and text.endswith("b}")


# ---- figures

POINTS = {"x": [1, 2, 3, 4], "y": [0.1, 0.4, 0.2, 0.3]}
FIGURES = {
    "nothing": {},
    "one point on log axes": {"log_x": True, "log_y": True, "series": [{"x": [3], "y": [4]}]},
    "nearly constant": {"series": [{"x": [1, 2, 3], "y": [1, 1 + 1e-16, 1 + 1e-12]}]},
    "not finite": {"series": [{"x": [1, 2, math.nan], "y": [math.nan, math.inf, -math.inf]}]},
    "words": {"series": [{"x": ["a", 2, True], "y": [None, "b", 3]}]},
    "not positive": {"log_x": True, "log_y": True, "series": [{"x": [-1, 0, 5], "y": [0, -3, 0]}]},
    "wide": {"log_x": True, "log_y": True, "series": [{"x": [1e-99, 1e99], "y": [1e-99, 1e99]}]},
    "bars": {"series": [POINTS | {"low": [0, None, 0.1, 0.2], "high": [1] * 4, "kind": "points"}]},
    "bands": {"series": [POINTS | {"low": [0] * 4, "high": [1] * 4, "name": str(n)}
                         for n in range(40)]},
    "hostile": {"title": "".join(HOSTILE), "x": "".join(HOSTILE), "y": "".join(HOSTILE[3:]),
                "series": [POINTS | {"name": name} for name in HOSTILE]},
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("size", [(640, 360), (400, 260)])
def test_every_figure_is_well_formed_and_inside_its_frame(name, size):
    root = ElementTree.fromstring(figure.svg(FIGURES[name], *size))
    height = int(root.attrib["height"])
    tags = {element.tag.split("}")[1] for element in root.iter()}
    assert tags <= {"svg", "style", "path", "text", "polyline", "polygon", "circle"}
    for element in root.iter():
        for key in ("x", "y", "d", "cx", "cy", "points"):
            assert not re.search("nan|inf|None", element.attrib.get(key, ""))
        for pair in element.attrib.get("points", "").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= size[0] and 0 <= y <= height


def test_a_missing_value_breaks_the_line_and_a_lone_point_is_seen():
    values = [1, 2, 3, None, 5, math.nan, *range(14)]
    text = figure.svg({"series": [{"x": list(range(20)), "y": values}]})
    assert text.count("<polyline") == 2 and text.count("<circle") == 1


def test_points_lie_where_the_axis_says_and_share_a_legend_with_their_fit():
    series = {"x": [1, 10, 100, 1000], "y": [0, 1, 2, 3], "name": "easy"}
    text = figure.svg({"log_x": True, "series": [
        series | {"kind": "points"}, series, series | {"name": "hard"}]})
    marks = re.findall(r'class="mark c0" cx="(\S+)" cy="(\S+)"', text)
    for axis, sign in ((0, 1), (1, -1)):
        values = [sign * float(mark[axis]) for mark in marks]
        gaps = [b - a for a, b in zip(values, values[1:])]
        assert len(gaps) == 3 and min(gaps) > 50 and max(gaps) - min(gaps) <= 0.2 + 1e-9
    assert text.count(">easy</text>") == 1 == text.count(">hard</text>")


def test_ticks_are_round_few_and_inside():
    assert figure.ticks(1e-8, 1e-5, True) == [1e-8, 5e-8, 2e-7, 1e-6, 5e-6]
    assert figure.ticks(2, 90, True) == [2, 5, 10, 20, 50]
    draw = random.Random(1)
    for _ in range(2000):
        low = draw.uniform(-1, 1) * 10 ** draw.uniform(-8, 8)
        high = low + 10 ** draw.uniform(-3, 6) * (abs(low) + 1e-9)
        found = figure.ticks(low, high)
        steps = [b - a for a, b in zip(found, found[1:])]
        slack = 1e-6 * (high - low)
        assert 2 <= len(found) <= 7 and low - slack <= found[0] and found[-1] <= high + slack
        assert max(steps) - min(steps) <= 1e-6 * max(steps)
        assert float(f"{steps[0]:.3e}"[:5]) in (1, 2, 5)
