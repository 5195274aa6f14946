"""What the README says is so."""

import dataclasses
import re
from pathlib import Path

import pytest

import data
import rpt
import train
from learned import failures
from reward import REWARDS
from rpt import Method

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
MODULES = ["model", "sampler", "reward", "data", "rpt", "train", "eval"]


def test_every_message_of_the_error_table_is_in_the_code():
    code = "".join((ROOT / f"{name}.py").read_text() for name in MODULES)
    code = re.sub(r'"\s+f?"', "", code)  # strings that go on in the next line
    rows = README[README.index("| you did | you see |"):README.index("## Speed and memory")].splitlines()[2:]
    messages = [m.strip("`") for row in rows if row for m in re.findall(r"`(?:[^`\\]|\\`)+`", row.split("|")[2])]
    missing = [m for m in messages if m.replace("\\`", "`") not in code]
    assert len(messages) > 30 and not missing


def test_a_run_has_learned_only_if_its_intervals_are_apart():
    def summary(standard, reasoning):
        return {split: {"questions": 9, "standard": standard, "reasoning": reasoning} for split in ("easy", "hard")}

    before, after = summary([0.3, 0.2, 0.4], [0.1, 0.0, 0.2]), summary([0.3, 0.2, 0.4], [0.9, 0.8, 1.0])
    assert failures({"base": before, "rpt": after}) == []
    assert len(failures({"base": before, "rpt": before})) == 4
    assert len(failures({"base": before, "rpt": summary([0.3, 0.2, 0.4], [0.9, 0.4, 1.0])})) == 2  # touches standard
    nan = float("nan")
    assert len(failures({"base": before, "rpt": summary([nan] * 3, [nan] * 3)})) == 4


def test_every_link_and_named_function_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    for name, file, line in links:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b|{name}\b.* = ", text), f"{file}#L{line} is not {name}"
    assert len(links) > 30


def test_the_results_are_the_output_of_the_command():
    shown = README[README.index("<!-- miniature -->"):README.index("<!-- /miniature -->")]
    assert shown.removeprefix("<!-- miniature -->").strip() == (ROOT / "paper/results/results.md").read_text().strip()
    assert (ROOT / "paper/results/plan-14b.txt").read_text().count("training") >= 6


def test_every_option_the_readme_names_exists():
    known = {"--" + f.name.replace("_", "-")
             for kind in (train.Run, Method, train.Plan) for f in dataclasses.fields(kind)}
    known |= {"--no-" + f.name.replace("_", "-")
              for kind in (train.Run, Method) for f in dataclasses.fields(kind) if f.type is bool}
    known |= {"--nproc-per-node", "--max-restarts", "--quick", "--processes", "--kills", "--samples", "--only",
              "--figures", "--choices"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def snippets():
    return re.findall(r"<!-- try: ([\w ]+) -->\n+```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("name, code", snippets(), ids=[name for name, _ in snippets()])
def test_a_change_it_recipe_works_as_printed(toy, tmp_path, monkeypatch, name, code):
    """Each recipe is what one puts into a file beside train.py; it ends in a call of train.main."""
    for reward in ("bolder", "brief"):
        monkeypatch.setitem(REWARDS, reward, None)  # and whatever stands there later goes away again
    small = ["--model", str(toy / "base" / "model"), "--corpus", str(toy / "corpus.jsonl"),
             "--out", str(tmp_path / "run"), "--steps", "1", "--questions", "4", "--group-size", "3",
             "--max-response", "30", "--holdout", "40", "--select", "0.3"]
    monkeypatch.setattr(train.sys, "argv", ["change.py", *small])
    for module, attribute in ((rpt, "group_advantages"), (data, "select_positions"), (data, "TOUCH")):
        monkeypatch.setattr(module, attribute, getattr(module, attribute))  # what a recipe replaces is put back
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1
