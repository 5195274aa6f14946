"""Laws of corpora, of what is held out, and of the positions that are asked about.

Oracles: the rows that were written, sets and sorting in plain Python, definitions by brute force.
"""

import gzip
import hashlib
import itertools
import json
import random
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from test_data import ASSETS, MAKERS, OF_QWEN, QWEN3, TEXTS, byte_level, needs_assets, read

import data
from data import (DROPPED, HELD_OUT, TRAIN, TRUTH_TOKENS, Corpus, Document, PositionFilter,
                  Tokenizer, answer_sets, fingerprint, load_corpus, prompt_ids, random_indices,
                  read_corpus, select_positions, sequences)
from reward import reachable

ROOT = Path(__file__).resolve().parent.parent


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Reading


def test_rows_become_documents(tmp_path):
    rows = [
        ({"text": "plain e\u0301"}, "plain é", {}),
        ({"problem": "P\u0041\u030a?", "solution": "S e\u0301.", "answer": 3, "difficulty": 5.5},
         "PÅ?\n\nS é.", {"problem": "PÅ?", "answer": "3"}),
        ({"question": "Q?", "answer": "So 1+1=2.\n#### 2"}, "Q?\n\nSo 1+1=2.\n#### 2",
         {"problem": "Q?", "answer": "So 1+1=2.\n#### 2"}),
        ({"text": "P! and more", "problem": "P!", "answer": "x"}, "P! and more",
         {"problem": "P!", "answer": "x"}),
        ({"text": "no beginning", "problem": "P!"}, "no beginning", {}),
        ({"problem": "only a problem", "answer": "7"}, "only a problem",
         {"problem": "only a problem", "answer": "7"}),
        ({"prompt": "A\u030a?", "response": "b</think>"}, "Å?", {"response": "b</think>"}),
        ({"text": "t", "prompt": "p", "response": "r"}, "t", {}),
    ]
    file = write(tmp_path / "a.jsonl", *(row for row, _, _ in rows))
    assert read_corpus(file) == [Document(text, f"{file} line {n}", **more)
                                 for n, (_, text, more) in enumerate(rows, 1)]
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as out:
        out.write(file.read_bytes())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/c.txt").write_text("c1\n<|endoftext|>\nc2")
    (tmp_path / "README.md").write_text("not a corpus")
    texts = [text for _, text, _ in rows]
    assert [document.text for document in read_corpus(tmp_path)] == [*texts, *texts, "c1\n", "c2"]


@pytest.mark.parametrize("text, wanted", [
    ("one\ntwo\n<|endoftext|>\nthree\n", ["one\ntwo\n", "three\n"]),
    ("one\n<|endoftext|>\nthree\n<|endoftext|>\n", ["one\n", "three\n"]),
    ("one\n<|endoftext|>\nthree\n<|endoftext|>", ["one\n", "three\n"]),
    ("one\r\n<|endoftext|>\r\nthree\r\n", ["one\r\n", "three\r\n"]),
    ("one<|endoftext|>\nthree", ["one", "three"]),
    ("a <|endoftext|> within a line\n", ["a <|endoftext|> within a line\n"]),
    ("e\u0301", ["é"]),
])
def test_a_text_file_is_parted_where_endoftext_ends_a_line(text, wanted, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert [document.text for document in read_corpus(tmp_path / "a.txt")] == wanted


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl line 3: not JSON that can be read"),
    ("a.jsonl", b'{"text": "x"}\n["y"]\n', "a.jsonl line 2: expected a JSON object"),
    ("a.jsonl", b'{"text": "x"}\n{"text": " \\n"}\n', "a.jsonl line 2: empty document"),
    ("a.jsonl", b'{"solution": "x"}\n', "a.jsonl line 1: empty document, or no field `text`"),
    ("a.jsonl", b'{"prompt": "x"}\n', "a.jsonl line 1: empty document, or no field `text`"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "a.jsonl line 2: not JSON that can be read"),
    ("a.jsonl", b'{"prompt": "x", "response": "\\ud83d"}\n', "a.jsonl line 1: half a surrogate"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl line 1: not JSON that can be read"),
    ("a.jsonl", b"\n \n", "a.jsonl: no documents"),
    ("a.txt", b"x\n<|endoftext|>\n\n<|endoftext|>\ny", "a.txt document 2: empty document"),
    ("a.txt", b"x\xff", "a.txt document 1: not UTF-8 that can be read"),
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: not JSON that can be read (Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 9, mtime=0)[:-9],
     "a.jsonl.gz: not JSON that can be"),
    ("a.csv", b"x", "a.csv: a corpus is a .jsonl, .jsonl.gz or .txt file"),
])
def test_what_is_wrong_with_a_corpus_is_one_sentence_with_file_and_line(
        name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{message}")) as caught:
        read_corpus(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, begin, where", [
    ("a.jsonl", b'{"text": "x"}\n{"text": "', "line"),
    ("a.txt", b"x\n<|endoftext|>\ny", "document")])
def test_a_document_of_100_megabytes_is_refused_before_it_is_read(name, begin, where, tmp_path):
    with open(tmp_path / name, "wb") as file:
        file.write(begin)
        file.truncate(100 * 10**6)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{name} {where} 2: .*longer than 16 MiB"):
        read_corpus(tmp_path / name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * data.MAX_LINE  # the piece, what it is joined from, and copies


def test_a_dataset_of_the_hub_is_its_text_files(tmp_path, monkeypatch):
    import huggingface_hub

    def snapshot(name: str, **options) -> str:
        assert options == {"repo_type": "dataset",
                           "allow_patterns": ["*.jsonl", "*.jsonl.gz", "*.txt"]}
        if name == "them/Offline":
            raise OSError("cannot\nreach it")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / "us/Math").mkdir(parents=True)
    write(tmp_path / "us/Math/test.jsonl", {"text": "a"})
    assert [document.text for document in read_corpus("us/Math")] == ["a"]
    convert = r"us/Parquet: .*load_dataset\('us/Parquet', split='train'\).to_json\('corpus.jsonl'\)"
    with pytest.raises(ValueError, match=convert):
        read_corpus("us/Parquet")
    with pytest.raises(FileNotFoundError, match="them/Offline: no such corpus.*cannot reach"):
        read_corpus("them/Offline")


# Held-out documents


def split(texts: list[str], holdout: int, seed: int) -> list[int]:
    return data.split_documents(lambda: texts, holdout, seed).tolist()


def sentence(rng: random.Random, words: int) -> list[str]:
    return [rng.choice("abcdefgh") + str(rng.randrange(50)) for _ in range(words)]


def runs(text: str) -> set[tuple[str, ...]]:
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text.casefold()).split()
    return {tuple(words[i: i + 8]) for i in range(len(words) - 7)} or {tuple(words)}


def test_near_duplicates_of_held_out_documents_leave_training_and_no_others_do():
    rng, texts, seen = random.Random(0), [], Counter()
    for _ in range(60):
        words = sentence(rng, rng.choice((3, 7, 8, 9, 20, 40, 80)))
        texts.append(" ".join(words))
        for changes in rng.choices(range(6), k=3):
            other = list(words)
            for at in rng.sample(range(len(words)), min(changes, len(words))):
                other[at] = "Z" + str(rng.randrange(10**6))
            other += sentence(rng, rng.choice((0, 0, 200)))  # a text that contains another
            texts.append(rng.choice((", ", " ", "! ")).join(word.upper() for word in other) + ".")
    rng.shuffle(texts)
    sets = list(map(runs, texts))
    parts = split(texts, 60, 1)
    held = [own for own, part in zip(sets, parts) if part == HELD_OUT]
    assert len(held) == 60
    for own, part in zip(sets, parts):
        if part != HELD_OUT:
            overlap = max(Fraction(len(own & other), min(len(own), len(other))) for other in held)
            alike = max(Fraction(len(own & other), len(own | other)) for other in held)
            assert (part == TRAIN) == (overlap < Fraction(1, 2))
            seen[overlap > 0, part, alike >= Fraction(1, 2)] += 1
    assert all(seen[case] > 5 for case in (
        (True, TRAIN, False), (True, DROPPED, True), (True, DROPPED, False), (False, TRAIN, False)))


@pytest.mark.parametrize("letters, stop", [("的一是不了人我在有他这中大来上国", "。"), ("กขคงจฉชซฌญฎฏ", " ")])
def test_near_twins_in_a_script_without_spaces_are_dropped(letters, stop):
    rng, texts = random.Random(3), []
    for _ in range(80):
        clauses = ["".join(rng.choices(letters, k=12)) for _ in range(9)]
        changed = [clause[:5] + rng.choice(letters) + clause[6:] if n % 3 == 0 else clause
                   for n, clause in enumerate(clauses)]
        texts += [stop.join(clauses), stop.join(changed)]
    parts = split(texts, 40, 0)
    assert all(parts[n ^ 1] != TRAIN for n, part in enumerate(parts) if part == HELD_OUT)
    assert parts.count(TRAIN) > 60


def test_one_document_more_changes_at_most_one_that_is_held_out():
    rng = random.Random(4)
    texts = [" ".join(sentence(rng, 20)) for _ in range(400)]

    def held(texts: list[str], seed: int = 7) -> set[str]:
        return {text for text, part in zip(texts, split(texts, 100, seed)) if part == HELD_OUT}

    before, changes = held(texts), []
    for _ in range(20):
        new = " ".join(sentence(rng, 20))
        after = held([new, *texts])
        changes.append(len(before - after))
        assert changes[-1] == (new in after) and len(after) == 100
    assert max(changes) == 1
    assert held(rng.sample(texts, 400)) == before != held(texts, 8)  # by content, not by place
    assert split(texts, 0, 7) == [TRAIN] * 400 and split(texts, 999, 7) == [HELD_OUT] * 400


def test_an_answer_set_is_held_out_by_its_problem_alone(tmp_path):
    rng, tokenizer = random.Random(5), read(byte_level())
    rows = [{"problem": problem, "solution": " ".join(sentence(rng, 90)), "answer": n}
            for n, problem in enumerate([" ".join(sentence(rng, 12)) for _ in range(60)] * 2)]
    file = write(tmp_path / "a.jsonl", *rows)
    train, held, about = answer_sets(file, tokenizer, 20, 0)
    assert len(train) == 80 and len(held) == 20 and "20 near-duplicates dropped" in about
    assert not {q.context for q in train} & {q.context for q in held}
    for question in train + held:
        row = rows[question.document]
        assert question.context == tuple(tokenizer.encode(row["problem"]))
        assert question.answer == str(row["answer"]) and question.truth == ()
    del rows[2]["answer"]
    with pytest.raises(ValueError, match="a.jsonl line 3: it has no `answer`"):
        answer_sets(write(file, *rows), tokenizer, 1, 0)


# Tokenised corpora


def some_rows(rng: random.Random, count: int = 40) -> list[dict]:
    rows = []
    for n in range(count):
        problem = rng.choice(TEXTS)[: rng.randint(1, 40)]
        problem += rng.choice("?.7é日}") + rng.choice("\n ?")
        solution = rng.choice(["So ", "$x$", "é", "日本", "{1}"])
        solution += rng.choice(TEXTS)[rng.randrange(20):] + " }{ end{" + str(n)
        rows.append(rng.choice([{"text": solution}, {"problem": problem, "solution": solution},
                                {"prompt": problem, "response": f"a {n}</think>{solution}"}]))
    return rows


def chat_tokenizer(kind: str, template: str = QWEN3) -> Tokenizer:
    if kind != "byte level":
        return read(MAKERS[kind]())
    settings = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}
    return read(byte_level((*OF_QWEN, "<s>", "<think>", "</think>")),
                tokenizer_config=settings | {"chat_template": template})


@pytest.fixture(params=MAKERS)
def corpus(request, tmp_path) -> tuple[Corpus, list[Document]]:
    rng = random.Random(request.param)
    file = write(tmp_path / "a.jsonl", *some_rows(rng))
    tokenizer = chat_tokenizer(request.param)
    return load_corpus(file, tokenizer, tmp_path / "cache", 8, 1), read_corpus(file)


def test_a_corpus_is_the_ids_of_its_documents(corpus):
    corpus, documents = corpus
    tokenizer, exact = corpus.tokenizer, 0
    assert corpus.starts[0] == 0 and corpus.starts[-1] == len(corpus.tokens)
    assert corpus.tokens.dtype == np.uint32 and len(corpus.starts) == len(documents) + 1
    assert corpus.split.tolist() == split([document.text for document in documents], 8, 1)
    for n, document in enumerate(documents):
        ids, region = corpus.ids(n).tolist(), int(corpus.regions[n] - corpus.starts[n])
        assert corpus.is_chat[n] == bool(document.response)
        if document.response:
            assert ids[:region] == tokenizer.chat(document.text)
            assert ids[region:] == tokenizer.response_ids(document.response)
            continue
        assert ids == tokenizer.encode(document.text)
        solution = document.text[len(document.problem or ""):].lstrip().encode()
        left = tokenizer.bytes_of(ids[region:])
        assert solution.endswith(left) or not document.problem and region == 0
        if document.problem:  # the token before is not wholly of the solution
            assert not solution.endswith(tokenizer.bytes_of(ids[region - 1:]))
            exact += left == solution
    assert exact > 3


def test_a_corpus_is_made_once_for_the_same_content(tmp_path, monkeypatch):
    rows, made = some_rows(random.Random(0)), []
    file, tokenizer = write(tmp_path / "a.jsonl", *rows), chat_tokenizer("byte level")
    divide = data.split_documents
    monkeypatch.setattr(data, "split_documents", lambda *a: made.append(a) or divide(*a))

    def load(source=file, tokenizer=tokenizer, holdout=8, seed=1) -> tuple[str, bool]:
        made.clear()
        corpus = load_corpus(source, tokenizer, tmp_path / "cache", holdout, seed)
        return corpus.fingerprint, bool(made)

    first, _ = load()
    assert load() == (first, False)
    assert load(seed=2) == load(holdout=9) == (first, True)  # the same texts, parted otherwise
    assert len(list((tmp_path / "cache").glob("*/tokens.u32"))) == 1  # but tokenised once
    (tmp_path / "moved").mkdir()
    moved = file.rename(tmp_path / "moved/a.jsonl")
    assert load(moved) == (first, False)
    special = byte_level((*OF_QWEN, "<think>", "</think>", "<x>", "<s>"))
    plain = write(tmp_path / "c.jsonl", *(row for row in rows if "text" in row))
    names = [load(write(tmp_path / "b.jsonl", *rows[:-1]))[0], load(plain)[0],
             load(moved, read(special))[0]]
    assert len({first, *names}) == 4
    other = chat_tokenizer("byte level", template="{{ messages[0].content }}")
    assert load(plain, other)[0] == names[1]  # plain text knows no chat format
    assert load(moved, other)[0] != first


def test_a_corpus_that_was_being_made_when_its_process_died_is_made_again(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", *some_rows(random.Random(1)))
    tokenizer, cache = chat_tokenizer("byte level"), tmp_path / "cache"
    whole = load_corpus(file, tokenizer, tmp_path / "whole", 8, 1)
    monkeypatch.setattr(data, "BATCH", 3)
    batches, encode, last = [], tokenizer.encode_batch, 0

    def dies(texts: list[str]) -> list[list[int]]:
        batches.append(texts)
        if len(batches) == last:
            raise KeyboardInterrupt
        return encode(texts)

    tokenizer.encode_batch = dies
    for last in (1, 5):
        batches.clear()
        with pytest.raises(KeyboardInterrupt):
            load_corpus(file, tokenizer, cache, 8, 1)
        assert [path.parent.suffix for path in cache.glob("*/tokens.u32")] == [".aside"]
    last = 0
    again = load_corpus(file, tokenizer, cache, 8, 1)
    assert len(batches) > 9 and again.fingerprint == whole.fingerprint
    for name in ("tokens", "starts", "regions", "is_chat", "split"):
        assert np.array_equal(getattr(again, name), getattr(whole, name))
    tokens = next(cache.glob("*/tokens.u32"))
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{tokens.parent}: .* tokens, not .*; remove it"):
        load_corpus(file, tokenizer, cache, 8, 1)


WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import data
data.BATCH = 8
corpus = data.load_corpus(sys.argv[2], data.Tokenizer.from_dir(sys.argv[3]), sys.argv[4], 8, 1)
print(corpus.fingerprint, len(corpus.tokens), corpus.split.tolist())
"""


def test_processes_that_begin_together_get_one_corpus(tmp_path):
    file = write(tmp_path / "a.jsonl", *some_rows(random.Random(1), 400))
    tokenizer = chat_tokenizer("byte level")
    (tmp_path / "model").mkdir()
    tokenizer.save(tmp_path / "model")
    command = [sys.executable, "-c", WORKER, ROOT, file, tmp_path / "model", tmp_path / "cache"]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    workers[0].kill()  # whatever it was doing
    printed = {worker.communicate(timeout=60)[0] for worker in workers[1:]}
    alone = load_corpus(file, tokenizer, tmp_path / "alone", 8, 1)
    assert printed == {f"{alone.fingerprint} {len(alone.tokens)} {alone.split.tolist()}\n"}
    assert [path.suffix for path in (tmp_path / "cache").iterdir()].count("") == 1


def test_a_document_that_its_tokens_cannot_spell_is_refused_by_number(tmp_path):
    file = write(tmp_path / "a.jsonl", {"text": "a b"}, {"text": "a ▁ literal one"})
    load_corpus(file, chat_tokenizer("byte level"), tmp_path, 0, 0)
    for kind in ("prepend", "metaspace first"):
        with pytest.raises(ValueError, match="a.jsonl line 2: .* ▁ .*'a ▁ literal one'"):
            load_corpus(file, read(MAKERS[kind]()), tmp_path, 0, 0)


def test_the_fingerprint_changes_with_every_input(tmp_path):
    folder = tmp_path / "model"
    (folder / "within").mkdir(parents=True)  # as hub downloads have them
    (folder / "a.json").write_text("12")
    (folder / "b.json").write_text("34")
    base = ("text", b"bytes", 512, folder)
    other = [base, base[1:], (*base, ""), ("textb", *base[1:]), (*base[:3], folder / "a.json")]
    seen = [fingerprint(*parts) for parts in other]
    (folder / "b.json").write_text("35")  # content of the same size
    seen.append(fingerprint(*base))
    (folder / "b.json").rename(folder / "c.json")
    seen.append(fingerprint(*base))
    assert len(set(seen)) == len(seen) and fingerprint(*base) == seen[-1]


# Positions


def some_entropy(corpus: Corpus) -> np.ndarray:
    """Exponential, in steps so that many are equal; some nan."""
    rng = np.random.default_rng(len(corpus.tokens))
    entropy = rng.exponential(1.0, len(corpus.tokens)).round(1).astype(np.float32)
    entropy[rng.random(len(entropy)) < 0.1] = np.nan  # not where documents begin: after bos
    return entropy


@pytest.mark.parametrize("part, region, min_context, max_context", [
    (TRAIN, "all", 0, 0), (TRAIN, "solution", 12, 0), (TRAIN, "all", 3, 30),
    (HELD_OUT, "solution", 1, 40), (HELD_OUT, "all", 900, 0)])
def test_filters_keep_what_they_say(corpus, part, region, min_context, max_context):
    corpus, _ = corpus
    entropy, places = some_entropy(corpus), []
    for document, (start, end) in enumerate(itertools.pairwise(corpus.starts.tolist())):
        for place in range(start + max(min_context, 1), end):
            behind = region == "all" or place >= corpus.regions[document]
            near = not max_context or place - start <= max_context
            if corpus.split[document] == part and behind and near and np.isfinite(entropy[place]):
                places.append(place)
    can = {place for place in places if reachable(corpus.truth(place))}
    assert len(can) < len(places) or min_context == 900

    def asked(kind: str, value: float) -> set[int]:
        chosen = PositionFilter(kind, value, min_context, max_context, region, seed=3)
        found = select_positions(corpus, entropy, chosen, part).positions
        assert found.dtype == np.int64 and (np.diff(found) > 0).all()
        return set(found.tolist())

    for threshold in (-1.0, 0.5, 99.0):
        assert asked("threshold", threshold) == {p for p in can if entropy[p] > threshold}
    ranked = sorted((entropy[place] for place in places), reverse=True)
    numbers = np.random.default_rng([3, 5]).random(len(places))
    for share in (0.01, 0.25, 1.0):
        least = ranked[int(np.ceil(share * len(ranked))) - 1] if ranked else 0
        assert asked("top", share) == {p for p in can if entropy[p] >= least}
        kept = {place for place, number in zip(places, numbers) if number < share}
        assert asked("random", share) == kept & can
    with pytest.raises(ValueError, match="filter 'best': it is threshold, top or random"):
        asked("best", 1.0)


def test_a_question_is_what_precedes_and_the_bytes_of_what_follows(corpus):
    corpus, _ = corpus
    entropy = some_entropy(corpus)
    questions, last = select_positions(corpus, entropy, PositionFilter("threshold", -1.0)), 0
    for question, place in zip(questions, questions.positions.tolist(), strict=True):
        ids = corpus.ids(question.document).tolist()
        assert place == corpus.starts[question.document] + question.position
        assert question.context == tuple(ids[: question.position])
        following = ids[question.position: question.position + TRUTH_TOKENS]
        assert question.truth == tuple(map(corpus.tokenizer.token_bytes, following))
        assert question.entropy == entropy[place] and question.answer is None
        last += question.position == len(ids) - 1
    assert last > 5 and max(len(q.truth) for q in questions) == 32


def test_choosing_positions_looks_at_each_token_a_bounded_number_of_times(tmp_path):
    text = "so {x} = }{ 日本 " * 12_000  # one document
    file = write(tmp_path / "a.jsonl", {"text": text})
    corpus = load_corpus(file, read(byte_level()), tmp_path, 0, 0)
    looked = []

    class Watched(np.ndarray):
        def __getitem__(self, places):
            found = super().__getitem__(places)
            looked.append(np.size(found))
            return found

    watched = replace(corpus, tokens=corpus.tokens.view(Watched))
    for chosen in (PositionFilter("threshold", -1.0), PositionFilter("top", 0.5)):
        looked.clear()
        entropy = np.ones(len(corpus.tokens), np.float32)
        assert len(select_positions(watched, entropy, chosen)) > 10_000
        assert sum(looked) <= (TRUTH_TOKENS + 2) * len(corpus.tokens)


# Sequences


@pytest.mark.parametrize("max_tokens", [2, 3, 16, 500])
def test_every_token_of_training_documents_is_predicted_once(corpus, max_tokens):
    corpus, documents = corpus
    keep = corpus.split.copy()
    if max_tokens < 500:
        keep[corpus.is_chat] = DROPPED
    corpus = replace(corpus, split=keep)
    bos, end, found = corpus.tokenizer.bos, corpus.tokenizer.eos_ids[:1], []
    for ids, first in sequences(corpus, max_tokens):
        assert len(ids) <= max_tokens and all(type(id) is int for id in ids)
        found.append((ids[:first], ids[first:]))
    for document in np.flatnonzero(corpus.split == TRAIN).tolist():
        ids = corpus.ids(document).tolist()
        if corpus.is_chat[document]:
            prompt = corpus.tokenizer.chat(documents[document].text)
            assert found.pop(0) == (prompt, ids[len(prompt):] + end)
            continue
        whole = bos + ids + end
        at = 1
        while at < len(whole):
            before, targets = found.pop(0)
            assert before == whole[at - 1: at] and targets == whole[at: at + len(targets)]
            assert len(targets) == max_tokens - 1 or at + len(targets) == len(whole) or at == 1
            at += len(targets)
    assert not found


def test_a_prompt_and_response_that_are_too_long_are_refused(tmp_path):
    file = write(tmp_path / "a.jsonl", {"text": "x " * 99}, {"prompt": "p", "response": "r " * 50})
    corpus = load_corpus(file, chat_tokenizer("byte level"), tmp_path, 0, 0)
    size = len(corpus.ids(1)) + 1
    assert len(sequences(corpus, size)) > 1
    with pytest.raises(ValueError, match=f"document 2 .* has {size} tokens; .* of {size - 1}"):
        sequences(corpus, size - 1)
    assert len(sequences(replace(corpus, split=np.full(2, HELD_OUT)), size)) == 0


# Draws


def test_a_draw_depends_on_seed_step_and_retry_alone_and_holds_no_question_twice():
    keys = itertools.product((0, 1, -3, 2**40, 2**63 - 1), range(9), (0, 1))  # seed, step, retry
    draws = {key: random_indices(50, *key, 10) for key in keys}
    assert all(random_indices(50, *key, 10) == numbers for key, numbers in reversed(draws.items()))
    assert len(set(map(tuple, draws.values()))) == len(draws)
    assert all(len(set(numbers) & set(range(50))) == 10 for numbers in draws.values())
    few = random_indices(3, 0, 0, 0, 10)
    assert len(few) == 10 and set(few) <= {0, 1, 2}


def test_draws_are_uniform():
    counts = np.zeros(20)
    for step in range(4000):
        counts[random_indices(20, 7, step, step % 3, 5)] += 1
    # Pearson's statistic, 19 degrees of freedom: above 43.8 once in a thousand.
    # Without repetition the variance is 15/19.
    assert ((counts - 1000) ** 2 / 1000).sum() * 19 / 15 < 43.8


# Real text


def digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


@needs_assets
def test_the_questions_of_omnimath_are_those_on_record(tmp_path):
    """Hashes of the ids, positions, questions and prompts of 300 documents, taken before corpora
    were files: the same seeds give the same questions."""
    tokenizer = Tokenizer.from_dir(ASSETS / "tokenizers/deepseek_r1_distill_qwen")
    rows = (ASSETS / "data/omni_math_rule.jsonl").read_text().splitlines()[:300]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    corpus = load_corpus(tmp_path / "a.jsonl", tokenizer, tmp_path, 0, 0)
    for n, document in enumerate(read_corpus(tmp_path / "a.jsonl")):
        assert tokenizer.bytes_of(corpus.ids(n)) == document.text.encode()
    assert digest([corpus.ids(n).tolist() for n in range(300)]) == "0d96d6193a18b8ee"
    rng = np.random.default_rng(5)
    entropy = rng.exponential(0.7, len(corpus.tokens)).astype(np.float32)
    entropy[corpus.starts[:-1]] = np.nan
    for kind, value, region, count, wanted in [
            ("threshold", 0.5, "all", 73097, "2d3f03c18c51b898"),
            ("threshold", 0.5, "solution", 61550, "b4e89764443dda4c"),
            ("top", 0.1, "all", 14944, "bd49b1b7661f9881"),
            ("top", 0.1, "solution", 12610, "c52e2ce5875ba92e"),
            ("random", 0.1, "all", 14965, "4c5054505e4b2d62"),
            ("random", 0.1, "solution", 12596, "a23b96721dafce99")]:
        chosen = PositionFilter(kind, value, 16, 0, region, seed=3)
        questions = select_positions(corpus, entropy, chosen)
        at = np.searchsorted(corpus.starts, questions.positions, "right") - 1
        places = list(zip(at.tolist(), (questions.positions - corpus.starts[at]).tolist()))
        assert (len(questions), digest(places)) == (count, wanted)
        if (kind, region) == ("threshold", "all"):
            drawn = [questions[n] for n in random_indices(count, 3, 7, 0, 60)]
            assert digest([(q.context, q.truth, q.document, q.position, round(q.entropy, 5))
                           for q in drawn]) == "e5900fcd4434afd7"
            prompts = [prompt_ids(tokenizer, question, "v0", 1024) for question in drawn]
            assert digest(prompts) == "05b99e1abc857e59"
