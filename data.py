r"""From text to questions: tokenizer, chat format, corpora, the filter of positions, templates.

    rows of a corpus --tokenize--> Corpus(tokens, starts, ...)     one array for all documents
        | a proxy model's entropy at every position (paper, section 3.2; eval.py)
        v positions that a filter keeps
    Question(context ids, truth: bytes of each following token) --template, chat--> prompt ids

Text is bytes from here to the reward, because a token may end inside a character. Nothing here
needs a model. A corpus is held in memory, four bytes a token. RPT asks about some hundred thousand
positions, so 10^8 tokens are plenty; sample from a larger corpus first.
"""

import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import tokenizers
from huggingface_hub import snapshot_download
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import pre_tokenizers

from reward import answer_match, box, extract_prediction

# --------------------------------------------------------------------------------------- tokenizer

# Byte-level BPE writes a printable byte as its own Latin-1 character, the others in order as
# characters 256, 257, ...
CHARS = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = sorted(range(256), key=lambda byte: chr(byte) not in CHARS)
BYTE_OF = {char: bytes([byte]) for char, byte in zip(CHARS, BYTES)}
PLAIN_CHAT = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
THINK = "{{ '<think>\\n' if add_generation_prompt }}"  # for templates that do not know thinking


def read_json(file: Path) -> dict:
    """Return a JSON object from a file, or {} if there is no file."""
    return json.loads(file.read_bytes()) if file.exists() else {}


class Tokenizer:
    """A byte-level BPE tokenizer.json with the exact bytes of every token, and its chat template.

    Documents are encoded as plain text: `<think>` in one is not the special token. In rows of
    prompt and response it is. A chat template that shows the date shows `today` (an ISO date), also
    after it is saved.
    """

    def __init__(self, directory: str | Path, today: str = ""):
        self.directory = Path(directory)
        spec, self.config, self.generation, model = (
            read_json(self.directory / f"{name}.json")
            for name in ("tokenizer", "tokenizer_config", "generation_config", "config"))
        if "ByteLevel" not in str(spec.get("decoder")):
            raise ValueError(f"{directory}: no tokenizer.json of a byte-level BPE, the only kind "
                             "that is supported")
        self.special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        plain = spec | {"post_processor": None, "truncation": None, "padding": None}
        self._chat, self._bpe = (tokenizers.Tokenizer.from_str(json.dumps(part)) for part in (
            plain, plain | {"added_tokens": []}))
        contents = {id: b"".join(BYTE_OF.get(char, char.encode()) for char in token)
                    for token, id in self._bpe.get_vocab().items()}
        contents |= {id: token.encode() for token, id in self.special.items()}
        self.contents = [contents.get(id, b"") for id in range(1 + max(contents))]
        self.ids_of = defaultdict(list)  # a few tokens are spelled by several ids
        for id, content in contents.items():
            self.ids_of[content].append(id)

        bos, eos = (token["content"] if isinstance(token, dict) else token
                    for token in map(self.config.get, ("bos_token", "eos_token")))
        wants_bos = self.config.get("add_bos_token", f"'{bos}'" in str(spec["post_processor"]))
        self.bos = [self.special[bos]] if bos and wants_bos else []
        # Fine-tuning often leaves a base model's end token in one of the files, so take all.
        ends = [self.generation.get("eos_token_id"), model.get("eos_token_id"),
                self.special.get(eos)]
        ends = sum((end if isinstance(end, list) else [end] for end in ends), [])
        self.eos_ids = list(dict.fromkeys(end for end in ends if end is not None))
        if not self.eos_ids:
            raise ValueError(f"{directory}: none of its files names an end token")
        try:
            self._read_template(bos, eos, today)
        except Exception as error:  # a template may raise anything
            raise ValueError(f"{directory}: the chat template in chat_template.jinja or "
                             f"tokenizer_config.json cannot be used ({error})") from None

    def _read_template(self, bos: str, eos: str, today: str) -> None:
        """Render the chat template around a user's prompt and after an assistant's message."""
        day = date.fromisoformat(today) if today else date.today()
        beside = self.directory / "chat_template.jinja"
        template = (beside.read_text() if beside.exists() else self.config.get("chat_template")
                    or "{{ bos_token }}" * len(self.bos) + PLAIN_CHAT)
        if isinstance(template, list):  # as transformers wrote several templates once
            template = {entry["name"]: entry["template"] for entry in template}["default"]
        template = re.sub(r"strftime_now\((['\"])(.*?)\1\)",
                          lambda call: repr(day.strftime(call[2])), template)

        def render(*messages: str, add_generation_prompt: bool) -> str:
            # Marks of what the assistant generates print nothing; transformers knows them too.
            source = re.sub(r"({%-?\s*)(?:end)?generation(\s*-?%})", r"\1set _ = 1\2", template)
            return ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
            ).from_string(source).render(
                messages=[{"role": role, "content": text}
                          for role, text in zip(("user", "assistant"), messages)],
                add_generation_prompt=add_generation_prompt, bos_token=bos or "", eos_token=eos,
                tools=None, documents=None, strftime_now=day.strftime)

        if ("<think>" not in render("\0", add_generation_prompt=True)
                and "enable_thinking" not in template):
            template = template.removesuffix("\n") + THINK
        self.template = template
        self._before, self._after = render("\0", add_generation_prompt=True).split("\0")
        _, _, behind = render("?", "\0", add_generation_prompt=False).partition("\0")
        closing = [id for id in self.encode_chat(behind) if id in self.eos_ids]
        self.end = (closing or self.eos_ids)[0]  # what closes an assistant's message

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files, with the end tokens and the chat template that are used."""
        shutil.copy(self.directory / "tokenizer.json", directory)
        for name, content in {
                "generation_config": self.generation | {"eos_token_id": self.eos_ids},
                "tokenizer_config": self.config | {"chat_template": self.template}}.items():
            (Path(directory) / f"{name}.json").write_text(json.dumps(content, indent=1))

    def __len__(self) -> int:
        return len(self.contents)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens whatever it spells."""
        return self._bpe.encode(text).ids

    def encode_chat(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are meant."""
        return self._chat.encode(text).ids

    def chat(self, prompt: str, context: Sequence[int] | None = None) -> list[int]:
        """Return the ids of a user's prompt in the model's chat format, up to where the assistant
        begins. A context, if given, replaces {context} as ids, because a document's tokens may end
        inside a character."""
        before, _, after = (prompt, "", "") if context is None else prompt.partition("{context}")
        return (self.encode_chat(self._before + before) + list(context or ())
                + self.encode_chat(after + self._after))

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of a token, none for an id that only pads the model's vocabulary."""
        return self.contents[id] if id < len(self) else b""

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of a run of tokens."""
        return b"".join(map(self.token_bytes, ids))

    def tokens(self, text: bytes) -> list[bytes]:
        """Return the bytes of each token of a text; none if it is not UTF-8."""
        try:
            return [self.token_bytes(id) for id in self.encode(text.decode())]
        except UnicodeDecodeError:
            return []


# ----------------------------------------------------------------------------------------- corpora

NOT_TEXT = (".", "readme", "licen", "requirements")  # how the names of other files begin


@dataclass(frozen=True)
class Document:
    """A row of a corpus. What is to be predicted is `text`; `given` precedes it."""

    given: str  # a problem, a prompt in the chat format, or ""
    text: str
    answer: str  # verifiable, or ""
    is_chat: bool
    where: str  # file and line


def field_of(row: dict, *names: str) -> str:
    """Return the first of the fields that is present as text, "" if none is. A list is joined."""
    for name in names:
        value = row.get(name)
        if isinstance(value, list):
            value = "\n\n".join(str(part) for part in value if part is not None)
        if type(value) in (str, int, float) and value != "":
            return unicodedata.normalize(
                "NFC", str(value).encode(errors="replace").decode())  # half a UTF-16 pair: "?"
    return ""


def read_files(source: str | Path) -> Iterator[tuple[dict, str]]:
    """Yield the rows of a corpus, each with its file and line. NaN, which pandas writes for a
    missing value, becomes None.

    source: a .jsonl or .txt file, a folder of them, or a dataset of the hub that has some. In a
    .txt, <|endoftext|> stands between documents.
    """
    path = Path(source)
    if not path.exists():
        try:
            path = Path(snapshot_download(str(source), repo_type="dataset",
                                          allow_patterns=["*.jsonl", "*.txt"]))
        except Exception as error:  # the hub's client raises many kinds
            raise FileNotFoundError(f"{source}: no such file or folder, and not available from the "
                                    f"hub ({str(error).splitlines()[0]})") from None
    files = [file for file in sorted(path.rglob("*")) or [path] if not any(
        part.lower().startswith(NOT_TEXT) for part in file.relative_to(path).parts)]
    for file in files:
        where = file
        try:
            if file.suffix == ".txt":
                for n, text in enumerate(file.read_text("utf-8-sig").split("<|endoftext|>"), 1):
                    yield {"text": text}, f"{file}, document {n}"
            elif file.suffix == ".jsonl":
                for n, line in enumerate(open(file, "rb"), 1):
                    where = f"{file}, line {n}"
                    if line.strip():
                        yield dict(json.loads(line, parse_constant=lambda _: None)), where
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: not UTF-8, or not a JSON object ({error})") from None


def read_documents(source: str | Path) -> list[Document]:
    """Read a corpus. A row has `text`, or `prompt` and `response`, or `problem` (`question`), with
    `solution`, `answer`, both or none. Rows of empty text are skipped. Raise ValueError, naming
    file and line, for rows without these fields."""
    documents = []
    for row, where in read_files(source):
        text, prompt, response = (field_of(row, name) for name in ("text", "prompt", "response"))
        problem, answer = field_of(row, "problem", "question"), field_of(row, "answer")
        is_chat = bool(prompt and response)
        if is_chat:
            given, text = prompt, response
        elif problem:
            given, text = f"{problem}\n\n", field_of(row, "solution", "answer").lstrip()
        else:
            given = ""
        if (given + text).strip():
            documents.append(Document(given, text, answer, is_chat, where))
        elif "text" not in row:
            raise ValueError(f"{where}: it has no text, problem or question, and no prompt with a "
                             "response")
    if not documents:
        raise ValueError(f"{source}: no documents; a corpus is a .jsonl or .txt file, or a folder "
                         "of them")
    return documents


def hold_out(texts: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Choose the texts with the `count` smallest hashes of (seed, text), bool [D].

    Texts that differ only in case and spaces stay together. A text that is added to the corpus
    displaces at most one.
    """
    plain = (" ".join(text.casefold().split()) for text in texts)
    keys = [hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest() for text in plain]
    chosen = set(sorted(set(keys))[:count])
    return np.array([key in chosen for key in keys], dtype=bool)


@dataclass(frozen=True)
class Corpus:
    """The documents of a corpus as token ids; D documents, N tokens."""

    tokenizer: Tokenizer
    tokens: np.ndarray  # uint32 [N], of all documents one after the other
    starts: np.ndarray  # int64 [D + 1]: document d is tokens[starts[d]: starts[d + 1]]
    given: np.ndarray  # int64 [D]: tokens of its problem or prompt
    is_chat: np.ndarray  # bool [D]: a prompt in the chat format and a response
    held: np.ndarray  # bool [D]: never trained on
    ends: np.ndarray  # bool [D]: the last piece of its text

    def ids(self, document: int) -> list[int]:
        """Return the tokens of a document."""
        return self.tokens[self.starts[document]: self.starts[document + 1]].tolist()


def load_corpus(source: str | Path, tokenizer: Tokenizer, holdout: int, seed: int,
                max_tokens: int) -> Corpus:
    """Read and tokenize a corpus, holding out `holdout` documents.

    A text of more than max_tokens is cut into pieces, which count as documents of their own. A
    prompt with its response is not cut, and raises ValueError.
    """
    documents, pieces = read_documents(source), []
    held = hold_out([document.given + document.text for document in documents], holdout, seed)
    sizes = np.array([*map(len, tokenizer.contents)])
    for document, out in zip(documents, held):
        if document.is_chat:  # a response is sampled after the ids of its prompt
            prompt = tokenizer.chat(document.given)
            first, ids = len(prompt), prompt + tokenizer.encode_chat(document.text)
        else:  # a token that spans the border is of the text
            ids = tokenizer.encode(document.given + document.text)
            first = np.sum(np.cumsum(sizes[ids]) <= len(document.given.encode()))
        ids = np.array(ids, np.uint32)
        if document.is_chat and len(ids) > max_tokens:
            raise ValueError(f"{document.where}: prompt and response have {len(ids)} tokens; raise "
                             f"--max-prompt {max_tokens} or leave the row out")
        pieces += [(ids[begin: begin + max_tokens], max(first - begin, 0), document.is_chat,
                    out, begin + max_tokens >= len(ids))
                   for begin in range(0, len(ids), max_tokens)]
    texts, *columns = zip(*pieces)
    return Corpus(tokenizer, np.concatenate(texts), np.cumsum([0, *map(len, texts)]),
                  *map(np.array, columns))


# --------------------------------------------------------------------------------------- questions

TRUTH_TOKENS = 32  # how much of the continuation a prediction may span; the paper does not say


@dataclass(frozen=True)
class Question:
    """A position of a document: what precedes it, and the bytes of each token that follows."""

    context: tuple[int, ...]
    truth: tuple[bytes, ...]
    document: int
    position: int  # of the first token to predict, in tokens of the document
    entropy: float | None = None  # nats, under the proxy
    answer: str | None = None  # of a problem with a verifiable answer; its context is the problem


@dataclass(frozen=True)
class QuestionSet:
    """Positions of a corpus that are asked about; [n] makes the n-th question."""

    corpus: Corpus
    entropy: np.ndarray  # float32 [N], nats, of every token of the corpus
    places: np.ndarray  # int64 [n], indices of corpus.tokens, ascending

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, n: int) -> Question:
        corpus, place = self.corpus, int(self.places[n])
        document = int(np.searchsorted(corpus.starts, place, "right")) - 1
        ids, position = corpus.ids(document), place - int(corpus.starts[document])
        truth = map(corpus.tokenizer.token_bytes, ids[position: position + TRUTH_TOKENS])
        return Question(tuple(ids[:position]), tuple(truth), document, position,
                        float(self.entropy[place]))


def select_positions(corpus: Corpus, entropy: np.ndarray, held: bool, min_entropy: float,
                     region: str = "all", min_context: int = 1) -> QuestionSet:
    """Choose the positions to ask about: entropy above min_entropy nats (section 3.2).

    region "solution": only what follows a problem or prompt. A position is left out if no box can
    hold its first token, for example because of a brace.
    """
    lengths = np.diff(corpus.starts)
    position = np.arange(len(entropy)) - np.repeat(corpus.starts[:-1], lengths)
    can_box = np.array([token != b"" and extract_prediction(box(token)) == token
                        for token in corpus.tokenizer.contents])
    keep = (entropy > min_entropy) & can_box[corpus.tokens] & (position >= min_context)
    keep &= np.repeat(corpus.held == held, lengths)
    if region == "solution":
        keep &= position >= np.repeat(corpus.given, lengths)
    return QuestionSet(corpus, entropy, np.flatnonzero(keep))


def answer_questions(source: str | Path, tokenizer: Tokenizer, max_prompt: int, holdout: int = 0,
                     seed: int = 0) -> tuple[list[Question], list[Question]]:
    """Read problems with verifiable answers: those to train on, and those held out.

    Leave out problems longer than max_prompt and those whose answer no response can earn, and print
    how many.
    """
    documents, sets = read_documents(source), ([], [])
    problems = [document.given.strip() or document.text for document in documents]
    for n, out in enumerate(hold_out(problems, holdout, seed)):
        ids, answer = tokenizer.encode(problems[n]), documents[n].answer
        short = len(tokenizer.chat("{context}", ids)) <= max_prompt
        if short and answer_match(extract_prediction(box(answer.encode())), answer):
            sets[int(out)].append(Question(tuple(ids), (), n, 0, answer=answer))
    if (left_out := len(documents) - sum(map(len, sets))) and os.environ.get("RANK", "0") == "0":
        print(f"{source}: {left_out} problems are left out, because they are longer than "
              "--max-prompt or no response can earn the answer")
    return sets


def sequences(corpus: Corpus) -> list[tuple[list[int], int]]:
    """Return what stage ntp trains on: (ids, first) of each training document, where the loss is of
    ids[first:]. A response ends as the chat template ends it, a text with an end token."""
    found, tokenizer = [], corpus.tokenizer
    for d in np.flatnonzero(~corpus.held):
        if corpus.is_chat[d]:
            found.append(([*corpus.ids(d), tokenizer.end], int(corpus.given[d])))
        else:
            end = tokenizer.eos_ids[:1] if corpus.ends[d] else []
            found.append(([*tokenizer.bos, *corpus.ids(d), *end], 1))
    return [(ids, first) for ids, first in found if len(ids) > first]


def random_indices(total: int, seed: int, step: int, retry: int, count: int) -> list[int]:
    """Draw `count` numbers below `total` as a function of (seed, step, retry) alone. Within
    one draw they repeat only if there are fewer than `count`."""
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
    "plain": "{context}",  # problems with answers
}


def prompt_ids(tokenizer: Tokenizer, question: Question, template: str,
               max_prompt: int) -> list[int]:
    """Return a question's prompt in the chat format; a context that is too long loses its
    beginning, never its end."""
    room = max_prompt - len(tokenizer.chat(TEMPLATES[template], []))
    if room < 1:
        raise ValueError(f"--max-prompt {max_prompt} leaves no room for a context in template "
                         f"{template}")
    return tokenizer.chat(TEMPLATES[template], question.context[-room:])
