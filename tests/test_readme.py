"""What the README and the papers beside it say is so: commands, options, links, messages."""

import dataclasses
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import train
from helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "paper").rglob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
CODE = {file: file.read_text() for folder in ("*.py", "paper/**/*.py", "tests/*.py", "toy/*.py")
        for file in ROOT.glob(folder)}
SMALL = {"train.py": ["--steps", "2", "--questions", "4", "--group-size", "4", "--holdout", "40",
                      "--max-response", "40", "--eval-questions", "4", "--cache", "../cache"],
         "eval.py": ["--eval-questions", "4", "--max-response", "40"]}


def commands():
    """Every command line, one of its own or within a line of text, as its words."""
    joined = re.sub(r"\s*\\\n\s*", " ", TEXT)
    lines = re.findall(r"^ *((?:torchrun|python|pip) .*)", joined, re.M)
    lines += re.findall(r"`((?:torchrun|python)\s[^`]+)`", joined)
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]


def script_of(words):
    """(train.py or paper.report or None, its arguments)"""
    for n, word in enumerate(words[:6]):
        if word.endswith(".py") or n and words[n - 1] == "-m":
            return word, words[n + 1:]
    return None, words


def file_of(script):
    return script if script.endswith(".py") else script.replace(".", "/") + ".py"


def test_every_command_line_names_what_exists_and_its_options_are_accepted():
    found = [script_of(words) for words in commands()]
    assert ("train.py", []) in found
    for script, arguments in found:
        arguments = [word for word in arguments if word not in ("...", "…")]
        if script == "eval.py":  # whose first argument is a model
            train.parse(["--model=x", "--steps=0", *arguments[1:]])
        elif script == "train.py" or "--corpus" in arguments:
            train.parse(arguments[2 * script.endswith("worked_start"):])  # not stage and documents
        if script:
            assert (ROOT / file_of(script)).is_file(), script


def test_what_runs_on_the_toy_runs_as_printed(tmp_path, monkeypatch):
    """The commands of the first page that need no other model, in their order, with few steps and
    questions, in another folder."""
    monkeypatch.chdir(tmp_path)
    done = []
    for words in commands():
        script, arguments = script_of(words)
        runs_toy = script == "train.py" and not {"--model", "--stage"} & set(arguments)
        of_run = script in ("eval.py", "paper.report") and "runs/toy" in arguments
        if not (runs_toy or of_run) or words in done:
            continue
        done.append(words)
        monkeypatch.setattr(sys, "argv", [script, *arguments, *SMALL.get(script, [])])
        runpy.run_path(str(ROOT / file_of(script)), run_name="__main__")
    assert ["torchrun", "train.py"] in done
    assert (tmp_path / "runs/toy/model/config.json").is_file()


def test_every_option_that_is_named_exists():
    known = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(train.Run)}
    known |= {"--no-" + option[2:] for option in known} | {"--nproc-per-node", "--max-restarts"}
    known |= set(re.findall(r'"(--[a-z][a-z-]+)"', "".join(CODE.values())))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT))
    assert len(named) > 10 and named <= known


def test_every_message_of_a_table_of_errors_is_in_the_code():
    code = re.sub(r'"\s+f?"', "", "\n".join(CODE.values()))  # strings that go on in the next line
    rows = re.findall(r"^\| you did \| you see \|.*?\n\n", TEXT + "\n\n", re.S | re.M)
    seen = "".join(row.split("|")[2] for row in "".join(rows).splitlines()[2:] if "|" in row)
    messages = [message.strip("`") for message in re.findall(r"`(?:[^`\\]|\\`)+`", seen)]
    missing = [message for message in messages if message.replace("\\`", "`") not in code]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for name, file, line in re.findall(r"\[`(\w+)`\]\(([\w/.]+\.py)#L(\d+)\)", text):
        there = (page.parent / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b|{name}\b.* = ", there), f"{file}#L{line}: {name}"


def test_the_law_table_names_tests_that_exist():
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", (ROOT / "tests/README.md").read_text())
    assert len(named) >= 12
    for file, test in named:
        assert f"def {test}(" in Path(ROOT / "tests" / f"{file}.py").read_text(), test
