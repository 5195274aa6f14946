"""The measurements on a model: accuracies, multiple choice, tables. (The statistics: test_statistics.py.)"""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny

import eval as evaluation
from data import Tokenizer, prompt_ids, read_corpus, split_holdout, toy_stories
from eval import SPLITS, Choice, evaluate, multiple_choice, option_likelihoods, summary
from model import load_pretrained
from reward import extract_prediction, prefix_match
from rpt import Method, Question
from sampler import generate

METHOD = Method(group_size=2, template="toy", max_prompt=128, max_response=40)


@pytest.fixture(scope="module")
def base(toy):
    model, tokenizer = load_pretrained(toy / "base" / "model"), Tokenizer.from_dir(toy / "base" / "model")
    questions = []
    for number, story in enumerate(toy_stories(24, seed=77)):
        ids = tokenizer.encode(story.text)
        truth = tuple(map(tokenizer.token_bytes, ids[-2:]))
        questions.append(Question(tuple(ids[:-2]), truth, number // 2, len(ids) - 2, 0.6 + 0.05 * number))
    return model, tokenizer, questions


def test_a_record_says_what_standard_prediction_and_each_response_got_right(base):
    model, tokenizer, questions = base
    records = evaluate(model, tokenizer, questions, METHOD, samples=3, seed=5)
    prompts = [prompt_ids(tokenizer, q, "toy", 128) for q in questions]
    responses = generate(model, prompts, samples=3, max_new_tokens=40, temperature=0.8, eos_ids=tokenizer.eos_ids,
                         seed=5, keys=[1 << 60 | n for n in range(len(questions))])
    for record, question, group in zip(records, questions, responses):
        with torch.no_grad():  # the oracle: one plain forward for each question
            token = int(model.logits(model(torch.tensor([question.context])))[0, -1].argmax())
        assert record["standard"] == float(tokenizer.token_bytes(token) == question.truth[0])
        said = [extract_prediction(tokenizer.bytes_of(c.ids[:-1])) if c.finished else None for c in group]
        assert record["reasoning"] == [prefix_match(p, question.truth) for p in said]
        assert record["length"] == [len(c.ids) for c in group] and record["document"] == question.document
    assert 0 < np.mean([r["reasoning"] for r in records]) < 1


def test_splits_are_nested_and_hold_what_their_entropy_says(base):
    model, tokenizer, questions = base
    records = evaluate(model, tokenizer, questions, METHOD, seed=5)
    table = summary(records)
    for split, threshold in SPLITS.items():
        chosen = [r for r in records if r["entropy"] > threshold]
        assert table[split]["questions"] == len(chosen) > 0
        assert table[split]["standard"][0] == pytest.approx(np.mean([r["standard"] for r in chosen]))
    assert table["easy"]["questions"] > table["medium"]["questions"] > table["hard"]["questions"]


def test_the_likelihood_of_an_option_is_the_sum_of_its_tokens_log_probabilities():
    model, prompt, options = tiny(), [3, 1, 4, 1, 5], [[9], [2, 6, 5], [3, 5, 8, 9, 7], [9, 9]]
    for got, option in zip(option_likelihoods(model, prompt, options), options):
        logits = model.logits(model(torch.tensor([prompt + option])))[0].double().log_softmax(-1)
        want = sum(logits[len(prompt) - 1 + n, token].item() for n, token in enumerate(option))
        assert got == pytest.approx(want, abs=1e-4)


def test_multiple_choice_takes_the_likeliest_letter_and_the_boxed_letter(base):
    model, tokenizer, _ = base
    choices = [Choice(s.problem, tuple(s.cups), s.cups.index(s.ball[-1])) for s in toy_stories(12, seed=78)]
    for record, choice in zip(multiple_choice(model, tokenizer, choices, METHOD), choices):
        ids = tokenizer.encode(choice.prompt + "\nAnswer:")
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids])))[0, -1]
        letters = [tokenizer.encode(f" {letter}") for letter in "ABCDEFGH"[: len(choice.options)]]
        assert all(len(letter) == 1 for letter in letters)
        assert record["standard"] == float(np.argmax([logits[letter[0]].item() for letter in letters]) == choice.answer)


def test_rows_of_mmlu_pros_format_are_choices(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "1 + 1?", "options": ["1", "2"], "answer": "B",
                                                     "answer_index": 1, "category": "math"}) + "\n")
    (choice,) = evaluation.read_choices(tmp_path / "rows.jsonl")
    assert choice.prompt == "1 + 1?\n(A) 1\n(B) 2" and choice.answer == 1


def test_the_command_measures_multiple_choice(toy, tmp_path, capsys):
    rows = [{"question": s.problem, "options": list(s.cups), "answer_index": s.cups.index(s.ball[-1])}
            for s in toy_stories(6, seed=79)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, command = str(toy / "base" / "model"), ["--choices", str(tmp_path / "rows.jsonl"), "--max-response", "40"]
    evaluation.main([model, *command, "--out", str(tmp_path / "records.jsonl")])
    tokenizer, method = Tokenizer.from_dir(model), replace(METHOD, temperature=0.8, max_response=40, max_prompt=4096)
    records = multiple_choice(load_pretrained(model), tokenizer, evaluation.read_choices(Path(command[1])), method)
    said = capsys.readouterr().out
    for name in ("standard", "reasoning"):
        assert re.search(rf"^model, {name} +{100 * np.mean([record[name] for record in records]):.1f} \[", said, re.M)
    assert [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()] == [
        record | {"entropy": pytest.approx(float("nan"), nan_ok=True)} for record in records]
    with open(command[1], "a") as out:
        out.write('{"question": "?", "options": ["1"], "answer_index": 1}\n')
    with pytest.raises(SystemExit):
        evaluation.main([model, *command])
    assert "rows.jsonl line 7: expected question" in capsys.readouterr().err


def test_the_command_measures_a_model_on_a_corpus(toy, tmp_path, capsys):
    evaluation.main([str(toy / "base" / "model"), "--corpus", str(toy / "corpus.jsonl"), "--holdout", "30",
                     "--questions", "20", "--template", "toy", "--part", "solution", "--max-response", "30",
                     "--cache", str(tmp_path),
                     "--samples", "2"])
    said = capsys.readouterr().out
    assert "model, standard" in said and "model, majority vote" in said and "model, pass@2" in said


def test_a_run_is_measured_on_its_own_held_out_documents_whatever_the_seed(toy, tmp_path):
    (tmp_path / "model").symlink_to(toy / "base" / "model")
    (tmp_path / "run.json").write_text(json.dumps({
        "corpus": str(toy / "corpus.jsonl"), "holdout": 25, "seed": 3, "part": "solution", "template": "toy",
        "max_response": 2, "questions": 4, "device": "cuda", "out": "elsewhere"}))
    held = {document.id for document in split_holdout(read_corpus(toy / "corpus.jsonl"), 25, 3)[1]}
    for seed in ("3", "4"):
        evaluation.main([str(tmp_path), "--seed", seed, "--out", str(tmp_path / "records.jsonl")])
        records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
        assert len(records) > 4 and {record["document"] for record in records} <= held


@pytest.mark.parametrize("accelerator", [None, torch.device("cuda")])
def test_the_command_takes_the_accelerator_if_there_is_one(toy, monkeypatch, accelerator):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: accelerator)
    taken = []
    monkeypatch.setattr(evaluation, "load_pretrained", lambda source, device, dtype: taken.append(device))
    monkeypatch.setattr(evaluation, "read_choices", lambda file: ["some"])
    monkeypatch.setattr(evaluation, "multiple_choice", lambda *_: [{"standard": 1.0, "reasoning": [1.0]}])
    model = str(toy / "base" / "model")
    evaluation.main([model, "--choices", "some"])
    evaluation.main([model, "--choices", "some", "--device", "cpu"])
    assert taken == [accelerator or torch.device("cpu"), torch.device("cpu")]


def test_bad_input_is_one_sentence(toy, tmp_path, capsys):
    for arguments, words in ((["nowhere/at/all"], "--corpus is missing"),
                             (["nowhere/at/all", "--corpus", str(toy / "corpus.jsonl")], "no such model directory"),
                             ([str(toy / "base" / "model"), "--corpus", str(tmp_path / "none")], "no such corpus"),
                             ([str(toy / "base" / "model"), "--dtype", "int4"], "choose from"),
                             ([str(toy / "base" / "model"), "--template", "v9"], "choose from")):
        with pytest.raises(SystemExit) as stop:
            evaluation.main(arguments)
        assert stop.value.code == 2 and words in capsys.readouterr().err
