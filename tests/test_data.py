"""Laws of the tokenizer and of the chat format: bytes, ids, and what a template renders.

Oracles: the text's own UTF-8; the `tokenizers` library on the unchanged tokenizer.json; the
published chat formats as literal text; transformers, where it is installed.
"""

import copy
import functools
import itertools
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from data import TEMPLATES, Question, Tokenizer, prompt_ids

ASSETS = Path(os.environ.get("RPT_TEST_ASSETS", "/nonexistent"))
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="RPT_TEST_ASSETS is not set")
TEXTS = [
    "The quick brown fox jumps over the lazy dog, twice.\n\n\tAnd 12345 times more!  ",
    r"Let $n \ge 2$, and \frac{a_1}{b} + \sqrt{x^{2}} = \boxed{ 4}. Then \left(1 - n\right) \to 0.",
    "👩‍🚀 flies 🚀🚀, 🤗 says 中国語 and 中文字符; naïve café, Ångström, ﬁne, ½ ∑∫ Ω",
    "combining: e\u0301 a\u030a n\u0303 \u1100\u1161\u11a8 q\u0323\u0307, leftwards: שלום مرحبا",
    "\r\n\r\n  if x:\r\n\treturn {'a': [1, 2]}\n\x00\x7f\u200b\ufeff end",
]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # Qwen's
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIAL = ("</s> <s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> "
           "<|start_header_id|>assistant <｜User｜> <｜Assistant｜> <think> </think> 日本").split()


@functools.cache
def byte_level(seed: int = 0, split: str = SPLIT) -> tokenizers.Tokenizer:
    """Qwen style, NFC; tokens of several bytes, some of which cut a character."""
    rng, bpe = random.Random(seed), tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    texts = [text[rng.randrange(9):] for text in rng.choices(TEXTS, k=4)]
    bpe.train_from_iterator(texts + ["日本 語文 字🚀🤗é", "\n\n1", "\n\n"] * 3, trainers.BpeTrainer(
        vocab_size=rng.randint(300, 420), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in SPECIAL])
    return bpe


def read(folder: Path, template: str = "", bpe: tokenizers.Tokenizer | None = None,
         today: str = "", **files: dict) -> Tokenizer:
    """Write a tokenizer, its template and the JSON files beside it; return data.Tokenizer of it."""
    settings = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": template or None}
    for name, content in ({"tokenizer_config": settings} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (bpe or byte_level()).save(str(folder / "tokenizer.json"))
    return Tokenizer(folder, today)


def save(tokenizer: Tokenizer) -> Path:
    folder = tokenizer.directory / "saved"
    folder.mkdir()
    tokenizer.save(folder)
    return folder


# ---- bytes and ids


def test_ids_are_the_librarys_and_their_bytes_those_of_the_text(tmp_path):
    rng, cut = random.Random(0), 0
    for seed in range(4):
        raw = byte_level(seed)
        tokenizer = read(tmp_path, bpe=raw)
        for _ in range(40):
            a, b = rng.choices(TEXTS, k=2)
            text = a[rng.randrange(len(a)):] + rng.choice(SPECIAL) + b[: rng.randrange(len(b))]
            exact, ids = unicodedata.normalize("NFC", text).encode(), tokenizer.encode(text)
            assert tokenizer.bytes_of(ids) == exact and not {*ids} & {*tokenizer.special.values()}
            pieces = tokenizer.tokens(exact)
            assert pieces == list(map(tokenizer.token_bytes, ids))
            cut += sum("\ufffd" in piece.decode(errors="replace") for piece in pieces)
            assert tokenizer.encode_chat(text) == raw.encode(text).ids  # special ones are meant
            assert tokenizer.encode(a) == raw.encode(a).ids
    assert cut > 100
    contents = list(map(tokenizer.token_bytes, range(len(tokenizer))))
    for content in {*contents, b"no such token"}:
        assert sorted(tokenizer.ids_of[content]) == [
            id for id, other in enumerate(contents) if other == content]
    assert len(tokenizer.ids_of["日本".encode()]) == 2
    assert tokenizer.bytes_of([len(tokenizer), *tokenizer.encode("ab")]) == b"ab"
    assert tokenizer.tokens(b"a\xe6\x97") == []  # not UTF-8


def test_what_is_no_byte_level_bpe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer.json of a byte-level BPE"):
        read(tmp_path, bpe=tokenizers.Tokenizer(models.BPE()))


def test_a_text_begins_as_the_post_processor_says(tmp_path):
    bpe = copy.deepcopy(byte_level())
    token = "<s>", bpe.token_to_id("<s>")
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[token])
    assert read(tmp_path, bpe=bpe).bos == bpe.encode("").ids
    assert read(tmp_path).bos == []


@pytest.mark.parametrize("generation, config, settings, wanted", [
    ({"eos_token_id": [9, 7]}, {"eos_token_id": 8}, {}, [9, 7, 8]),
    ({"eos_token_id": 0}, {"eos_token_id": [8, 0]}, {"eos_token": "<s>"}, [0, 8, "<s>"]),
    ({"eos_token_id": None}, {}, {"eos_token": {"content": "</s>", "lstrip": False}}, ["</s>"]),
])
def test_end_tokens_are_all_that_the_files_name(generation, config, settings, wanted, tmp_path):
    tokenizer = read(tmp_path, generation_config=generation, config=config,
                     tokenizer_config=settings)
    assert tokenizer.eos_ids == [tokenizer.special.get(token, token) for token in wanted]
    # It is saved without config.json, which is the model's.
    assert Tokenizer(save(tokenizer)).eos_ids == tokenizer.eos_ids


# ---- the chat format: the published templates (of Qwen, the branches that a lone user takes)

CHATML = ("{%- if messages[0]['role'] == 'system' %}"
          "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
          "@{%- endif %}{%- for message in messages %}"
          "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
          "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}&"
          "{%- endif %}\n")
QWEN25 = CHATML.replace("&", "").replace("@", (
    "{%- else %}{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a "
    "helpful assistant.<|im_end|>\\n' }}"))
QWEN3 = CHATML.replace("@", "").replace("&", (
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"))
SMOLLM2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
           "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
           "Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
           "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
           "{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = ("{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
          "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | "
          "trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
          "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
R1 = ("{{bos_token}}{%- for message in messages %}{%- if message['role'] == 'user' %}"
      "{{'<｜User｜>' + message['content']}}{%- else %}{{'<｜Assistant｜>' + message['content'] + "
      "eos_token}}{%- endif %}{%- endfor -%}{% if add_generation_prompt %}"
      "{{'<｜Assistant｜><think>\\n'}}{% endif %}")
DATED = ("{{ 'Today: ' + strftime_now('%d %b %Y') }}{%- set year = strftime_now(\"%Y\") -%}"
         "{{ ', ' + year + '\n' }}" + SMOLLM2)
MARKED = ("{% for m in messages %}\n{{ '<|im_start|>' + m.role + '\\n' }}\n{%- if m.role == "
          "'assistant' %}\n  {%- generation -%}\n  {{ m.content }}\n  {%- if true %}\n"
          "<|im_end|>\n  {% endif %}\n{%- endgeneration %}\n{%- else %}\n{{ m.content }}"
          "<|im_end|>\n  {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}\n"
          "<|im_start|>assistant\n{% generation %}<think>\n{% endgeneration %}{% endif %}")
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOL = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
USER, TURN = "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
FAMILIES = {  # template, the text around the prompt, what ends a message
    "R1": (R1, "<s><｜User｜>", "<｜Assistant｜><think>\n", "</s>"),
    "Qwen2.5": (QWEN25, QWEN + USER, TURN + "<think>\n", "<|im_end|>"),
    "Qwen3": (QWEN3, "<|im_start|>user\n", TURN, "<|im_end|>"),
    "SmolLM2": (SMOLLM2, SMOL + USER, TURN + "<think>\n", "<|im_end|>"),
    "Llama 3": (LLAMA3, "<s><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n", "<|eot_id|>"),
    "dated": (DATED, f"Today: 31 Dec 2025, 2025\n{SMOL}{USER}", TURN + "<think>\n", "<|im_end|>"),
    "marked": (MARKED, "<|im_start|>user\n", TURN + "<think>\n", "<|im_end|>"),
    "none": ("", "", "\n<think>\n", "</s>"),
}
PROMPTS = ["What is 1 + 1?", "中国語 🚀\nx", "a {context} and \\boxed{ =}", "{context}\n\nlines"]
each = pytest.mark.parametrize("name", FAMILIES)


def family(name: str, folder: Path, beside: bool = False) -> Tokenizer:
    """beside: with the template in a file of its own, as transformers writes it today."""
    template, ends = FAMILIES[name][0], ["</s>", "<|im_end|>", "<|eot_id|>"]
    if beside and template:
        (folder / "chat_template.jinja").write_text(template)
    return read(folder, "not this one" if beside and template else template, today="2025-12-31",
                generation_config={"eos_token_id": list(map(byte_level().token_to_id, ends))})


@each
@pytest.mark.parametrize("beside", [False, True])
def test_the_chat_format_is_the_published_one(name, beside, tmp_path):
    tokenizer, (_, before, after, end) = family(name, tmp_path, beside), FAMILIES[name]
    for tokenizer in (tokenizer, Tokenizer(save(tokenizer))):
        for prompt in PROMPTS:
            assert tokenizer.chat(prompt) == byte_level().encode(before + prompt + after).ids
        assert tokenizer.token_bytes(tokenizer.end) == end.encode()


def test_of_a_list_of_templates_the_default_is_used(tmp_path):
    listed = [{"name": "tools", "template": R1}, {"name": "default", "template": QWEN3}]
    tokenizer = read(tmp_path, listed)
    for one in (tokenizer, Tokenizer(save(tokenizer))):
        assert one.chat("x") == byte_level().encode(f"<|im_start|>user\nx{TURN}").ids


@pytest.mark.parametrize("template", ["{% if %}", "no prompt", "{{ messages[0].content + 1 }}"])
def test_a_template_that_cannot_be_rendered_is_one_sentence_with_its_file(template, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: .* in chat_template.jinja or .* be used"):
        read(tmp_path, template)


@each
def test_an_export_prompts_in_transformers_as_it_was_trained(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer, (_, before, after, end) = family(name, tmp_path), FAMILIES[name]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(save(tokenizer))
    for prompt in [*PROMPTS, *(text.replace("{context}", "x") for text in TEMPLATES.values())]:
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "so"}]
        asked = theirs.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
        assert asked == before + prompt + after
        said = theirs.apply_chat_template(chat, tokenize=False)
        assert said.rpartition("so")[2].startswith(end) or name == "none"


@each
def test_a_context_is_inserted_as_its_own_ids(name, tmp_path):
    tokenizer, rng = family(name, tmp_path), random.Random(name)
    template = "Text:\n{context} and then"
    cut = tokenizer.chat(template, [10**6]).index(10**6)
    before, after = (tokenizer.chat(template, [])[part] for part in (slice(cut), slice(cut, None)))
    assert tokenizer.bytes_of(before).endswith(b"Text:\n")
    assert tokenizer.bytes_of(after).startswith(b" and then")
    for size in range(20):  # of any tokens, special ones too, and some that cut a character
        context = rng.choices(range(len(tokenizer)), k=size)
        assert tokenizer.chat(template, context) == before + context + after


# ---- prompts


def test_template_v0_is_the_papers():
    assert TEMPLATES["v0"] == (
        "Complete the given text under ‘### Context’ by predicting the next token, and wrap it in "
        "‘\\boxed{}’. Please reason step by step to find the most probable next token as the final "
        "answer, and enclose it in \\boxed{} (note: the token may begin with a space, e.g., "
        "\\boxed{ para} or \\boxed{ =}; do not use \\text{}).\n\n### Context\n{context}")
    for name in ("v1", "v2", "v3", "v4", "v5", "v6"):
        assert TEMPLATES[name].count("```{context}```") == 1 and "{}}" not in TEMPLATES[name]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_context_that_is_too_long_loses_its_beginning(template, tmp_path):
    tokenizer = family("R1", tmp_path)
    frame = len(tokenizer.chat(TEMPLATES[template], []))
    for room, size in itertools.product((1, 7, 50), (0, 1, 6, 7, 8, 300)):
        context = tuple(range(size))
        prompt = prompt_ids(tokenizer, Question(context, (), 0, size), template, frame + room)
        assert prompt == tokenizer.chat(TEMPLATES[template], context[max(0, size - room):])
        assert len(prompt) == frame + min(size, room)
    with pytest.raises(ValueError, match=f"--max-prompt {frame} leaves no room .* {template}"):
        prompt_ids(tokenizer, Question((1,), (), 0, 1), template, frame)


@each
def test_a_problem_is_asked_as_its_users_will_ask_it(name, tmp_path):
    tokenizer = family(name, tmp_path)
    for text in PROMPTS:
        question = Question(tuple(tokenizer.encode(text)), (), 0, 0, answer="2")
        assert prompt_ids(tokenizer, question, "plain", 10**6) == tokenizer.chat(text)


# ---- a real tokenizer


@needs_assets
def test_the_published_ids_and_prompts_of_the_qwen_family(tmp_path):
    tokenizer = Tokenizer(ASSETS / "tokenizers/deepseek_r1_distill_qwen")
    vectors = json.loads((ASSETS / "vectors/qwen_tokenizer_vectors.json").read_text())
    for text, ids in zip(vectors["sequences"], vectors["input_ids"]):
        exact = unicodedata.normalize("NFC", text).encode()
        assert tokenizer.encode(text) == ids and tokenizer.bytes_of(ids) == exact
    assert tokenizer.bos == [151646] and tokenizer.eos_ids == [151643] == [tokenizer.end]
    for prompt in [*PROMPTS, *TEMPLATES["v0"].split("{context}")]:
        wanted = [151646, 151644, *tokenizer.encode(prompt), 151645, 151648, 198]
        assert tokenizer.chat(prompt) == wanted
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    rows = (ASSETS / "data/gsm8k_train_2k.jsonl").read_text().splitlines()[:200]
    for text in [*(json.loads(row)["question"] for row in rows), *TEXTS, *PROMPTS]:
        assert theirs(text)["input_ids"] == tokenizer.bos + tokenizer.encode(text)
        assert tokenizer.chat(text) == theirs.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
