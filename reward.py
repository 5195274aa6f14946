r"""Completion bytes in, reward out: the prefix-matching reward of "Reinforcement Pre-Training"
(arXiv 2506.08007, section 3), the three alternatives of its appendix A, and an answer check for RL
with verifiable rewards.

Everything is bytes. A token may end inside a UTF-8 character, so characters know nothing of token
boundaries, and decoding a token and encoding it again moves them. The boundaries here are sums of
the lengths of the document's own tokens; only `answer_match`, which compares answers and not
tokens, decodes. Left out: a length penalty, a score for format beside the reward, partial credit
for a cut character. The paper's reward is 1 or 0.

Evaluation always asks for `prefix_match` or `answer_match`, whatever a run was rewarded for; a
run's metrics `accuracy` and `all_right` call a reward of at least 1 right.

A new reward is one function over a group of completions, and one line in REWARDS:

    def longer_is_better(responses, question, policy):
        predictions = [extract_prediction(response) for response in responses]
        return [prefix_match(p, question.truth) * len(p or b"") for p in predictions]
    REWARDS["longer"] = longer_is_better
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

END_OF_THINKING = b"</think>"
MAX_ANSWER_BYTES = 10_000  # longer is wrong: NFC is quadratic on hostile combining marks
MAX_NUMBER_CHARS = 200  # beyond this a number is compared as text, and no arithmetic is done on it

Tokens = Callable[[bytes], list[bytes]]  # a tokenizer: bytes to the bytes of each token
Probability = Callable[[bytes], float]  # of a token's bytes: P(token | context) under the model
_BRACES = re.compile(rb"\\boxed\{|[{}]")


def extract_prediction(response: bytes) -> bytes | None:
    r"""The bytes inside the last balanced `\boxed{...}` after the last `</think>` (section 3); None
    if there is none.

    Last is the box that starts last among those whose brace closes: a later `\boxed{` left open
    does not hide an earlier answer, and of two nested boxes the inner one counts. Every `{` and `}`
    byte counts, `\{` too. Nothing is stripped: a leading space belongs to the token. The result may
    be b"", which no reward accepts. Linear time. """
    thought = response.rfind(END_OF_THINKING)
    if thought < 0:
        return None
    start, end = -1, -1
    open_braces: list[int] = []  # where the inside of each open box starts, -1 for a plain brace
    for mark in _BRACES.finditer(response, thought + len(END_OF_THINKING)):
        if mark[0] == b"}":
            inside = open_braces.pop() if open_braces else -1
            if inside > start:
                start, end = inside, mark.start()
        else:
            open_braces.append(-1 if mark[0] == b"{" else mark.end())
    return None if start < 0 else response[start:end]


def prefix_match(prediction: bytes | None, truth: Sequence[bytes]) -> float:
    """The prefix-matching reward (section 3): 1.0 iff prediction == text[:l] and l is in L_gt,
    where l is its length.

    truth: the bytes of each token that follows in the document, text their concatenation, L_gt the
    cumulative sums of their lengths. The prediction may span several tokens. None and b"" earn 0.0.
    Without L_gt a first byte, often a space, would be right nearly everywhere.
    """
    if not prediction:
        return 0.0
    boundary = 0
    for token in truth:
        if boundary == len(prediction):
            break
        if not prediction.startswith(token, boundary):
            return 0.0
        boundary += len(token)
    return float(boundary == len(prediction))


def reachable(truth: Sequence[bytes]) -> bool:
    r"""True iff some prediction can earn the prefix-matching reward: some non-empty prefix of whole
    tokens comes back unchanged from `\boxed{...}`.

    A prefix that closes a brace it did not open, leaves one open, or itself holds `\boxed{` or
    `</think>` does not come back. Positions whose truth is not reachable are excluded from all
    questions, held-out ones too: every completion there scores 0, whatever the policy knows. The
    paper does not say what it does with them.
    """
    prefix, depth = bytearray(), 0
    for token in truth:
        prefix += token
        depth += token.count(b"{") - token.count(b"}")
        if prefix and depth <= 0:
            # The first boundary that closes all it opened decides: what breaks this prefix breaks
            # each longer one.
            return extract_prediction(END_OF_THINKING + b"\\boxed{" + prefix + b"}") == prefix
    return False


def first_token_match(prediction: bytes | None, truth: Sequence[bytes], tokens: Tokens) -> float:
    """Scheme 1 of appendix A: 1.0 iff the prediction's first token is truth[0]; the rest is
    ignored.

    The tokenizer sees the prediction alone: cut elsewhere than the document is cut, its first token
    is another one. """
    first = tokens(prediction)[:1] if prediction else []
    return float(bool(first) and first == list(truth[:1]))


def dense_reward(prediction: bytes | None, truth: Sequence[bytes], tokens: Tokens,
                 probability: Probability) -> float:
    """Scheme 2 of appendix A: 1.0 if the first token is right, else its probability; 0.0 for no
    prediction or b""."""
    if first_token_match(prediction, truth, tokens):
        return 1.0
    first = tokens(prediction)[:1] if prediction else []
    return float(probability(first[0])) if first else 0.0


def conditional_dense_reward(
    predictions: Sequence[bytes | None], truth: Sequence[bytes], tokens: Tokens,
    probability: Probability, all_wrong: float = 0.0,
) -> list[float]:
    """Scheme 3 of appendix A, on a group: dense where at least one first token is right, else
    all_wrong for each."""
    if not any(first_token_match(prediction, truth, tokens) for prediction in predictions):
        return [all_wrong] * len(predictions)
    return [dense_reward(prediction, truth, tokens, probability) for prediction in predictions]


# Three digits of exponent at most: 1e999999999 is text.
_UNSIGNED = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:\\frac\{{(?P<top>[-+]?{_UNSIGNED})\}}\{{(?P<bottom>[-+]?{_UNSIGNED})\}}"
    rf"|(?P<number>{_UNSIGNED})(?:/(?P<divisor>[-+]?{_UNSIGNED}))?)(?P<percent>%?)"
)
# Not beside a bracket: (1,234) is a pair.
_THOUSANDS = re.compile(r"(?<![0-9.,(\[{])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,)\]}])")


def _normalise(text: str) -> str:
    """One spelling for what LaTeX spells in several ways. Letter case and units stay."""
    text = unicodedata.normalize("NFC", text).replace("\u2212", "-")
    text = text.replace("{,}", ",").replace("\\%", "%")
    text = re.sub(r"\\(?:text|mathrm|mbox) ?\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[!,;:()\[\]]|\\?\$", "", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}", text)
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    text = " ".join(text.replace("\\ ", " ").replace("~", " ").split()).rstrip(". ")
    # A space between digits stays: 1 1/2 is not 11/2.
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", text)


def _value(text: str) -> Fraction | None:
    """The exact value of a number, a simple fraction or a percentage; None if the text is not
    one."""
    number = _NUMBER.fullmatch(text) if len(text) <= MAX_NUMBER_CHARS else None
    if number is None:
        return None
    bottom = Fraction(number["bottom"] or number["divisor"] or 1)
    if bottom == 0:
        return None
    value = Fraction(number["top"] or number["number"]) / bottom
    if number["percent"]:
        value /= 100
    return -value if number["sign"] == "-" else value


def answer_match(prediction: bytes | None, answer: str) -> float:
    r"""1.0 iff the prediction is the answer (RL with verifiable rewards, section 2): equal text
    after normalisation, or equal value as exact fractions: 1/2, \frac{1}{2}, 0.5 and 50\% are one
    number. No algebra, no evaluation.

    Of an answer with "####" (GSM8K's worked solutions) what follows the last one counts. Empty is
    never right, and neither is a prediction that is not UTF-8 or is longer than MAX_ANSWER_BYTES.
    """
    if prediction is None or len(prediction) > MAX_ANSWER_BYTES:
        return 0.0
    try:
        given = _normalise(prediction.decode())
    except UnicodeDecodeError:
        return 0.0
    wanted = _normalise(answer.rsplit("####", 1)[-1])
    if not given:
        return 0.0
    value = _value(given)
    return float(given == wanted or (value is not None and value == _value(wanted)))


# The rewards by name: what the trainer calls, once per group. responses are the bytes of the
# group's completions; one that did not finish is passed as b"" and so earns 0: what the length
# limit cut short is no prediction. question has `truth`, the bytes of each token that follows, and
# `answer`; policy answers `tokens(bytes)` and `probability(question, bytes)`.


def predictions_of(responses: Sequence[bytes]) -> list[bytes | None]:
    """What each response boxes."""
    return [extract_prediction(response) for response in responses]


def prefix(responses: Sequence[bytes], question, policy) -> list[float]:
    """The paper's reward: `prefix_match` of what each response boxes."""
    return [prefix_match(p, question.truth) for p in predictions_of(responses)]


def first_token(responses: Sequence[bytes], question, policy) -> list[float]:
    """Scheme 1 of appendix A for a group."""
    return [first_token_match(p, question.truth, policy.tokens) for p in predictions_of(responses)]


def dense(responses: Sequence[bytes], question, policy) -> list[float]:
    """Scheme 2 of appendix A for a group."""
    probability = partial(policy.probability, question)
    return [dense_reward(p, question.truth, policy.tokens, probability)
            for p in predictions_of(responses)]


def conditional_dense(responses: Sequence[bytes], question, policy) -> list[float]:
    """Scheme 3 of appendix A."""
    return conditional_dense_reward(predictions_of(responses), question.truth, policy.tokens,
                                    partial(policy.probability, question))


def answer(responses: Sequence[bytes], question, policy) -> list[float]:
    """RL with verifiable rewards: `answer_match` with the question's answer."""
    if question.answer is None:
        raise ValueError("reward 'answer': this question has no answer; give a corpus with answers "
                         "or use reward 'prefix'")
    return [answer_match(p, question.answer) for p in predictions_of(responses)]


def format_only(responses: Sequence[bytes], question, policy) -> list[float]:
    """A control: pays for any prediction that can be read, so what it raises is not prediction."""
    return [float(bool(p)) for p in predictions_of(responses)]


REWARDS: dict[str, Callable[..., list[float]]] = {
    "prefix": prefix,
    "first-token": first_token,
    "dense": dense,
    "conditional-dense": conditional_dense,
    "answer": answer,
    "format": format_only,
}
