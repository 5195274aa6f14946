"""The entropy pass, the measurements on a model, the tables, and eval.py as a command. (The
intervals: test_statistics.py.)"""

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_rounds_to, in_float64, plain_logits, tiny
from test_train import rows

import eval as evaluation
import rpt
import train
from data import Corpus, Question, Tokenizer, load_corpus
from eval import (SPLITS, Task, bootstrap_interval, corpus_entropy, entropies,
                  evaluate, measures, summary, table)
from model import load_pretrained, save_pretrained
from paper.perplexity import perplexity
from rpt import Policy
from sampler import Completion

TASK = Task(template="toy", max_prompt=128, max_response=24)
# A float32 forward of tiny() errs by some roundings of its largest logit (sums over 32 channels, 2
# layers, 60 positions): an entropy was off by 4 to 9 of them on three instruction sets.
ROUNDINGS = 32
LENGTHS = (5, 16, 17, 1, 60, 24, 25, 9, 41, 16, 2, 7)


@pytest.fixture(scope="module")
def base(toy):
    return Policy(load_pretrained(toy / "base"), Tokenizer(toy / "base"))


@pytest.fixture(scope="module")
def questions(toy, base, tmp_path_factory):
    """The last word of forty stories, two of a document, with entropies on both sides of each
    split."""
    out = []
    for n, row in enumerate(rows(toy / "corpus.jsonl")[:40]):
        ids = base.tokenizer.encode(f"{row['problem']}\n\n{row['solution']}")
        truth = tuple(map(base.tokenizer.token_bytes, ids[-2:]))
        out.append(Question(tuple(ids[:-2]), truth, n // 2, len(ids) - 2, 0.6 + 0.03 * n))
    return out


def random_policy():
    """Random weights over the toy's tokens."""
    tokenizer = Tokenizer(ROOT / "toy" / "base")
    return Policy(tiny(vocab_size=len(tokenizer) + 8, max_position_embeddings=128), tokenizer)


@pytest.fixture
def proxy(tmp_path):
    """A folder with these weights, and the task of measuring entropies with them."""
    policy = random_policy()
    save_pretrained(policy.model, tmp_path / "proxy", policy.tokenizer)
    return replace(TASK, proxy=str(tmp_path / "proxy"), cache=str(tmp_path / "cache"))


def random_corpus(*bos):
    """Twelve held-out documents of the toy's tokens; the last is a prompt of three tokens and a
    response, in the chat format, which begins without BOS."""
    tokenizer, last = Tokenizer(ROOT / "toy" / "base"), np.arange(len(LENGTHS)) == len(LENGTHS) - 1
    tokenizer.bos = list(bos)
    tokens = np.random.default_rng(0).integers(0, 300, sum(LENGTHS)).astype(np.uint32)
    return Corpus(tokenizer, tokens, np.cumsum([0, *LENGTHS]), 3 * last, last, last >= 0, last >= 0)


@torch.no_grad()
def read(model, corpus):
    """By document: its ids with what precedes them, and float64 logits [T, V] behind each."""
    found, model = [], in_float64(model)
    for document in range(len(LENGTHS)):
        bos = [] if corpus.is_chat[document] else corpus.tokenizer.bos
        ids = [*bos, *corpus.ids(document)]
        found.append((ids, plain_logits(model, ids)))
    return found


# ---- entropy and perplexity


def test_each_token_has_the_entropy_of_the_renormalised_16_most_probable_before_it(monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 40)
    corpus, model = random_corpus(3), random_policy().model
    values = entropies(model, corpus)
    for start, end, (ids, logits) in zip(corpus.starts, corpus.starts[1:], read(model, corpus)):
        p = logits[:-1].softmax(-1).sort(descending=True).values[:, :16]
        p = p / p.sum(-1, keepdim=True)
        unknown, got = np.split(values[start:end], [end - start - len(p)])
        assert len(unknown) == (len(ids) == end - start) and np.isnan(unknown).all()
        wanted = -(p * p.log()).sum(-1)
        assert_rounds_to(torch.tensor(got), wanted, ROUNDINGS, logits.abs().max())


def test_perplexity_is_that_of_every_token_behind_what_precedes_it():
    model, corpus, losses, documents = random_policy().model, random_corpus(3), [], []
    for document, (ids, logits) in enumerate(read(model, corpus)):
        first = corpus.given[document] if corpus.is_chat[document] else 1
        logprobs = logits.log_softmax(-1)[range(first - 1, len(ids) - 1), ids[first:]]
        losses += (-logprobs).tolist()
        documents += [document] * len(logprobs)
    wanted = torch.tensor(bootstrap_interval(losses, documents), dtype=torch.float64)
    found = torch.tensor(perplexity(model, corpus)).log()
    assert_rounds_to(found, wanted, ROUNDINGS, logits.abs().max())


def test_entropies_are_named_by_the_content_of_what_matters(proxy, monkeypatch, tmp_path):
    corpus, measured, original = random_corpus(), [], evaluation.entropies
    monkeypatch.setattr(evaluation, "entropies", lambda *how: measured.append(1) or original(*how))

    def is_measured(task, corpus=corpus):
        measured.clear()
        corpus_entropy(task, corpus)
        return bool(measured)

    folder = Path(proxy.proxy)
    moved = replace(proxy, proxy=str(shutil.copytree(folder, tmp_path / "moved")))
    assert is_measured(proxy) and not is_measured(proxy) and not is_measured(moved)
    for file in folder.iterdir():
        os.utime(file, (0, 0))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert not is_measured(proxy)
    assert is_measured(replace(proxy, dtype="bfloat16"))
    assert is_measured(proxy, random_corpus(3))
    assert is_measured(proxy, replace(corpus, tokens=corpus.tokens + 1))
    (weights,) = folder.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert is_measured(proxy) and not is_measured(proxy) and not is_measured(moved)


def test_a_proxy_is_refused_if_its_ids_in_the_corpus_mean_other_bytes(proxy):
    file = Path(proxy.proxy) / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace("<|im_start|>", "<|User|>"))  # an id that no document holds
    corpus = random_corpus()
    corpus.tokens[0] = corpus.tokenizer.ids_of[b"A"][0]
    assert len(corpus_entropy(proxy, corpus)) == len(corpus.tokens)
    file.write_text(text.replace('"A"', '"\\u0000"').replace('"B"', '"A"').replace(
        '"\\u0000"', '"B"'))
    with pytest.raises(ValueError, match=proxy.proxy):
        corpus_entropy(proxy, corpus)


# ---- measurements


def test_standard_prediction_is_the_argmax_of_one_plain_forward(base, questions):
    tokenizer, right = base.tokenizer, []
    for question in questions:
        with torch.no_grad():
            hidden = base.model(torch.tensor([[*tokenizer.bos, *question.context]]))
        token = int(base.model.logits(hidden)[0, -1].argmax())
        right.append(float(tokenizer.token_bytes(token) == question.truth[0]))
    records = evaluate(base, questions, TASK)
    assert [record["standard"] for record in records] == right and 0 < sum(right) < len(right)
    assert [record["entropy"] for record in records] == [q.entropy for q in questions]


@pytest.fixture
def says(base, monkeypatch):
    """Makes the model say these texts about every question; one with `...` is not finished."""
    def make(*texts):
        group = []
        for text in texts:
            ids = base.tokenizer.encode_chat(text.removesuffix("..."))
            ids += base.tokenizer.eos_ids[:1] * (not text.endswith("..."))
            group.append(Completion(ids, [0.0] * len(ids), not text.endswith("...")))
        monkeypatch.setattr(rpt, "generate", lambda model, prompts, **_: [group] * len(prompts))
        return replace(TASK, samples=len(texts))
    return make


def test_only_whole_tokens_that_were_boxed_in_time_are_right(base, says):
    texts = {"x</think>\\boxed{ Abcd}": (1, True), "</think>\\boxed{ Abc}": (0, True),
             "\\boxed{ Ab}": (0, False), "</think>\\boxed{ Abcd}...": (0, False)}
    question = Question((1, 2), (b" Ab", b"cd", b"e"), 0, 2, 1.0)
    (record,) = evaluate(base, [question], says(*texts))
    assert list(zip(record["rewards"], [p is not None for p in record["predictions"]])) == list(
        texts.values())
    assert record["truth"] == " Abcde"


def test_votes_are_merged_by_value_for_answers_and_by_bytes_for_next_tokens():
    def measured(entropy, rewards, *predictions):
        tokens = [len(rewards)] * len(rewards)
        return measures({"entropy": entropy, "rewards": rewards, "predictions": predictions,
                         "tokens": tokens})

    said = " 2", "2", "1/2", "0.5", "\\frac12", None
    answers, tokens = measured(None, [0, 0, 1, 1, 1, 0], *said), measured(1.0, [1] + [0] * 5, *said)
    assert (answers["majority vote"], answers["reasoning"], answers["pass@6"]) == (1, 1 / 2, 1)
    assert (tokens["majority vote"], tokens["parsed"]) == (1, 5 / 6)  # all differ: the first seen
    assert measured(1.0, [0, 1, 1, 0, 0, 0], "2", " 2", " 2", None, None, None)[
        "majority vote"] == 1  # no prediction is no vote
    assert measured(1.0, [0, 0], None, None)["majority vote"] == 0
    assert measured(1.0, [1], "2").keys() == {"reasoning", "parsed", "length"}


def test_splits_are_nested_and_their_intervals_are_over_documents(base, questions):
    records = evaluate(base, questions, replace(TASK, samples=3))
    found = summary(records)
    for split, nats in SPLITS.items():
        chosen = [record for record in records if record["entropy"] > nats]
        documents = [record["document"] for record in chosen]
        assert found[split]["questions"] == len(chosen) > len(set(documents)) > 1
        for name, value in {"standard": lambda r: r["standard"], "pass@3": lambda r: max(
                r["rewards"]), "length": lambda r: np.mean(r["tokens"])}.items():
            assert found[split][name] == bootstrap_interval(list(map(value, chosen)), documents)


def test_a_table_has_a_row_for_each_measure_and_model(base, says):
    task = says("</think>\\boxed{ A}")
    records = [evaluate(base, [Question((1, 2), (truth,), 4, 2, 0.7)], task)[0]
               for truth in (b" A", b" B")]  # one document, two empty splits
    twice = {name: 2 * records[1][name] for name in ("rewards", "predictions", "tokens")}
    first, second = summary(records[:1]), summary([records[1] | twice])
    _, columns, *lines = table({"a": first, "b": second}).splitlines()
    assert columns.split() == ["easy", "(1)", "medium", "(0)", "hard", "(0)"]
    found = [re.split("  +", line) for line in lines]
    assert [name for name, *_ in found] == [
        f"{m}, {name}" for name in ("standard", "reasoning", "parsed", "length", "majority vote",
                                    "pass@2") for m in "ab"]
    assert [cells[1].split()[0] for cells in found[2:6]] == ["100.0", "0.0", "100.0", "100.0"]
    assert [cells[1].split()[0] for cells in found[8:]] == ["-", "0.0"] * 2
    assert all(cells[2:] == ["-", "-"] for cells in found)
    json.dumps(first, allow_nan=False)


def test_processes_share_what_is_measured(base, says, monkeypatch):
    task, model, corpus = says("</think>\\boxed{A}", "x"), random_policy().model, random_corpus()
    asked, parts = [Question((1, n), (), n, 0, answer="A") for n in range(11)], []
    for share in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(evaluation, "rank_and_world", lambda: share)  # noqa: B023
        parts.append((evaluate(base, asked, task), entropies(model, corpus)))
    (records, values), (first, left), (second, right) = parts
    assert sorted(first + second, key=lambda r: r["question"]) == records != first
    assert (np.isnan(left) | np.isnan(right)).all()
    both, values = (torch.tensor(x).nan_to_num(-1) for x in (np.fmax(left, right), values))
    assert_rounds_to(both, values.double(), 2 * ROUNDINGS, read(model, corpus)[4][1].abs().max())


# ---- the command line


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs eval.py; what it printed, and the records."""
    def run(folder, options):
        options = (f"--out {tmp_path}/out --cache {tmp_path.parent}/cache --eval-questions 20 "
                   f"{options}")
        monkeypatch.setattr(sys, "argv", ["eval.py", str(folder), *options.split()])
        capsys.readouterr()
        evaluation.main()
        return capsys.readouterr().out, rows(tmp_path / "out" / "records.jsonl")
    return run


SMALL = "--max-prompt 128 --max-response 24 --template toy"


@pytest.fixture
def a_run(toy, tmp_path, monkeypatch):
    """A short run in a folder behind a symbolic link, on a corpus beside it."""
    monkeypatch.chdir(tmp_path)
    lines = (toy / "corpus.jsonl").read_text().splitlines(keepends=True)
    Path("corpus.jsonl").write_text("".join(lines[:400]))
    Path("disk").mkdir()
    Path("runs").symlink_to("disk")
    train.main("--recipe toy --corpus corpus.jsonl --out runs/a --answers= --steps 1 --questions 2 "
               "--group-size 2 --max-response 24 --holdout 25 --seed 3 --eval-questions 0".split())
    return Path("runs/a")


def test_a_run_is_measured_on_its_own_held_out_documents_wherever_it_is_moved(a_run, base, command):
    corpus = load_corpus("corpus.jsonl", base.tokenizer, 25, 3, 256)
    said, records = command(a_run, "--samples 2")
    assert "majority vote" in said and "pass@2" in said and len(records) == 20
    assert all(corpus.held[record["document"]] for record in records)
    Path("disk/a").rename("moved")
    known = Path("moved/run.json").read_text().replace('"device": "', '"device": "not-here-')
    Path("moved/run.json").write_text(known)
    assert command("moved", "--samples 2") == (said, records)
    for other in ("--seed 1", "--holdout 30"):  # which hold out documents that were trained on
        with pytest.raises(SystemExit, match="hold out other documents"):
            command("moved", other)
    with open("corpus.jsonl", "a") as file:
        file.write('{"text": "One line more."}\n')
    with pytest.raises(SystemExit, match="corpus.jsonl: not the text"):
        command("moved", "")


def test_a_run_of_next_token_prediction_is_asked_the_same(toy, tmp_path, command):
    train.main(f"--recipe toy --stage ntp --steps 1 --questions 2 --out {tmp_path}/ntp".split())
    said, records = command(tmp_path / "ntp", f"{SMALL} --answers= --region all")
    assert "step 0, standard" in said and len(records) == 20


def test_any_model_is_measured_on_a_corpus(a_run, toy, command):
    options = f"--corpus corpus.jsonl --region solution {SMALL}"
    said, records = command(toy / "base", options)
    assert "step 0, standard" in said and len(records) == 20
    assert command(toy / "base", options + " --temperature 0")[1] != records  # even greedily
    assert command(toy / "base", options + " --holdout 0")[1] == []


def test_files_of_one_name_are_two_exams(toy, tmp_path, command):
    (tmp_path / "held-out.jsonl").write_bytes((toy / "answers.jsonl").read_bytes())
    files = [toy / "answers.jsonl", tmp_path / "held-out.jsonl"]
    said, records = command(toy / "base", f"--answers {files[0]},{files[1]} {SMALL}")
    assert [r["exam"] for r in records] == ["answers"] * 20 + [f"{files[1]}"] * 20
    assert "answers in %" in said and f"{files[1]} in %" in said


def test_answers_need_no_corpus(toy, command):
    said, records = command(toy / "base", f"--answers {toy}/answers.jsonl --samples 4 {SMALL}")
    assert "answers in %" in said and "all (20)" in said
