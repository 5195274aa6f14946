r"""From text to questions: tokenizer, chat format, corpora, the filter of positions, prompt templates.

    documents --tokenize once--> flat files: tokens (uint32), starts (int64); read through np.memmap
        | a proxy model's entropy at every position, in the same order (paper, section 3.2; eval.py)
        v positions that a filter keeps, by arrays, chunk by chunk
    Question(context ids, truth: bytes of each following token) --template, chat format--> prompt ids

Text is bytes from here to the reward; a tokenizer may split a character, so only bytes have exact
token boundaries. Nothing here knows a model, and nothing in memory grows with the tokens of a
corpus. Left out: Unigram and WordPiece vocabularies, and all that cannot give back the bytes it read.
"""

import fcntl
import gzip
import hashlib
import json
import re
import shutil
import tempfile
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers
from tqdm import tqdm

from reward import reachable

# --------------------------------------------------------------------------------------- tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json",
         "special_tokens_map.json", "chat_template.jinja")
# Byte-level BPE writes a printable byte as its own Latin-1 character, the others in order as
# characters 256, 257, ...
CHARS = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_OF_CHAR = dict(zip(CHARS, sorted(range(256), key=lambda byte: chr(byte) not in CHARS)))
PROBE = "Spelled  as It is:\n\tnaïve ﬁne ½ Ω，日本語 한글 🚀 ①\r\n{x_1} "  # in NFC, not in NFKC
# Chat templates. \0 stands for what the user says.
PLAIN_CHAT = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
THINK = ("{{ '<think>\\n' if add_generation_prompt and (enable_thinking is not defined"
         " or enable_thinking) else '' }}")
SWITCH = "{%% if enable_thinking is not defined %%}{%% set enable_thinking = %s %%}{%% endif %%}"


class Tokenizer:
    """A Hugging Face tokenizer.json with the exact bytes of every token.

    Text is encoded as text: a corpus that spells `<think>` or an end token does not get the special
    token. A SentencePiece model reads a space before the beginning of a text: it is in the ids, and
    in the bytes of the first of them, but not in the text.
    """

    def __init__(self, files: dict[str, bytes], where: str, thinking: bool = True):
        """files: the contents of those of FILES that exist. where: the folder that an error names.
        thinking: whether the chat format opens the assistant's thinking."""
        settings, generation, config = (json.loads(files.get(name, b"{}")) for name in FILES[1:4])
        try:
            spec = json.loads(files["tokenizer.json"])
            self.special = {token["content"]: token["id"] for token in spec["added_tokens"]}
            self._read_model(spec)
        except Exception as error:  # the Rust parser raises bare Exceptions
            raise ValueError(f"{where}/tokenizer.json: not a usable tokenizer "
                             f"({type(error).__name__}: {error})") from None

        names = {key: token["content"] if isinstance(token, dict) else token
                 for key, token in settings.items() if key.endswith("_token") and token}
        bos, eos = names.get("bos_token"), names.get("eos_token")
        added = json.dumps(spec.get("post_processor"), ensure_ascii=False)
        wants_bos = settings.get("add_bos_token", f'"{bos}"' in added)
        self.bos: list[int] = [self.special[bos]] if wants_bos and bos in self.special else []
        end = next((source["eos_token_id"] for source in (generation, config)
                    if source.get("eos_token_id") is not None), self.special.get(eos))
        if end is None:
            raise ValueError(f"{where}: no end token in generation_config.json, config.json or "
                             "tokenizer_config.json")
        self.eos_ids: list[int] = [end] if isinstance(end, int) else list(end)

        template = settings.get("chat_template")
        if isinstance(template, list):  # several by name
            template = {choice["name"]: choice["template"] for choice in template}.get("default")
        if "chat_template.jinja" in files:
            template = files["chat_template.jinja"].decode()
        if not template:
            template = "{{ bos_token }}" * len(self.bos) + PLAIN_CHAT
        template, self._trims, text = chat_format(template, thinking, names, where)
        special = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        self._chat = re.split(f"({special or '(?!)'})", text)
        # What is written: the model's config.json is the model's, the template is the one used.
        settings = json.dumps(settings | {"chat_template": template}, ensure_ascii=False, indent=1)
        generation = json.dumps(generation | {"eos_token_id": self.eos_ids})
        self.files = {name: files[name] for name in ("tokenizer.json", "special_tokens_map.json")
                      if name in files}
        self.files |= {"tokenizer_config.json": settings.encode(),
                       "generation_config.json": generation.encode()}

    def _read_model(self, spec: dict) -> None:
        """The encoders and the bytes of each id. ValueError if those cannot spell a text."""
        steps = {key: spec.get(key) for key in ("normalizer", "pre_tokenizer")}
        nothing = {"prepend": "", "prepend_scheme": "never", "add_prefix_space": False}
        bare = json.loads(json.dumps(steps), object_hook=lambda step: step | {
            name: value for name, value in nothing.items() if name in step})

        def encoder(steps: dict) -> tokenizers.Tokenizer:
            plain = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
            return tokenizers.Tokenizer.from_str(json.dumps(spec | plain | steps))

        self._begin = encoder(steps)  # of what begins a text
        self._inside = self._begin if bare == steps else encoder(bare)  # of what goes on with one
        # What follows a special token begins a text too, but for Metaspace's scheme "first".
        written = json.dumps(steps, ensure_ascii=False)
        self._behind = self._inside if '"prepend_scheme": "first"' in written else self._begin

        vocabulary = spec["model"]["vocab"]
        if not isinstance(vocabulary, dict):
            raise ValueError("only BPE vocabularies are supported")
        self._bytes = [b""] * (1 + max([*vocabulary.values(), *self.special.values()]))
        byte_level = "ByteLevel" in json.dumps([steps, spec.get("decoder")])
        space = " " if "▁" in written else "▁"
        for token, id in vocabulary.items():
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            if byte_level and BYTE_OF_CHAR.keys() >= set(token):
                self._bytes[id] = bytes(map(BYTE_OF_CHAR.get, token))
            elif byte and not byte_level:
                self._bytes[id] = bytes.fromhex(byte[1])
            else:
                self._bytes[id] = token.replace("▁", space).encode()
        for token, id in self.special.items():
            self._bytes[id] = token.encode()
        self._ids_of = defaultdict(list)
        for id, content in enumerate(self._bytes):
            self._ids_of[content].append(id)

        probe = PROBE + "▁" * (space == "▁")  # elsewhere ▁ is a space, and refused in a corpus
        for encode in (self._begin, self._inside):
            spelled = self.bytes_of(encode.encode(probe, add_special_tokens=False).ids)
            if spelled.removeprefix(b" ") != probe.encode():
                raise ValueError(f"its tokens spell {probe!r} as {spelled.decode(errors='replace')!r}"
                                 "; use one that keeps every byte, such as byte-level BPE")

    @classmethod
    def from_dir(cls, path: str | Path, thinking: bool = True) -> "Tokenizer":
        """Reads tokenizer.json and the configs beside it; ValueError or FileNotFoundError of one
        sentence."""
        files = {name: (Path(path) / name).read_bytes() for name in FILES
                 if (Path(path) / name).is_file()}
        if "tokenizer.json" not in files:
            raise FileNotFoundError(f"{path}: no tokenizer.json")
        for name in files.keys() & set(FILES[1:4]):
            try:
                json.loads(files[name]).keys()
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{path}/{name}: not a JSON object ({error})") from None
        return cls(files, str(path), thinking)

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and the configs, with the chat template and the end tokens that were
        used: apply_chat_template of what is written gives chat()."""
        for name, content in self.files.items():
            (Path(directory) / name).write_bytes(content)

    def __len__(self) -> int:
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Ids of a text from its beginning, without special tokens whatever it spells."""
        return self._begin.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """encode() of many texts, in parallel."""
        batch = self._begin.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def encode_inside(self, text: str) -> list[int]:
        """Ids of a text that goes on with another: no space is put before it."""
        return self._inside.encode(text, add_special_tokens=False).ids

    @property
    def adds_space(self) -> bool:
        """Whether encode() may put a space before a text."""
        return self._begin is not self._inside

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for; none for an id that pads the model's vocabulary."""
        return self._bytes[id] if id < len(self._bytes) else b""

    def ids_of_token(self, content: bytes) -> list[int]:
        """The ids whose bytes are exactly these: none, one, or a few."""
        return self._ids_of.get(content, [])

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """The bytes of a run of tokens."""
        return b"".join(map(self.token_bytes, ids))

    def tokens(self, text: bytes) -> list[bytes]:
        """The bytes of each token of what goes on with a text; none for bytes that are not UTF-8."""
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
        ids, encoder = [], self._begin
        for piece in self._chat:
            if piece in self.special:
                ids.append(self.special[piece])
                encoder = self._behind
                continue
            piece = piece.replace("\0", prompt)
            before, place, after = piece.partition("{context}")
            if not place or context is None:
                ids += encoder.encode(piece, add_special_tokens=False).ids
            else:
                ids += encoder.encode(before, add_special_tokens=False).ids
                ids += [*context, *self.encode_inside(after)]
        return ids

    def response_ids(self, text: str) -> list[int]:
        """Ids of what an assistant says, where the ends of thinking are the model's own tokens."""
        ids = []
        for piece in re.split("(</?think>)", text):
            mark = piece in ("<think>", "</think>") and piece in self.special
            ids += [self.special[piece]] if mark else self.encode_inside(piece)
        return ids


def chat_format(template: str, thinking: bool, names: dict[str, str],
                where: str) -> tuple[str, bool, str]:
    r"""The chat template to use, whether it trims what the user says, and its text around "\0".

    thinking: what enable_thinking says; where the template does not know it, a `<think>` behind the
    assistant's turn. The returned template does so by default. names: bos_token and the like.
    ValueError if the template cannot be rendered, or opens the thinking that was not wanted.
    """
    def render(prompt: str = "\0", **switch: bool) -> str:
        return render_chat(template, prompt, **names, **switch)

    try:
        opened = "<think>" in render().rpartition("\0")[2]
        if thinking and not opened and "enable_thinking" not in template:
            template = template.removesuffix("\n") + THINK  # the newline is not rendered
        text = render(enable_thinking=thinking)
        if render() != text:
            template = SWITCH % str(thinking).lower() + template
        trims = render(" \0 ") == text
    except Exception as error:  # templates are programs
        raise ValueError(f"{where}: the chat template cannot be rendered "
                         f"({type(error).__name__}: {error})") from None
    behind = text.rpartition("\0")[2]
    if text.count("\0") != 1:
        raise ValueError(f"{where}: the chat template says the user's message {text.count(chr(0))} "
                         "times; it should once")
    if not thinking and behind.rfind("<think>") > behind.rfind("</think>"):
        raise ValueError(f"{where}: the chat template opens <think> whatever enable_thinking says; "
                         "use thinking, or a template that can do without")
    return template, trims, text


def render_chat(template: str, prompt: str, **variables: object) -> str:
    """What a chat template makes of one user message, the assistant's turn opened, as transformers'
    apply_chat_template renders it, in a sandbox."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    def tojson(value: object, **options: object) -> str:
        return json.dumps(value, **{"ensure_ascii": False} | options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda format: datetime.now().strftime(format)}
    # transformers' {% generation %} marks what an assistant said; there is nothing here to mark.
    template = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", template)
    template = re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", template)
    return environment.from_string(template).render(
        messages=[{"role": "user", "content": prompt}], tools=None, documents=None,
        add_generation_prompt=True, **variables)


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
            raise ValueError(f"{where}: token {id} is {theirs!r} there and {ours!r} in the policy's "
                             "tokenizer; the proxy has to share the policy's tokenizer")


# ----------------------------------------------------------------------------------------- corpora

MAX_LINE = 16 * 2**20  # bytes of one corpus line or document; a longer one should be split
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")
FIELDS = ("text", "problem", "question", "solution", "answer", "prompt", "response")
CONVERT = ("python -c \"from datasets import load_dataset; "
           "load_dataset('{}', split='train').to_json('corpus.jsonl')\"")


@dataclass(frozen=True)
class Document:
    """A text. `problem` is its beginning if it is a problem and its solution, `answer` the
    verifiable result; of a prompt and response row both halves, in the chat format when encoded."""

    text: str
    id: int
    problem: str | None = None
    answer: str | None = None
    prompt: str | None = None
    response: str | None = None


def _document(row: object, id: int, where: str) -> Document:
    """A JSON row: `text`, or problem (question) and solution, joined by an empty line, or prompt and
    response; `answer` where there is one."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object")
    get = {key: unicodedata.normalize("NFC", str(row[key])) for key in FIELDS
           if isinstance(row.get(key), (str, int, float))}
    problem = get.get("problem") or get.get("question")
    solution = get.get("solution") or (get.get("answer") if "question" in get else None)
    text, prompt, response = map(get.get, ("text", "prompt", "response"))
    if text or not (prompt and response):
        prompt = response = None
    if not text:
        halves = (prompt, response) if prompt else (problem, solution)
        text = "\n\n".join(halves) if all(halves) else problem
    if not text or not text.strip():
        raise ValueError(f"{where}: empty document, or no field `text`, or `problem` and `solution`, "
                         "or `prompt` and `response`")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{where}: half a surrogate pair (\\ud800 to \\udfff) is no character; "
                         "mend the text")
    problem = problem if problem and text.startswith(problem) else None
    return Document(text, id, problem, get.get("answer"), prompt, response)


def _text_documents(content: BinaryIO) -> Iterator[bytes]:
    """The documents of a .txt: `<|endoftext|>` at the end of a line ends one."""
    piece = bytearray()
    while line := content.readline(MAX_LINE + 1):
        end = re.search(rb"<\|endoftext\|>\s*\Z", line)
        piece += line[: end.start()] if end else line
        if end or len(piece) > MAX_LINE:
            yield bytes(piece)
            piece.clear()
    if piece.strip():
        yield bytes(piece)


def file_rows(file: Path) -> Iterator[tuple[object, str]]:
    """The documents of one file as (row, place); none is ever read beyond its limit."""
    is_text = file.suffix == ".txt"
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as content:
        lines = iter(lambda: content.readline(MAX_LINE + 1), b"")
        for number, piece in enumerate(_text_documents(content) if is_text else lines, 1):
            where = f"{file} {'document' if is_text else 'line'} {number}"
            if len(piece) > MAX_LINE:
                raise ValueError(f"{where}: longer than {MAX_LINE // 2**20} MiB; one document a "
                                 "line, split this one")
            try:
                text = piece.decode()
                if text.strip() or is_text:
                    yield {"text": text} if is_text else json.loads(text), where
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: byte {error.start} is not UTF-8; convert the file to "
                                 "UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error})") from None


def corpus_files(source: str | Path) -> list[Path]:
    """The files of a corpus: one, those of a folder in order, or those of a dataset of the hub.

    huggingface_hub does the fetching, so HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE mean what they
    mean elsewhere.
    """
    path, name = Path(source), str(source)
    if not path.exists():
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) or name.endswith(SUFFIXES):
            raise FileNotFoundError(f"{name}: no such corpus")
        try:
            from huggingface_hub import snapshot_download
            path = Path(snapshot_download(name, repo_type="dataset",
                                          allow_patterns=[f"*{suffix}" for suffix in SUFFIXES]))
        except Exception as error:  # the hub's client has many; the user can do the same about each
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FileNotFoundError(f"{name}: no such corpus, and not available from the hub "
                                    f"({reason})") from None
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.name.endswith(SUFFIXES) and file.is_file()]
    if not files:
        raise ValueError(f"{name}: a corpus is a .jsonl, .jsonl.gz or .txt file, or a folder of them;"
                         f" a dataset of the hub that has none becomes one by: {CONVERT.format(name)}")
    return files


def documents(source: str | Path) -> Iterator[Document]:
    """The documents of a corpus one by one, normalised to NFC, ids counting from 0.

    source: a .jsonl, .jsonl.gz or .txt file, a folder of them, or the id of a dataset of the hub
    that has some. In a .txt, `<|endoftext|>` at the end of a line ends a document. ValueErrors name
    file and line.
    """
    id = -1
    for file in corpus_files(source):
        try:
            for row, where in file_rows(file):
                id += 1
                yield _document(row, id, where)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file}: cannot be read ({error})") from None
    if id < 0:
        raise ValueError(f"{source}: no documents")


def read_corpus(source: str | Path) -> list[Document]:
    """All documents of a corpus at once."""
    return list(documents(source))


# ------------------------------------------------------------------------------ held-out documents

TRAIN, HELD_OUT, DROPPED = 0, 1, 2
# Scripts without spaces: Thai and Lao, Burmese, Khmer, kana, and the ideographs.
ALONE = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
         "\U00020000-\U0003ffff")
WORD = re.compile(rf"[{ALONE}]|[^\W{ALONE}]+")
RUN = 8  # words


def _word_runs(text: str) -> np.ndarray:
    """The set of a text's runs of eight words, or of all if there are fewer, as uint64 hashes of
    this process. Words are in lower case and without punctuation; a character each where the
    script has no spaces."""
    words = np.array(list(map(hash, WORD.findall(text.casefold()))), dtype=np.int64)
    words, size = words.view(np.uint64), min(RUN, len(words))
    runs = np.full(len(words) - size + 1, size, np.uint64)
    for place in range(size):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + words[place: place + len(runs)]
    return np.unique(runs)


def split_documents(texts: Callable[[], Iterable[str]], hashes: np.ndarray, holdout: int,
                    seed: int) -> np.ndarray:
    """TRAIN, HELD_OUT or DROPPED for each document, int8 [D].

    texts: gives what is asked of each document, in order; it is read twice, and only the runs of
    held-out documents are kept. hashes [D]: of their contents. Held out are those with the
    `holdout` smallest hashes of (seed, content), so that a document that is added changes at most
    one. Dropped are near-duplicates of a held-out document: at least half of the runs of eight
    words of the shorter one are in the other. (Of two equally long texts with one word changed in 40
    three quarters are; a Jaccard index of 1/2 or more is included.)
    """
    keys = [hashlib.blake2b(f"{seed} {content}".encode()).digest() for content in hashes.tolist()]
    split = np.full(len(keys), TRAIN, np.int8)
    split[sorted(range(len(keys)), key=keys.__getitem__)[:holdout]] = HELD_OUT
    held = [_word_runs(text) for text, part in zip(texts(), split, strict=True) if part == HELD_OUT]
    if not held:
        return split
    sizes, runs = np.array(list(map(len, held))), np.concatenate(held)
    order = np.argsort(runs)
    runs, owners = runs[order], np.repeat(np.arange(len(held)), sizes)[order]
    for number, text in enumerate(texts()):
        if split[number] == HELD_OUT:
            continue
        own = _word_runs(text)
        first, last = np.searchsorted(runs, own, "left"), np.searchsorted(runs, own, "right")
        found = [owners[a:b] for a, b in zip(first, last) if b > a] if (last > first).any() else []
        if found:
            shared = np.bincount(np.concatenate(found), minlength=len(sizes))
            if (2 * shared >= np.minimum(sizes, len(own))).any():
                split[number] = DROPPED
    return split


def content_hash(text: str) -> int:
    """64 bits that name a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def fingerprint(*parts: object) -> str:
    """A short name for a set of inputs: a file (a Path) by its content, a folder by its files' names
    and contents, everything else by its text."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        if not isinstance(part, Path):
            digest.update(repr(part).encode() + b"\0")
            continue
        is_folder = part.is_dir()
        for file in sorted(filter(Path.is_file, part.iterdir())) if is_folder else [part]:
            with open(file, "rb") as content:
                name = file.name.encode() if is_folder else b""
                digest.update(name + hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Holds the lock of this name among processes; take it before looking at what it guards."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# -------------------------------------------------------------------------------- tokenised corpora

BATCH = 2**20  # characters tokenised at a time


@dataclass(frozen=True)
class Corpus:
    """The documents of a corpus as token ids, in files; D documents, N tokens."""

    tokenizer: Tokenizer
    tokens: np.ndarray  # uint32 [N], of all documents one after the other
    starts: np.ndarray  # int64 [D + 1]: document d is tokens[starts[d]: starts[d + 1]]
    regions: np.ndarray  # int64 [D]: the token where the solution or response begins, or the document
    is_chat: np.ndarray  # bool [D]: a prompt in the chat format and a response
    split: np.ndarray  # int8 [D]: TRAIN, HELD_OUT or DROPPED
    fingerprint: str  # of the tokenizer and of all tokens

    def ids(self, document: int) -> np.ndarray:
        """The tokens of a document, uint32."""
        return self.tokens[self.starts[document]: self.starts[document + 1]]


ARRAYS = {"starts": np.int64, "regions": np.int64, "is_chat": np.bool_, "hashes": np.uint64}


def _asked(document: Document) -> str:
    """What near-duplicates are judged by."""
    return document.prompt or document.text


def _batches(source: str | Path) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in tqdm(documents(source), desc="tokenize", unit=" documents", disable=None):
        batch.append(document)
        size += len(document.text)
        if size > BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _encode_documents(tokenizer: Tokenizer, batch: Sequence[Document],
                      sizes: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """The ids of each document, and the place in them where its solution or response begins.

    sizes: the bytes of each token. ValueError if the tokens of a document do not spell it.
    """
    texts = iter(tokenizer.encode_batch([d.text for d in batch if d.prompt is None]))
    for document in batch:
        if document.prompt is not None:
            prompt = tokenizer.chat(document.prompt)
            ids = prompt + tokenizer.response_ids(document.response)
            yield np.array(ids, np.uint32), len(prompt)
            continue
        ids, place = np.array(next(texts), np.uint32), 0
        ends, size = sizes[ids].cumsum(), len(document.text.encode())
        if ends[-1] - size not in (0, int(tokenizer.adds_space)):
            raise ValueError(
                f"document {document.id + 1} of the corpus has a character that its tokens do not give"
                f" back (SentencePiece reads ▁, U+2581, as a space): {document.text[:60]!r}")
        if document.problem is not None:
            solution = document.text[len(document.problem):].lstrip().encode()
            place = int(np.searchsorted(ends, ends[-1] - len(solution))) + 1
        yield ids, place


def _tokenize(source: str | Path, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokens.u32, the small arrays and the fingerprint of a corpus to a folder."""
    sizes = np.array([len(tokenizer.token_bytes(id)) for id in range(len(tokenizer))])
    digest = hashlib.blake2b(fingerprint(tokenizer.files["tokenizer.json"]).encode(), digest_size=12)
    columns, total = {name: [] for name in ARRAYS}, 0
    with open(folder / "tokens.u32", "wb") as out:
        for batch in _batches(source):
            for document, (ids, place) in zip(batch, _encode_documents(tokenizer, batch, sizes)):
                row = (total, total + place, document.prompt is not None,
                       content_hash(_asked(document)))
                for column, value in zip(columns.values(), row):
                    column.append(value)
                digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
                ids.tofile(out)
                total += len(ids)
    columns["starts"].append(total)
    for name, dtype in ARRAYS.items():
        np.array(columns[name], dtype).tofile(folder / name)
    (folder / "fingerprint").write_text(digest.hexdigest())


def load_corpus(source: str | Path, tokenizer: Tokenizer, cache: str | Path, holdout: int,
                seed: int) -> Corpus:
    """A corpus as flat files in a folder of `cache`, and its split; made once for the same content.

    source: see documents(). Files are written aside and renamed, under a lock that is taken before
    anything is looked at, so several processes may begin together and any may be killed.
    """
    made_of = (tokenizer.files["tokenizer.json"], tokenizer.bos, tokenizer.chat("\0"))
    folder = Path(cache) / f"corpus-{fingerprint(*made_of, *corpus_files(source))}"
    split = folder / f"split-{holdout}-{seed}"
    with locked(folder.with_suffix(".lock")):
        arrays = {name: np.fromfile(folder / name, dtype) for name, dtype in ARRAYS.items()
                  if (folder / name).exists()}
        tokens = folder / "tokens.u32"
        if len(arrays) < len(ARRAYS) or tokens.stat().st_size != 4 * arrays["starts"][-1]:
            aside = folder.with_suffix(".aside")
            for old in (folder, aside):
                shutil.rmtree(old, ignore_errors=True)
            aside.mkdir()
            _tokenize(source, tokenizer, aside)
            aside.rename(folder)
            arrays = {name: np.fromfile(folder / name, dtype) for name, dtype in ARRAYS.items()}
        hashes = arrays.pop("hashes")
        if not split.exists():
            aside = split.with_suffix(".aside")
            split_documents(lambda: map(_asked, documents(source)), hashes, holdout,
                            seed).tofile(aside)
            aside.rename(split)
    return Corpus(tokenizer, np.memmap(tokens, np.uint32, "r"), split=np.fromfile(split, np.int8),
                  fingerprint=(folder / "fingerprint").read_text(), **arrays)


# --------------------------------------------------------------------------------------- questions

TRUTH_TOKENS = 32  # how much of the continuation a prediction may span; the paper does not say
CHUNK = 2**20  # positions looked at in one go


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
        start, end = corpus.starts[document: document + 2].tolist()
        following = corpus.tokens[place: min(place + TRUTH_TOKENS, end)].tolist()
        truth = tuple(map(corpus.tokenizer.token_bytes, following))
        return Question(tuple(corpus.tokens[start:place].tolist()), truth, document, place - start,
                        float(self.entropy[place]))


@dataclass(frozen=True)
class PositionFilter:
    """The positions to ask about, after the paper's token-level filter (section 3.2).

    kind "threshold": entropy above `value` nats; "top": the `value` share of highest entropy, the
    earlier of equals; "random": a random `value` share. Contexts of min_context to max_context
    tokens (0: no bound). region "solution": only what follows a problem or prompt.
    """

    kind: str = "threshold"
    value: float = 0.5
    min_context: int = 1
    max_context: int = 0
    region: str = "all"
    seed: int = 0

    def __post_init__(self):
        if self.kind not in ("threshold", "top", "random") or self.region not in ("all", "solution"):
            raise ValueError(f"filter {self.kind!r} in {self.region!r}: the kinds are threshold, top "
                             "and random, the regions all and solution")
        if self.kind != "threshold" and not 0 <= self.value <= 1:
            raise ValueError(f"filter {self.kind} {self.value:g}: a share is between 0 and 1")


def _candidates(corpus: Corpus, entropy: np.ndarray, chosen: PositionFilter,
                split: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunk by chunk, the positions that a filter may keep and their entropies."""
    first = corpus.starts[:-1] + max(chosen.min_context, 1)
    last = corpus.starts[1:]
    if chosen.region == "solution":
        first = np.maximum(first, corpus.regions)
    if chosen.max_context:
        last = np.minimum(last, corpus.starts[:-1] + chosen.max_context + 1)
    there = (corpus.split == split) & (first < last)
    first, last = first[there], last[there]
    for begin in range(0, len(corpus.tokens), CHUNK):
        values = np.array(entropy[begin: begin + CHUNK])
        steps = np.zeros(len(values) + 1, np.int8)  # where a document's positions begin and end
        for edges, step in ((first, 1), (last, -1)):
            here = edges[np.searchsorted(edges, begin): np.searchsorted(edges, begin + CHUNK)]
            steps[here - begin] += np.int8(step)
        steps[0] += np.searchsorted(first, begin) - np.searchsorted(last, begin)
        places = np.flatnonzero((np.cumsum(steps[:-1], dtype=np.int8) > 0) & np.isfinite(values))
        yield places + begin, values[places]


def _ordered(values: np.ndarray) -> np.ndarray:
    """float32 to uint32 that compare alike; 0.0 and -0.0 are one."""
    bits = (values + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(2**31))


def _top(chunks: Callable[[], Iterator], share: float) -> Iterator[np.ndarray]:
    """The positions of the `share` highest entropies, the earlier of equals, in three passes: two
    histograms find the entropy of the last one kept."""
    counts = sum(np.bincount(_ordered(v) >> 16, minlength=2**16) for _, v in chunks())
    left = int(np.ceil(share * counts.sum()))
    edge = 0
    for bits in (16, 0):
        if bits == 0:
            inside = (_ordered(v) for _, v in chunks())
            counts = sum(np.bincount(o[o >> 16 == edge] & 0xFFFF, minlength=2**16) for o in inside)
        above = counts[::-1].cumsum()
        behind = int(np.searchsorted(above, left))  # buckets that are kept whole
        left -= int(above[behind - 1]) if behind else 0
        edge = (edge << 16) + 2**16 - 1 - behind
    for places, values in chunks():
        order = _ordered(values)
        equal = order == edge
        kept = (order > edge) | (equal & (np.cumsum(equal) <= left))
        left -= min(left, int(equal.sum()))
        yield places[kept]


def _reachable(corpus: Corpus, decided: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Of some positions, those whose truth a \\boxed{} can hold. decided: see select_positions."""
    known = decided[corpus.tokens[places]]
    keep = known == 1
    open_ones = np.flatnonzero(known < 0)
    ends = corpus.starts[np.searchsorted(corpus.starts, places[open_ones], "right")]
    for n, end in zip(open_ones, ends):
        following = corpus.tokens[places[n]: min(places[n] + TRUTH_TOKENS, end)].tolist()
        keep[n] = reachable(map(corpus.tokenizer.token_bytes, following))
    return places[keep]


def select_positions(corpus: Corpus, entropy: np.ndarray, chosen: PositionFilter,
                     split: int = TRAIN) -> QuestionSet:
    """The positions of a part of a corpus that a filter keeps.

    entropy float32 [N]: of every token of the corpus. Left out: positions without a finite entropy,
    and truths that no \\boxed{} can hold (see reward.reachable). What is kept takes 8 bytes a
    position in a file that goes with the set; memory holds a chunk.
    """
    if len(entropy) != len(corpus.tokens):
        raise ValueError(f"{len(entropy)} entropies for {len(corpus.tokens)} tokens")
    random = np.random.default_rng([chosen.seed, 5])

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return _candidates(corpus, entropy, chosen, split)

    if chosen.kind == "threshold":
        kept = (places[values > chosen.value] for places, values in chunks())
    elif chosen.kind == "random":
        kept = (places[random.random(len(places)) < chosen.value] for places, _ in chunks())
    else:
        kept = _top(chunks, chosen.value)
    # Whether a truth is reachable: 1 or 0 where its first token decides, else -1.
    decided = np.ones(len(corpus.tokenizer), np.int8)
    for id in range(len(decided)):
        token = corpus.tokenizer.token_bytes(id)
        if not token or b"{" in token or b"}" in token or b"</think>" in token:
            is_open = not token or token.count(b"{") > token.count(b"}")
            decided[id] = -1 if is_open else reachable([token])
    with tempfile.TemporaryFile() as file:
        for places in kept:
            _reachable(corpus, decided, places).tofile(file)
        positions = np.memmap(file, np.int64, "r") if file.tell() else np.zeros(0, np.int64)
    return QuestionSet(corpus, entropy, positions)


def answer_sets(source: str | Path, tokenizer: Tokenizer, holdout: int,
                seed: int) -> tuple[list[Question], list[Question], str]:
    """Questions with verifiable answers, to train on and held out, and a line about them.

    What is held out, and what is near it, is judged by the problem alone: it is all that is asked.
    """
    rows = read_corpus(source)
    if missing := next((row for row in rows if row.answer is None), None):
        raise ValueError(f"document {missing.id + 1} of the corpus has no `answer`; "
                         "stage rlvr needs one for every problem")
    problems = [row.problem or row.text for row in rows]
    split = split_documents(lambda: problems, np.array(list(map(content_hash, problems)), np.uint64),
                            holdout, seed)
    questions = [Question(tuple(ids), (), row.id, 0, answer=row.answer)
                 for ids, row in zip(tokenizer.encode_batch(problems), rows)]
    train, held = ([questions[n] for n in np.flatnonzero(split == part)]
                   for part in (TRAIN, HELD_OUT))
    dropped = len(rows) - len(train) - len(held)
    return train, held, (f"questions with answers: {len(train):,}, held out {len(held):,}, "
                         f"{dropped:,} near-duplicates dropped")


@dataclass(frozen=True)
class SequenceSet:
    """Training documents as runs of tokens for next-token prediction; [n] is (ids, first): the loss
    is of ids[first:]."""

    corpus: Corpus
    max_tokens: int
    documents: np.ndarray  # int64 [D']
    ends: np.ndarray  # int64 [D']: how many sequences there are up to and with each document

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, n: int) -> tuple[list[int], int]:
        corpus, tokenizer = self.corpus, self.corpus.tokenizer
        place = int(np.searchsorted(self.ends, n, "right"))
        document = int(self.documents[place])
        start, end = corpus.starts[document: document + 2].tolist()
        if corpus.is_chat[document]:
            first = int(corpus.regions[document]) - start
            return corpus.tokens[start:end].tolist() + tokenizer.eos_ids[:1], first
        # Windows share one token, so that every token but the first is predicted once.
        begin = (n - (int(self.ends[place - 1]) if place else 0)) * (self.max_tokens - 1)
        bos = tokenizer.bos[begin:]
        body = start + max(begin - len(tokenizer.bos), 0)
        ids = corpus.tokens[body: min(body + self.max_tokens, end)].tolist()
        return (bos + ids + tokenizer.eos_ids[:1])[: self.max_tokens], 1


def sequences(corpus: Corpus, max_tokens: int) -> SequenceSet:
    """What stage ntp trains on: of the training split alone, plain documents between bos (if the
    tokenizer has one) and the end token in windows of at most max_tokens, and responses with their
    end token behind their prompts, whole. ValueError if one of these is longer than max_tokens."""
    chosen = np.flatnonzero(corpus.split == TRAIN)
    is_chat = corpus.is_chat[chosen]
    lengths = np.diff(corpus.starts)[chosen] + 1 + np.where(is_chat, 0, len(corpus.tokenizer.bos))
    too_long = np.flatnonzero(is_chat & (lengths > max_tokens))
    if max_tokens < 2 or len(too_long):
        what = f"document {chosen[too_long[0]] + 1} takes {lengths[too_long[0]]} tokens, " \
            if len(too_long) else ""
        raise ValueError(f"{what}max_tokens is {max_tokens}; raise it or leave the document out")
    windows = np.where(is_chat, 1, -(-(lengths - 1) // (max_tokens - 1)))
    return SequenceSet(corpus, max_tokens, chosen, windows.cumsum())


def random_indices(total: int, seed: int, step: int, retry: int, count: int) -> list[int]:
    """`count` different numbers below `total` (repeated only if there are fewer), by (seed, step,
    retry) alone."""
    key, counter = [seed % 2**63, 1], [0, step, retry, 0]
    random = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return random.choice(total, count, replace=count > total).tolist()


# --------------------------------------------------------------------------------------- templates

_ASK = ("Complete the given text under {} by predicting the next token, and wrap it in ‘\\boxed{{}}’. "
        "Please reason step by step to find the most probable next token{}, and enclose it in "
        "\\boxed{{}} ")
_LIST = ("by predicting the next token, list multiple potential tokens and select the most probable "
         "one as the final ")
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
    """The chat-formatted prompt of a question; a context that is too long loses its beginning, never
    its end.

    A problem with an answer is a whole text and encoded with what stands around it, as the model's
    users will; the tokens of an unfinished text stay as the document has them.
    """
    if question.answer is not None:
        text = tokenizer.bytes_of(question.context).decode()
        text = text.removeprefix(" ") if tokenizer.adds_space else text
        ids = tokenizer.chat(TEMPLATES[template].replace("{context}", text))
        if len(ids) <= max_prompt:
            return ids
    frame = len(tokenizer.chat(TEMPLATES[template], []))
    if frame >= max_prompt:
        raise ValueError(f"--max-prompt {max_prompt}: template {template} alone takes {frame} tokens")
    return tokenizer.chat(TEMPLATES[template], question.context[-(max_prompt - frame):])
