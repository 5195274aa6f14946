"""The report as a parser sees it: what a model or a corpus wrote stays text, and every figure is an SVG file."""

import base64
import hashlib
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from paper import figure, report

HOSTILE = [
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "</SCRIPT ><img src=x onerror=alert(1)>",
    "<!--<script>", "-->", "]]>", "<![CDATA[", "\"'><svg onload=alert(1)>", "' onmouseover='alert(1)", "</noscript><b>",
    "</style><i>", "</title><u>", "&lt;b&gt;&amp;&#60;", "<b>unclosed", "\\boxed{</think>}", "\u2028\u2029",
    "\ud800 alone \udfff", "\x00\x01\x08\x0b\x1b[31m\x7f\x9f", "\ufffe\uffff", "\u202eright to left",
    "{{x}} ${alert(1)} `", "javascript:alert(1)", "中文 🎲 \r\n\t", "", "x" * 5000,
]
VOID = {"meta", "br", "hr", "img", "link", "input", "base", "col", "embed", "source", "track", "wbr", "area", "param"}


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

    def texts(self, tag: str) -> list[str]:
        return [content for (name, _), content in zip(self.elements, self.content) if name == tag]


def write_run(folder, word=lambda: "plain", steps=6, questions=3):
    """A run with every file; each text in it comes from word()."""
    folder.mkdir(exist_ok=True)
    lines = {"metrics": [], "rollouts": [], "evals": []}
    measures = {measure: [0.5, 0.4, 0.6] for measure in ("standard", "reasoning", "length")}
    splits = {split: {"questions": 9} | measures for split in ("easy", "hard")}
    for step in range(steps):
        loss = {"loss": 0.1, "logprob_diff": 1e-7, "logprob_diff_max": 1e-5, "grad_norm": math.nan} if step != 2 else {}
        lines["metrics"].append({
            "step": step, "reward": step / steps, "accuracy": 0.5, "length": 12.5, "length_max": 40, "parsed": 1.0,
            "all_right": 0.1, "all_wrong": 0.2, "entropy": 0.3, "time": {"seconds": 1, "decode_tokens_per_s": 9e4},
            word(): word()} | loss)
        for question in range(questions):
            common = {"step": step, "question": [0, question], "document": word(), "position": word(), "entropy": 1.25,
                      "context": word(), "truth": word()}
            for sample in range(4):
                prediction = None if sample == 3 else word()
                lines["rollouts"].append(common | {
                    "response": word() + "</think>\\boxed{" + str(prediction) + "}", "reward": float(sample == 0),
                    "prediction": prediction, "advantage": -0.5, "finished": sample < 3, "tokens": 7, word(): word()})
        lines["evals"].append({"step": step, word() or "x": splits["easy"]} | splits)
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"x": [1, 10, 100], "y": [0.1, 0.2, 0.3], "low": [0, 0.1, 0.2], "high": [0.2, 0.3, 0.4]}
    figure = {"title": word(), "x": word(), "y": word(), "log_x": True,
              "series": [values | {"name": word(), "kind": kind} for kind in ("line", "points")]}
    table = {"head": [word()] * 2, "rows": [[word(), word()], [word(), word()]]}
    part = {"title": word(), "text": word() + "\n\n" + word(), "figure": figure, "table": table}
    results = {"title": word(), "sections": [part]}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "table.json").write_text(json.dumps({word(): splits, "after " + word(): splits}))
    (folder / "run.json").write_text(json.dumps({"stage": "rpt", "model": word(), "seed": 1, word(): word()}))
    return lines["rollouts"]


def outline(page: Page) -> list[tuple[str, tuple[str, ...]]]:
    return [(tag, tuple(sorted(attributes))) for tag, attributes in page.elements]


def embedded(page: Page) -> list[dict]:
    contents = zip(page.elements, page.content)
    return json.loads(next(content for (_, attributes), content in contents if attributes.get("id") == "data"))


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path):
    write_run(tmp_path)
    text = report.page(tmp_path)
    page = Page(text)
    assert not {"link", "img", "iframe", "object", "embed", "base", "a", "form"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not {"src", "href", "xlink:href", "srcset", "action", "data", "style"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|\bfetch\(|XMLHttp|innerHTML|outerHTML|insertAdjacent|\.write\(|eval\(", text)
    assert set(re.findall(r"\w+://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg"}


def test_the_policy_allows_the_one_script_and_nothing_else(tmp_path):
    write_run(tmp_path)
    page = Page(report.page(tmp_path))
    scripts = [(a.get("type"), c) for (tag, a), c in zip(page.elements, page.content) if tag == "script"]
    assert [kind for kind, _ in scripts] == ["application/json", None]
    digest = base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode()
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    rules = dict(rule.strip().split(" ", 1) for rule in policies[0].split(";"))
    assert rules["default-src"] == "'none'" and rules["script-src"] == f"'sha256-{digest}'"
    assert rules["style-src"] == "'unsafe-inline'" and rules["img-src"] == "data:"


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_in_every_field_adds_no_element_and_comes_back_unchanged(tmp_path, hostile):
    write_run(tmp_path / "plain")
    rows = write_run(tmp_path / "hostile", lambda: hostile)
    plain, page = (Page((report.page(tmp_path / name)).encode().decode()) for name in ("plain", "hostile"))
    tags = [tag for tag, _ in outline(page)]
    assert set(tags) <= {tag for tag, _ in outline(plain)}
    if hostile.strip():  # a blank text has no paragraph
        assert outline(page) == outline(plain)
    questions = embedded(page)
    responses = [response for question in questions for response in question["responses"]]
    assert [r[1] for r in responses] == [row["response"] for row in rows]
    assert [r[3] for r in responses] == [row["prediction"] for row in rows]
    assert [r[0] for r in responses] == [0, 1, 1, 2] * (len(rows) // 4)
    fields = ("reward", "advantage", "finished", "tokens")
    assert [[r[2], *r[4:]] for r in responses] == [[row[field] for field in fields] for row in rows]
    assert {q["context"] for q in questions} == {hostile} == {q["truth"] for q in questions}


def test_random_rows_of_hostile_pieces_round_trip(tmp_path):
    draw = random.Random(0)
    rows = write_run(tmp_path, lambda: "".join(draw.choices(HOSTILE[:-1], k=draw.randrange(1, 5))), steps=12)
    page = Page(report.page(tmp_path))
    assert [r[1] for q in embedded(page) for r in q["responses"]] == [row["response"] for row in rows]
    assert page.texts("script")[1] == report.SCRIPT


def test_what_the_static_page_shows_is_the_text_itself(tmp_path):
    write_run(tmp_path, lambda: "<i>&amp;\u2028</i>")
    page = Page(report.page(tmp_path))
    assert "unparsable: <i>&amp;\u2028</i></think>\\boxed{None}" in page.texts("noscript")[0]
    assert page.texts("h1") == ["<i>&amp;\u2028</i>"] == page.texts("title")


def test_the_script_tells_the_parser_nothing():
    assert not re.search(r"</script|<!--|<script", report.SCRIPT, re.IGNORECASE)


@pytest.mark.parametrize("missing", ["metrics.jsonl", "rollouts.jsonl", "evals.jsonl", "results.json", "table.json",
                                     "run.json"])
def test_a_missing_file_is_an_absent_section(tmp_path, missing):
    write_run(tmp_path)
    before = Page(report.page(tmp_path))
    (tmp_path / missing).unlink()
    assert len(Page(report.page(tmp_path)).elements) < len(before.elements)


@pytest.mark.parametrize("left", ["metrics.jsonl", "results.json"])
def test_one_file_is_enough_for_a_page(tmp_path, left):
    write_run(tmp_path)
    for file in [file for file in tmp_path.iterdir() if file.name != left]:
        file.unlink()
    assert "svg" in {tag for tag, _ in Page(report.page(tmp_path)).elements}


def test_nothing_to_show_is_one_sentence_and_exit_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "results.json").write_text("[1, 2")
    for name, word in (("absent", "absent"), ("empty", "neither metrics.jsonl nor results.json"), ("broken", "line 2"),
                       ("list", "results.json")):
        assert report.main([str(tmp_path / name)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and word in said.err
    assert not list(tmp_path.glob("*/report.html"))


def test_half_a_last_line_is_ignored(tmp_path):
    rows = write_run(tmp_path)
    whole = report.page(tmp_path)
    for name in ("metrics", "rollouts", "evals"):
        with open(tmp_path / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(rows[-1])[:-9])
    assert report.page(tmp_path) == whole


def test_the_command_writes_where_it_is_told(tmp_path, capsys):
    write_run(tmp_path / "run")
    assert report.main([str(tmp_path / "run")]) == 0
    assert report.main([str(tmp_path / "run"), "--out", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "run" / "report.html").read_bytes() == (tmp_path / "a.html").read_bytes()
    assert "a.html" in capsys.readouterr().out


@pytest.mark.parametrize("budget", [4_000_000, 40_000, 6_000])
def test_rollouts_beyond_the_budget_are_sampled_evenly_and_the_page_says_so(tmp_path, monkeypatch, budget):
    rows = write_run(tmp_path, lambda: "<" * 20, steps=40, questions=5)
    monkeypatch.setattr(report, "PAGE_BYTES", budget)
    questions, note = report.sample_rollouts(tmp_path / "rollouts.jsonl")
    assert len(report.embed(questions).encode()) <= budget
    steps = [q["step"] for q in questions]
    assert all(len(q["responses"]) == 4 for q in questions)
    if budget == 4_000_000:
        assert note == "" and sum(len(q["responses"]) for q in questions) == len(rows)
    else:
        kept = sorted(set(steps))
        gaps = [b - a for a, b in zip(kept, kept[1:])]
        assert kept[0] == 0 and kept[-1] == 39 and max(gaps) - min(gaps) <= 1
        assert f"{len(questions)} of 200 questions" in note and f"{len(kept)} of 40 steps" in note
        assert note in report.page(tmp_path)


def test_one_step_beyond_the_budget_is_sampled_too(tmp_path, monkeypatch):
    write_run(tmp_path, steps=1, questions=50)
    monkeypatch.setattr(report, "PAGE_BYTES", 5_000)
    questions, note = report.sample_rollouts(tmp_path / "rollouts.jsonl")
    assert 1 < len(questions) < 20 and len(report.embed(questions)) <= 5_000 and "1 of 1 steps" in note


def test_a_long_response_keeps_its_ends(tmp_path):
    write_run(tmp_path, lambda: "a" * 100_000 + "b", steps=1, questions=1)
    [question] = embedded(Page(report.page(tmp_path)))
    text = question["responses"][0][1]
    assert len(text) < report.TEXT_CHARS + 100 and "left out" in text
    assert text.startswith("a" * 999) and text.endswith("b}")


# Figures

KINDS = ("line", "points")
POINTS = {"x": [1, 2, 3, 4], "y": [0.1, 0.4, 0.2, 0.3]}
FIGURES = {
    "nothing": {},
    "no series": {"title": "t", "x": "x", "y": "y", "series": []},
    "empty series": {"series": [{"name": "a", "x": [], "y": []}]},
    "one point": {"series": [{"name": "a", "x": [3], "y": [4]}]},
    "one point on log axes": {"log_x": True, "log_y": True, "series": [{"name": "a", "x": [3], "y": [4]}]},
    "zero": {"series": [{"x": [0], "y": [0]}]},
    "constant": {"series": [{"x": [1, 2, 3], "y": [7, 7, 7]}]},
    "nearly constant": {"series": [{"x": [1, 2, 3], "y": [1, 1 + 1e-16, 1 + 1e-12]}]},
    "not finite": {"series": [{"x": [1, 2, math.nan, 4], "y": [math.nan, math.inf, 3, -math.inf]}]},
    "all missing": {"series": [{"x": [1, 2], "y": [None, None]}]},
    "words": {"series": [{"x": ["a", 2, True], "y": [1, "b", 3]}]},
    "not positive": {"log_x": True, "log_y": True, "series": [{"x": [-1, 0, 5], "y": [0, -3, 0]}]},
    "huge": {"series": [{"x": [-1e308, 1e308, 1e99], "y": [5e-324, 1e308, -1e99]}]},
    "wide": {"log_x": True, "log_y": True, "series": [{"x": [1e-99, 1e99], "y": [1e-99, 1e99]}]},
    "uneven": {"series": [{"x": [1, 2, 3], "y": [1], "low": [], "high": [2, 3, 4, 5]}]},
    "bars": {"series": [POINTS | {"low": [0, None, 0.1, 0.2], "high": [1] * 4, "kind": kind} for kind in KINDS]},
    "band": {"series": [POINTS | {"low": [0] * 4, "high": [1] * 4, "name": str(n)} for n in range(40)]},
    "hostile": {"title": "".join(HOSTILE), "x": "".join(HOSTILE), "y": "".join(HOSTILE[3:]),
                "series": [POINTS | {"name": name} for name in HOSTILE]},
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("size", [(640, 360), (400, 260)])
def test_every_figure_is_well_formed_and_inside_its_frame(name, size):
    text = figure.svg(FIGURES[name], *size)
    root = ElementTree.fromstring(text)
    assert text.startswith("<svg xmlns=")
    assert root.attrib["width"] == str(size[0]) and int(root.attrib["height"]) >= size[1]
    tags = {element.tag.split("}")[1] for element in root.iter()}
    assert tags <= {"svg", "style", "path", "text", "polyline", "polygon"}
    for element in root.iter():
        assert set(element.attrib) <= {"class", "role", "aria-label", "width", "height", "viewBox", "d", "x", "y",
                                       "transform", "text-anchor", "points", "stroke-dasharray"}
        for key in ("x", "y", "d", "transform", "points"):
            assert not re.search("nan|inf|None", element.attrib.get(key, ""))
        for pair in element.attrib.get("points", "").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= size[0] and 0 <= y <= int(root.attrib["height"])


def test_a_missing_value_breaks_the_line_and_a_lone_point_is_seen():
    text = figure.svg({"series": [{"x": list(range(20)), "y": [1, 2, 3, None, 5, math.nan, *range(14)]}]})
    assert text.count("<polyline") == 2 and text.count('class="mark') == 1


def test_points_lie_where_the_axis_says():
    series = {"x": [1, 10, 100, 1000], "y": [0, 1, 2, 3], "kind": "points"}
    text = figure.svg({"log_x": True, "series": [series]})
    marks = re.findall(r'class="mark c0" transform="translate\((\S+) (\S+)\)"', text)
    xs, ys = ([float(mark[i]) for mark in marks] for i in (0, 1))
    for values, sign in ((xs, 1), (ys, -1)):
        gaps = [sign * (b - a) for a, b in zip(values, values[1:])]
        assert min(gaps) > 50 and max(gaps) - min(gaps) <= 0.2 + 1e-9


def test_a_fit_and_its_points_share_colour_and_legend():
    series = [POINTS | {"name": name, "kind": kind} for name in ("easy", "hard") for kind in ("points", "line")]
    text = figure.svg({"series": series})
    assert text.count(">easy</text>") == 1 == text.count(">hard</text>")
    assert text.count('"line c0"') == 2 == text.count('"line c1"')  # one of them in the legend
    assert text.count('"mark c0"') == len(POINTS["x"]) + 1


def test_ticks_are_round_few_and_inside():
    draw = random.Random(1)
    for _ in range(2000):
        low = draw.uniform(-1, 1) * 10 ** draw.uniform(-8, 8)
        high = low + 10 ** draw.uniform(-3, 6) * (abs(low) + 1e-9)
        found = figure.ticks(low, high)
        steps = [b - a for a, b in zip(found, found[1:])]
        slack = 1e-6 * (high - low)
        assert 2 <= len(found) <= 7 and low - slack <= min(found) and max(found) <= high + slack
        assert max(steps) - min(steps) <= 1e-6 * max(steps)
        assert float(f"{steps[0]:.3e}"[:5]) in (1, 2, 5)
        assert len({figure.tick_label(x) for x in found}) == len(found) or high - low < 1e-3 * abs(low)


def test_log_ticks_are_powers_of_ten_or_at_least_round():
    assert figure.ticks(1e-8, 1e-5, True) == [1e-8, 1e-7, 1e-6, 1e-5]
    assert figure.ticks(2, 90, True) == [2, 5, 10, 20, 50]
    draw = random.Random(2)
    for _ in range(2000):
        low = 10 ** draw.uniform(-90, 60)
        high = low * 10 ** draw.uniform(0.01, 30)
        found = figure.ticks(low, high, True)
        assert 2 <= len(found) <= 8 and found == sorted(set(found))
        assert low * (1 - 1e-9) <= found[0] and found[-1] <= high * (1 + 1e-9)


def test_tick_labels():
    values = {0: "0", 0.25: "0.25", -3: "−3", 1500: "1500", 40_000: "40k", 1e6: "10⁶", 2e15: "2×10¹⁵", 1e-7: "10⁻⁷",
              -5e-5: "−5×10⁻⁵"}
    assert {value: figure.tick_label(value) for value in values} == values
