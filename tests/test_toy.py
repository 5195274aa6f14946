"""The toy world: its texts are the same everywhere, its balls are where they are said to be, and
its base is weak in the way that the experiments need."""

import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

import eval as evaluation
from data import PositionFilter, Question, Tokenizer, load_corpus, prompt_ids
from model import load_pretrained
from rpt import Method, Policy
from toy import make, step

SLOW = pytest.mark.skipif("RPT_TEST_SLOW" not in os.environ,
                          reason="RPT_TEST_SLOW is not set: it trains a base for minutes")
METHOD = Method(template="toy", max_prompt=256, max_response=96)


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def play(problem: str) -> tuple[str, list[str]]:
    """Where the ball is at the end of a game, and its swaps: every cup is moved, ball or not."""
    start, *swaps = re.fullmatch(r"The ball is under ([A-L])\.((?: \d [A-L] [A-L]\.)+)",
                                 problem).groups()
    swaps = re.findall(r"(\d) (.) (.)\.", swaps[0])
    holds = {cup: cup == start for cup in "ABCDEFGHIJKL"}
    for _, a, b in swaps:
        holds[a], holds[b] = holds[b], holds[a]
    return next(cup for cup in holds if holds[cup]), swaps


def likely(count: int, total: int, p: float) -> bool:
    """Whether a count is within five standard deviations of a binomial distribution's mean."""
    return abs(count - p * total) <= 5 * (p * (1 - p) * total) ** 0.5


# ---- texts


def test_texts_are_the_same_to_the_bit_wherever_they_are_made(toy, tmp_path):
    make.write_texts(tmp_path, seed=0)
    for name in make.SIZES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (toy / f"{name}.jsonl").read_bytes()


def test_every_version_of_the_library_makes_the_same_tokens(toy, tmp_path):
    make.write_tokenizer(tmp_path)
    made, ours = Tokenizer.from_dir(tmp_path), Tokenizer.from_dir(toy / "base")
    assert [made.token_bytes(n) for n in range(len(made))] == [
        ours.token_bytes(n) for n in range(len(ours))]
    texts = [row["problem"] for row in read(toy / "answers.jsonl")]
    assert made.encode_batch(texts) == ours.encode_batch(texts)


def test_the_ball_is_where_the_text_says(toy):
    files = {name: read(toy / f"{name}.jsonl") for name in make.SIZES}
    assert {name: len(rows) for name, rows in files.items()} == make.SIZES
    for row in files["corpus"]:
        assert row["solution"] == f"The ball is now under {play(row['problem'])[0]}."
    for row in files["answers"]:
        assert row["answer"] == play(row["problem"].removesuffix("\nWhere is the ball?"))[0]
    for row in files["choices"]:
        cup, swaps = play(row["question"].removesuffix("\nWhere is the ball?"))
        assert row["options"][row["answer_index"]] == cup
        assert row["options"] == list("ABCDEFGH"[: len(row["options"])])
        assert {x for _, *pair in swaps for x in pair} <= set(row["options"])


def test_stories_are_as_various_as_described():
    random, total = Random("a test"), 6000
    kinds, lengths, touches, moves = Counter(), Counter(), 0, 0
    for _ in range(total):
        story = make.tell(random)
        cup, swaps = play(story.problem)
        kinds[next(kind for kind in make.KINDS if kind[0] <= len(story.cups) <= kind[1])] += 1
        lengths[len(swaps)] += 1
        assert [int(n) for n, *_ in swaps] == list(range(story.first, story.first + len(swaps)))
        assert story.first + len(swaps) <= 10  # every number is one digit
        assert all(a != b and a in story.cups and b in story.cups for _, a, b in swaps)
        assert story.ball[-1] == cup and len(set(story.cups)) == len(story.cups)
        if len(story.cups) > 2:
            moves += len(swaps)
            touches += sum(x != y for x, y in zip(story.ball, story.ball[1:]))
    assert all(likely(kinds[kind], total, 1 / 3) for kind in make.KINDS)
    assert all(likely(lengths[n], total, 1 / make.SWAPS) for n in range(1, make.SWAPS + 1))
    assert likely(touches, moves, make.TOUCH)


def test_no_story_is_told_twice_and_none_is_in_what_the_base_has_read(toy):
    told = [row["problem"] for row in read(toy / "corpus.jsonl")]
    told += [row["problem"].split("\n")[0] for row in read(toy / "answers.jsonl")]
    told += [row["question"].split("\n")[0] for row in read(toy / "choices.jsonl")]
    known, random = set(told), Random("lessons 0")
    assert len(known) == len(told)
    story = re.compile(r"The ball is under [A-L]\.(?: \d [A-L] [A-L]\.)+")
    for _ in range(make.ROWS):
        row = make.lesson(random, known)
        assert story.search(row.get("text") or row["prompt"])[0] not in known


# ---- lessons


def test_the_annotator_errs_as_often_as_stated_and_goes_on_from_the_wrong_cup():
    random, errors, expected, variance = Random("a test"), 0, 0.0, 0.0
    for _ in range(3000):
        story = make.tell(random)
        thought, cup = make.annotate(story, random)
        steps = re.findall(r" (\d) (.) (.) (.)\.", thought)
        assert thought[0] == story.ball[0] and cup == steps[-1][-1]
        assert [a + b for _, a, b, _ in steps] == list(story.swaps)
        ball = thought[0]
        for _, a, b, then in steps:
            p = make.ERRS * (1 - 1 / len(story.cups))  # any cup, the right one too
            errors += then != {a: b, b: a}.get(ball, ball)
            expected, variance, ball = expected + p, variance + p * (1 - p), then
    assert abs(errors - expected) <= 5 * variance ** 0.5


def test_lessons_are_asked_in_the_words_of_the_questions_to_come(toy, tmp_path):
    tokenizer, random, seen = Tokenizer.from_dir(toy / "base"), Random("a test"), Counter()
    for _ in range(2000):
        row = make.lesson(random, set())
        if "text" in row:
            problem, solution = row["text"].split("\n\n")
            assert solution == f"The ball is now under {play(problem)[0]}."
            seen["text"] += 1
            continue
        prompt = tokenizer.chat(row["prompt"])
        problem = re.search(r"The ball is under [^\n]*", row["prompt"])[0]
        if row["prompt"].startswith("Next"):
            context = tuple(tokenizer.encode(f"{problem}\n\nThe ball is now under"))
            asked = prompt_ids(tokenizer, Question(context, (), 0, 0), "toy", 256)
            seen["thought" if "." in row["response"] else "guess"] += 1
        else:
            cups = re.findall(r"\n\((.)\) (.)", row["prompt"])
            assert all(letter == cup for letter, cup in cups)
            row = {"question": problem + make.QUESTION, "options": [cup for _, cup in cups]}
            asked = tokenizer.chat(row["question"])
            if cups:
                make.write_rows(tmp_path / "choice.jsonl", [row | {"answer_index": 0}])
                (choice,) = evaluation.read_choices(tmp_path / "choice.jsonl", tokenizer)
                asked = prompt_ids(tokenizer, choice, "plain", 256)
            seen["choice" if cups else "solved"] += 1
        assert prompt == asked
    shares = {"text": 0.2, "solved": 0.55 * 0.8, "choice": 0.55 * 0.2, "guess": 0.25 * 0.95,
              "thought": 0.25 * 0.05}
    assert all(likely(seen[name], 2000, share) for name, share in shares.items())


# ---- the base


def check_base(folder: Path, cache: Path, seed: int) -> None:
    """The bounds that the experiments need, on held-out questions of the world in `folder`."""
    tokenizer = Tokenizer.from_dir(folder / "base")
    corpus = load_corpus(folder / "corpus.jsonl", tokenizer, cache, holdout=500, seed=seed)
    corpus = replace(corpus, split=np.where(corpus.split == 1, 1, 2).astype(np.int8))
    cpu = torch.device("cpu")
    policy = Policy(load_pretrained(folder / "base", cpu, torch.float32), tokenizer)
    proxy = evaluation.Proxy(folder / "base", cache, 256, cpu, torch.float32)
    _, held, _ = evaluation.question_sets(corpus, proxy, PositionFilter(region="solution"))
    records = evaluation.evaluate(policy, [held[n] for n in range(len(held))], METHOD, seed=seed)
    bands = [[r for r in records if low < r["entropy"] <= high]
             for low, high in ((0.5, 1.0), (1.0, 1.5), (1.5, 9.0))]
    assert all(len(band) >= 60 for band in bands), [len(band) for band in bands]
    for measure in ("standard", "reasoning"):
        easy, medium, hard = (np.mean([r[measure] for r in band]) for band in bands)
        assert 0.7 > easy > medium > hard > 0.05, (measure, easy, medium, hard)
    questions = evaluation.answer_questions(folder / "answers.jsonl", tokenizer)[:500]
    plain = replace(METHOD, template="plain")
    answers = evaluation.evaluate(policy, questions, plain, seed=seed)
    questions = evaluation.read_choices(folder / "choices.jsonl", tokenizer)[:500]
    choices = evaluation.evaluate(policy, questions, plain, seed=seed)
    for found in (answers, choices):  # something is there, and something is left to mend
        assert 0.6 < np.mean([r["reasoning"] for r in found]) < 0.9


def test_the_base_is_small_and_opens_a_thought(toy):
    model = load_pretrained(toy / "base", torch.device("cpu"), torch.float32)
    assert 50_000 < sum(weight.numel() for weight in model.parameters()) < 150_000
    assert sum(file.stat().st_size for file in (toy / "base").iterdir()) < 2**20
    tokenizer = Tokenizer.from_dir(toy / "base")
    assert tokenizer.bytes_of(tokenizer.chat("Where?")) == (
        b"<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n<think>\n")


@SLOW
def test_the_base_is_as_weak_as_the_experiments_need(toy, tmp_path):
    check_base(toy, tmp_path, seed=0)


@SLOW
def test_a_base_of_another_seed_is_so_too(tmp_path):
    known = make.write_texts(tmp_path, seed=11)
    make.train_base(tmp_path, tmp_path / "work", 11, known)
    check_base(tmp_path, tmp_path / "cache", seed=11)


def test_one_step_by_hand_prints_what_the_modules_do(tmp_path, capsys):
    step.main(["--cache", str(tmp_path), "--group-size", "6"])
    out = capsys.readouterr().out
    assert [int(n) for n in re.findall(r"^(\d)\. ", out, re.M)] == list(range(1, 8))
    groups = [part.split("\n6.")[0] for part in re.split(r"\n[47]\. ", out)[1:]]
    for group in groups:
        said = [float(r) for r in re.findall(r"reward ([01]),", group)]
        mean, deviation = np.mean(said), np.std(said, ddof=1)
        advantages = re.findall(r"advantage ([-+.\d]+)", group)
        assert len(said) == 6 and len(advantages) == 6
        for reward, advantage in zip(said, advantages):
            want = (reward - mean) / deviation if deviation else 0
            assert abs(float(advantage) - want) < 6e-4  # three digits are printed
    before, after = re.search(r"mean reward ([.\d]+) -> ([.\d]+)", out).groups()
    assert [float(before), float(after)] == [
        float(f"{np.mean(list(map(float, re.findall('reward ([01]),', g)))):.3f}")
        for g in groups]
    weight = int(re.search(r"weight 1/(\d+) a token", out)[1])
    best = float(re.search(r"A = ([-+.\d]+)", out)[1])
    losses = re.findall(r"(\d\.\d{5}) +\d\.\d{4} ([-+]\d\.\d{5})$", out, re.M)
    assert len(losses) > 6
    for ratio, loss in losses:
        assert abs(float(ratio) - 1) < 1e-4 and abs(float(loss) + best / weight) < 2e-5
