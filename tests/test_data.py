"""Laws of the tokenizer and of the chat format: bytes, ids, and what a template renders.

Oracles: the text's own UTF-8; the `tokenizers` library on the unchanged tokenizer.json; the
published chat formats as literal text; transformers, where it is installed.
"""

import itertools
import json
import os
import random
import re
import tempfile
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from data import TEMPLATES, Question, Tokenizer, check_same_tokens, check_vocabulary, prompt_ids

ASSETS = Path(os.environ.get("RPT_TEST_ASSETS", "/nonexistent"))
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="RPT_TEST_ASSETS is not set")
TEXTS = [
    "The quick brown fox jumps over the lazy dog, twice.\n\n\tAnd 12345 times more!  ",
    r"Let $n \ge 2$, and \frac{a_1}{b} + \sqrt{x^{2}} = \boxed{ 4}. Then \left(1 - n\right) \to 0.",
    "👩‍🚀 flies 🚀🚀, 🤗 says 日本語 and 中文字符; naïve café, Ångström, ﬁne, ½ ∑∫ Ω",
    "combining: e\u0301 a\u030a n\u0303 \u1100\u1161\u11a8 q\u0323\u0307, leftwards: שלום مرحبا",
    "\r\n\r\n  if x:\r\n\treturn {'a': [1, 2]}\n\x00\x7f\u200b\ufeff end",
]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # Qwen's


def byte_level(special: tuple[str, ...] = ("</s>",), seed: object = 0) -> tokenizers.Tokenizer:
    """Qwen style, NFC; tokens of several bytes, some of which cut a character."""
    rng, bpe = random.Random(seed), tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    texts = [text[rng.randrange(9):] for text in rng.choices(TEXTS, k=4)]
    bpe.train_from_iterator(texts + ["日本 語文 字🚀🤗é"] * 3, trainers.BpeTrainer(
        vocab_size=rng.randint(300, 420), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
    return bpe


def sentencepiece(scheme: str, special: tuple[str, ...] = ("<s>", "</s>"),
                  seed: object = 0) -> tokenizers.Tokenizer:
    """Llama 2 style: ▁ for the space, one before a text by `scheme`, bytes for what is unknown."""
    rng = random.Random(seed)
    bpe = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    bpe.normalizer = space
    bpe.train_from_iterator(rng.choices(TEXTS, k=6) + ["▁▁", "x▁y"] * 9, trainers.BpeTrainer(
        vocab_size=rng.randint(330, 420), limit_alphabet=25, show_progress=False,
        special_tokens=["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]))
    spec = json.loads(bpe.to_str())
    spec["added_tokens"] = spec["added_tokens"][: 1 + len(special)]
    bpe = tokenizers.Tokenizer.from_str(json.dumps(spec))
    if scheme == "prepend":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
    else:
        bpe.normalizer = None
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))])
    return bpe


def read(bpe: tokenizers.Tokenizer, thinking: bool = True, jinja: str = "",
         **files: object) -> Tokenizer:
    """data.Tokenizer of a tokenizer, a template and the JSON objects beside it."""
    files = {"tokenizer_config": {"eos_token": "</s>", "bos_token": "<s>"}} | files
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, f"{name}.json").write_text(json.dumps(content))
        if jinja:
            Path(folder, "chat_template.jinja").write_text(jinja)
        bpe.save(f"{folder}/tokenizer.json")
        return Tokenizer.from_dir(folder, thinking)


MAKERS = {
    "byte level": lambda seed=0: byte_level(seed=seed),
    "prepend": lambda seed=0: sentencepiece("prepend", seed=seed),
    "metaspace first": lambda seed=0: sentencepiece("first", seed=seed),
    "metaspace always": lambda seed=0: sentencepiece("always", seed=seed),
}


# Bytes and ids


@pytest.mark.parametrize("kind", MAKERS)
def test_ids_are_the_librarys_and_their_bytes_those_of_the_text(kind):
    rng, cut = random.Random(kind), 0
    for seed in range(4):
        raw = MAKERS[kind](seed)
        tokenizer, texts = read(raw), [*TEXTS, " x", "  x", "\nx", " ", "", "x"]
        for _ in range(40):
            a, b = rng.choices(TEXTS, k=2)
            texts.append(a[rng.randrange(len(a)):] + b[: rng.randrange(len(b))])
        runs = [raw.encode(text, add_special_tokens=False).ids for text in texts]
        assert [tokenizer.encode(text) for text in texts] == runs == tokenizer.encode_batch(texts)
        for text, ids in zip(texts, runs):
            exact = unicodedata.normalize("NFC", text) if kind == "byte level" else text
            spelled, inside = tokenizer.bytes_of(ids), tokenizer.encode_inside(text)
            assert spelled in (exact.encode(), b" " * tokenizer.adds_space + exact.encode())
            assert tokenizer.bytes_of(inside) == exact.encode()
            pieces = [tokenizer.token_bytes(id) for id in inside]
            assert tokenizer.tokens(exact.encode()) == pieces
            cut += sum("\ufffd" in piece.decode(errors="replace") for piece in pieces)
    assert tokenizer.adds_space == (kind != "byte level") and cut > 100


@pytest.mark.parametrize("kind", ["byte level", "prepend"])
def test_a_token_is_found_by_its_bytes_and_ids_beyond_the_vocabulary_have_none(kind):
    tokenizer = read(MAKERS[kind]())
    size = len(tokenizer)
    contents = list(map(tokenizer.token_bytes, range(size)))
    for content in {*contents, b"no such token"}:
        found = [id for id, other in enumerate(contents) if other == content]
        assert tokenizer.ids_of_token(content) == found
    assert tokenizer.bytes_of([size, *tokenizer.encode_inside("ab"), 10**6]) == b"ab"
    assert tokenizer.tokens(b"a\xe6\x97") == []  # not UTF-8


def lossy(kind: str) -> tokenizers.Tokenizer:
    """Loses something of a text."""
    if kind == "no bytes":
        spec = json.loads(sentencepiece("prepend").to_str())
        spec["model"]["byte_fallback"] = False
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    bpe = byte_level()
    if kind == "spaces":
        bpe.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        bpe.normalizer = getattr(normalizers, kind)()
    return bpe


@pytest.mark.parametrize("kind", ["Lowercase", "NFKC", "spaces", "no bytes"])
def test_a_tokenizer_that_cannot_spell_a_text_is_refused(kind):
    with pytest.raises(ValueError, match="the tokenizer .* cannot be used .*its tokens spell "
                                         "'Spelled  as It is.*use one that keeps every byte"):
        read(lossy(kind))


@pytest.mark.parametrize("special", [
    ("</s>",), ("</s>", "</think>"), ("</s>", "<think>", "</think>")])
def test_a_response_has_the_models_own_marks_of_thinking(special):
    text = "So </s> 日\n</think>\n\n\\boxed{ 4}</think> <think>x"
    for tokenizer in (read(byte_level(special)), read(sentencepiece("prepend", ("<s>", *special)))):
        ids = tokenizer.response_ids(text)
        assert tokenizer.bytes_of(ids) == text.encode()
        found = [tokenizer.token_bytes(id).decode() for id in ids
                 if id in tokenizer.special.values()]
        assert found == [mark for mark in ("</think>", "</think>", "<think>") if mark in special]


@pytest.mark.parametrize("generation, config, settings, wanted", [
    ({"eos_token_id": [9, 7]}, {"eos_token_id": 8}, {}, [9, 7]),
    ({"eos_token_id": 0}, {"eos_token_id": 8}, {}, [0]),
    ({"eos_token_id": None}, {"eos_token_id": [8, 3]}, {}, [8, 3]),
    ({}, {"eos_token_id": 8}, {"eos_token": "</s>"}, [8]),
    ({}, {"eos_token_id": None}, {"eos_token": "</s>"}, ["</s>"]),
    ({}, {}, {"eos_token": {"content": "</s>", "lstrip": False}}, ["</s>"]),
    ({}, {}, {"eos_token": "</t>"}, None),
])
def test_end_tokens_come_from_the_generation_config_else_the_config_else_the_tokenizer(
        generation, config, settings, wanted, tmp_path):
    files = {"generation_config": generation, "config": config, "tokenizer_config": settings}
    if wanted is None:
        with pytest.raises(ValueError, match="no end token in"):
            read(byte_level(), **files)
        return
    tokenizer = read(byte_level(), **files)
    assert tokenizer.eos_ids == [tokenizer.special.get(token, token) for token in wanted]
    tokenizer.save(tmp_path)  # without config.json, which is the model's
    assert Tokenizer.from_dir(tmp_path).eos_ids == tokenizer.eos_ids


@pytest.mark.parametrize("name, content", [
    ("tokenizer.json", "{"), ("tokenizer.json", "[]"), ("tokenizer.json", None),
    ("tokenizer_config.json", "{"), ("generation_config.json", "[1]"), ("config.json", "\udcff"),
])
def test_a_damaged_or_missing_file_is_one_sentence_that_names_it(name, content, tmp_path):
    read(byte_level()).save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))) as caught:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize("spec", [
    {}, {"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": "b"}}},
    {"added_tokens": [], "model": {"type": "Unigram", "vocab": [["a", 0.0]]}}])
def test_what_is_no_usable_tokenizer_is_one_sentence_that_names_its_folder(spec, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer .* cannot be used") as caught:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(caught.value).strip()


def test_a_proxy_whose_ids_mean_something_else_is_refused():
    ours, spec = read(byte_level()), json.loads(byte_level().to_str())
    vocabulary = spec["model"]["vocab"]
    a, b = sorted(vocabulary)[5:7]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    theirs = read(tokenizers.Tokenizer.from_str(json.dumps(spec)))
    with pytest.raises(ValueError, match="proxy: token .* there and .* in the policy's tokenizer"):
        check_same_tokens(ours, theirs, "proxy")
    more = read(byte_level(("</s>", "<extra>")))
    check_same_tokens(ours, more, "proxy")
    with pytest.raises(ValueError, match=f"token {len(ours)} is b'' there and b'<extra>'"):
        check_same_tokens(more, ours, "proxy")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    tokenizer, far = read(byte_level()), read(byte_level(), config={"eos_token_id": 900})
    check_vocabulary(tokenizer, len(tokenizer), "model")
    for one, size in ((tokenizer, len(tokenizer) - 1), (far, 900)):
        with pytest.raises(ValueError, match=f"model: the tokenizer has .* only {size}"):
            check_vocabulary(one, size, "model")


# The chat format: the published templates (of Qwen, the branches that a lone user message takes)

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
TODAY = "31 Dec 2025"
DATED = "{%- set day = strftime_now('%d %b %Y') %}{{ 'Today: ' + day + '\n' }}" + SMOLLM2
R1 = ("{{bos_token}}{%- for message in messages %}{%- if message['role'] == 'user' %}"
      "{{'<｜User｜>' + message['content']}}{%- endif %}{%- endfor -%}{% if add_generation_prompt %}"
      "{{'<｜Assistant｜>@'}}{% endif %}")
LLAMA2 = ("{{ bos_token }}{% for message in messages %}{{ '[INST] ' + message['content'].strip() + "
          "' [/INST]' }}{% endfor %}")
OF_QWEN = ("</s>", "<|im_start|>", "<|im_end|>")
OF_LLAMA3 = ("</s>", "<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
             "<|start_header_id|>assistant")  # one begins with another
OF_R1 = ("</s>", "<｜User｜>", "<｜Assistant｜>", "<s>", "<think>", "</think>")
SMOL = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\n")
TURN, THINK = "<|im_end|>\n<|im_start|>assistant\n", "<think>\n"
FAMILIES = {  # template, tokenizer, the text around the prompt: before, behind, thinking on and off
    "R1": (R1.replace("@", ""), byte_level(OF_R1), "<s><｜User｜>", "<｜Assistant｜>", THINK, ""),
    "R1, new": (R1.replace("@", "<think>\\n"), byte_level(OF_R1), "<s><｜User｜>", "<｜Assistant｜>",
                THINK, None),
    "Qwen2.5": (QWEN25, byte_level(OF_QWEN), "<|im_start|>system\nYou are Qwen, created by Alibaba "
                "Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\n", TURN, THINK,
                ""),
    "Qwen3": (QWEN3, byte_level((*OF_QWEN, "<think>", "</think>")), "<|im_start|>user\n", TURN, "",
              "<think>\n\n</think>\n\n"),
    "SmolLM2": (SMOLLM2, byte_level(OF_QWEN), SMOL, TURN, THINK, ""),
    "Llama 3": (LLAMA3, byte_level(OF_LLAMA3), "<s><|start_header_id|>user<|end_header_id|>\n\n",
                "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", THINK, ""),
    "dated": (DATED, byte_level(OF_QWEN), f"Today: {TODAY}\n" + SMOL, TURN, THINK, ""),
    "Llama 2": (LLAMA2, sentencepiece("prepend"), "<s>[INST] ", " [/INST]", THINK, ""),
    "Mistral": (LLAMA2, sentencepiece("first"), "<s>[INST] ", " [/INST]", THINK, ""),
    "no bos": ("{{ '[INST] ' + messages[0]['content'] }}{{ '!' }}\n", sentencepiece("first"),
               "[INST] ", "!", THINK, ""),
    "none": (None, byte_level(), "", "\n", THINK, ""),
    "none, SentencePiece": (None, sentencepiece("always"), "<s>", "\n", THINK, ""),
}
PROMPTS = ["What is 1 + 1?", "日本語 🚀\n", " x", "a {braces} and \\boxed{ =}", "two\n\nlines\n\n",
           "\0 {context}"]


def family(name: str, thinking: bool = True, beside: bool = False) -> Tokenizer:
    """beside: with the template in a file of its own, as transformers writes it today."""
    template, bpe = FAMILIES[name][:2]
    settings = {"eos_token": "</s>", "bos_token": "<s>" if bpe.token_to_id("<s>") else None}
    if template:
        settings["chat_template"] = "not this one" if beside else template
    jinja = template if beside and template else ""
    return read(bpe, thinking, jinja, tokenizer_config=settings)


def rendered(name: str, prompt: str, thinking: bool) -> str:
    _, _, before, behind, on, off = FAMILIES[name]
    return before + (prompt.strip() if "Llama" in name or name == "Mistral" else prompt) + behind \
        + (on if thinking else off)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_chat_format_is_the_published_one(name, thinking, beside, tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: TODAY if form == "%d %b %Y" else form)
    if FAMILIES[name][5] is None and not thinking:
        with pytest.raises(ValueError, match="opens <think> whatever"):
            family(name, thinking, beside)
        return
    tokenizer, raw = family(name, thinking, beside), FAMILIES[name][1]
    for prompt in PROMPTS:
        wanted = raw.encode(rendered(name, prompt, thinking), add_special_tokens=False).ids
        assert tokenizer.chat(prompt) == wanted
    tokenizer.save(tmp_path)
    if FAMILIES[name][5] is not None:  # what is exported can still do both
        again, other = Tokenizer.from_dir(tmp_path, not thinking), family(name, not thinking)
        assert [again.chat(prompt) for prompt in PROMPTS] == list(map(other.chat, PROMPTS))
    again = Tokenizer.from_dir(tmp_path, thinking)
    assert again.files == tokenizer.files and again.bos == tokenizer.bos


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_prompts_in_transformers_as_it_was_trained(name, thinking, tmp_path):
    transformers = pytest.importorskip("transformers")
    if FAMILIES[name][5] is None and not thinking:
        return
    tokenizer = family(name, thinking)
    tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for prompt in [*PROMPTS, *TEMPLATES.values()]:
        messages = [{"role": "user", "content": prompt}]
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == rendered(name, prompt, thinking)
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.chat(prompt)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_special_token_spelled_in_text_stays_text(name):
    tokenizer, spelled = family(name), "x" + "".join(family(name).special) + "y"
    special = set(tokenizer.special.values())
    ids, plain = tokenizer.chat(spelled), tokenizer.chat("x")
    assert [id for id in ids if id in special] == [id for id in plain if id in special]
    for ids in (ids, tokenizer.encode(spelled), *tokenizer.encode_batch([spelled])):
        assert spelled.encode() in tokenizer.bytes_of(ids)
    assert not set(tokenizer.encode(spelled)) & special


@pytest.mark.parametrize("name", FAMILIES)
def test_a_context_is_inserted_as_its_own_ids(name):
    tokenizer, rng = family(name), random.Random(name)
    for _ in range(10):
        context = rng.choices(range(len(tokenizer)), k=rng.randint(0, 9))
        context += tokenizer.encode_inside("日")[:1]  # a cut character
        plain = tokenizer.chat("Text:\n{context} and then", [])
        ids = tokenizer.chat("Text:\n{context} and then", context)
        places = [n for n in range(len(plain) + 1) if plain[:n] + context + plain[n:] == ids]
        sides = [(tokenizer.bytes_of(plain[:n]), tokenizer.bytes_of(plain[n:])) for n in places]
        assert any(left.endswith(b"Text:\n") and right.startswith(b" and then")
                   for left, right in sides)


@pytest.mark.parametrize("template, message", [
    ("{% if %}", "TemplateSyntaxError"), ("{{ messages[7].content }}", "UndefinedError"),
    ("no prompt", "does not show the prompt once"),
    ("{{ messages[0].content * 2 }}", "does not show the prompt once"),
    ("{{ messages.append(1) }}", "SecurityError"), ("{{ ''.__class__.mro() }}", "SecurityError"),
])
def test_a_template_that_does_not_work_or_wants_out_of_its_sandbox_is_refused(template, message):
    with pytest.raises(ValueError, match=f"chat template cannot be used .*{message}"):
        read(byte_level(), jinja=template)


def test_of_several_templates_the_default_is_used():
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": SMOLLM2}]
    settings = {"eos_token": "</s>", "chat_template": named}
    chosen = read(byte_level(OF_QWEN), tokenizer_config=settings)
    assert chosen.bytes_of(chosen.chat("x")).decode() == SMOL + "x" + TURN + THINK


# Prompts


def test_template_v0_is_the_papers():
    assert TEMPLATES["v0"] == (
        "Complete the given text under ‘### Context’ by predicting the next token, and wrap it in "
        "‘\\boxed{}’. Please reason step by step to find the most probable next token as the final "
        "answer, and enclose it in \\boxed{} (note: the token may begin with a space, e.g., "
        "\\boxed{ para} or \\boxed{ =}; do not use \\text{}).\n\n### Context\n{context}")
    for name in ("v1", "v2", "v3", "v4", "v5", "v6"):
        template = TEMPLATES[name]
        assert template.count("{context}") == 1 and "{}}" not in template
        assert "(note: the token may begin with a space, e.g., \\boxed{ para} or" in template
        assert "\\boxed{}" in template and "```{context}```" in template


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["R1", "Llama 2"])
def test_a_context_that_is_too_long_loses_its_beginning(name, template):
    rng, tokenizer = random.Random(0), family(name)
    frame = len(tokenizer.chat(TEMPLATES[template], []))
    for room, size in itertools.product((1, 7, 50), (0, 1, 6, 7, 8, 300)):
        context = tuple(rng.choices(range(len(tokenizer)), k=size))
        question = Question(context, (b"x",), 0, size)
        kept = context[max(0, size - room):]
        prompt = prompt_ids(tokenizer, question, template, frame + room)
        assert prompt == tokenizer.chat(TEMPLATES[template], kept)
        assert len(prompt) == frame + len(kept)
    with pytest.raises(ValueError, match=f"--max-prompt {frame}: template {template} takes"):
        prompt_ids(tokenizer, question, template, frame)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_problem_is_asked_as_its_users_will_ask_it(name):
    tokenizer = family(name)
    for text in ("What is 1 + 1?", "\n日本 {context}", TEXTS[1].replace("  ", " ").strip()):
        question = Question(tuple(tokenizer.encode(text)), (), 0, 0, answer="2")
        wanted = tokenizer.chat(text)
        assert prompt_ids(tokenizer, question, "plain", len(wanted)) == wanted
        assert prompt_ids(tokenizer, question, "plain", 10**6) == wanted
        short = prompt_ids(tokenizer, question, "plain", len(wanted) - 1)
        assert len(short) < len(wanted)


# Real tokenizers


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    return Tokenizer.from_dir(ASSETS / "tokenizers/deepseek_r1_distill_qwen")


@needs_assets
def test_the_published_ids_of_the_qwen_family_and_of_a_llama(deepseek):
    vectors = json.loads((ASSETS / "vectors/qwen_tokenizer_vectors.json").read_text())
    for text, ids in zip(vectors["sequences"], vectors["input_ids"], strict=True):
        exact = unicodedata.normalize("NFC", text).encode()
        assert deepseek.encode(text) == ids and deepseek.bytes_of(ids) == exact
    assert deepseek.bos == [151646] and deepseek.eos_ids == [151643]
    for prompt in [*PROMPTS, *TEMPLATES.values()]:
        wanted = [151646, 151644, *deepseek.encode(prompt), 151645, 151648, 198]
        assert deepseek.chat(prompt) == wanted
    llama = Tokenizer.from_dir(ASSETS / "models/stories260K")
    raw = tokenizers.Tokenizer.from_file(str(ASSETS / "models/stories260K/tokenizer.json"))
    for text in TEXTS:
        assert llama.bos + llama.encode(text) == raw.encode(text).ids
        assert llama.bytes_of(llama.encode(text)) == b" " + text.encode()
    assert llama.bos == [1] and llama.eos_ids == [2]


@needs_assets
def test_real_tokenizers_read_and_ask_as_transformers_does(deepseek, tmp_path):
    transformers = pytest.importorskip("transformers")
    for tokenizer in (deepseek, Tokenizer.from_dir(ASSETS / "models/stories260K")):
        tokenizer.save(tmp_path)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        rows = (ASSETS / "data/gsm8k_train_2k.jsonl").read_text().splitlines()[:200]
        for text in [*(json.loads(row)["question"] for row in rows), *TEXTS, *PROMPTS]:
            assert theirs(text)["input_ids"] == tokenizer.bos + tokenizer.encode(text)
            assert tokenizer.chat(text) == theirs.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
