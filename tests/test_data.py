"""Laws of data.py: from a file of text to prompts and truths, byte by byte.

Oracles: the text's own UTF-8, the published chat templates (through jinja2 and transformers where they are installed),
sets and sorting in plain Python, float64, and an independent player of the shell game.
"""

import itertools
import json
import os
import random
import re
import threading
import time
import tracemalloc
import unicodedata
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
from data import (
    CUPS,
    TEMPLATES,
    TRUTH_TOKENS,
    Document,
    Question,
    QuestionSet,
    Tokenizer,
    draw,
    entropy_pass,
    fingerprint,
    next_token_entropy,
    prompt_ids,
    question_sets,
    read_corpus,
    select_positions,
    split_holdout,
    toy_runs,
    toy_stories,
    toy_tokenizer,
    write_toy,
)
from helpers import tiny
from model import save_pretrained
from reward import extract_prediction, prefix_match, reachable

ASSETS = Path(os.environ.get("RPT_TEST_ASSETS", "/nonexistent"))
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="RPT_TEST_ASSETS is not set")
CPU = torch.device("cpu")
TEXTS = [
    "The quick brown fox jumps over the lazy dog, twice.\n\n\tAnd 12345 times more!  ",
    r"Let $n \ge 2$, and \frac{a_1}{b} + \sqrt{x^{2}} = \boxed{ 4}. Then \left(1 - \epsilon\right)^n \to 0.",
    "👩‍🚀 flies 🚀🚀, 🤗 says 日本語 and 中文字符; naïve café, Ångström, ﬁne, ½ ∑∫ Ω",
    "combining: e\u0301 a\u030a n\u0303 \u1100\u1161\u11a8 q\u0323\u0307, right to left: שלום مرحبا",
    "\r\n\r\n  if x:\r\n\treturn {'a': [1, 2]}\n\x00\x7f\u200b\ufeff end",
]


def nfc(text: str) -> bytes:
    return unicodedata.normalize("NFC", text).encode()


# Tokenizers made on the spot


def byte_level(rng: random.Random, special: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """GPT-2 or Qwen style, NFC; a random vocabulary that has tokens of several bytes, some of them cut characters."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(data.QWEN_SPLIT), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    texts = [text[rng.randrange(9):] for text in rng.choices(TEXTS, k=4)] + ["日本 語文 字🚀🤗é"] * 3
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=rng.randint(300, 420), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    return bpe


def byte_fallback(rng: random.Random, metaspace: bool) -> tokenizers.Tokenizer:
    """SentencePiece style as in Llama 2: ▁ for the space, one before every text, bytes for unknown characters."""
    bpe = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    bpe.normalizer = space
    special = ["<unk>", "<s>", "</s>"]
    bpe.train_from_iterator(rng.choices(TEXTS, k=6), trainers.BpeTrainer(
        vocab_size=rng.randint(330, 420), special_tokens=special + [f"<0x{b:02X}>" for b in range(256)],
        limit_alphabet=25, show_progress=False))
    spec = json.loads(bpe.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    bpe = tokenizers.Tokenizer.from_str(json.dumps(spec))
    if metaspace:
        bpe.normalizer, bpe.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return bpe


def read(bpe: tokenizers.Tokenizer, settings: dict, **files: object) -> Tokenizer:
    """data.Tokenizer of a tokenizer and the JSON objects beside it."""
    files = {f"{name}.json": json.dumps(content).encode()
             for name, content in (files | {"tokenizer_config": settings}).items()}
    return Tokenizer(files | {"tokenizer.json": bpe.to_str().encode()}, "here")


MAKERS = {
    "byte level": lambda rng: read(byte_level(rng, ("</s>",)), {"eos_token": "</s>"}),
    "byte fallback": lambda rng: read(byte_fallback(rng, False), {"eos_token": "</s>", "bos_token": "<s>"}),
    "byte fallback, metaspace": lambda rng: read(byte_fallback(rng, True), {"eos_token": "</s>", "bos_token": "<s>"}),
}


@pytest.fixture(scope="module")
def toy() -> Tokenizer:
    return toy_tokenizer()


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    return Tokenizer.from_dir(ASSETS / "tokenizers/deepseek_r1_distill_qwen")


# Tokenizer


@pytest.mark.parametrize("kind", MAKERS)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(kind):
    rng, cut, long = random.Random(kind), 0, 0
    for _ in range(5):
        tokenizer, texts = MAKERS[kind](rng), list(TEXTS)
        for _ in range(60):
            a, b = rng.choices(TEXTS, k=2)
            texts.append(a[rng.randrange(len(a)):] + b[: rng.randrange(len(b))])
        runs = [tokenizer.encode(text) for text in texts]
        assert tokenizer.encode_batch(texts) == runs
        for text, ids in zip(texts, runs):
            pieces = [tokenizer.token_bytes(id) for id in ids]
            assert b"".join(pieces) == tokenizer.bytes_of(ids) == (nfc(text) if kind == "byte level" else text.encode())
            assert tokenizer.tokens(tokenizer.bytes_of(ids)) == pieces
            long += sum(len(piece) > 1 for piece in pieces)
            cut += sum(len(piece) > 1 and "\ufffd" in piece.decode(errors="replace") for piece in pieces)
    assert long > 1000 and (cut > 100 or kind != "byte level")  # tokens that split a character did occur


@pytest.mark.parametrize("kind", MAKERS)
def test_a_token_is_found_by_its_bytes_and_ids_beyond_the_vocabulary_have_none(kind):
    tokenizer = MAKERS[kind](random.Random(3))
    contents = [tokenizer.token_bytes(id) for id in range(len(tokenizer))]
    for content in {*contents, b"no such token", b"\xff\xff\xff"}:
        assert tokenizer.ids_of_token(content) == [id for id, other in enumerate(contents) if other == content]
    for id in (len(tokenizer), len(tokenizer) + 1, 10**6):
        assert tokenizer.token_bytes(id) == b""
    size = len(tokenizer)
    assert tokenizer.bytes_of([size, *tokenizer.encode("ab"), size + 7]) == b"ab"
    assert tokenizer.tokens(b"\xff\xfe") == tokenizer.tokens(b"a\xe6\x97") == []  # not UTF-8: no tokenizer reads it


def test_a_special_token_spelled_in_text_stays_text(tmp_path):
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    tokenizer = read(byte_level(random.Random(0), special), {"eos_token": "<|im_end|>"})
    text = "a <think> b</think><|im_end|>\n<|im_start|>user<|endoftext|>"
    for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text])):
        assert tokenizer.bytes_of(ids) == text.encode() and not set(ids) & set(tokenizer.special.values())
    ids = tokenizer.chat(text)
    assert tokenizer.bytes_of(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n".encode()
    assert Counter(id for id in ids if id in tokenizer.special.values()) == Counter(
        [tokenizer.special[token] for token in ("<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>")])


@pytest.mark.parametrize("files, wanted", [
    ({"generation_config": {"eos_token_id": 7}, "config": {"eos_token_id": 8}, "settings": {"eos_token": "</s>"}}, [7]),
    ({"generation_config": {"eos_token_id": [9, 7]}, "config": {"eos_token_id": 8}}, [9, 7]),
    ({"generation_config": {"eos_token_id": 0}, "config": {"eos_token_id": 8}}, [0]),
    ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": [8, 3]}}, [8, 3]),
    ({"generation_config": {}, "config": {"eos_token_id": 8}, "settings": {"eos_token": "</s>"}}, [8]),
    ({"config": {"eos_token_id": None}, "settings": {"eos_token": "</s>"}}, ["</s>"]),
    ({"settings": {"eos_token": {"content": "</s>", "lstrip": False}}}, ["</s>"]),
    ({"settings": {"eos_token": "</t>"}}, None),
    ({"settings": {"eos_token": None}}, None),
    ({}, None),
])
def test_end_tokens_come_from_the_generation_config_else_the_config_else_the_tokenizer(files, wanted, tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level(random.Random(0), ("</s>",)).to_str())
    for name, content in files.items():
        name = "tokenizer_config" if name == "settings" else name
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    if wanted is None:
        with pytest.raises(ValueError, match="no end token in"):
            Tokenizer.from_dir(tmp_path)
        return
    tokenizer = Tokenizer.from_dir(tmp_path)
    wanted = [tokenizer.special.get(token, token) for token in wanted]
    assert tokenizer.eos_ids == wanted
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")  # without the model's config.json, which save_pretrained writes
    again = Tokenizer.from_dir(tmp_path / "copy")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert again.eos_ids == wanted


@pytest.mark.parametrize("name, content", [
    ("tokenizer.json", "{"), ("tokenizer.json", ""), ("tokenizer.json", "[]"), ("tokenizer.json", "{}"),
    ("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}'),
    ("tokenizer.json", '{"added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}}'),
    ("tokenizer_config.json", "{"), ("generation_config.json", "[1]"), ("config.json", "no"),
])
def test_a_damaged_file_is_one_sentence_that_names_it(name, content, tmp_path):
    read(byte_level(random.Random(0), ("</s>",)), {"eos_token": "</s>"}).save(tmp_path)
    Tokenizer.from_dir(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))) as caught:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(caught.value).strip()


def test_a_missing_tokenizer_is_file_not_found(tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
            Tokenizer.from_dir(place)


# The chat format, against the branches of the published templates that a lone user message takes

CHATML = ("{%- if tools %}{{- '<|im_start|>system\\n' }}{%- else %}"
          "{%- if messages[0]['role'] == 'system' %}"
          "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
          "@{%- endif %}{%- endif %}{%- for message in messages %}"
          "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
          "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")
DEEPSEEK = ("{{bos_token}}{%- for message in messages %}"
            "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}"
            "{%- endif %}{%- endfor -%}{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}")
SMOLLM2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
           "{{ '<|im_start|>system\n"
           "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
           "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def default(system: str) -> str:
    """Qwen2.5's template with a default system message, as it stands in a Jinja string."""
    return CHATML.replace("@", "{%- else %}{{- '<|im_start|>system\\n" + system + "<|im_end|>\\n' }}")


OF_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
OF_DEEPSEEK = ("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<think>", "</think>")
FAMILIES = {  # template, special tokens, and what the tokens read as around the prompt
    "DeepSeek-R1-Distill": (DEEPSEEK, OF_DEEPSEEK, "<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜>"),
    "Qwen3": (CHATML.replace("@", ""), (*OF_QWEN, "<think>", "</think>"), "<|im_start|>user\n",
              "<|im_end|>\n<|im_start|>assistant\n"),
    "Qwen2.5": (default("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."), OF_QWEN,
                "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
                "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "Qwen2.5-Math": (default("Please reason step by step, and put your final answer within \\\\boxed{}."), OF_QWEN,
                     "<|im_start|>system\n"
                     "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
                     "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "SmolLM2": (SMOLLM2, OF_QWEN,
                "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
                "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
}
PROMPTS = ["What is 1 + 1?", "日本語 🚀\n", " x", "a {braces} and \\boxed{ =}", "two\n\nlines\n\n"]


def family(name: str, beside: bool = False) -> Tokenizer:
    """beside: with the template in a file of its own, as transformers writes it today."""
    template, special, _, _ = FAMILIES[name]
    bpe = byte_level(random.Random(name), special)
    settings = {"eos_token": special[0], "bos_token": special[3] if name.startswith("DeepSeek") else None}
    if name.startswith("DeepSeek"):
        bpe.post_processor = processors.TemplateProcessing(single=f"{special[3]} $A",
                                                           special_tokens=[(special[3], bpe.token_to_id(special[3]))])
    files = {"tokenizer.json": bpe.to_str().encode()}
    files |= {"chat_template.jinja": template.encode()} if beside else {}
    return Tokenizer(files | {"tokenizer_config.json": json.dumps(
        settings if beside else settings | {"chat_template": template}).encode()}, name)


def in_pieces(tokenizer: Tokenizer, text: str) -> list[int]:
    """Special tokens where they are spelled, what stands between them as text: what a chat template's text means."""
    pattern = "(" + "|".join(map(re.escape, tokenizer.special)) + ")"
    return [id for piece in re.split(pattern, text) if piece
            for id in ([tokenizer.special[piece]] if piece in tokenizer.special else tokenizer.encode(piece))]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_chat_format_is_the_published_one_with_the_thinking_opened(name, beside):
    tokenizer, (_, special, before, after) = family(name, beside), FAMILIES[name]
    for prompt in PROMPTS:
        ids = tokenizer.chat(prompt)
        assert ids == in_pieces(tokenizer, before + prompt + after + "<think>\n")
        assert [id in ids for id in tokenizer.bos] == [ids.count(id) == 1 for id in tokenizer.bos]
    newline = tokenizer.encode("\n")
    if "<think>" in special:
        assert ids[-1 - len(newline):] == [tokenizer.special["<think>"], *newline]
    else:
        assert tokenizer.bytes_of(ids).endswith(b"assistant\n<think>\n") and len(tokenizer.encode("<think>")) > 1
    assert len(tokenizer.bos) == (name == "DeepSeek-R1-Distill")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_chat_format_is_what_the_template_renders(name):
    jinja2 = pytest.importorskip("jinja2")
    tokenizer, template = family(name), FAMILIES[name][0]
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        text = template.render(messages=messages, add_generation_prompt=True, bos_token=OF_DEEPSEEK[3])
        assert tokenizer.chat(prompt) == in_pieces(tokenizer, text + "<think>\n")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_chat_format_is_that_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = family(name)
    tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for prompt in PROMPTS:
        text = theirs.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        assert tokenizer.chat(prompt) == theirs(text + "<think>\n", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_users_text_never_becomes_a_special_token(name):
    tokenizer, (_, special, before, after) = family(name), FAMILIES[name]
    ids = tokenizer.chat("".join(special) + "<think>")
    assert [id for id in ids if id in tokenizer.special.values()] == [
        id for id in tokenizer.chat("x") if id in tokenizer.special.values()]
    assert tokenizer.bytes_of(ids) == (before + "".join(special) + "<think>" + after + "<think>\n").encode()


@pytest.mark.parametrize("name", [*FAMILIES, "no family", "byte fallback"])
def test_a_context_is_inserted_as_its_own_ids(name):
    tokenizer = (family(name) if name in FAMILIES
                 else MAKERS[{"no family": "byte level"}.get(name, name)](random.Random(1)))
    rng = random.Random(name)
    for _ in range(20):
        context = rng.choices(range(len(tokenizer)), k=rng.randint(0, 9)) + tokenizer.encode("日")[:1]  # a cut character
        plain = tokenizer.chat("Text:\n{context} and then", [])
        ids = tokenizer.chat("Text:\n{context} and then", context)
        places = [n for n in range(len(plain) + 1) if plain[:n] + context + plain[n:] == ids]
        sides = [(tokenizer.bytes_of(plain[:n]), tokenizer.bytes_of(plain[n:])) for n in places]
        assert any(left.endswith(b"Text:\n") and right.startswith(b" and then") for left, right in sides)
    assert tokenizer.bytes_of(plain) == tokenizer.bytes_of(tokenizer.chat("Text:\n and then"))


# Corpora


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_become_documents(tmp_path):
    file = write(
        tmp_path / "a.jsonl",
        {"text": "plain e\u0301"},
        {"problem": "P\u0041\u030a?", "solution": "S e\u0301.", "answer": 3, "difficulty": 5.5},
        {"question": "Q?", "answer": "So 1+1=2.\n#### 2"},
        {"text": "P! and more", "problem": "P!", "answer": "x"},
        {"text": "no beginning", "problem": "P!"},
        {"problem": "only a problem", "answer": "7"},
    )
    assert read_corpus(file) == [
        Document("plain é", 0),
        Document("PÅ?\n\nS é.", 1, "PÅ?", "3"),
        Document("Q?\n\nSo 1+1=2.\n#### 2", 2, "Q?", "So 1+1=2.\n#### 2"),
        Document("P! and more", 3, "P!", "x"),
        Document("no beginning", 4),
        Document("only a problem", 5, "only a problem", "7"),
    ]


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


def test_a_folder_is_all_its_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.jsonl", {"text": "b1"}, {"text": "b2"})
    (tmp_path / "a.txt").write_text("a1\n<|endoftext|>\na2")
    write(tmp_path / "sub" / "c.jsonl", {"text": "c1"})
    (tmp_path / "README.md").write_text("not a corpus")
    assert [(d.id, d.text) for d in read_corpus(tmp_path)] == list(enumerate(["a1\n", "a2", "b1", "b2", "c1"]))


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl line 3: not JSON"),
    ("a.jsonl", b'{"text": "x"}\n["y"]\n', "a.jsonl line 2: expected a JSON object"),
    ("a.jsonl", b'{"text": "x"}\n"y"\n', "a.jsonl line 2: expected a JSON object"),
    ("a.jsonl", b'{"text": "x"}\n{"text": " \\n"}\n', "a.jsonl line 2: empty document"),
    ("a.jsonl", b'{"body": "x"}\n', "a.jsonl line 1: empty document, or no field `text`"),
    ("a.jsonl", b'{"solution": "x"}\n', "a.jsonl line 1: empty document, or no field `text`"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "a.jsonl line 2: byte 10 is not UTF-8"),
    ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl line 1: half a surrogate pair"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl line 1: not JSON"),
    ("a.jsonl", b"", "a.jsonl: no documents"),
    ("a.jsonl", b"\n \n", "a.jsonl: no documents"),
    ("a.txt", b"", "a.txt: no documents"),
    ("a.txt", b"x\n<|endoftext|>\n\n<|endoftext|>\ny", "a.txt document 2: empty document"),
    ("a.txt", b"x\xff", "a.txt document 1: byte 1 is not UTF-8"),
    ("a.csv", b"x", "a.csv: a corpus is a .jsonl or .txt file"),
    ("a", b"x", "a: a corpus is a .jsonl or .txt file"),
])
def test_what_is_wrong_with_a_corpus_is_one_sentence_with_file_and_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{message}")) as caught:
        read_corpus(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_corpus_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such corpus"):
        read_corpus(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="a corpus is a .jsonl or .txt file, or a folder of them"):
        read_corpus(tmp_path)


def test_a_line_of_50_megabytes_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(b'{"text": "x"}\n{"text": "')
        file.truncate(50 * 10**6)
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(ValueError, match="a.jsonl line 2: longer than 16 MiB"):
        read_corpus(tmp_path / "a.jsonl")
    took, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 2 and peak < 40 * 2**20


# Held-out documents


def jaccard(a: str, b: str) -> Fraction:
    """Of the sets of runs of eight words, by the definition."""
    def runs(text: str) -> set[tuple[str, ...]]:
        words = "".join(c if c.isalnum() or c == "_" else " " for c in text.casefold()).split()
        return {tuple(words[i: i + 8]) for i in range(len(words) - 7)} or {tuple(words)}
    a, b = runs(a), runs(b)
    return Fraction(len(a & b), len(a | b))


def sentence(rng: random.Random, words: int) -> list[str]:
    return [rng.choice("abcdefgh") + str(rng.randrange(50)) for _ in range(words)]


def test_near_duplicates_of_held_out_documents_leave_training_and_no_others_do():
    rng, texts = random.Random(0), []
    for _ in range(60):
        words = sentence(rng, rng.choice((3, 7, 8, 9, 20, 40, 80)))
        texts.append(" ".join(words))
        for changes in rng.choices(range(6), k=3):
            other = list(words)
            for at in rng.sample(range(len(words)), min(changes, len(words))):
                other[at] = "Z" + str(rng.randrange(10**6))
            texts.append(rng.choice((", ", " ", "! ")).join(word.upper() for word in other) + ".")
    rng.shuffle(texts)
    documents, seen = [Document(text, id) for id, text in enumerate(texts)], Counter()
    for seed in range(3):
        train, held, dropped = split_holdout(documents, 60, seed)
        assert len(held) == 60 and len(train) + len(held) + dropped == len(documents)
        assert [d.id for d in train] == sorted({d.id for d in train} - {d.id for d in held})
        for document in documents:
            if document not in held:
                overlap = max(jaccard(document.text, other.text) for other in held)
                assert (document in train) == (overlap < Fraction(1, 2)), (document, overlap)
                seen[overlap > 0, document in train] += 1
    assert min(seen[case] for case in ((True, True), (True, False), (False, True))) > 20


def test_one_word_changed_in_forty_is_a_near_duplicate():
    rng = random.Random(1)
    words = sentence(rng, 40)
    changed = [" ".join(words[:n] + ["another"] + words[n + 1:]) for n in range(40)]
    unlike = [" ".join(sentence(rng, 40)) for _ in range(40)]
    documents = [Document(text, id) for id, text in enumerate([" ".join(words), *changed, *unlike])]
    for seed in range(10):
        for n in range(1, 41):  # whichever of the two is held out
            assert split_holdout([documents[0], documents[n]], 1, seed)[::2] == ([], 1)
        train, _, dropped = split_holdout(documents[:1] + documents[41:], 1, seed)
        assert len(train) == 40 and dropped == 0


def test_the_split_depends_on_the_seed_alone():
    documents = [Document(" ".join(sentence(random.Random(n), 20)), n) for n in range(100)]
    splits = [split_holdout(documents, 20, seed) for seed in (1, 2, 1)]
    assert splits[0] == splits[2] != splits[1]
    train, held, dropped = split_holdout(documents, 0, 1)
    assert (train, held, dropped) == (documents, [], 0)


# Entropy


def exact_entropy(logits: torch.Tensor, top_k: int) -> list[list[float]]:
    """Sort, keep the most probable, renormalise, -sum p ln p; in float64."""
    p = logits.double().softmax(-1).sort(descending=True).values[..., :top_k].numpy()
    p = p / p.sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1)


@pytest.mark.parametrize("top_k", [1, 5, 16, 40, 1000])
def test_the_entropy_is_that_of_the_renormalised_most_probable_tokens(top_k):
    model = tiny()
    # 633 positions: the head takes two
    ids = torch.randint(40, (3, 211), generator=torch.Generator("cpu").manual_seed(0))
    entropy = next_token_entropy(model, ids, top_k)
    with torch.no_grad():
        exact = exact_entropy(model.logits(model(ids)), top_k)
    assert entropy.shape == ids.shape and np.abs(entropy.numpy() - exact).max() < 1e-5
    assert not entropy.requires_grad and 0 <= entropy.min() and entropy.max() <= np.log(min(top_k, 40)) + 1e-5


def test_the_entropy_of_sixteen_equal_tokens_is_the_logarithm_of_sixteen():
    model = tiny()
    with torch.no_grad():
        model.head.zero_()
    entropy = next_token_entropy(model, torch.zeros(1, 3, dtype=torch.long, device=CPU))
    assert torch.allclose(entropy, torch.full((1, 3), float(np.log(16))))


WINDOW = 16
RUNS = [random.Random(n).choices(range(40), k=size)
        for n, size in enumerate((5, 16, 17, 1, 60, 24, 25, 9, 41, 16, 2, 7))]


def pass_over(model, bos, file):
    return entropy_pass(model, SimpleNamespace(bos=bos), RUNS, file, WINDOW, batch_tokens=40)


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b))


@pytest.mark.parametrize("bos", [[], [3]])
def test_the_pass_gives_each_token_the_entropy_before_it(bos, tmp_path):
    model = tiny()
    values = pass_over(model, bos, tmp_path / "e.f32")
    for run, got in zip(RUNS, values):
        assert got.dtype == np.float32 and len(got) == len(run)
        for position in range(len(run)):
            if position == 0 and not bos:
                assert np.isnan(got[0])
                continue
            begin = 0
            if position >= WINDOW:  # windows overlap by half; the last ends with the text
                end = min(WINDOW + (1 + (position - WINDOW) // (WINDOW // 2)) * (WINDOW // 2), len(run))
                begin = end - WINDOW
            before = [*bos, *run[begin:position]]
            with torch.no_grad():
                exact = exact_entropy(model.logits(model(torch.tensor([before], device=CPU)))[:, -1], 16)
            assert abs(got[position] - exact[0]) < 1e-5
    assert (tmp_path / "e.f32").stat().st_size == 4 * sum(map(len, RUNS))


@pytest.mark.parametrize("bos", [[], [3]])
def test_an_interrupted_pass_resumes_to_the_same_bits(bos, tmp_path, monkeypatch):
    model, file, calls, last = SimpleNamespace(head=torch.empty(0, device=CPU)), tmp_path / "e.f32", [], 10**9

    def entropy_of_prefixes(model, ids):  # any function of what precedes, and of what else is in the batch
        if len(calls) == last:
            raise KeyboardInterrupt
        calls.append(ids.shape)
        return (ids + 1.0).cumsum(1).sqrt() + ids.float().std()

    monkeypatch.setattr(data, "next_token_entropy", entropy_of_prefixes)
    whole = pass_over(model, bos, file)
    content, batches, boundaries = file.read_bytes(), len(calls), []
    assert batches > 8 and same(pass_over(None, bos, file), whole) and file.read_bytes() == content  # needs no model
    file.unlink()
    for last in range(batches):  # stopped in each batch
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            pass_over(model, bos, file)
        boundaries.append(file.stat().st_size)
        resumed, last = len(calls), 10**9
        assert same(pass_over(model, bos, file), whole) and file.read_bytes() == content
        assert len(calls) == batches and resumed == len(boundaries) - 1  # nothing is computed twice
        file.unlink()
    for size in (*boundaries, *random.Random(0).sample(range(len(content)), 40), len(content)):  # killed while it wrote
        file.write_bytes(content[:size])
        calls.clear()
        assert same(pass_over(model, bos, file), whole) and file.read_bytes() == content
        assert len(calls) == batches - sum(0 < boundary <= size for boundary in (*boundaries, len(content)))


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_give_what_one_gives(world, tmp_path, monkeypatch):
    model, alone, shared = tiny(), tmp_path / "1.f32", tmp_path / "n.f32"
    whole = pass_over(model, [], alone)
    me, values, barrier = threading.local(), [None] * world, threading.Barrier(world)  # threads stand for processes

    def gather(value: object) -> list:
        values[me.rank] = value
        barrier.wait(20)
        gathered = list(values)
        barrier.wait(20)
        return gathered

    monkeypatch.setattr(data, "all_gather", gather)
    monkeypatch.setattr(data, "rank_and_world", lambda: (me.rank, world))
    for size in (0, 0, 101, 400, 4 * sum(map(len, RUNS))):  # from the beginning, and resumed within a batch
        shared.write_bytes(alone.read_bytes()[:size])
        results = [None] * world

        def process(rank: int) -> None:
            me.rank = rank
            results[rank] = pass_over(model, [], shared)

        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(same(result, whole) for result in results)
        assert shared.read_bytes() == alone.read_bytes()


def test_the_fingerprint_changes_with_every_input(tmp_path):
    for name in ("model", "sub"):
        (tmp_path / name).mkdir()
    (tmp_path / "model/a.json").write_text("12")
    (tmp_path / "model/b.json").write_text("34")
    (tmp_path / "model/folder").mkdir()  # as hub downloads have them
    base = ("text", b"bytes", 512, tmp_path / "model")
    seen = {fingerprint(*base)}
    assert {fingerprint(*base)} == seen and re.fullmatch("[0-9a-f]{24}", *seen)

    def differs(*parts: object) -> None:
        assert fingerprint(*parts) not in seen
        seen.add(fingerprint(*parts))

    for n, other in enumerate(("Text", b"Bytes", 513, tmp_path / "sub")):
        differs(*base[:n], other, *base[n + 1:])
    differs(*base, "")
    differs(*base[1:])
    differs("textb", *base[1:])
    differs(base[1], base[0], *base[2:])
    (tmp_path / "model/b.json").write_text("35")  # content of the same size
    differs(*base)
    (tmp_path / "model/b.json").rename(tmp_path / "model/c.json")
    differs(*base)
    (tmp_path / "model/d.json").write_text("")
    differs(*base)


def test_entropies_are_computed_once_for_the_same_inputs_and_again_for_others(toy, tmp_path, monkeypatch):
    folder, cache = tmp_path / "model", tmp_path / "cache"
    model = tiny(vocab_size=len(toy) + 3)
    with torch.no_grad():
        model.model.norm.weight.mul_(4)  # sure of some tokens, so that every threshold parts them
    save_pretrained(model, folder, toy)
    texts = [story.text for story in toy_stories(30, seed=5)] + [f"p{n} \\frac{{1}}{{2}} {n}" for n in range(20)]
    documents = [Document(text, id) for id, text in enumerate(texts)]
    loads = []
    load = data.load_pretrained
    monkeypatch.setattr(data, "load_pretrained", lambda *a: loads.append(a) or load(*a))

    def sets(tokenizer=toy, documents=documents, **changes) -> tuple[QuestionSet, QuestionSet, str]:
        settings = {"holdout": 8, "selector": "threshold", "value": 1.0, "min_context": 2, "part": "all", "seed": 1,
                    "window": 64, "device": CPU, "dtype": torch.float32}
        return question_sets(tokenizer, documents, folder, cache, **settings | changes)

    train, held, table = sets()
    again = sets()
    assert len(loads) == 1 and table == again[2] and np.array_equal(train.places, again[0].places)
    assert np.array_equal(held.entropy, again[1].entropy)
    one, two, dropped = split_holdout(documents, 8, 1)
    for questions, part, threshold in ((train, one, 1.0), (held, two, 0.5)):
        assert list(questions.documents) == part
        wanted, possible = [], 0
        for number, document in enumerate(part):
            ids = toy.encode(document.text)
            entropy = next_token_entropy(model, torch.tensor([ids], device=CPU))[0].numpy()
            for position in range(2, len(ids)):
                truth = [toy.token_bytes(id) for id in ids[position: position + TRUTH_TOKENS]]
                possible += reachable(truth)
                if entropy[position - 1] > threshold and reachable(truth):
                    wanted.append((number, position, document.id))
        assert [(*place, questions[n].document) for n, place in enumerate(questions.places.tolist())] == wanted
        assert 0 < len(wanted) < possible
    assert f"documents: {len(one):,} to train on, 8 held out, {dropped:,} near-duplicates" in table

    sets(min_context=5, part="solution", value=0.1)  # choices made after the pass
    assert len(loads) == 1
    with_bos = Tokenizer(toy.files | {"tokenizer_config.json": json.dumps(
        {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "add_bos_token": True}).encode()}, "toy")
    sets(window=32)
    sets(dtype=torch.bfloat16)
    sets(tokenizer=with_bos)
    sets(documents=documents[:-1] + [Document("p19 \\frac{1}{2} 18", 49)])
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    save_pretrained(model, folder, toy)
    sets()
    assert len(loads) == 6 and len(list(cache.iterdir())) == 6
    with pytest.raises(ValueError, match="no position is left to ask about"):
        sets(value=99.0)
    with pytest.raises(ValueError, match="no document is longer than --min-context 900"):
        sets(min_context=900)
    for holdout in (0, len(documents)):  # nothing held out, or everything
        assert [bool(len(part)) for part in sets(holdout=holdout)[:2]] == [holdout == 0, holdout > 0]


# Positions


def some_questions(rng: random.Random,
                   tokenizer: Tokenizer) -> tuple[list[Document], list[list[int]], list[np.ndarray]]:
    documents, ends = [], ("?", ".", " 7", "é", "日", "}", "\n", " ")
    for n in range(30):
        problem = rng.choice(TEXTS)[: rng.randint(1, 40)] + rng.choice(ends)
        solution = rng.choice(["So ", "$x$", "é", "日本", "{1}"]) + rng.choice(TEXTS)[rng.randrange(20):] + " }{ end"
        row = {"problem": problem, "solution": solution} if n % 3 else {"text": solution}
        documents.append(data._document(row, n, "here"))
    ids = [tokenizer.encode(document.text) for document in documents]
    generator = np.random.default_rng(rng.randrange(10**6))
    entropies = [generator.exponential(1.0, len(run)).astype(np.float32) for run in ids]
    for entropy in entropies:
        entropy[0] = np.nan
        entropy[generator.random(len(entropy)) < 0.1] = np.nan
    return documents, ids, entropies


def candidates(tokenizer, documents, ids, entropies, min_context: int, part: str) -> list[tuple[int, int]]:
    """Positions that may be asked about, by definition; whether a box can hold the truth comes after the selector."""
    out = []
    for d, document in enumerate(documents):
        begin = len(document.text.encode()) - len(document.text[len(document.problem or ""):].lstrip().encode())
        for p in range(max(min_context, 1), len(ids[d])):
            behind = len(tokenizer.bytes_of(ids[d][:p])) >= begin
            if not np.isnan(entropies[d][p]) and (part == "all" or document.problem is None or behind):
                out.append((d, p))
    return out


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("part", ["all", "solution"])
@pytest.mark.parametrize("min_context", [0, 1, 12])
def test_selectors_keep_what_they_say(kind, part, min_context):
    rng = random.Random(f"{kind} {part} {min_context}")
    tokenizer = MAKERS[kind](rng)
    documents, ids, entropies = some_questions(rng, tokenizer)
    places = candidates(tokenizer, documents, ids, entropies, min_context, part)

    def asked(selector: str, value: float, seed: int = 0) -> set[tuple[int, int]]:
        questions = select_positions(tokenizer, documents, ids, entropies, selector, value, min_context, part, seed)
        found = [tuple(place) for place in questions.places.tolist()]
        assert found == sorted(set(found)) and len(questions) == len(found)
        assert [float(entropies[d][p]) for d, p in found] == questions.entropy.tolist()
        return set(found)

    can = {(d, p) for d, p in places if reachable([tokenizer.token_bytes(id) for id in ids[d][p: p + TRUTH_TOKENS]])}
    assert 50 < len(can) < len(places)  # some truths no box can hold
    for threshold in (-1.0, 0.0, 0.5, 1.5, float(entropies[places[3][0]][places[3][1]]), 99.0):
        assert asked("threshold", threshold) == {(d, p) for d, p in can if entropies[d][p] > threshold}
    ranked = sorted(places, key=lambda place: (-entropies[place[0]][place[1]], place))
    for share in (0.0, 0.01, 0.25, 0.8, 1.0):
        assert asked("top", share) == set(ranked[: int(np.ceil(share * len(ranked)))]) & can
        chosen = asked("random", share)
        assert chosen == asked("random", share) and chosen <= can
        assert abs(len(chosen) - share * len(can)) <= 4 * (share * (1 - share) * len(can)) ** 0.5
    assert asked("random", 0.5, seed=1) != asked("random", 0.5, seed=2)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_first_question_of_a_solution_is_its_first_token(kind):
    rng = random.Random(kind)
    tokenizer = MAKERS[kind](rng)
    documents, ids, entropies = some_questions(rng, tokenizer)
    entropies = [np.ones(len(run), np.float32) for run in ids]
    questions = select_positions(tokenizer, documents, ids, entropies, "threshold", 0.5, 1, "solution")
    exact = 0
    for d, document in enumerate(documents):
        if document.problem is None:
            continue
        solution = document.text[len(document.problem):].lstrip()
        positions = questions.places[questions.places[:, 0] == d, 1]
        left = document.text.encode()[len(tokenizer.bytes_of(ids[d][: positions[0]])):]
        assert solution.encode().endswith(left)  # nothing of the problem, nor of the empty line
        exact += left == solution.encode()
    assert exact > 5


def test_a_question_is_what_precedes_and_the_bytes_of_what_follows(toy):
    ids = [toy.encode("The ball 日 is " * 12), toy.encode("under A.")]
    places, entropy = np.array([[0, 3], [0, len(ids[0]) - 1], [1, 1]]), np.array([0.5, 1.5, 2.5], np.float32)
    questions = QuestionSet(toy, ids, [Document("x", 70), Document("y", 71)], places, entropy)
    for question, (document, position), entropy in zip(questions, questions.places.tolist(), (0.5, 1.5, 2.5)):
        run = ids[document]
        assert question == Question(
            tuple(run[:position]), tuple(toy.token_bytes(id) for id in run[position: position + 32]),
            70 + document, position, entropy)
    assert len(questions) == 3 and len(questions[0].truth) == 32
    assert questions[1].truth == (toy.token_bytes(ids[0][-1]),)


# Prompts


def test_template_v0_is_the_papers():
    assert TEMPLATES["v0"] == (
        "Complete the given text under ‘### Context’ by predicting the next token, and wrap it in ‘\\boxed{}’. Please "
        "reason step by step to find the most probable next token as the final answer, and enclose it in \\boxed{} "
        "(note: the token may begin with a space, e.g., \\boxed{ para} or \\boxed{ =}; do not use \\text{}).\n\n"
        "### Context\n{context}")


@pytest.mark.parametrize("name", ["v0", "v1", "v2", "v3", "v4", "v5", "v6"])
def test_templates_hold_one_context_and_the_note_about_the_box(name):
    template = TEMPLATES[name]
    assert template.count("{context}") == 1 and "\0" not in template and "{}}" not in template
    assert "(note: the token may begin with a space, e.g., \\boxed{ para} or \\boxed{" in template
    assert template.count("\\boxed{}") >= 1 or name == "v4"
    assert template.endswith((
        "{context}", "{context}```", "{context}```.", "{context}```, now please predict the next token."))


def test_a_context_that_is_too_long_loses_its_beginning(toy):
    rng = random.Random(0)
    for template in TEMPLATES:
        frame = len(toy.chat(TEMPLATES[template], []))
        for room in (1, 2, 7, 50):
            for size in (0, 1, 6, 7, 8, 49, 50, 51, 300):
                context = tuple(rng.randrange(len(toy)) for _ in range(size))
                question = Question(context, (b"x",), 0, size)
                prompt = prompt_ids(toy, question, template, frame + room)
                kept = context[max(0, size - room):]
                assert prompt == toy.chat(TEMPLATES[template], kept) and len(prompt) == frame + min(size, room)
        for limit in (frame, frame - 1, 1):
            refusal = f"--max-prompt {limit}: template {template} alone takes {frame} tokens"
            with pytest.raises(ValueError, match=refusal):
                prompt_ids(toy, question, template, limit)


# Draws


def test_a_draw_depends_on_seed_step_and_retry_alone_and_holds_no_question_twice():
    keys = itertools.product((0, 1, -3, 2**40, 2**63 - 1), range(9), (0, 1))  # seed, step, retry
    draws = {key: draw(50, *key, 10) for key in keys}
    assert all(draw(50, *key, 10) == numbers for key, numbers in reversed(draws.items()))
    assert len({tuple(numbers) for numbers in draws.values()}) == len(draws)
    assert all(len(set(numbers)) == 10 and set(numbers) <= set(range(50)) for numbers in draws.values())
    assert sorted(draw(10, 0, 0, 0, 10)) == list(range(10))
    assert len(draw(3, 0, 0, 0, 10)) == 10 and set(draw(3, 0, 0, 0, 10)) <= {0, 1, 2}


def test_draws_are_uniform():
    counts, first = np.zeros(20), np.zeros(20)
    for step in range(4000):
        numbers = draw(20, 7, step, step % 3, 5)
        first[numbers[0]] += 1
        for number in numbers:
            counts[number] += 1
    # Pearson's statistic, 19 degrees of freedom: above 43.8 once in a thousand.
    # Without repetition the variance is 15/19.
    assert ((first - 200) ** 2 / 200).sum() < 43.8 and ((counts - 1000) ** 2 / 1000).sum() * 19 / 15 < 43.8


# The toy world


def play(problem: str) -> list[str]:
    """An independent player: boxes whose contents are exchanged. Where the ball is at the start and after each swap."""
    start, *swaps = re.fullmatch(r"The ball is under ([A-H])\.((?: \d [A-H] [A-H]\.)+)", problem).groups()
    boxes = {cup: cup == start for cup in "ABCDEFGH"}
    track = [start]
    for number, (n, a, b) in enumerate(re.findall(r" (\d) (.) (.)\.", swaps[0]), 1):
        assert int(n) == number and a != b
        boxes[a], boxes[b] = boxes[b], boxes[a]
        track.append(next(cup for cup, ball in boxes.items() if ball))
    return track


def test_stories_obey_the_game():
    stories, touched, swaps = toy_stories(3000, seed=3), 0, Counter()
    for story in stories:
        track = play(story.problem)
        assert "".join(track) == story.ball and set(story.ball) | set("".join(story.swaps)) <= set(story.cups)
        assert story.text == f"{story.problem}\n\nThe ball is now under {track[-1]}."
        for steps in [*range(len(story.swaps) + 1), None]:
            lines = [f" {n} {pair[0]} {pair[1]} {track[n]}." for n, pair in enumerate(story.swaps, 1)]
            assert story.chain(steps) == track[0] + "".join(lines if steps is None else lines[:steps])
        swaps[len(story.swaps)] += 1
        touched += sum(a != b for a, b in zip(track, track[1:]))
    total = sum(size * count for size, count in swaps.items())
    assert set(swaps) == {1, 2, 3, 4, 5, 6} and min(swaps.values()) > 400
    assert {len(story.cups) for story in stories} == {3, 4, 5, 6, 7, 8}
    assert abs(touched / total - 0.6) < 4 * (0.24 / total) ** 0.5 + 0.01
    assert stories == toy_stories(3000, seed=3) != toy_stories(3000, seed=4)


def test_excluded_stories_are_not_told():
    excluded = frozenset(story.text for story in toy_stories(500, seed=0))
    stories = toy_stories(500, seed=0, exclude=excluded)
    assert len(stories) == 500 and not excluded & {story.text for story in stories}


def test_the_weak_reasoner_sees_the_mixture_that_is_described(toy):
    stories, kinds, efforts, guesses = toy_stories(2500, seed=2), Counter(), Counter(), Counter()
    ending = re.compile(r"(?s)(.*)</think>\n\n\\boxed\{( ?)(.)\}<\|im_end\|>")
    for story, run in zip(stories, toy_runs(toy, stories, seed=0), strict=True):
        assert run[-1:] == toy.eos_ids
        text, track = toy.bytes_of(run).decode(), play(story.problem)
        if text == story.text + "<|im_end|>":
            kinds["document"] += 1
            continue
        options = "".join(f"\n({cup}) {cup}" for cup in story.cups)
        prompts = {"asked": toy.chat(TEMPLATES["toy"], toy.encode(story.text)[:-2]),
                   "answered": toy.chat(story.problem + data.TOY_QUESTION),
                   "chosen": toy.chat(story.problem + data.TOY_QUESTION + options)}
        kind, prompt = next((kind, prompt) for kind, prompt in prompts.items() if run[: len(prompt)] == prompt)
        kinds[kind] += 1
        thought, space, answer = ending.fullmatch(toy.bytes_of(run[len(prompt):]).decode()).groups()
        if kind != "asked":
            assert (thought, space, answer) == (story.chain() + "\n", "", track[-1])
            continue
        assert space == " " and toy.bytes_of(toy.encode(story.text)[-2:]) == f" {track[-1]}.".encode()
        if not thought:
            efforts["guess"] += 1
            guesses[answer] += 1
            continue
        steps = thought.count(".")
        assert thought == story.chain(steps) + "\n" and answer == track[steps]
        efforts["right" if steps == len(story.swaps) else "early"] += 1
    assert set(guesses) == set(CUPS)

    def near(count: int, share: float, total: int) -> bool:
        return abs(count - share * total) < 4 * (share * (1 - share) * total) ** 0.5

    solved = kinds["answered"] + kinds["chosen"]
    assert near(kinds["document"], 0.35, 2500) and near(solved, 0.35, 2500) and near(kinds["asked"], 0.30, 2500)
    assert near(kinds["chosen"], 0.30, solved)
    assert near(efforts["guess"], 0.90, kinds["asked"]) and near(efforts["early"], 0.07, kinds["asked"])
    assert near(efforts["right"], 0.03, kinds["asked"])


def test_the_toy_tokenizer_has_all_that_a_real_one_has(toy):
    assert [toy.token_bytes(toy.special[token]) for token in data.SYSTEM_TOKENS] == [
        t.encode() for t in data.SYSTEM_TOKENS]
    assert toy.eos_ids == [toy.special["<|im_end|>"]] and toy.special["<think>"] in toy.chat("x")
    assert toy.encode(" ball") and len(toy.encode(" ball")) == 1 and len(toy.encode(" under A. 1")) < len(" under A. 1")
    for text in TEXTS:
        assert toy.bytes_of(toy.encode(text)) == nfc(text)
    assert toy_tokenizer().files == toy.files
    for story in toy_stories(200, seed=9):  # the answer is a token of its own, where its document is cut
        ids = toy.encode(story.text)
        assert toy.token_bytes(ids[-2]) == f" {story.ball[-1]}".encode()


def test_the_toy_world_on_disk_is_the_stories(tmp_path):
    write_toy(tmp_path, seed=4, count=50)
    corpus, answers = (read_corpus(tmp_path / f"{name}.jsonl") for name in ("corpus", "answers"))
    assert len(corpus) == len(answers) == 50
    for document, pair in zip(corpus, answers):
        assert document.text == f"{document.problem}\n\nThe ball is now under {play(document.problem)[-1]}."
        assert pair.problem == document.problem + "\nWhere is the ball?" and pair.answer == play(document.problem)[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "corpus.jsonl"]


# Real tokenizers and texts


@needs_assets
def test_the_published_ids_of_the_qwen_family(deepseek):
    vectors = json.loads((ASSETS / "vectors/qwen_tokenizer_vectors.json").read_text())
    for text, ids in zip(vectors["sequences"], vectors["input_ids"], strict=True):
        assert deepseek.encode(text) == ids and deepseek.bytes_of(ids) == nfc(text)
    split, _ = json.loads(deepseek.files["tokenizer.json"])["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"]["Regex"] == data.QWEN_SPLIT  # the toy splits text as they do


@needs_assets
def test_the_chat_format_of_the_real_deepseek_tokenizer(deepseek):
    assert deepseek.bos == [151646] and deepseek.eos_ids == [151643] and deepseek.encode("\n") == [198]
    for prompt in ["hi", *PROMPTS, *TEMPLATES.values()]:
        assert deepseek.chat(prompt) == [151646, 151644, *deepseek.encode(prompt), 151645, 151648, 198]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(ASSETS / "tokenizers/deepseek_r1_distill_qwen")
    for prompt in [*PROMPTS, *TEMPLATES.values()]:
        text = theirs.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        assert deepseek.chat(prompt) == theirs(text + "<think>\n", add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def omni(deepseek) -> tuple[list[Document], list[list[int]]]:
    documents = read_corpus(ASSETS / "data/omni_math_rule.jsonl")
    return documents, deepseek.encode_batch([document.text for document in documents])


@needs_assets
def test_every_text_of_omnimath_survives_its_tokens(deepseek, omni):
    rows = [json.loads(line) for line in (ASSETS / "data/omni_math_rule.jsonl").read_text().splitlines()]
    documents, ids = omni
    assert len(rows) == len(documents) == 2821
    for row, document, run in zip(rows, documents, ids):
        joined = f"{row['problem']}\n\n{row['solution']}"
        assert deepseek.bytes_of(run) == document.text.encode() == nfc(joined)
        assert document.problem.encode() == nfc(row["problem"]) and document.answer.encode() == nfc(row["answer"])
    for field in ("problem", "solution"):
        texts = [row[field] for row in rows]
        for text, run in zip(texts, deepseek.encode_batch(texts)):
            assert deepseek.bytes_of(run) == nfc(text)


def match_by_sets(prediction: bytes, truth: list[bytes]) -> float:
    """The paper's sentence: the bytes agree, and the length is one of the boundaries."""
    boundaries = {sum(map(len, truth[:n])) for n in range(1, len(truth) + 1)}
    return float(len(prediction) in boundaries - {0} and b"".join(truth).startswith(prediction))


@needs_assets
def test_the_true_continuations_of_omnimath_earn_the_reward_and_damaged_ones_do_not(deepseek, omni):
    documents, ids = omni
    rng, otherwise, held = random.Random(0), 0, 0
    sizes = np.array([len(run) - 1 for run in ids])
    chosen = np.random.default_rng(0).choice(len(ids), 10_000, p=sizes / sizes.sum())
    places = np.array([(d, rng.randrange(1, len(ids[d]))) for d in chosen])
    questions = QuestionSet(deepseek, ids, documents, places, np.zeros(len(places), np.float32))
    for question in questions:
        truth = list(question.truth)
        assert nfc(documents[question.document].text).startswith(deepseek.bytes_of(question.context) + b"".join(truth))
        for size in {1, 2, 5} & set(range(len(truth) + 1)):
            right = b"".join(truth[:size])
            assert prefix_match(right, truth) == 1.0
            at, cut = rng.randrange(len(right)), rng.randint(1, len(truth[size - 1]))
            wrong = [right[:at] + bytes([right[at] ^ rng.randint(1, 255)]) + right[at + 1:], right + b" ", right[:-cut]]
            for prediction in wrong:
                expected = match_by_sets(prediction, truth)
                assert prefix_match(prediction, truth) == expected, (prediction, truth)
                otherwise += expected
        boxed = [prefix_match(extract_prediction(b"so</think>\n\n\\boxed{" + b"".join(truth[:n]) + b"}"), truth)
                 for n in range(1, len(truth) + 1)]
        assert any(boxed) == reachable(truth)
        held += any(boxed)
        if not any(mark in truth[0] for mark in (b"{", b"}", b"\\boxed")):
            assert boxed[0] == 1.0
    assert 9_000 < held < 10_000 and otherwise > 100


@needs_assets
def test_the_tokenizer_of_stories260k_gives_its_text_back():
    tokenizer = Tokenizer.from_dir(ASSETS / "models/stories260K")
    text = json.loads((ASSETS / "vectors/stories260K_greedy_200.json").read_text())["text"]
    for text in (text, *(t for t in TEXTS)):
        assert tokenizer.bytes_of(tokenizer.encode(text)) == text.encode()
    assert tokenizer.bos == [1] and tokenizer.eos_ids == [2]


def test_an_answer_set_asks_the_problem_and_keeps_the_answer(toy, tmp_path):
    write_toy(tmp_path, seed=1, count=60)
    documents = read_corpus(tmp_path / "answers.jsonl")
    train, held, _ = data.answer_sets(toy, documents, 10, 0)
    parts = split_holdout(documents, 10, 0)[:2]
    for questions, part in zip((train, held), parts):
        asked = [(toy.bytes_of(q.context).decode(), q.answer, q.document) for q in questions]
        assert asked == [(d.problem, d.answer, d.id) for d in part]
    with pytest.raises(ValueError, match="document 3 of the corpus has no `answer`"):
        data.answer_sets(toy, [*documents[:2], replace(documents[2], answer=None)], 1, 0)
