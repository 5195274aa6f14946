"""The toy world: its texts are the same everywhere, its balls are where they are said to be, and
its base is weak in the way that the experiments need."""

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from data import Question, Tokenizer, answer_questions, load_corpus, prompt_ids, select_positions
from eval import Task, entropies, evaluate, measures
from model import load_pretrained
from paper.report import read_rows
from rpt import Policy
from toy import make, step

STORY = re.compile(r"The ball is under [A-L]\.(?: \d [A-L] [A-L]\.)+")


def play(problem: str) -> tuple[str, list[str]]:
    """Where the ball is at the end of a game, and its swaps: every cup is moved, ball or not."""
    problem = STORY.fullmatch(problem)[0]
    swaps = re.findall(r" (\d) (.) (.)\.", problem)
    holds = {cup: cup == problem[18] for cup in make.CUPS}
    for _, a, b in swaps:
        holds[a], holds[b] = holds[b], holds[a]
    return next(cup for cup in holds if holds[cup]), swaps


# ---- texts


def test_texts_and_tokenizer_are_the_same_to_the_bit_wherever_they_are_made(toy, tmp_path):
    make.write_texts(tmp_path, seed=0)
    for name in make.SIZES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (toy / f"{name}.jsonl").read_bytes()
    make.write_tokenizer(tmp_path)
    made, ours = Tokenizer(tmp_path), Tokenizer(toy / "base")
    assert made.ids_of == ours.ids_of
    texts = [row["problem"] for row in read_rows(toy / "answers.jsonl")]
    assert list(map(made.encode, texts)) == list(map(ours.encode, texts))


def test_the_ball_is_where_the_text_says(toy):
    files = {name: read_rows(toy / f"{name}.jsonl") for name in make.SIZES}
    for row in files["corpus"]:
        assert row["solution"] == f"The ball is now under {play(row['problem'])[0]}."
    for row in files["answers"] + files["choices"]:
        problem, asked, *options = row["problem"].split("\n")
        cup, swaps = play(problem)
        assert asked == "Where is the ball?" and row["answer"] == cup
        assert options == [f"({cup}) {cup}" for cup in "ABCDEFGH"[: len(options)]]
        assert not options or {x for _, *pair in swaps for x in pair} <= set("".join(options))


def test_no_story_is_told_twice_and_none_is_in_what_the_base_has_read(toy):
    told = [row["problem"].split("\n")[0] for name in make.SIZES
            for row in read_rows(toy / f"{name}.jsonl")]
    known, random = set(told), Random("lessons 0")
    assert len(known) == len(told)
    for row in (make.lesson(random, known) for _ in range(make.ROWS // 4)):
        assert STORY.search(row.get("text") or row["prompt"])[0] not in known


# ---- lessons


def test_the_annotator_errs_as_often_as_stated_and_goes_on_from_the_wrong_cup():
    random, errors, expected, variance = Random("a test"), 0, 0.0, 0.0
    for _ in range(3000):
        story = make.tell(random)
        thought, cup = make.annotate(story, random)
        steps = re.findall(r" \d (.) (.) (.)\.", thought)
        ball = thought[0]
        assert ball == story.ball[0] and cup == steps[-1][-1]
        for (a, b, then), swap in zip(steps, story.swaps, strict=True):
            p = make.ERRS * (1 - 1 / len(story.cups))  # any cup, the right one too
            errors += then != {a: b, b: a}.get(ball, ball)
            expected, variance, ball = expected + p, variance + p * (1 - p), then
            assert a + b == swap
    assert abs(errors - expected) <= 5 * variance ** 0.5


def test_lessons_are_asked_in_the_words_of_the_questions_to_come(toy):
    tokenizer, random, seen = Tokenizer(toy / "base"), Random("a test"), Counter()
    for row in (make.lesson(random, set()) for _ in range(2000)):
        problem = STORY.search(row.get("text") or row["prompt"])[0]
        if "text" in row:
            assert row["text"] == f"{problem}\n\nThe ball is now under {play(problem)[0]}."
            seen["text"] += 1
            continue
        template, asked = "plain", problem + "\nWhere is the ball?"
        if row["prompt"].startswith("Next"):
            template, asked = "toy", f"{problem}\n\nThe ball is now under"
            seen["thought" if "." in row["response"] else "guess"] += 1
        else:
            cups = re.findall(r"\n\(.\) .", row["prompt"])
            asked += "".join(f"\n({cup}) {cup}" for cup in "ABCDEFGH"[: len(cups)])
            seen["choice" if cups else "solved"] += 1
        question = Question(tuple(tokenizer.encode(asked)), (), 0, 0)
        assert tokenizer.chat(row["prompt"]) == prompt_ids(tokenizer, question, template, 256)
    shares = {"text": 0.2, "solved": 0.55 * 0.8, "choice": 0.55 * 0.2, "guess": 0.25 * 0.95,
              "thought": 0.25 * 0.05}
    for name, p in shares.items():  # within five standard deviations
        assert abs(seen[name] - 2000 * p) <= 5 * (2000 * p * (1 - p)) ** 0.5


# ---- the base


def test_the_base_is_small_and_opens_a_thought(toy):
    model, tokenizer = load_pretrained(toy / "base"), Tokenizer(toy / "base")
    assert 50_000 < sum(weight.numel() for weight in model.parameters()) < 150_000
    assert tokenizer.bytes_of(tokenizer.chat("Where?")) == (
        b"<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert make.MODEL.items() <= model.config.hf.items()


@pytest.mark.skipif("RPT_TEST_SLOW" not in os.environ,
                    reason="RPT_TEST_SLOW is not set: it trains a base for minutes")
@pytest.mark.parametrize("seed", [0, 11])
def test_a_base_is_as_weak_as_the_experiments_need(toy, tmp_path, seed):
    """The one of seed 0 is in the repository, another one is made."""
    folder = tmp_path if seed else toy
    if seed:
        make.train_base(folder, folder / "work", seed, make.write_texts(folder, seed))
    tokenizer, model = Tokenizer(folder / "base"), load_pretrained(folder / "base")
    policy, task = Policy(model, tokenizer), Task(template="toy", max_response=96, seed=seed)
    corpus = load_corpus(folder / "corpus.jsonl", tokenizer, 500, seed, 256)
    held = select_positions(corpus, entropies(model, corpus), True, 0.5, "solution")
    records = evaluate(policy, [held[n] for n in range(len(held))], task)
    for name in ("standard", "reasoning"):
        easy, medium, hard = (np.mean([measures(r)[name] for r in records
                                       if low < r["entropy"] <= low + width])
                              for low, width in ((0.5, 0.5), (1.0, 0.5), (1.5, 9.0)))
        assert 0.7 > easy > medium > hard > 0.05, (name, easy, medium, hard)
    for name in ("answers", "choices"):  # something is there, and something is left to mend
        asked, _ = answer_questions(folder / f"{name}.jsonl", tokenizer, 256)
        records = evaluate(policy, asked[:500], replace(task, template="plain"))
        assert 0.6 < np.mean([measures(r)["reasoning"] for r in records]) < 0.9


# ---- one step


def test_one_step_by_hand_prints_what_the_modules_do(capsys, tmp_path):
    """Numbers with a decimal point may be rounded differently on another machine."""
    step.main(["--recipe", "toy", "--seed", "1", "--cache", f"{tmp_path.parent}/cache"])
    out = capsys.readouterr().out
    stored = (Path(step.__file__).parent / "step.md").read_text()
    printed, stored = (re.sub(r" *[-+]?\d+\.\d+", " #", text).split("\n") for text in (out, stored))
    assert printed == stored[4 - 1:]
    for group in re.split(r"\n[4567]\. ", out)[1::3]:
        said = [float(r) for r in re.findall(r"reward ([01]),", group)]
        advantages = [float(a) for a in re.findall(r"advantage ([-+.\d]+)", group)]
        exact = (said - np.mean(said)) / (np.std(said, ddof=1) or 1.0)
        assert len(said) == 8 and np.abs(advantages - exact).max() < 6e-4  # three digits
    best, weight = re.search(r"A = ([-+.\d]+), weight 1/(\d+) a token", out).groups()
    losses = re.findall(r" 1\.0000\d +\d\.\d{4} ([-+]\d\.\d{5})$", out, re.M)
    assert len(losses) > 6
    assert all(abs(float(loss) + float(best) / int(weight)) < 2e-5 for loss in losses)
