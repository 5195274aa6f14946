r"""From text to questions: tokenizer, chat format, corpora, the filter of positions, templates.

    documents --tokenize once--> flat files: tokens (uint32), starts (int64); np.memmap after that
        | a proxy model's entropy at every position, in the same order (paper, section 3.2; eval.py)
        v positions that a filter keeps, block by block, by arrays
    Question(context ids, truth: bytes of each following token) --template, chat--> prompt ids

Text is bytes from here to the reward; a tokenizer may split a character, so only bytes have exact
token boundaries. Nothing here knows a model, and nothing in memory grows with the tokens of a
corpus. Left out: tokenizers that cannot give back what they read, such as WordPiece.
"""

import fcntl
import gzip
import hashlib
import json
import re
import shutil
import tempfile
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers
from tqdm import tqdm

from reward import reachable

# --------------------------------------------------------------------------------------- tokenizer

# Byte-level BPE writes a printable byte as its own Latin-1 character, the others in order as
# characters 256, 257, ...; SentencePiece writes a space as ▁, and a byte without token as <0x0A>.
CHARS = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = sorted(range(256), key=lambda byte: chr(byte) not in CHARS)
BYTE_LEVEL = {char: bytes([byte]) for char, byte in zip(CHARS, BYTES)}
SENTENCEPIECE = {"▁": b" "} | {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
# What NFC leaves as it is and NFKC, lower-casing or a vocabulary without all bytes does not.
PROBE = "Spelled  as It is:\n\tnaïve ﬁne ½ Ω，日本語 한글 🚀 ①\r\n{x_1} "
NO_PREFIX = {"prepend": "", "prepend_scheme": "never", "add_prefix_space": False}
# Chat templates, or what is put before and behind them; in what they render, \0 is the prompt.
PLAIN_CHAT = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
THINK = "{{ '<think>\\n' if add_generation_prompt and enable_thinking is not false }}"
SWITCH = "{{% set enable_thinking = enable_thinking | default({}) %}}"


class Tokenizer:
    """A Hugging Face tokenizer.json with the exact bytes of every token.

    Text is encoded as text: a corpus that spells `<think>` or an end token does not get the special
    token. A SentencePiece model reads a space before the beginning of a text (adds_space): it is in
    the ids, and in the bytes of the first of them, but not in the text.
    """

    def __init__(self, folder: Path, thinking: bool = True):
        """See from_dir, which says more when it fails."""
        content = (folder / "tokenizer.json").read_bytes()
        spec, settings, generation, config = (_json_object(folder / f"{name}.json") for name in (
            "tokenizer", "tokenizer_config", "generation_config", "config"))
        self.special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self._read_model(spec)

        names = {key: token["content"] if isinstance(token, dict) else token
                 for key, token in settings.items() if key.endswith("_token") and token}
        bos, eos = names.get("bos_token"), names.get("eos_token")
        added = json.dumps(spec.get("post_processor"), ensure_ascii=False)
        wants_bos = settings.get("add_bos_token", f'"{bos}"' in added) and bos in self.special
        self.bos: list[int] = [self.special[bos]] if wants_bos else []
        ends = (generation.get("eos_token_id"), config.get("eos_token_id"), self.special.get(eos))
        known = [end if isinstance(end, list) else [end] for end in ends if end is not None]
        if not known:
            raise ValueError("no end token in generation_config.json, config.json or "
                             "tokenizer_config.json")
        self.eos_ids: list[int] = known[0]

        beside, template = folder / "chat_template.jinja", settings.get("chat_template")
        if beside.exists():
            template = beside.read_text()
        elif isinstance(template, list):
            template = {each["name"]: each["template"] for each in template}["default"]
        template = template or "{{ bos_token }}" * len(self.bos) + PLAIN_CHAT
        template, self._trims, text = chat_format(template, thinking, names)
        tokens = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        self._chat = re.split(f"({tokens or '(?!)'})", text)
        # What is saved: the tokenizer as it was read, the template and the end tokens as used.
        settings = json.dumps(settings | {"chat_template": template}, ensure_ascii=False, indent=1)
        generation = json.dumps(generation | {"eos_token_id": self.eos_ids})
        self.files = {"tokenizer.json": content, "tokenizer_config.json": settings.encode(),
                      "generation_config.json": generation.encode()}

    def _read_model(self, spec: dict) -> None:
        """The encoders, and the bytes of each id. ValueError if those cannot spell a text."""
        steps = {key: spec.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
        written = json.dumps(steps)
        bare = json.loads(written, object_hook=lambda step: {
            key: NO_PREFIX.get(key, value) for key, value in step.items()})
        plain = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._encoder, self._inside = (
            tokenizers.Tokenizer.from_str(json.dumps(spec | plain | wanted))
            for wanted in (steps, bare))
        # What follows a special token begins a text too, but for Metaspace's scheme "first".
        self._first_only = '"prepend_scheme": "first"' in written

        spell = BYTE_LEVEL if "ByteLevel" in written else SENTENCEPIECE
        contents = {}
        for token, id in self._encoder.get_vocab().items():
            letters = [spell.get(char, char.encode()) for char in token]
            contents[id] = spell.get(token) or b"".join(letters)
        contents |= {id: token.encode() for token, id in self.special.items()}
        self._bytes = [contents.get(id, b"") for id in range(1 + max(contents))]
        spelled = self.bytes_of(self.encode_inside(PROBE))
        if spelled != PROBE.encode():
            raise ValueError(f"its tokens spell {PROBE!r} as {spelled.decode(errors='replace')!r}; "
                             "use one that keeps every byte, such as byte-level BPE")
        self.adds_space = self.encode("x") != self.encode_inside("x")

    @classmethod
    def from_dir(cls, path: str | Path, thinking: bool = True) -> "Tokenizer":
        """Reads tokenizer.json and the configs beside it; ValueError of one sentence.

        thinking: whether the assistant thinks, see chat_format.
        """
        try:
            return cls(Path(path), thinking)
        except Exception as error:  # the Rust parser raises bare ones, and templates are programs
            raise ValueError(f"{path}: the tokenizer or its chat template cannot be used "
                             f"({type(error).__name__}: {error})") from None

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and its configs: apply_chat_template of what is written gives
        chat()."""
        for name, content in self.files.items():
            (Path(directory) / name).write_bytes(content)

    def __len__(self) -> int:
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Ids of a text from its beginning, without special tokens whatever it spells."""
        return self._encoder.encode(text).ids

    def encode_inside(self, text: str) -> list[int]:
        """Ids of a text that goes on with another: no space is put before it."""
        return self._inside.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """encode() of many texts, in parallel."""
        return [encoding.ids for encoding in self._encoder.encode_batch_fast(texts)]

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for; none for an id that pads the model's vocabulary."""
        return self._bytes[id] if id < len(self._bytes) else b""

    def ids_of_token(self, content: bytes) -> list[int]:
        """The ids whose bytes are exactly these: none, one, or a few."""
        return [id for id, token in enumerate(self._bytes) if token == content]

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """The bytes of a run of tokens."""
        return b"".join(map(self.token_bytes, ids))

    def tokens(self, text: bytes) -> list[bytes]:
        """The bytes of each token of what goes on with a text; none if it is not UTF-8."""
        try:
            return [self.token_bytes(id) for id in self.encode_inside(text.decode())]
        except UnicodeDecodeError:
            return []

    def chat(self, prompt: str, context: Sequence[int] | None = None) -> list[int]:
        """Ids of a user's prompt in the model's chat format, up to where the assistant begins.

        A context is inserted as ids where the prompt says {context}: a document's own tokens, even
        where it breaks off within a character.
        """
        prompt = prompt.strip() if self._trims else prompt
        ids = []
        for piece in self._chat:
            if piece in self.special:
                ids.append(self.special[piece])
                continue
            text = piece.replace("\0", prompt)
            before, *behind = [text] if context is None else text.split("{context}", 1)
            goes_on = ids and self._first_only
            ids += self.encode_inside(before) if goes_on else self.encode(before)
            for text in behind:
                ids += [*context, *self.encode_inside(text)]
        return ids

    def response_ids(self, text: str) -> list[int]:
        """Ids of what an assistant says, where the marks of thinking are the model's own tokens."""
        ids = []
        for piece in re.split("(</?think>)", text):
            is_mark = piece.endswith("think>") and piece in self.special
            ids += [self.special[piece]] if is_mark else self.encode_inside(piece)
        return ids


def _json_object(file: Path) -> dict:
    """What a JSON file holds; nothing if there is none."""
    try:
        return {} | json.loads(file.read_bytes()) if file.exists() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not a JSON object ({error})") from None


def chat_format(template: str, thinking: bool, names: dict[str, str]) -> tuple[str, bool, str]:
    r"""The chat template to use, whether it trims the prompt, and what it renders around "\0".

    thinking: the template's enable_thinking; where it does not know that, a `<think>` behind the
    assistant's turn. The returned template does so by default. names: bos_token and the like.
    ValueError if the template does not show the prompt once, or opens thinking that is not wanted.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def render(prompt: str = "\0", **switch: bool) -> str:
        return environment.from_string(template).render(
            names | switch, messages=[{"role": "user", "content": prompt}], tools=None,
            documents=None, add_generation_prompt=True)

    environment = ImmutableSandboxedEnvironment(  # as transformers has it
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["strftime_now"] = time.strftime
    text = render(enable_thinking=thinking)
    if text.count("\0") != 1:
        raise ValueError("the template does not show the prompt once")
    behind = text.partition("\0")[2]
    is_open = behind.rfind("<think>") > behind.rfind("</think>")
    if is_open and not thinking:
        raise ValueError("the template opens <think> whatever enable_thinking says")
    if thinking and not is_open and "enable_thinking" not in template:
        template = template.removesuffix("\n") + THINK  # a last newline is not rendered
        text = render()
    elif render() != text:
        template = SWITCH.format(str(thinking).lower()) + template
    return template, render(" \0 ") == text, text


def check_vocabulary(tokenizer: Tokenizer, size: int, where: object) -> None:
    """ValueError if the tokenizer has ids that the model has no row for."""
    if len(tokenizer) > size or max(tokenizer.eos_ids) >= size:
        raise ValueError(f"{where}: the tokenizer has {len(tokenizer)} ids, the model's vocabulary "
                         f"only {size}")


def check_same_tokens(tokenizer: Tokenizer, other: Tokenizer, where: object) -> None:
    """ValueError if an id of the tokenizer means something else to the other, that of `where`."""
    for id in range(len(tokenizer)):
        ours, theirs = tokenizer.token_bytes(id), other.token_bytes(id)
        if ours != theirs:
            raise ValueError(f"{where}: token {id} is {theirs!r} there and {ours!r} in the "
                             "policy's tokenizer; use a proxy that shares it")


# ----------------------------------------------------------------------------------------- corpora

MAX_LINE = 16 * 2**20  # bytes of one corpus line or document; a longer one should be split
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")
END = b"<|endoftext|>"
CONVERT = ("python -c \"from datasets import load_dataset; "
           "load_dataset('{}', split='train').to_json('corpus.jsonl')\"")


@dataclass(frozen=True)
class Document:
    """A text. `problem` is its beginning if it is a problem and its solution, `answer` the
    verifiable result. With a `response` the text is a prompt; in the chat format once encoded."""

    text: str
    where: str  # file and line
    problem: str | None = None
    answer: str | None = None
    response: str | None = None


def _document(row: object, where: str) -> Document:
    """A JSON row: `text`, or prompt and response, or problem (question) and solution, joined by an
    empty line; `answer` where there is one."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object")
    get = {key: unicodedata.normalize("NFC", str(value)) for key, value in row.items()
           if isinstance(value, (str, int, float))}.get
    text, prompt, response, answer = map(get, ("text", "prompt", "response", "answer"))
    problem = get("problem") or get("question")
    solution = get("solution") or (answer if get("question") else None)
    if not text and prompt and response:
        text = prompt
    else:
        response = None
        text = text or (f"{problem}\n\n{solution}" if problem and solution else problem)
    if not text or not text.strip():
        raise ValueError(f"{where}: empty document, or no field `text`, or `problem` and "
                         "`solution`, or `prompt` and `response`")
    if re.search("[\ud800-\udfff]", text + (response or "")):
        raise ValueError(f"{where}: half a surrogate pair (\\ud800 to \\udfff) is no character; "
                         "mend the text")
    begins = problem and text.startswith(problem)
    return Document(text, where, problem if begins else None, answer, response)


def _pieces(content: BinaryIO, is_text: bool) -> Iterator[bytes]:
    """The lines of a file, or of a .txt what ends where END ends a line; cut beyond MAX_LINE."""
    piece = bytearray()
    while line := content.readline(MAX_LINE + 1):
        piece += line
        if is_end := line.rstrip().endswith(END):
            piece = piece.rstrip().removesuffix(END)
        if is_end or not is_text or len(piece) > MAX_LINE:
            yield bytes(piece)
            piece.clear()
    if piece.strip():
        yield bytes(piece)


def file_rows(file: Path) -> Iterator[tuple[object, str]]:
    """The documents of one file as (row, place); none is ever read beyond its limit. ValueErrors
    name file and line."""
    kind, unit = ("UTF-8", "document") if file.suffix == ".txt" else ("JSON", "line")
    where = file
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as content:
            for number, piece in enumerate(_pieces(content, kind == "UTF-8"), 1):
                where = f"{file} {unit} {number}"
                if len(piece) > MAX_LINE:
                    raise ValueError(f"longer than {MAX_LINE // 2**20} MiB; split it")
                if kind == "UTF-8":
                    yield {"text": piece.decode()}, where
                elif piece.strip():
                    yield json.loads(piece), where
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not {kind} that can be read ({error})") from None


def corpus_files(source: str | Path) -> list[Path]:
    """The files of a corpus: one, those of a folder in order, or those of a dataset of the hub.

    huggingface_hub does the fetching, so HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE mean what they
    mean elsewhere.
    """
    path = Path(source)
    if not path.exists():
        try:
            from huggingface_hub import snapshot_download
            path = Path(snapshot_download(str(source), repo_type="dataset",
                                          allow_patterns=["*" + suffix for suffix in SUFFIXES]))
        except Exception as error:  # the hub's client has many; the user can do the same about each
            raise FileNotFoundError(f"{source}: no such corpus, and not available from the hub "
                                    f"({' '.join(str(error).split())})") from None
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.name.endswith(SUFFIXES)]
    if not files:
        raise ValueError(f"{source}: a corpus is a .jsonl, .jsonl.gz or .txt file, or a folder of "
                         f"them; a dataset of the hub is made one by: {CONVERT.format(source)}")
    return files


def documents(source: str | Path) -> Iterator[Document]:
    """The documents of a corpus one by one, normalised to NFC.

    source: a .jsonl, .jsonl.gz or .txt file, a folder of them, or the id of a dataset of the hub
    that has some. In a .txt, `<|endoftext|>` at the end of a line ends a document. ValueErrors name
    file and line.
    """
    where = None
    for file in corpus_files(source):
        for row, where in file_rows(file):
            yield _document(row, where)
    if where is None:
        raise ValueError(f"{source}: no documents")


def read_corpus(source: str | Path) -> list[Document]:
    """All documents of a corpus at once."""
    return list(documents(source))


# ------------------------------------------------------------------------------ held-out documents

TRAIN, HELD_OUT, DROPPED = 0, 1, 2
# Scripts without spaces: Thai and Lao, Burmese, Khmer, kana, and the ideographs.
ALONE = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
         "\U00020000-\U0003ffff")
WORD = re.compile(f"[{ALONE}]|[^\\W{ALONE}]+")


def _word_runs(text: str, size: int = 8) -> set[int]:
    """The set of a text's runs of eight words, or of all if there are fewer, as hashes. Words are
    in lower case and without punctuation, and single characters where a script has no spaces."""
    words = WORD.findall(text.casefold())
    return {hash(tuple(words[n: n + size])) for n in range(max(1, len(words) - size + 1))}


def split_documents(texts: Callable[[], Iterable[str]], holdout: int, seed: int) -> np.ndarray:
    """TRAIN, HELD_OUT or DROPPED for each document, int8 [D].

    texts: gives what is asked of each document, in order; it is read again and again, and only the
    runs of held-out documents are kept. Held out are the documents with the `holdout` smallest
    hashes of (seed, text), so that a document that is added changes at most one. Dropped are their
    near-duplicates: at least half of the runs of eight words of the one that has fewer are in the
    other, which holds where Jaccard's index is 1/2 or one text contains the other.
    """
    keys = [hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest() for text in texts()]
    split = np.full(len(keys), TRAIN, np.int8)
    documents_of = dict(zip(keys, range(len(keys))))  # one for each text
    split[[documents_of[key] for key in sorted(documents_of)[:holdout]]] = HELD_OUT
    held = {document: _word_runs(text) for document, text in enumerate(texts())
            if split[document] == HELD_OUT}
    owners = defaultdict(list)  # the held-out documents that a run occurs in
    for document, runs in held.items():
        for run in runs:
            owners[run].append(document)
    for document, text in enumerate(texts() if held else ()):
        if split[document] == TRAIN:
            runs = _word_runs(text)
            shared = Counter(other for run in runs & owners.keys() for other in owners[run])
            if any(2 * both >= min(len(runs), len(held[n])) for n, both in shared.items()):
                split[document] = DROPPED
    return split


def fingerprint(*parts: object) -> str:
    """A short name for a set of inputs: a file or a folder of files (a Path) by names and contents,
    everything else by its text."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        if not isinstance(part, Path):
            digest.update(repr(part).encode() + b"\0")
            continue
        for file in sorted(filter(Path.is_file, part.iterdir())) if part.is_dir() else [part]:
            with open(file, "rb") as content:
                digest.update(file.name.encode())
                digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()


# ------------------------------------------------------------------------------- tokenised corpora

BATCH = 256  # documents tokenised at a time


@dataclass(frozen=True)
class Corpus:
    """The documents of a corpus as token ids, in files; D documents, N tokens."""

    tokenizer: Tokenizer
    tokens: np.ndarray  # uint32 [N], of all documents one after the other
    starts: np.ndarray  # int64 [D + 1]: document d is tokens[starts[d]: starts[d + 1]]
    regions: np.ndarray  # int64 [D]: the token where a solution or response begins, or a document
    is_chat: np.ndarray  # bool [D]: a prompt in the chat format and a response
    split: np.ndarray  # int8 [D]: TRAIN, HELD_OUT or DROPPED
    fingerprint: str  # of the tokenizer, all tokens and where documents and regions begin

    def ids(self, document: int) -> np.ndarray:
        """The tokens of a document, uint32."""
        return self.tokens[self.starts[document]: self.starts[document + 1]]

    def truth(self, place: int) -> tuple[bytes, ...]:
        """The bytes of each token from a place in `tokens` on, up to the end of the document."""
        end = self.starts[np.searchsorted(self.starts, place, "right")]
        ids = self.tokens[place: min(place + TRUTH_TOKENS, end)].tolist()
        return tuple(map(self.tokenizer.token_bytes, ids))


def _ids_and_region(document: Document, ids: list[int],
                    tokenizer: Tokenizer) -> tuple[list[int], int]:
    """A document's tokens, and the place of the first one behind its prompt or problem.

    ids: of its text. ValueError if they do not spell it.
    """
    text = document.text
    if document.response:
        prompt = tokenizer.chat(text)
        return prompt + tokenizer.response_ids(document.response), len(prompt)
    spelled = tokenizer.bytes_of(ids)
    if not spelled.endswith(text.encode()):
        raise ValueError(f"{document.where}: its tokens do not spell it (SentencePiece reads the "
                         f"character ▁ as a space); mend the text: {text[:60]!r}")
    if not document.problem:
        return ids, 0
    solution = text[len(document.problem):].lstrip().encode()
    ends = np.cumsum([len(tokenizer.token_bytes(id)) for id in ids])
    return ids, int(np.searchsorted(ends, len(spelled) - len(solution))) + 1


def _tokenize(source: str | Path, tokenizer: Tokenizer, file: Path) -> dict[str, object]:
    """Writes the tokens of a corpus; what else a Corpus has, but for the split."""
    starts, rows = [0], []  # rows: region, is_chat
    left = iter(tqdm(documents(source), "tokenize", unit=" documents", disable=None))
    with open(file, "wb") as out:
        while batch := list(islice(left, BATCH)):
            for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch])):
                ids, region = _ids_and_region(document, ids, tokenizer)
                np.array(ids, np.uint32).tofile(out)
                rows.append((starts[-1] + region, bool(document.response)))
                starts.append(starts[-1] + len(ids))
    regions, is_chat = zip(*rows)
    name = fingerprint(tokenizer.files["tokenizer.json"], file, starts, rows)
    return dict(starts=starts, regions=regions, is_chat=is_chat, fingerprint=name)


def load_corpus(source: str | Path, tokenizer: Tokenizer, cache: str | Path, holdout: int,
                seed: int) -> Corpus:
    """A corpus as flat files in a folder of `cache`, made once for the same content, and its split.

    source: see documents(). Files are written aside and renamed, under a lock that is taken before
    anything is looked at, so several processes may begin together and any may be killed.
    """
    name = fingerprint(tokenizer.files["tokenizer.json"], tokenizer.chat(""), *corpus_files(source))
    folder = Path(cache) / f"corpus-{name}"
    aside, split = folder.with_suffix(".aside"), folder / f"split-{holdout}-{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
            aside.mkdir()
            np.savez(aside / "documents.npz", **_tokenize(source, tokenizer, aside / "tokens.u32"))
            aside.rename(folder)
        if not split.exists():
            texts = (lambda: (document.text for document in documents(source)))
            split_documents(texts, holdout, seed).tofile(split.with_suffix(".aside"))
            split.with_suffix(".aside").rename(split)
    arrays = dict(np.load(folder / "documents.npz"), split=np.fromfile(split, np.int8))
    tokens = np.asarray(np.memmap(folder / "tokens.u32", np.uint32, "r"))
    if len(tokens) != arrays["starts"][-1]:
        raise ValueError(f"{folder}: {len(tokens)} tokens, not {arrays['starts'][-1]}; remove it")
    return Corpus(tokenizer, tokens, **arrays | {"fingerprint": str(arrays["fingerprint"])})


# --------------------------------------------------------------------------------------- questions

BLOCK = 2**18  # tokens looked at together
TRUTH_TOKENS = 32  # how much of the continuation a prediction may span; the paper does not say


@dataclass(frozen=True)
class Question:
    """A position of a document: what precedes it, and the bytes of each token that follows."""

    context: tuple[int, ...]
    truth: tuple[bytes, ...]
    document: int
    position: int  # of the first token to predict, in tokens of the document
    entropy: float = float("nan")  # nats, under the proxy
    answer: str | None = None  # of a question-answer pair; then `context` is the problem


@dataclass(frozen=True)
class QuestionSet:
    """Positions of a corpus that are asked about; [n] makes the n-th question."""

    corpus: Corpus
    entropy: np.ndarray  # float32 [N], nats, of every token of the corpus
    positions: np.ndarray  # int64 [n], indices of corpus.tokens, ascending

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, n: int) -> Question:
        corpus, place = self.corpus, int(self.positions[n])
        document = int(np.searchsorted(corpus.starts, place, "right")) - 1
        position = place - int(corpus.starts[document])
        return Question(tuple(corpus.ids(document)[:position].tolist()), corpus.truth(place),
                        document, position, float(self.entropy[place]))


@dataclass(frozen=True)
class PositionFilter:
    """The positions to ask about, after the paper's token-level filter (section 3.2).

    kind "threshold": entropy above `value` nats; "top": the `value` share of highest entropy, and
    what equals the last of it; "random": a random `value` share. Contexts of min_context to
    max_context tokens (0: no bound). region "solution": only what follows a problem or prompt.
    """

    kind: str = "threshold"
    value: float = 0.5
    min_context: int = 1
    max_context: int = 0
    region: str = "all"
    seed: int = 0


def _candidates(corpus: Corpus, entropy: np.ndarray, chosen: PositionFilter,
                split: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The places that a filter of any kind may keep, and their entropies, some at a time."""
    for begin in range(0, len(entropy), BLOCK):
        values = entropy[begin: begin + BLOCK]
        places = np.arange(begin, begin + len(values))
        document = np.searchsorted(corpus.starts, places, "right") - 1
        context = places - corpus.starts[document]
        keep = np.isfinite(values) & (corpus.split[document] == split)
        keep &= context >= max(chosen.min_context, 1)
        if chosen.max_context:
            keep &= context <= chosen.max_context
        if chosen.region == "solution":
            keep &= places >= corpus.regions[document]
        yield places[keep], values[keep]


def _on_disk(parts: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    """Arrays one after the other, in a temporary file and not in memory."""
    with tempfile.TemporaryFile() as file:
        for part in parts:
            part.tofile(file)
        return np.memmap(file, dtype, "r+") if file.tell() else np.zeros(0, dtype)


def select_positions(corpus: Corpus, entropy: np.ndarray, chosen: PositionFilter,
                     split: int = TRAIN) -> QuestionSet:
    """The positions of a part of a corpus that a filter keeps.

    entropy float32 [N]: of every token of the corpus. Left out: positions without a finite entropy,
    and truths that no \\boxed{} can hold (see reward.reachable). What is kept takes 8 bytes a
    position, in a temporary file.
    """
    def reached(places: np.ndarray) -> np.ndarray:
        keep = alone[corpus.tokens[places]]
        for n in np.flatnonzero(~keep):
            keep[n] = reachable(corpus.truth(places[n]))
        return places[keep]

    # Mostly the first token of a truth shows that it is reachable.
    vocabulary = range(len(corpus.tokenizer))
    alone = np.array([reachable([corpus.tokenizer.token_bytes(id)]) for id in vocabulary])
    among = corpus, np.asarray(entropy), chosen, split
    if chosen.kind == "threshold":
        kept = (places[values > chosen.value] for places, values in _candidates(*among))
    elif chosen.kind == "random":
        random = np.random.default_rng([chosen.seed, 5])
        kept = (places[random.random(len(places)) < chosen.value]
                for places, _ in _candidates(*among))
    elif chosen.kind == "top":
        ranked = _on_disk((values for _, values in _candidates(*among)), np.float32)
        ranked.sort()
        least = ranked[-int(np.ceil(chosen.value * len(ranked)))] if len(ranked) else np.inf
        kept = (places[values >= least] for places, values in _candidates(*among))
    else:
        raise ValueError(f"filter {chosen.kind!r}: it is threshold, top or random")
    return QuestionSet(corpus, entropy, _on_disk(map(reached, kept), np.int64))


def answer_sets(source: str | Path, tokenizer: Tokenizer, holdout: int,
                seed: int) -> tuple[list[Question], list[Question], str]:
    """Questions with verifiable answers, to train on and held out, and a line about them.

    What is held out, and what is near it, is judged by the problem alone: it is all that is asked.
    """
    rows = read_corpus(source)
    problems = [row.problem or row.text for row in rows]
    train, held, dropped = sets = [], [], []
    split = split_documents(lambda: problems, holdout, seed)
    for n, (row, ids) in enumerate(zip(rows, tokenizer.encode_batch(problems))):
        if row.answer is None:
            raise ValueError(f"{row.where}: it has no `answer`, and every problem needs one")
        sets[split[n]].append(Question(tuple(ids), (), n, 0, answer=row.answer))
    return train, held, (f"questions with answers: {len(train):,}, held out {len(held):,}, "
                         f"{len(dropped):,} near-duplicates dropped")


@dataclass(frozen=True)
class SequenceSet:
    """Training documents as runs of tokens for next-token prediction; [n] is (ids, first): the loss
    is of ids[first:]."""

    corpus: Corpus
    max_tokens: int
    places: np.ndarray  # int64 [n, 2]: document, and where in it the run begins

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, n: int) -> tuple[list[int], int]:
        document, begin = self.places[n]
        corpus = self.corpus
        ids = np.append(corpus.ids(document), corpus.tokenizer.eos_ids[0])
        if corpus.is_chat[document]:
            return ids.tolist(), int(corpus.regions[document] - corpus.starts[document])
        # A window opens with the last token of the one before: every token is predicted once.
        before = ids[begin - 1: begin].tolist() if begin else corpus.tokenizer.bos
        return before + ids[begin: begin + self.max_tokens - 1].tolist(), 1


def sequences(corpus: Corpus, max_tokens: int) -> SequenceSet:
    """What stage ntp trains on: of the training split alone, plain documents between bos (if the
    tokenizer has one) and the end token in windows of at most max_tokens, and responses with their
    end token behind their prompts, whole. ValueError if one of these is longer than max_tokens."""
    places = []
    for document in np.flatnonzero(corpus.split == TRAIN).tolist():
        size = len(corpus.ids(document)) + 1
        if corpus.is_chat[document] and size > max_tokens:
            raise ValueError(f"document {document + 1} of the corpus, a prompt and its response, "
                             f"has {size} tokens; raise the limit of {max_tokens} or leave it out")
        places += [(document, begin) for begin in range(0, size, max_tokens - 1)]
    return SequenceSet(corpus, max_tokens, np.array(places, np.int64).reshape(-1, 2))


def random_indices(total: int, seed: int, step: int, retry: int, count: int) -> list[int]:
    """`count` different numbers below `total` (repeated only if there are fewer), by (seed, step,
    retry) alone."""
    philox = np.random.Philox(key=[seed % 2**63, 1], counter=[0, step, retry, 0])
    return np.random.Generator(philox).choice(total, count, replace=count > total).tolist()


# --------------------------------------------------------------------------------------- templates

_ASK = ("Complete the given text under {} by predicting the next token, and wrap it in "
        "‘\\boxed{{}}’. Please reason step by step to find the most probable next token{}, and "
        "enclose it in \\boxed{{}} ")
_LIST = ("by predicting the next token, list multiple potential tokens and select the most "
         "probable one as the final ")
_NOTE = (r"(note: the token may begin with a space, e.g., \boxed{ para} or \boxed{ =}; "
         r"do not use \text{})")
_FENCED = ".\n\n### Context\n```{context}```"
TEMPLATES = {  # paper, appendix D; the line breaks and v4's worked examples are ours
    "v0": _ASK.format("‘### Context’", " as the final answer") + _NOTE
          + ".\n\n### Context\n{context}",
    "v1": _ASK.format("### Context", " as the final prediction") + _NOTE + _FENCED + ".",
    "v2": "You are a helpful assistant, good at predicting the next token for a given context.\n\n"
          "Now, please c" + _ASK.format("### Context", "")[1:] + _NOTE.replace("{ =}", "{ +=}")
          + _FENCED + ".",
    "v3": "Complete the given text under ### Context " + _LIST
          + "answer. Wrap your final answer in \\boxed{} " + _NOTE + _FENCED,
    "v4": "Complete the given text under ### Context by predicting the next token. Reason step by "
          "step, then wrap the token in \\boxed{} " + _NOTE + ".\n\n"
          "Example 1. ### Context ```To begin, we simplify``` The next token is \\boxed{ this}.\n"
          "Example 2. ### Context ```The square of 7 is 4``` The next token is \\boxed{9}.\n"
          "Example 3. ### Context ```The steps are``` The next token is \\boxed{:\n}.\n\n"
          "Now, the context is: ### Context ```{context}```.",
    "v5": _ASK.format("### Context", " as the final answer") + _NOTE + _FENCED,
    "v6": "Complete the given text wrapped in ``` and ``` " + _LIST
          + "prediction. Wrap your final prediction in \\boxed{} " + _NOTE
          + ".\n\nThe context is: ```{context}```, now please predict the next token.",
    "toy": "Next token?\n{context}",
    "plain": "{context}",  # question-answer pairs: the problem itself
}


def prompt_ids(tokenizer: Tokenizer, question: Question, template: str,
               max_prompt: int) -> list[int]:
    """The chat-formatted prompt of a question; a context that is too long loses its beginning,
    never its end.

    A problem with an answer is a whole text and encoded with what stands around it, as the model's
    users will; the tokens of an unfinished text stay as the document has them.
    """
    form = TEMPLATES[template]
    if question.answer is not None:
        text = tokenizer.bytes_of(question.context).decode()
        text = text.removeprefix(" ") if tokenizer.adds_space else text
        ids = tokenizer.chat(form.replace("{context}", text))
        if len(ids) <= max_prompt:
            return ids
    frame = len(tokenizer.chat(form, []))
    if frame >= max_prompt:
        raise ValueError(f"--max-prompt {max_prompt}: template {template} takes {frame} tokens")
    return tokenizer.chat(form, question.context[-(max_prompt - frame):])
