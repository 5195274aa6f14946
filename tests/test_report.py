"""The report is one page in which text stays text; ask and choices ask as they say."""

import json
import re
import runpy
import sys
import xml.etree.ElementTree as ElementTree
from html import unescape

import pytest
from helpers import ROOT, plain_logits

from data import Question, Tokenizer
from paper import ask, choices, report

HOSTILE = "<script>alert(1)</script></pre>\"'><svg onload=x> <!-- ]]> &lt;b&gt;&amp; 中文 🎲\r\t"


def write_run(folder, word="plain"):
    """A run of which the texts are `word`."""
    rollout = {"step": 0, "question": [0, 0, 1], "document": 3, "kept": False, "context": word,
               "truth": word, "rewards": [1.0, 0.0, 0.0], "predictions": [word, word, None],
               "responses": [word] * 3, "finished": [True, True, False], "tokens": [5, 6, 7]}
    evals = [{"step": n, "exam": {"all": {"questions": 9, "reasoning": [n / 8, 0, 1]}}}
             for n in range(3)]
    metrics = [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.3}, {"step": 3, "reward": 0.5}]
    for name, rows in (("evals", evals), ("rollouts", [rollout]), ("metrics", metrics)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines + lines[:9])  # the last is being written
    (folder / "run.json").write_text(json.dumps({"model": word}))


def test_what_a_model_or_a_corpus_wrote_adds_no_element_and_is_shown_and_marked(tmp_path):
    write_run(tmp_path)
    plain = report.page([tmp_path])
    write_run(tmp_path, HOSTILE)
    text = report.page([tmp_path])
    assert re.findall("<[^>]*", text) == re.findall("<[^>]*", plain) and "<script" not in text
    assert unescape(text).count(f"\n{HOSTILE}</pre>") == 3 and f"<mark>{HOSTILE}" in unescape(text)
    assert re.findall('"answer (.*?)"', text) == ["right", "wrong", "unreadable"]
    assert "1 of 3 right, replaced</summary>" in text and "7 tokens, not finished" in text


def test_runs_stand_side_by_side_in_curves_that_lie_where_the_axes_say(tmp_path):
    for folder in (folders := [tmp_path / "one", tmp_path / "two"]):
        folder.mkdir()
        write_run(folder)
    text = report.page(folders)
    assert f"<td>{folders[1]}, step 2, reasoning</td>" in text
    figure = ElementTree.fromstring(re.search("<svg.*?</svg>", text, re.S)[0])
    said = {each.text: each.get("y") for each in figure.iter()}
    assert {"mean reward", *map(str, folders)} <= said.keys()
    line = next(each.get("points") for each in figure.iter() if each.get("points"))
    points = [tuple(map(float, pair.split(","))) for pair in line.split()]
    for mark, (_, y) in zip(("0.1", "0.3", "0.5"), points):
        assert float(said[mark]) - 4 == pytest.approx(y, abs=0.2)
    assert points[0][1] > points[2][1]  # pixels count downwards
    assert 2 * points[1][0] == pytest.approx(points[0][0] + points[2][0], abs=0.3)


def test_a_folder_without_a_run_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="no metrics.jsonl"):
        report.main([str(tmp_path)])


# ---- ask and choices


def test_a_choice_counts_however_its_label_is_boxed():
    right = rb"B|(B)|\text{(B)}|\textbf{B}|B)|B.|(B) two|B: two| B ".split(b"|")
    wrong = b"two|Because||A, B|A|4|\xff".split(b"|")
    responses = [b"</think>\\boxed{%b}" % text for text in right + wrong]
    got = choices.is_right(responses, Question((), (), 0, 0, answer="B"), None)
    assert got == [1] * len(right) + [0] * len(wrong)


def test_a_model_is_asked_choices_and_what_comes_next(toy, tmp_path, capsys):
    tokenizer = Tokenizer(toy / "base")
    (tmp_path / "mc.jsonl").write_text(
        '{"question": "Where is the ball?", "options": ["A", "B"], "answer_index": 0}')
    (question,) = choices.read_choices(tmp_path / "mc.jsonl", tokenizer)
    assert tokenizer.bytes_of(question.context) == b"Where is the ball?\n(A) A\n(B) B"
    options = "--max-prompt 256 --max-response 60 --template toy --samples 4 --device cpu".split()
    choices.main([str(toy / "base"), "--choices", str(tmp_path / "mc.jsonl"), *options])
    assert "all (1)" in capsys.readouterr().out
    run, policy = ask.load(str(toy / "base"), options)
    said = ask.ask(policy, "The ball is", run)
    assert re.findall(r"^(\d)\. ", said, re.M) == list("1234") and "\nvotes: ' " in said
    likely = plain_logits(policy.model, tokenizer.encode("The ball is"))[-1].softmax(-1).max()
    assert f"plain next token: ' under' {likely:.3f}, " in said


@pytest.mark.parametrize(("command", "says"), [
    ("paper.patterns nothing", "nothing: no rollouts"),
    ("paper.flops nothing", "nothing: no metrics"),
    ("paper.report toy --out x.svg", "toy: no rewards"),
    ("paper.perplexity toy/base", "no --corpus"),
    ("paper.choices toy/base --choices empty.jsonl", "no questions to ask"),
    ("paper.choices toy/base --choices toy/choices.jsonl", "has no 'options'"),
    ("paper.compare empty.jsonl empty.jsonl", "no records"),
    ("paper.recipes.deduplicate", "deduplicate"), ("paper.recipes.skill", "skill")])
def test_a_wrong_file_is_one_sentence(toy, tmp_path, monkeypatch, command, says):
    module, *arguments = command.split()
    (tmp_path / "toy").symlink_to(toy)
    (tmp_path / "empty.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit, match=says):
        runpy.run_path(str(ROOT / f"{module.replace('.', '/')}.py"), run_name="__main__")
