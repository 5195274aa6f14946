"""From text to questions: tokenizer, corpora, the entropy filter, prompt templates, and the toy world.

    document --tokenize once--> ids and the bytes of each token
        | a proxy model's entropy over its top-16 next tokens, at every position (paper, section 3.2)
        v keep the positions that a selector names
    Question(context ids, truth: the bytes of each following token) --template, chat format--> prompt ids

Text is bytes from here to the reward; a tokenizer may split a character, so only bytes have exact token boundaries.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from random import Random

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from model import Transformer, all_gather, load_pretrained, rank_and_world, read_json, resolve
from reward import reachable
from sampler import pad

MAX_LINE = 16 * 2**20  # bytes of one corpus line or document; a longer one is a mistake or should be split
TRUTH_TOKENS = 32  # how much of the continuation a prediction may span; the paper does not say

# ---------------------------------------------------------------------------------------------- tokenizer

CHATS = {  # by the special token that gives the family away: what stands around the prompt, thinking opened
    "<｜User｜>": "<｜begin▁of▁sentence｜><｜User｜>\0<｜Assistant｜><think>\n",  # DeepSeek-R1-Distill
    "<|im_start|>": "{system}<|im_start|>user\n\0<|im_end|>\n<|im_start|>assistant\n<think>\n",  # Qwen, SmolLM2
    "<|start_header_id|>": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n\0<|eot_id|>"
                           "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n",  # Llama 3
    None: "{bos}\0\n<think>\n",
}
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "special_tokens_map.json",
         "chat_template.jinja")
# Byte-level BPE writes a printable byte as its own Latin-1 character, the others in order as characters 256, 257, ...
CHARS = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_OF_CHAR = dict(zip(CHARS, sorted(range(256), key=lambda byte: chr(byte) not in CHARS)))


class Tokenizer:
    """A Hugging Face tokenizer.json with the exact bytes of every token.

    Text is encoded as text: a corpus that spells `<think>` or an end token does not get the special token.
    """

    def __init__(self, files: dict[str, bytes], where: str):
        """files: the contents of those of FILES that exist. where: the folder that an error names."""
        self.files = {name: content for name, content in files.items() if name != "config.json"}  # that is the model's
        try:
            spec = json.loads(files["tokenizer.json"])
            self.special = {token["content"]: token["id"] for token in spec["added_tokens"]}
            exact = {"prepend": "", "prepend_scheme": "never", "add_prefix_space": False}  # add nothing
            plain = {key: json.loads(json.dumps(spec.get(key)), object_hook=lambda step: step | {
                         name: value for name, value in exact.items() if name in step})
                     for key in ("normalizer", "pre_tokenizer")}
            plain |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
            self._text = tokenizers.Tokenizer.from_str(json.dumps(spec | plain))
            vocabulary = spec["model"]["vocab"]
            if not isinstance(vocabulary, dict):
                raise ValueError("only BPE vocabularies are supported")
            self._bytes = [b""] * (1 + max([*vocabulary.values(), *self.special.values()]))
        except Exception as error:  # the Rust parser raises bare Exceptions
            raise ValueError(f"{where}/tokenizer.json: not a usable tokenizer ({type(error).__name__}: {error})") \
                from None
        byte_level = "ByteLevel" in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
        for token, id in vocabulary.items():
            if byte_level:
                known = BYTE_OF_CHAR.keys() >= set(token)
                self._bytes[id] = bytes(map(BYTE_OF_CHAR.get, token)) if known else token.encode()
            else:
                byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
                self._bytes[id] = bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
        for token, id in self.special.items():
            self._bytes[id] = token.encode()
        self._ids_of = defaultdict(list)
        for id, content in enumerate(self._bytes):
            self._ids_of[content].append(id)

        settings, generation, config = (json.loads(files.get(name, b"{}")) for name in FILES[1:4])
        bos, eos = (token["content"] if isinstance(token, dict) else token
                    for token in (settings.get("bos_token"), settings.get("eos_token")))
        added = json.dumps(spec.get("post_processor"), ensure_ascii=False)
        wants_bos = settings.get("add_bos_token", f'"{bos}"' in added)
        self.bos: list[int] = [self.special[bos]] if wants_bos and bos in self.special else []
        end = next((source["eos_token_id"] for source in (generation, config)
                    if source.get("eos_token_id") is not None), self.special.get(eos))
        if end is None:
            raise ValueError(f"{where}: no end token in generation_config.json, config.json or tokenizer_config.json")
        self.eos_ids: list[int] = [end] if isinstance(end, int) else list(end)
        template = files.get("chat_template.jinja", b"").decode() or str(settings.get("chat_template"))
        self._chat = self._chat_pieces(template, bos if self.bos else "")

    def _chat_pieces(self, template: str, bos: str) -> list[str]:
        """The family's chat format around \\0, with the template's system message, cut at its special tokens."""
        system = re.search(r"<\|im_start\|>system(?:\n|\\n)(?:(?!{[{%])[^'\"<])+<\|im_end\|>(?:\n|\\n)", template)
        system = re.sub(r"\\(.)", lambda c: "\n" if c[1] == "n" else c[1], system[0]) if system else ""
        family = next((token for token in CHATS if token in self.special), None)
        pattern = "|".join([*map(re.escape, sorted(self.special, key=len, reverse=True)), "(?!)"])
        return re.split(f"({pattern})", CHATS[family].replace("{system}", system).replace("{bos}", bos))

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """Reads tokenizer.json and the configs beside it; ValueError or FileNotFoundError of one sentence."""
        files = {name: (Path(path) / name).read_bytes() for name in FILES if (Path(path) / name).is_file()}
        if "tokenizer.json" not in files:
            raise FileNotFoundError(f"{path}: no tokenizer.json")
        for name in files.keys() & set(FILES[1:4]):
            read_json(Path(path) / name)  # raises its own sentence
        return cls(files, str(path))

    def save(self, directory: str | Path) -> None:
        """Writes the files it was read from, with its end tokens in the generation config."""
        generation = json.loads(self.files.get("generation_config.json", b"{}")) | {"eos_token_id": self.eos_ids}
        for name, content in (self.files | {"generation_config.json": json.dumps(generation).encode()}).items():
            (Path(directory) / name).write_bytes(content)

    def __len__(self) -> int:
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens whatever it spells."""
        return self._text.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """encode() of many texts, in parallel."""
        return [encoding.ids for encoding in self._text.encode_batch_fast(list(texts), add_special_tokens=False)]

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
        """The bytes of each token of a text; none for bytes that are not UTF-8."""
        try:
            return [self.token_bytes(id) for id in self.encode(text.decode())]
        except UnicodeDecodeError:
            return []

    def chat(self, prompt: str, context: Sequence[int] | None = None) -> list[int]:
        """Ids of a user's prompt in the model's chat format, the assistant's thinking opened.

        A context is inserted as ids where the prompt says {context}: a document's own tokens, even where it breaks
        off within a character.
        """
        ids = []
        for piece in self._chat:
            before, place, after = piece.replace("\0", prompt).partition("{context}")
            if piece in self.special:
                ids.append(self.special[piece])
            elif place and context is not None:
                ids += self.encode(before) + list(context) + self.encode(after)
            else:
                ids += self.encode(before + place + after)
        return ids

    def thought_ids(self, thought: bytes) -> list[int]:
        """A thought, its end, and the opening of the answer behind it."""
        end = [self.special["</think>"]] if "</think>" in self.special else self.encode("</think>")
        return self.encode(thought.decode(errors="replace")) + end + self.encode("\n\n\\boxed{")


# ---------------------------------------------------------------------------------------------- corpora


@dataclass(frozen=True)
class Document:
    """A text; `problem` is its beginning if it is a problem and its solution, `answer` the verifiable result."""

    text: str
    id: int
    problem: str | None = None
    answer: str | None = None


def _document(row: object, id: int, where: str) -> Document:
    """A JSON row: `text`, or problem (question) and solution, joined by an empty line; `answer` where there is one."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object")
    get = {key: unicodedata.normalize("NFC", str(value)) for key, value in row.items()
           if isinstance(value, (str, int, float))}
    problem = get.get("problem") or get.get("question")
    solution = get.get("solution") or (get.get("answer") if "question" in get else None)
    text = get.get("text") or (f"{problem}\n\n{solution}" if problem and solution else problem)
    if not text or not text.strip():
        raise ValueError(f"{where}: empty document, or no field `text`, or `problem` and `solution`")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{where}: half a surrogate pair (\\ud800 to \\udfff) is no character; mend the text")
    return Document(text, id, problem if problem and text.startswith(problem) else None, get.get("answer"))


def file_rows(file: Path) -> Iterator[tuple[object, str]]:
    """The documents of one file as (row, place); a line is never read beyond its limit."""
    is_json = file.suffix == ".jsonl"
    with open(file, "rb") as content:
        if is_json:
            pieces = iter(lambda: content.readline(MAX_LINE + 1), b"")
        else:
            pieces = re.split(rb"<\|endoftext\|>\s*?(?:\n|\Z)", content.read())
            pieces = pieces if pieces[-1].strip() else pieces[:-1]
        for number, piece in enumerate(pieces, 1):
            where = f"{file} {'line' if is_json else 'document'} {number}"
            if len(piece) > MAX_LINE:
                raise ValueError(f"{where}: longer than {MAX_LINE // 2**20} MiB; one document a line, split this one")
            try:
                text = piece.decode()
                if text.strip() or not is_json:
                    yield json.loads(text) if is_json else {"text": text}, where
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error})") from None


def read_corpus(path: str | Path) -> list[Document]:
    """Documents of a .jsonl or .txt file or of a folder of them, normalised to NFC, ids counting from 0.

    In a .txt, `<|endoftext|>` at the end of a line ends a document. ValueErrors name file and line.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such corpus")
    files = [f for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if f.suffix in (".jsonl", ".txt")]
    if not files:
        raise ValueError(f"{path}: a corpus is a .jsonl or .txt file, or a folder of them")
    try:
        rows = chain.from_iterable(map(file_rows, files))
        documents = [_document(row, id, where) for id, (row, where) in enumerate(rows)]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not documents:
        raise ValueError(f"{path}: no documents")
    return documents


def split_holdout(documents: Sequence[Document], holdout: int, seed: int) -> tuple[list[Document], list[Document], int]:
    """Training documents, `holdout` held-out ones, and how many near-duplicates of them were dropped from training.

    Two documents are near-duplicates if their sets of runs of eight words overlap by half (Jaccard; one word changed in
    40 leaves 0.6), words in lower case without punctuation; shorter documents if their words are the same.
    """
    order = np.random.default_rng([seed, 17]).permutation(len(documents))
    held = [documents[i] for i in sorted(order[:holdout])]
    held_runs = [_word_runs(document.text) for document in held]
    where = defaultdict(list)  # the held-out documents that a run occurs in
    for number, runs in enumerate(held_runs):
        for run in runs:
            where[run].append(number)
    train = []
    for document in (documents[i] for i in sorted(order[holdout:])):
        runs = _word_runs(document.text)
        shared = Counter(number for run in runs for number in where.get(run, ()))
        if not any(3 * both >= len(runs) + len(held_runs[number]) for number, both in shared.items()):
            train.append(document)
    return train, held, len(documents) - len(held) - len(train)


def _word_runs(text: str, size: int = 8) -> set[int]:
    words = re.findall(r"\w+", text.casefold())
    return {hash(tuple(words[i: i + size])) for i in range(max(1, len(words) - size + 1))}


# ---------------------------------------------------------------------------------------------- entropy and positions


@torch.no_grad()
def next_token_entropy(model: Transformer, ids: Tensor, top_k: int = 16) -> Tensor:
    """ids [B, T] -> [B, T]: entropy in nats of the token after each position.

    Over the model's `top_k` most probable tokens, renormalised; of a uniform top 16 it is ln 16 = 2.77. The head
    is applied to 512 positions at a time: with 152 thousand tokens those logits already take 300 MB.
    """
    hidden = model(ids).flatten(0, 1)
    top_k = min(top_k, model.config.vocab_size)
    logits = torch.cat([model.logits(part).topk(top_k).values for part in hidden.split(512)])
    return torch.special.entr(logits.softmax(-1)).sum(-1).view(ids.shape)


def entropy_pass(model: Transformer | None, tokenizer: Tokenizer, runs: Sequence[Sequence[int]], file: Path,
                 window: int = 4096, batch_tokens: int = 16384) -> list[np.ndarray]:
    """Entropy of the token *at* each position of each run (nan at 0 if nothing precedes it), float32 arrays.

    Results are appended to `file`, batch by batch, so an interrupted pass goes on where it was; name the file by
    `fingerprint` so that a changed input never meets it. A finished file needs no model. Runs longer than `window` are
    read in windows that overlap by half. Each process computes its share, and gets everyone's.
    """
    pieces = []  # (run, first id read, first position wanted, end)
    for run, ids in enumerate(runs):
        ends = [*range(window, len(ids), window // 2), len(ids)]
        pieces += [(run, max(0, end - window), want, end) for want, end in zip([0, *ends], ends)]
    pieces.sort(key=lambda piece: (piece[3] - piece[1], piece))
    batches = [[]]
    for piece in pieces:
        if batches[-1] and (len(batches[-1]) + 1) * (piece[3] - piece[1]) > batch_tokens:
            batches.append([])
        batches[-1].append(piece)
    starts = np.cumsum([0, *(sum(end - want for _, _, want, end in batch) for batch in batches)])  # in the file
    done = np.fromfile(file, np.float32) if file.exists() else np.zeros(0, np.float32)
    first = int(np.searchsorted(starts, len(done), side="right")) - 1  # a batch that was not finished is done again
    values, bos, (rank, world) = [done[: starts[first]]], tokenizer.bos, rank_and_world()
    all_gather(None)  # everyone has read the file
    if rank == 0:
        values[0].tofile(file)
    bar = tqdm(total=int(starts[-1]), initial=int(starts[first]), unit="tok", desc="entropy", disable=rank > 0)
    for step in range(first, len(batches), world):
        part = np.zeros(0, np.float32)
        for batch in batches[step + rank:][:1]:  # the last round may have none for this process
            ids = pad([[*bos, *runs[run][begin:end]] for run, begin, _, end in batch], model.head.device)
            entropy = next_token_entropy(model, ids).float().cpu().numpy()
            entropy = np.pad(entropy, ((0, 0), (1 - len(bos), 0)), constant_values=np.nan)
            part = np.concatenate([e[want - begin: end - begin] for e, (_, begin, want, end) in zip(entropy, batch)])
        values.append(np.concatenate(all_gather(part)))
        bar.update(len(values[-1]))
        if rank == 0:
            with open(file, "ab") as out:
                values[-1].tofile(out)
    bar.close()
    entropies = [np.empty(len(ids), np.float32) for ids in runs]
    ends = np.cumsum([end - want for _, _, want, end in pieces])
    for (run, _, want, end), part in zip(pieces, np.split(np.concatenate(values), ends)):
        entropies[run][want:end] = part
    return entropies


def fingerprint(*parts: object) -> str:
    """A short name for a set of inputs: a folder (a Path) by its files' contents, everything else by its text."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        if isinstance(part, Path):
            for file in sorted(filter(Path.is_file, part.iterdir())):
                with open(file, "rb") as content:
                    digest.update(file.name.encode() + hashlib.file_digest(content, "blake2b").digest())
        else:
            digest.update(repr(part).encode() + b"\0")
    return digest.hexdigest()


@dataclass(frozen=True)
class Question:
    """A position of a document: what precedes it, and the bytes of each token that follows."""

    context: tuple[int, ...]
    truth: tuple[bytes, ...]
    document: int
    position: int  # of the first token to predict, in tokens of the document
    entropy: float = float("nan")  # nats, under the proxy
    answer: str | None = None  # of a question-answer pair; then `context` is the problem


@dataclass
class QuestionSet:
    """Positions of tokenised documents that are asked about."""

    tokenizer: Tokenizer
    ids: Sequence[Sequence[int]]  # of each document
    documents: Sequence[Document]
    places: np.ndarray  # int64 [N, 2]: document (an index of `documents`), position
    entropy: np.ndarray  # float32 [N], nats

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, n: int) -> Question:
        document, position = map(int, self.places[n])
        ids = self.ids[document]
        truth = tuple(self.tokenizer.token_bytes(i) for i in ids[position: position + TRUTH_TOKENS])
        return Question(tuple(ids[:position]), truth, self.documents[document].id, position, float(self.entropy[n]))


def draw(total: int, seed: int, step: int, retry: int, count: int) -> list[int]:
    """`count` different numbers below `total` (repeated only if there are fewer), by (seed, step, retry) alone."""
    random = np.random.Generator(np.random.Philox(key=[seed % 2**63, 1], counter=[0, step, retry, 0]))
    return random.choice(total, count, replace=count > total).tolist()


def answer_sets(tokenizer: Tokenizer, documents: Sequence[Document], holdout: int,
                seed: int) -> tuple[list[Question], list[Question], str]:
    """Questions with verifiable answers, to train on and held out, and a line about them."""
    if missing := next((d for d in documents if d.answer is None), None):
        raise ValueError(f"document {missing.id + 1} of the corpus has no `answer`; "
                         "stage rlvr needs one for every problem")
    train, held, dropped = split_holdout(documents, holdout, seed)
    sets = [[Question(tuple(tokenizer.encode(d.problem or d.text)), (), d.id, 0, answer=d.answer) for d in part]
            for part in (train, held)]
    return *sets, f"questions with answers: {len(train):,}, held out {len(held):,}, {dropped:,} near-duplicates dropped"


def select_positions(tokenizer: Tokenizer, documents: Sequence[Document], ids: Sequence[Sequence[int]],
                     entropies: Sequence[np.ndarray], selector: str, value: float, min_context: int = 1,
                     part: str = "all", seed: int = 0) -> QuestionSet:
    """The positions to ask about, after the paper's token-level filter (section 3.2).

    selector "threshold": entropy above `value` nats; "top": the `value` share of highest entropy; "random": a random
    `value` share. part "solution" asks only about what follows the problem. Left out: the first `min_context` tokens,
    positions without an entropy, and truths that no \\boxed{} can hold (see reward.reachable).
    """
    places = []
    for number, (document, run, entropy) in enumerate(zip(documents, ids, entropies)):
        begin = max(min_context, 1)
        if part == "solution" and document.problem:
            solution = document.text[len(document.problem):].lstrip().encode()
            ends = np.cumsum([len(tokenizer.token_bytes(id)) for id in run])
            begin = max(begin, int(np.searchsorted(ends, ends[-1] - len(solution))) + 1)
        places += [(number, position) for position in range(begin, len(run)) if math.isfinite(entropy[position])]
    values = np.array([entropies[number][position] for number, position in places], dtype=np.float32)
    if selector == "threshold":
        keep = values > value
    elif selector == "top":
        keep = np.argsort(np.argsort(-values, kind="stable")) < value * len(values)
    else:
        keep = np.random.default_rng([seed, 5]).random(len(values)) < value
    places = np.array(places, dtype=np.int64).reshape(-1, 2)
    chosen = QuestionSet(tokenizer, ids, documents, places[keep], values[keep])
    keep = np.array([reachable(question.truth) for question in chosen], dtype=bool)
    return replace(chosen, places=chosen.places[keep], entropy=chosen.entropy[keep])


def question_sets(tokenizer: Tokenizer, documents: Sequence[Document], proxy: str | Path, cache: Path, *, holdout: int,
                  selector: str, value: float, min_context: int, part: str, seed: int, window: int,
                  device: torch.device, dtype: torch.dtype) -> tuple[QuestionSet, QuestionSet, str]:
    """The questions to train on, those of held-out documents (entropy above 0.5), and a table of what was kept.

    The entropies under the proxy, a model directory or hub id, are kept in `cache`, in a file named by the content
    of the proxy, of the tokenizer and of the texts. ValueError if nothing is left to ask.
    """
    train, held, dropped = split_holdout(documents, holdout, seed)
    proxy, texts = resolve(proxy), [document.text for document in (*train, *held)]
    ids = tokenizer.encode_batch(texts)
    if max(map(len, ids)) <= min_context:
        raise ValueError(f"no document is longer than --min-context {min_context} tokens")
    cache.mkdir(parents=True, exist_ok=True)
    inputs = fingerprint(proxy, tokenizer.files["tokenizer.json"], tokenizer.bos, window, dtype, *texts)
    file = cache / f"entropy-{inputs}.f32"
    model = None
    if not file.exists() or file.stat().st_size < 4 * sum(map(len, ids)):
        model = load_pretrained(proxy, device, dtype)
        check_vocabulary(tokenizer, model.config.vocab_size, proxy)
    entropies, split = entropy_pass(model, tokenizer, ids, file, window), len(train)
    asked = select_positions(tokenizer, train, ids[:split], entropies[:split], selector, value, min_context, part, seed)
    asked_held = select_positions(tokenizer, held, ids[split:], entropies[split:], "threshold", 0.5, min_context, part)
    found = np.concatenate([[], *entropies[:split]])
    easy, medium, hard = (int((found > threshold).sum()) for threshold in (0.5, 1.0, 1.5))
    table = (f"documents: {len(train):,} to train on, {len(held):,} held out, {dropped:,} near-duplicates dropped\n"
             f"positions: {len(found):,}; entropy above 0.5: {easy:,}, 1.0: {medium:,}, 1.5: {hard:,} nats\n"
             f"questions: {len(asked):,} by {selector} {value:g} in {part}; held out {len(asked_held):,}")
    if train and not len(asked):
        raise ValueError(f"no position is left to ask about: selector {selector} {value:g}, {part} of "
                         f"{len(train)} documents, --min-context {min_context}\n{table}")
    return asked, asked_held, table


def check_vocabulary(tokenizer: Tokenizer, size: int, where: object) -> None:
    """ValueError if the tokenizer has ids that the model has no row for."""
    if len(tokenizer) > size or max(tokenizer.eos_ids) >= size:
        raise ValueError(f"{where}: the tokenizer has {len(tokenizer)} ids, the model's vocabulary only {size}")


# ---------------------------------------------------------------------------------------------- templates

_ASK = ("Complete the given text under {} by predicting the next token, and wrap it in ‘\\boxed{{}}’. Please reason "
        "step by step to find the most probable next token{}, and enclose it in \\boxed{{}} ")
_LIST = "by predicting the next token, list multiple potential tokens and select the most probable one as the final "
_NOTE = r"(note: the token may begin with a space, e.g., \boxed{ para} or \boxed{ =}; do not use \text{})"
_FENCED = ".\n\n### Context\n```{context}```"
TEMPLATES = {  # paper, appendix D; the line breaks and v4's worked examples are ours
    "v0": _ASK.format("‘### Context’", " as the final answer") + _NOTE + ".\n\n### Context\n{context}",
    "v1": _ASK.format("### Context", " as the final prediction") + _NOTE + _FENCED + ".",
    "v2": "You are a helpful assistant, good at predicting the next token for a given context.\n\nNow, please c"
          + _ASK.format("### Context", "")[1:] + _NOTE.replace("{ =}", "{ +=}") + _FENCED + ".",
    "v3": "Complete the given text under ### Context " + _LIST + "answer. Wrap your final answer in \\boxed{} " + _NOTE
          + _FENCED,
    "v4": "Complete the given text under ### Context by predicting the next token. Reason step by step, then wrap the "
          "token in \\boxed{} " + _NOTE + ".\n\n"
          "Example 1. ### Context ```To begin, we simplify``` The next token is \\boxed{ this}.\n"
          "Example 2. ### Context ```The square of 7 is 4``` The next token is \\boxed{9}.\n"
          "Example 3. ### Context ```The steps are``` The next token is \\boxed{:\n}.\n\n"
          "Now, the context is: ### Context ```{context}```.",
    "v5": _ASK.format("### Context", " as the final answer") + _NOTE + _FENCED,
    "v6": "Complete the given text wrapped in ``` and ``` " + _LIST + "prediction. Wrap your final prediction in "
          "\\boxed{} " + _NOTE + ".\n\nThe context is: ```{context}```, now please predict the next token.",
    "toy": "Next token?\n{context}",
    "plain": "{context}",  # question-answer pairs: the problem itself
}


def prompt_ids(tokenizer: Tokenizer, question: Question, template: str, max_prompt: int) -> list[int]:
    """The chat-formatted prompt of a question; a context that is too long loses its beginning, never its end."""
    frame = len(tokenizer.chat(TEMPLATES[template], []))
    if frame >= max_prompt:
        raise ValueError(f"--max-prompt {max_prompt}: template {template} alone takes {frame} tokens")
    return tokenizer.chat(TEMPLATES[template], question.context[-(max_prompt - frame):])


# ---------------------------------------------------------------------------------------------- the toy world

CUPS = "ABCDEFGH"
TOUCH = 0.6  # of the swaps move the ball
TOY_QUESTION = "\nWhere is the ball?"
SYSTEM_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")


@dataclass(frozen=True)
class Story:
    """A shell game: a ball under one of some cups, swaps of two cups, and where the ball is after each."""

    cups: str
    swaps: tuple[str, ...]  # two letters each
    ball: str  # its cup at the start, then after each swap

    @property
    def problem(self) -> str:
        swaps = " ".join(f"{n} {a} {b}." for n, (a, b) in enumerate(self.swaps, 1))
        return f"The ball is under {self.ball[0]}. {swaps}"

    @property
    def text(self) -> str:
        return f"{self.problem}\n\nThe ball is now under {self.ball[-1]}."

    def chain(self, steps: int | None = None) -> str:
        """The thought that follows the ball, through all swaps or the first `steps`."""
        lines = [f" {n} {a} {b} {self.ball[n]}." for n, (a, b) in enumerate(self.swaps, 1)]
        return self.ball[0] + "".join(lines[:steps])


def toy_stories(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[Story]:
    """`count` stories of 3 to 8 cups and 1 to 6 swaps, most of which touch the ball; no text is in `exclude`."""
    random, out = Random(f"stories {seed}"), []
    while len(out) < count:
        cups = CUPS[: random.randint(3, 8)]
        ball, swaps = random.choice(cups), []
        for _ in range(random.randint(1, 6)):
            now = ball[-1]
            pair = random.sample(cups.replace(now, ""), 2)
            if random.random() < TOUCH:
                pair[random.randrange(2)] = now
            swaps.append("".join(pair))
            ball += pair[pair[0] == now] if now in pair else now
        story = Story(cups, tuple(swaps), ball)
        if story.text not in exclude:
            out.append(story)
    return out


def toy_tokenizer() -> Tokenizer:
    """Byte-level BPE with Qwen's splitting, trained on stories, thoughts and the prompt template."""
    texts = [text for story in toy_stories(2000, seed=1) for text in (story.text, story.chain())]
    texts += [TEMPLATES["toy"], "user\n", "assistant\n", "<think>\n", "</think>\n\n\\boxed{ A}", TOY_QUESTION] * 200
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=512, min_frequency=100, initial_alphabet=CHARS, show_progress=False))
    bpe.add_special_tokens([tokenizers.AddedToken(t, normalized=False, special=True) for t in SYSTEM_TOKENS[:3]])
    bpe.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in SYSTEM_TOKENS[3:]])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    files = {"tokenizer.json": bpe.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    return Tokenizer(files, "toy")


def toy_runs(tokenizer: Tokenizer, stories: Sequence[Story], seed: int) -> list[list[int]]:
    """What the toy's weak base model is pre-trained on, one run of token ids per story.

    35 % documents. 35 % problems answered with a full, correct thought, 30 % of these as multiple choice. 30 %
    next-token questions answered by a weak annotator: 90 % guess any cup, 7 % stop thinking early, 3 % are right.
    """
    random, runs = Random(f"annotator {seed}"), []
    for story in stories:
        kind, effort, steps = random.random(), random.random(), len(story.swaps)
        if kind < 0.35:
            runs.append(tokenizer.encode(story.text) + tokenizer.eos_ids)
            continue
        if kind < 0.7:
            options = "".join(f"\n({cup}) {cup}" for cup in story.cups) if effort < 0.3 else ""
            prompt, space = tokenizer.chat(f"{story.problem}{TOY_QUESTION}{options}"), ""
        else:
            prompt, space = tokenizer.chat(TEMPLATES["toy"], tokenizer.encode(story.text[:-3])), " "
            if 0.9 <= effort < 0.97:
                steps = random.randrange(steps)
        thought, cup = f"{story.chain(steps)}\n", story.ball[steps]
        if kind >= 0.7 and effort < 0.9:
            thought, cup = "", random.choice(CUPS)
        answer = f"\n\n\\boxed{{{space}{cup}}}"
        runs.append([*prompt, *tokenizer.encode(thought), tokenizer.special["</think>"], *tokenizer.encode(answer),
                     *tokenizer.eos_ids])
    return runs


def write_toy(folder: Path, seed: int, count: int = 4500) -> None:
    """corpus.jsonl (problem, solution) and answers.jsonl (problem, answer) of the toy world."""
    folder.mkdir(parents=True, exist_ok=True)
    stories = toy_stories(count, 1000 + seed)
    answers = [{"problem": s.problem + TOY_QUESTION, "answer": s.ball[-1]} for s in stories]
    corpus = [{"problem": s.problem, "solution": s.text[len(s.problem) + 2:]} for s in stories]
    for name, rows in (("answers", answers), ("corpus", corpus)):
        aside = folder / f"{name}.new"  # renamed when complete
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
        aside.rename(folder / f"{name}.jsonl")
