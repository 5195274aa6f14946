"""Laws of reward.py, each against an oracle that is too slow or too plain to be wrong."""

import itertools
import json
import os
import random
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

import reward
from reward import REWARDS, answer_match, box, extract_prediction, prefix_match, value

ASSETS = Path(os.environ.get("RPT_TEST_ASSETS", "/nonexistent"))
MB = 1_000_000
TEXT = "aéb 😀 日本語 naïve {x} ∑ \\frac{1}{2} ça 👩‍🚀 déjà".encode()


# ---- oracles


def extract_by_trying(response: bytes) -> bytes | None:
    """Try each start from the right; walk byte by byte to where its brace closes."""
    if b"</think>" not in response:
        return None
    tail = response.split(b"</think>")[-1]
    for start in reversed(range(len(tail))):
        if tail[start: start + 7] != b"\\boxed{":
            continue
        depth = 1
        for end in range(start + 7, len(tail)):
            depth += (tail[end: end + 1] == b"{") - (tail[end: end + 1] == b"}")
            if depth == 0:
                return tail[start + 7: end]
    return None


def match_by_sets(prediction: bytes | None, truth: list[bytes]) -> float:
    """The paper's sentence, word for word: the bytes agree, and the length is in the set of
    boundaries."""
    text = b"".join(truth)
    boundaries = {len(b"".join(truth[:n])) for n in range(1, len(truth) + 1)}
    length = len(prediction or b"")
    return 1.0 if length > 0 and prediction == text[:length] and length in boundaries else 0.0


def random_vocabulary(rng: random.Random) -> set[bytes]:
    """Every byte, and chunks of TEXT cut at any byte: many begin or end inside a character."""
    starts = [rng.randrange(len(TEXT)) for _ in range(60)]
    return {bytes([b]) for b in range(256)} | {TEXT[s: s + rng.randint(2, 6)] for s in starts}


def longest_match(text: bytes, vocabulary: set[bytes]) -> list[bytes]:
    tokens = []
    while text:
        tokens.append(next(text[:n] for n in range(6, 0, -1) if text[:n] in vocabulary))
        text = text[len(tokens[-1]):]
    return tokens


# ---- the prediction


def test_extraction_is_the_last_box_that_closes():
    rng, found = random.Random(1), 0
    pieces = rb"\boxed{ \boxed{ { } } </think> a \ \boxed </think >".split() + [b" ", b"\xc3"]
    for _ in range(100_000):
        response = b"".join([rng.choice([b"", b"</think>"]),
                             *rng.choices(pieces, k=rng.randrange(15))])
        expected = extract_by_trying(response)
        assert extract_prediction(response) == expected, response
        found += expected is not None
    assert 10_000 < found < 90_000  # both outcomes were tried often


@pytest.mark.parametrize("response, prediction", [
    (b"so \\boxed{3}?</think>\n\nSo, the next token is ' 4'.\n\n\\boxed{ 4}", b" 4"),
    (b"hm \\boxed{x</think>\n\n\\boxed{$}", b"$"),
    (b"</think>\\boxed{ }", b" "),
    (b"</think>\\boxed{\n}<|end|>", b"\n"),
    (b"</think>\\boxed{a} wait</think> no", None),  # the last end of thinking counts
    (b"</think>\\boxed{a\\{b}", None),  # an escaped brace is a brace
    (b"<think>\\boxed{a}", None),
    (b"</think>" + b"{" * MB, None),  # no time grows faster than a response
    (b"</think>\\boxed{a}" + b"\\boxed{{" * (MB // 8) + b"}", b"a"),
    (b"</think>" + b"\\boxed{" * (MB // 8) + b"}" * (MB // 8), b""),
], ids=range(10))
def test_extraction_reads_the_endings_of_the_case_study(response, prediction):
    assert extract_prediction(response) == prediction


def test_a_box_gives_back_what_can_be_boxed():
    for prediction in (b" 4", b"\n", b"\xc3", b"{x}", b"\\frac{1}{2}", b"\\", b"$"):
        assert extract_prediction(box(prediction)) == prediction
    for prediction in (b"{", b"a}", b"}{", b"</think>", b"\\boxed{a}"):
        assert extract_prediction(box(prediction)) != prediction


def test_prefix_match_agrees_with_the_set_of_boundaries_over_random_byte_vocabularies():
    rng, right, split = random.Random(2), 0, 0
    for _ in range(400):
        vocabulary = random_vocabulary(rng)
        for _ in range(250):
            start = rng.randrange(len(TEXT))
            truth = longest_match(TEXT[start: start + rng.randint(0, 12)], vocabulary)
            if rng.random() < 0.2:
                truth.insert(rng.randint(0, len(truth)), b"")
            prediction = bytearray((b"".join(truth) + b"a")[: rng.randint(0, 10)])
            if rng.random() < 0.2 and prediction:
                prediction[rng.randrange(len(prediction))] = rng.randrange(256)
            expected = match_by_sets(bytes(prediction), truth)
            assert prefix_match(bytes(prediction), truth) == expected, (prediction, truth)
            right += expected == 1.0
            split += expected == 1.0 and "\ufffd" in prediction.decode(errors="replace")
    assert 10_000 < right < 90_000 and split > 2_500
    truth = [b"a", b"\xc3", b"\xa9", b"bc"]  # "aébc"
    assert [n for n in range(6) if prefix_match(b"a\xc3\xa9bc"[:n], truth)] == [1, 2, 3, 5]
    assert not prefix_match(None, [b""]) and not prefix_match(b"", [b"", b"a"])


# ---- answers: a line has the spellings of one answer, and no two lines have the same answer

SPELLINGS = r"""
1/2 | \frac{1}{2} | \dfrac{1}{2} | \tfrac12 | $\frac 12$ | 2/4 | 0.5 | .5 | 0.50. | \frac{ 1 }{2}
-1/2 | -\frac{1}{2} | \frac{-1}{2} | -0.5 | −0.5 | 1/-2 | \frac{1}{-2} | \frac{ 1 }{ -2 }
1/72 | \frac1{72} | \frac{1}72 | \cfrac{1}{72}
2 1/2 | 2\frac12 | 2\frac{1}{2} | 2\,\frac12 | 2 \frac12 | 2\ \frac12 | 2  1/2 | {2 \frac{1}{2}}
21/2 | 10.5
1 2 | 1\ 2 | 1~2 | 1  2
12 | 12. | +12 | 1{2} | \text{12} | {12} | {{12}}
1000 | 1,000 | 1{,}000 | 1\,000 | 1\!000 | $1,000.00$ | \$1,000 | \text{1,000} | \textbf{1,000.}
1234567 | 1,234,567 | long thought #### 1,234,567 | #### 5 #### 1234567
1,2345
12345
18 | 18.00 | \$18 | 18^\circ | 18 ^{\circ} | 18\% | 18% | \left(18\right) | \boxed{18} | 18°
(1,234) | (1, 234) | \left(1,\,234\right) | \( (1,234) \)
1234 | 1,234
(3,4) | (3, 4)
3,4 | 3, 4
[1,234 + x] | [1, 234 + x]
I | (I) | \text{(I)} | \textbf{I} | I. | \text{I.} | \mathbf{I} | \mathrm{(I)} | $\text{I}$
B | (B) | \mathbf{B}
Paris | \text{Paris} | Paris. | \mathrm{Paris} | \mbox{Paris}
paris
x^2 + 1 | x^2+1 | $x^2 +~1$ | x^2\;+\ 1 | x^{2}+1 | x^{ 2 } + 1 | x^{{2}}+1
5 cm | 5 \text{ cm} | 5\,\text{cm} | 5cm | 5 \mathrm{~cm}
\sqrt2 | \sqrt{2} | \sqrt 2 | {\sqrt{2}} | \sqrt{ 2 } | \sqrt {2}
\leftarrow
arrow
1999 | \boxed{1999} | $\boxed{1999}$ | The number is \(\boxed{1999}\).
n^2-n-1 | $\boxed{n^2-n-1}$
\frac{\pi}{4} | \[ \boxed{\frac{\pi}{4}} \] | \dfrac{\pi}{4} | \tfrac\pi4 | \dfrac {\pi} {4}
\frac{\sqrt{3}}{2} | \frac{\sqrt3}2 | \frac{\sqrt{3}}2 | \dfrac{\sqrt3}{2} | {\tfrac{\sqrt 3}{2}}
\frac{n+1}{2} | \tfrac{n+1}{2} | \cfrac{ n + 1 }2 | {\dfrac {n+1} {2}}
{\frac{n!(n-1)!}{2^{n-1}}} | \dfrac{n!(n-1)!}{2^{n-1}}
\frac{1+2}{3}
\frac{1}{+23}
\frac{1}{2n} | \dfrac 1{2n}
\frac{1}{2}n | 1/2n
\binom{12}{3}
\binom{1}{23} | \dbinom1{23}
\binom{5}{2} | \binom52 | \binom5{2} | \tbinom{5}2
2^{n-1} | 2^{n - 1} | 2^ {n-1}
2^n-1 | 2^{n}-1 | {2^n} - 1
2^{10} | 2^10
2^{-1} | 2^-1
2^{1/2} | 2^\frac12 | 2^{\frac{1}{2}} | 2^{\dfrac12}
2^1/2 | 2^{1}/2
\sqrt{2+1} | \sqrt {2 + 1}
\sqrt{2}+1 | \sqrt2+1
\sqrt{\frac{1}{2}} | \sqrt\frac12 | \sqrt{1/2} | \sqrt{\dfrac 1 2}
\sqrt[3]{4/3} | \sqrt [3]{\frac {4}{3}}
p^{2q}
p^{2}q | p^2q | p^2 q
\log_2 3 | \log_{2}3 | \log_{2} 3
\log_{23} | \log_{ 23 }
x \text{ or } y | x\text{ or }y | x or y
80^\circ+x | {80^\circ+x} | \text{80$^{\circ}$}+x
1 \\ 2 | 1\\2 | 1\\ 2
1 \2 | 1\2
a\\(b) | a \\ (b) | a\\ \left(b\right)
1/0 | \frac{1}{0}
0 | -0 | 0.0
1e999999999
1e999999998
\begin{pmatrix}-2\\-14\\-7\end{pmatrix} | \begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
\begin{pmatrix}1\\\frac12\end{pmatrix} | \begin{pmatrix} 1 \\ \frac{1}{2} \end{pmatrix}
(2n)! \cdot 2^{n^2} | \[ (2n)! \cdot 2^{n^2} \]
"""


def test_spellings_of_one_answer_match_and_no_others_do():
    lines = [line.split(" | ") for line in SPELLINGS.strip().splitlines()]
    for line in lines:
        for prediction, answer in itertools.product(line, line):
            assert answer_match(prediction.encode(), answer) == 1.0, (prediction, answer)
    for (one, *_), (other, *_) in itertools.combinations(lines, 2):
        assert answer_match(one.encode(), other) == 0.0, (one, other)
    assert value("cafe\u0301") == value("caf\u00e9")


def test_fractions_compare_exactly():
    rng = random.Random(4)
    for _ in range(5_000):
        a, b, c, d = (rng.randint(1, 12) for _ in range(4))
        gold = rng.choice([f"{c}/{d}", f"\\frac{{{c}}}{{{d}}}", f"\\dfrac{{{3 * c}}}{{{3 * d}}}"])
        assert answer_match(f"{a}/{b}".encode(), gold) == float(a * d == b * c)


@pytest.mark.parametrize("prediction", [None, b"", b" ", b"$", b".", b"\xff", b"{", b"9" * 9999,
                                        b"\\text{" * 1600, b"1" + b",234" * 2000 + b")"])
def test_an_answer_that_is_empty_undecodable_or_endless_is_wrong(prediction):
    for answer in ("", " ", "5", "####"):
        assert answer_match(prediction, answer) == 0.0


@pytest.mark.skipif(not ASSETS.is_dir(), reason="RPT_TEST_ASSETS is not set")
def test_all_but_four_answers_of_omnimath_can_be_earned_and_few_are_the_same():
    rows = (ASSETS / "data/omni_math_rule.jsonl").read_text().splitlines()
    answers = [json.loads(row)["answer"] for row in rows]
    lost = [a for a in answers if not answer_match(extract_prediction(box(a.encode())), a)]
    assert len(lost) == 4 and all(a.count("{") > a.count("}") for a in lost)
    spellings = set(answers)
    assert (len(answers), len(spellings)) == (2821, 1486)
    assert len(set(map(value, spellings))) == 1447


# ---- the rewards of a group, as the trainer calls them

CHANCES = {b" par": 0.5, b" lon": 0.25, b" the": 0.125, b"x": 0.0625}
QUESTION = SimpleNamespace(truth=[b" par", b"is"], answer="1/2")
POLICY = SimpleNamespace(
    tokenizer=SimpleNamespace(tokens=lambda text: longest_match(
        text, {*CHANCES, *(bytes([b]) for b in range(256))})),
    next_token=lambda question: CHANCES.__getitem__)


@pytest.mark.parametrize("name, predictions, rewards", [
    ("prefix", " par| paris| pari| lon|", [1, 1, 0, 0, 0]),
    ("first-token", " par| paris| parade| pa|par| lon|", [1, 1, 1, 0, 0, 0, 0]),
    ("dense", " par| lon| the end|xyz|", [1, 0.25, 0.125, 0.0625, 0]),
    ("dense", " lon| the", [0.25, 0.125]),
    ("conditional-dense", " paris| lon|", [1, 0.25, 0]),
    ("conditional-dense", " lon| the", [0, 0]),
    ("answer", "0.5|\\frac12| par|", [1, 1, 0, 0]),
])
def test_a_group_gets_one_number_per_response_and_an_unfinished_one_gets_nothing(
        name, predictions, rewards):
    responses = [b"hm" + box(prediction.encode()) for prediction in predictions.split("|")]
    got = REWARDS[name]([*responses, b"", b"\\boxed{ par}"], QUESTION, POLICY)
    assert got == [*rewards, 0, 0]


def test_the_example_in_the_module_docstring_is_a_reward():
    example = textwrap.dedent(reward.__doc__.split("REWARDS:\n")[1].split("A response")[0])
    names = dict(vars(reward))
    exec(example, names)
    responses = [b"</think>\\boxed{ par}", b"</think>\\boxed{ paris}", b"</think>\\boxed{ pa}", b""]
    assert names["longer_is_better"](responses, QUESTION, POLICY) == [4.0, 6.0, 0.0, 0.0]
