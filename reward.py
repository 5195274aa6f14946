r"""Response bytes in, reward out: the prefix-matching reward of "Reinforcement Pre-Training"
(arXiv 2506.08007, section 3), the three alternatives of its appendix A, and an answer check for RL
with verifiable rewards.

Everything is bytes: a token may end inside a UTF-8 character, so only bytes have exact token
boundaries. A reward is one function over the responses to a question, and one line in REWARDS:

    def longer_is_better(responses, question, policy):
        predictions = [extract_prediction(response) for response in responses]
        return [prefix_match(p, question.truth) * len(p or b"") for p in predictions]

A response that hit the length limit is passed as b"" and earns nothing. `question` is data.Question
and has `truth`, the bytes of each token that follows, or `answer`; `policy` is rpt.Policy and has
`tokenizer.tokens(bytes)` and `next_token(question)`.
"""

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

END_OF_THINKING = b"</think>"
_BRACES = re.compile(rb"\\boxed\{|[{}]")


def extract_prediction(response: bytes) -> bytes | None:
    r"""Return the bytes inside the last balanced `\boxed{...}` after the last `</think>`, or None.

    Every brace counts, `\{` too. "Last" is the box that opens last among those that close: a later
    box that never closes does not hide an earlier one, and a box inside another one wins. Nothing
    is stripped, because a leading space belongs to the token.
    """
    _, mark, text = response.rpartition(END_OF_THINKING)
    opened: list[int] = []  # where the inside of each open box starts, -1 for a plain brace
    start, end = -1, -1
    for brace in _BRACES.finditer(text if mark else b""):
        if brace[0] != b"}":
            opened.append(-1 if brace[0] == b"{" else brace.end())
        elif opened and (inside := opened.pop()) > start:
            start, end = inside, brace.start()
    return None if start < 0 else text[start:end]


def prefix_match(prediction: bytes | None, truth: Sequence[bytes]) -> float:
    """Return the prefix-matching reward (section 3): 1.0 iff the prediction is a prefix of the text
    that follows and ends where one of its tokens ends.

    The prediction may span several tokens. If any prefix were right, a first byte, often a space,
    would be right nearly everywhere.
    """
    boundaries = accumulate(map(len, truth))  # the paper's L_gt
    return float(bool(prediction) and b"".join(truth).startswith(prediction)
                 and len(prediction) in boundaries)


def box(prediction: bytes) -> bytes:
    """Return a response that predicts these bytes. A lone brace cannot be boxed."""
    return END_OF_THINKING + b"\\boxed{" + prediction + b"}"


# ----------------------------------------------------------------------------------------- answers

# Spellings that do not change a value: patterns and their replacements, applied in this order.
_SPELLINGS = (
    (r"(?s)^.*####", ""),
    ("\u2212", "-"),
    (r"\{,\}", ","),
    (r"(?<![\\^_])\\((text|math)[a-z]*|mbox) *\{([^{}]*)\}", r"\3"),
    # Markup without a value; but two backslashes end a row of a matrix.
    (r"(?<!\\)\\(left|right|(text|math)[a-z]*|mbox)(?![A-Za-z])|(?<!\\)\\[!,;:()\[\]]", ""),
    (r"\^(\\circ|\{\\circ\})|°|\\?[$%]", ""),
    (r"(?<!\\)\\ |~|\s", " "),
    # Thousands; but (1,234) is a pair.
    (r"(?<![\d.,(\[{])\d{1,3}(,\d{3})+(?![\d,)\]}])", lambda number: number[0].replace(",", "")),
    (r"\\[dtc](?=frac|binom)", r"\\"),
    (r"(?<=\\binom)(\d)", r"{\1}"),
    (r"\}(?=\d)", "} "),
    (r"(\\sqrt|\^) *(\\frac( *\w| *\{[^{}]*\}){2})", r"\1{\2}"),
    (r"\\frac *(?:(\w)|\{( *-?[\w. ]*)\}) *(?:(\w)|\{ *(-?[\d.]+|\w(?:_\w)?) *\})", r" \1\2/\3\4"),
    (r"(\\[A-Za-z]+|[\^_\]}]) +\{", r"\1{"),
    # From the inside out, braces around an argument become ⟨⟩ and others are dropped; then ⟨⟩
    # around a single symbol are dropped too, because 2^{n} is 2^n but 2^{n-1} is not 2^n-1.
    *5 * [(r"(?<![\w^_\]}⟩])\{([^{}]*)\}", r"\1"), (r"(?<=[\w^_\]}⟩])\{([^{}]*)\}", r"⟨\1⟩")],
    (r"⟨ *(-?(\w|[\d.]+|\\[A-Za-z]+)) *⟩", r"\1 "),
    # A space between digits stays, because 1 1/2 is not 11/2.
    (" +", " "),
    (r"(?<!\d) | (?!\d)", ""),
    (r"\.$", ""),
    (r"^\(([^(),]*)\)$", r"\1"),
    (r"^(\d+)/-", r"-\1/"),
)


def value(text: str) -> Fraction | str:
    r"""Return an answer as a Fraction if it is a number, else its text in one spelling.

    1/2, 0.5, \frac12 and \dfrac{1}{2} are one number; so are 1{,}000 and \$1000. Of a solution only
    the last box counts, or what follows GSM8K's "####". No algebra and no units.
    """
    boxed = extract_prediction(END_OF_THINKING + text.encode(errors="replace"))
    text = text if boxed is None else boxed.decode(errors="replace")
    text = unicodedata.normalize("NFC", text)
    for pattern, replacement in _SPELLINGS:
        text = re.sub(pattern, replacement, text)
    try:  # nobody writes 1e999999999, and its digits would take forever
        return Fraction(text) if len(text) < 50 and "e" not in text.lower() else text
    except (ValueError, ZeroDivisionError):
        return text


def answer_match(prediction: bytes | None, answer: str) -> float:
    """Return 1.0 iff the prediction is the answer: the same number, or the same text."""
    given = value((prediction or b"").decode(errors="replace"))
    return float(given != "" and given == value(answer))


# ------------------------------------------------------------------------------- rewards by name


def predictions_of(responses: Sequence[bytes]) -> list[bytes | None]:
    """Return what each response boxes."""
    return [extract_prediction(response) for response in responses]


def prefix(responses: Sequence[bytes], question, policy) -> list[float]:
    """The paper's reward (section 3)."""
    return [prefix_match(p, question.truth) for p in predictions_of(responses)]


def first_token(responses: Sequence[bytes], question, policy) -> list[float]:
    """Appendix A, scheme 1: 1.0 iff the prediction's first token is right; the rest is ignored.

    The tokenizer sees the prediction alone. It may split the text differently than in the document,
    and then the first token differs.
    """
    return [float(policy.tokenizer.tokens(p or b"")[:1] == [question.truth[0]])
            for p in predictions_of(responses)]


def dense(responses: Sequence[bytes], question, policy) -> list[float]:
    """Appendix A, scheme 2: a wrong first token earns its probability P(token | context)."""
    right = first_token(responses, question, policy)
    firsts = [policy.tokenizer.tokens(p or b"")[:1] for p in predictions_of(responses)]
    probability = policy.next_token(question)
    return [one or sum(map(probability, first)) for one, first in zip(right, firsts)]


def conditional_dense(responses: Sequence[bytes], question, policy) -> list[float]:
    """Appendix A, scheme 3: dense if some first token of the group is right, else 0 for all."""
    if not any(first_token(responses, question, policy)):
        return [0.0] * len(responses)
    return dense(responses, question, policy)


def answer(responses: Sequence[bytes], question, policy) -> list[float]:
    """RL with verifiable rewards (section 2)."""
    return [answer_match(p, question.answer) for p in predictions_of(responses)]


REWARDS = {
    "prefix": prefix, "first-token": first_token, "dense": dense,
    "conditional-dense": conditional_dense, "answer": answer}
