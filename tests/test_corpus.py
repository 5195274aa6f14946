"""Laws of corpora, of what is held out, and of the positions that are asked about.

Oracles: the rows that were written, sets and sorting in plain Python, definitions by brute force.
"""

import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from test_data import GPT2, QWEN3, SPLIT, TEXTS, byte_level, family, read

import data
from data import (TRUTH_TOKENS, Corpus, Tokenizer, answer_questions, hold_out, load_corpus,
                  random_indices, read_documents, select_positions, sequences)
from reward import box, extract_prediction


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- reading


def test_rows_become_documents(tmp_path):
    nan, inf = float("nan"), float("inf")
    rows = [  # and what precedes, the text, the answer
        ({"text": "plain e\u0301"}, "", "plain é", ""),
        ({"text": "half a pair \ud83d, a whole one \ud83d\ude00"}, "",
         "half a pair ?, a whole one \U0001f600", ""),
        ({"problem": "P\u0041\u030a?", "solution": " S e\u0301.", "answer": 3, "difficulty": 5.5},
         "PÅ?\n\n", "S é.", "3"),
        ({"question": "Q?", "solution": "", "answer": "1+1=2.\n#### 2"},
         "Q?\n\n", "1+1=2.\n#### 2", "1+1=2.\n#### 2"),
        ({"problem": "P", "solution": nan, "answer": 0}, "P\n\n", "0", "0"),
        ({"problem": "P", "solution": "S", "answer": nan}, "P\n\n", "S", ""),
        ({"problem": "P", "solution": True, "answer": inf}, "P\n\n", "", ""),
        ({"problem": "P", "solution": ["a", nan, "b"], "answer": None}, "P\n\n", "a\n\nb", ""),
        ({"prompt": "A\u030a?", "response": "b</think>", "text": "t"}, "Å?", "b</think>", ""),
        ({"prompt": nan, "response": "r", "text": "t"}, "", "t", ""),
    ]
    file = write(tmp_path / "a.jsonl", *(row for row, *_ in rows), {"text": " "}, {"text": nan})
    for n, (document, (row, *wanted)) in enumerate(zip(read_documents(file), rows, strict=True), 1):
        assert [document.given, document.text, document.answer] == wanted
        assert document.is_chat == ("b</think>" in row.values())
        assert document.where == f"{file}, line {n}"


def test_a_folder_is_its_texts_and_nothing_beside_them(tmp_path):
    (tmp_path / ".hidden/sub").mkdir(parents=True)  # the folder itself may stand in one
    corpus = tmp_path / ".hidden"
    (corpus / "sub/b.txt").write_text("\ufeffb1<|endoftext|> \n<|endoftext|>b2", "utf-8")
    (corpus / "a.jsonl").write_text('\ufeff{"text": "a"}\n\n \t\r\n{"text": "a2"}\n\n', "utf-8")
    for name in ("README.txt", "readme.jsonl", "LICENSE-2.txt", "requirements.txt", ".b.jsonl",
                 "sub/._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "c.csv"):
        (corpus / name).parent.mkdir(exist_ok=True)
        (corpus / name).write_text('{"text": "no document"}')
    assert [document.text for document in read_documents(corpus)] == ["a", "a2", "b1", "b2"]


@pytest.mark.parametrize("line, message", [
    ('{"text": ', "a.jsonl, line 2: not UTF-8, or not a JSON object"),
    ('["y"]', "a.jsonl, line 2: not UTF-8, or"), ("5", "a.jsonl, line 2: not UTF-8, or"),
    ('{"text": "caf\xe9"}', "a.jsonl, line 2: not UTF-8, or"), ("caf\xe9", "a.txt: not UTF-8, or"),
    ('{"prompt": "x"}', "a.jsonl, line 2: it has no text"),
    ('{"solution": "x"}', "a.jsonl, line 2: it has no text"),
    ('{"problem": NaN}', "a.jsonl, line 2: it has no text"),
])
def test_what_is_wrong_with_a_row_is_one_sentence_with_file_and_line(line, message, tmp_path):
    file = tmp_path / re.split("[,:]", message)[0]
    file.write_text(f'{{"text": "x"}}\n{line}\n', "latin-1")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{message}")) as caught:
        read_documents(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_dataset_of_the_hub_is_its_text_files(tmp_path, monkeypatch):
    def snapshot(name, repo_type, allow_patterns):
        if (name, repo_type, allow_patterns) != ("us/Math", "dataset", ["*.jsonl", "*.txt"]):
            raise OSError("cannot\nreach it")
        return str(tmp_path)

    monkeypatch.setattr(data, "snapshot_download", snapshot)
    with pytest.raises(ValueError, match="us/Math: no documents"):
        read_documents("us/Math")
    write(tmp_path / "test.jsonl", {"text": "a"})
    assert [document.text for document in read_documents("us/Math")] == ["a"]
    with pytest.raises(FileNotFoundError, match=r"them/Off: no such file .*\(cannot\)"):
        read_documents("them/Off")


# ---- held-out documents


def test_a_text_that_is_added_displaces_at_most_one_and_equal_texts_stay_together():
    rng = random.Random(4)
    texts = [f"Text {n} of\n{rng.random()}" for n in range(300)]

    def held(texts: list[str], count: int = 100, seed: int = 7) -> set[str]:
        return set(itertools.compress(texts, hold_out(texts, count, seed)))

    before, displaced = held(texts), set()
    for n in range(20):
        after = held([f"new {n}", *texts])
        assert len(after) == 100 and len(before - after) == (f"new {n}" in after)
        displaced |= before - after
    assert displaced and held(rng.sample(texts, 300)) == before != held(texts, seed=8)
    assert not held(texts, 0) and len(held(texts, 999)) == 300
    twins = [f" {text.upper()}  " for text in texts]
    assert held(twins + texts) == before | {f" {text.upper()}  " for text in before}


# ---- tokenised corpora


def qwen3(folder: Path, split: str = SPLIT) -> Tokenizer:
    """Qwen 3's chat format, and a first token for plain text."""
    settings = {"eos_token": "<|im_end|>", "bos_token": "<s>", "add_bos_token": True}
    end = {"eos_token_id": [0, 1]}
    return read(folder, bpe=byte_level(0, split), generation_config=end,
                tokenizer_config=settings | {"chat_template": QWEN3})


@pytest.fixture(params=[(7, SPLIT), (40, GPT2), (10**6, r"[\s\S]+")])  # tokens of a document
def corpus(request, tmp_path) -> tuple[Corpus, list, int]:
    """GPT-2 cuts off the last line before a word; without a pre-tokenizer, tokens span lines."""
    most, split = request.param
    rng, rows = random.Random(most), []
    for n in range(40):
        text = f"{n}{rng.choice(TEXTS)[rng.randrange(20):]} }}{{ end{{"
        rows.append(rng.choice([{"text": text}, {"problem": rng.choice(TEXTS), "solution": text}]))
        if most > 40 and n % 4 == 0:
            rows.append({"prompt": f"{n}{rng.choice(TEXTS)}", "response": f"a</think>{text}"})
    file = write(tmp_path / "a.jsonl", *rows)
    return load_corpus(file, qwen3(tmp_path, split), 8, 1, most), read_documents(file), most


def test_a_corpus_is_the_ids_of_its_documents_in_pieces(corpus):
    corpus, documents, most = corpus
    tokenizer, pieces, apart = corpus.tokenizer, iter(range(len(corpus.starts) - 1)), 0
    held = hold_out([document.given + document.text for document in documents], 8, 1)
    assert corpus.tokens.dtype == np.uint32 and corpus.starts[-1] == len(corpus.tokens)
    for document, out in zip(documents, held):
        ids, border = tokenizer.encode(document.given + document.text), document.given.encode()
        first = max(n for n in range(len(ids)) if border.startswith(tokenizer.bytes_of(ids[:n])))
        apart += ids != tokenizer.encode(document.given) + tokenizer.encode(document.text)
        if document.is_chat:
            prompt = tokenizer.chat(document.given)
            ids, first = prompt + tokenizer.encode_chat(document.text), len(prompt)
        whole, given = [], 0
        while len(whole) < len(ids):
            piece = next(pieces)
            part = corpus.ids(piece)
            assert len(part) == most or corpus.ends[piece] and len(part) < most
            assert (corpus.held[piece], corpus.is_chat[piece]) == (out, document.is_chat)
            assert given == len(whole[:first])
            whole, given = whole + part, given + min(corpus.given[piece], len(part))
            assert corpus.ends[piece] == (len(whole) == len(ids))
        assert whole == ids and given == first
    assert next(pieces, None) is None and bool(apart) == (most > 7)


def test_a_prompt_and_response_that_are_too_long_are_refused(tmp_path):
    tokenizer = qwen3(tmp_path)
    file = write(tmp_path / "a.jsonl", {"text": "x " * 99}, {"prompt": "p", "response": "r " * 50})
    size = len(load_corpus(file, tokenizer, 0, 0, 10**6).ids(1))
    assert len(load_corpus(file, tokenizer, 0, 0, size).starts) > 3  # the text is cut
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: .* have {size} tokens; raise"):
        load_corpus(file, tokenizer, 0, 0, size - 1)


# ---- positions


def some_entropy(corpus: Corpus) -> np.ndarray:
    """Exponential, in steps so that many are equal; some nan."""
    rng = np.random.default_rng(len(corpus.tokens))
    entropy = rng.exponential(1.0, len(corpus.tokens)).round(1).astype(np.float32)
    entropy[rng.random(len(entropy)) < 0.1] = np.nan
    return entropy


@pytest.mark.parametrize("held, nats, region, min_context", [
    (False, 0.0, "all", 0), (False, 0.5, "solution", 12), (True, 1.0, "all", 3),
    (True, 0.5, "solution", 1), (True, 0.0, "all", 900), (False, 99.0, "all", 1)])
def test_questions_are_the_positions_that_the_filters_keep(corpus, held, nats, region, min_context):
    corpus, _, most = corpus
    entropy, wanted, tokenizer = some_entropy(corpus), [], corpus.tokenizer
    for d in np.flatnonzero(corpus.held == held).tolist():
        ids, first = corpus.ids(d), corpus.given[d] if region == "solution" else 0
        for n in range(max(first, min_context), len(ids)):
            token, nat = tokenizer.token_bytes(ids[n]), entropy[corpus.starts[d] + n]
            if nat > nats and extract_prediction(box(token)) == token:
                truth = tuple(map(tokenizer.token_bytes, ids[n: n + TRUTH_TOKENS]))
                wanted.append((tuple(ids[:n]), truth, d, n, nat, None))
                assert b"{" not in token and b"}" not in token and n < most
    found = select_positions(corpus, entropy, held, nats, region, min_context)
    assert [(q.context, q.truth, q.document, q.position, q.entropy, q.answer)
            for q in found] == wanted
    assert len(found) == len(wanted) and (wanted or nats == 99 or min_context > 7)


def test_next_token_prediction_trains_on_what_is_not_given_and_on_the_end(corpus):
    corpus, documents, _ = corpus
    tokenizer, found = corpus.tokenizer, iter(sequences(corpus))
    for d in np.flatnonzero(~corpus.held).tolist():
        ids = corpus.ids(d)
        if corpus.is_chat[d]:
            ids, first = [*ids, tokenizer.special["<|im_end|>"]], corpus.given[d]
        else:
            ids, first = [*tokenizer.bos, *ids, *([0] if corpus.ends[d] else [])], 1
        assert next(found) == (ids, first)
    assert next(found, None) is None


def test_a_response_ends_as_the_template_ends_it(tmp_path):
    """Llama 3 names its end of text first, which ends no turn."""
    tokenizer = family("Llama 3", tmp_path)
    special = tokenizer.special
    file = write(tmp_path / "a.jsonl", {"prompt": "p", "response": "r"}, {"text": "t"})
    chat, text = sequences(load_corpus(file, tokenizer, 0, 0, 100))
    assert (chat[0][-1], text[0][-1]) == (special["<|eot_id|>"], special["</s>"])
    assert chat[0][: chat[1]] == tokenizer.chat("p")
    for ids, first in sequences(load_corpus(write(file, {"text": "a text"}), tokenizer, 0, 0, 1)):
        assert 0 < first < len(ids)  # what is to be predicted; a step divides by its tokens


# ---- problems with answers


def test_problems_too_long_or_without_an_answer_to_earn_are_left_out_and_counted(
        tmp_path, capsys):
    tokenizer = qwen3(tmp_path)
    rows = [{"problem": f"Is it {n % 20}?\n", "solution": f"{n}", "answer": n} for n in range(40)]
    rows += [{"problem": "P", "answer": answer} for answer in ("", " ", r"\frac{5055}{2^{15}", "$")]
    rows += [{"problem": "Is it long? " * 9, "answer": 1}, {"text": "no problem"}]
    file = write(tmp_path / "a.jsonl", *rows)
    most = len(tokenizer.chat("Is it 19?"))
    train, held = answer_questions(file, tokenizer, most, 10, 3)
    assert f"{file}: 6 problems are left out" in capsys.readouterr().out
    assert len(train) + len(held) == 40 and 14 < len(held) <= 20
    assert not {q.context for q in train} & {q.context for q in held}
    for q in train + held:
        assert (q.truth, q.position, q.entropy, q.answer) == ((), 0, None, str(q.document))
        assert list(q.context) == tokenizer.encode(f"Is it {q.document % 20}?")
    write(file, *rows[:40])
    assert len(answer_questions(file, tokenizer, most)[0]) == 40 and not capsys.readouterr().out


# ---- draws


def test_a_draw_depends_on_seed_step_and_retry_alone_and_holds_no_question_twice():
    keys = itertools.product((0, 1, -3, 2**40, 2**63 - 1), range(9), (0, 1))  # seed, step, retry
    draws = {key: random_indices(50, *key, 10) for key in keys}
    assert all(random_indices(50, *key, 10) == numbers for key, numbers in reversed(draws.items()))
    assert len(set(map(tuple, draws.values()))) == len(draws)
    assert all(len(set(numbers) & set(range(50))) == 10 for numbers in draws.values())
    assert len(random_indices(3, 0, 0, 0, 10)) == 10  # there are fewer
    assert random_indices(50, 1, 2, 3, 5) == [28, 37, 1, 32, 7]  # numpy keeps its streams
