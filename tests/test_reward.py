"""Laws of reward.py, each against an oracle that is too slow or too plain to be wrong."""

import random
import textwrap
from types import SimpleNamespace

import pytest

import reward
from reward import (
    REWARDS,
    answer_match,
    conditional_dense_reward,
    dense_reward,
    extract_prediction,
    first_token_match,
    prefix_match,
    reachable,
)

MB = 1_000_000
TEXT = "aéb 😀 日本語 naïve {x} ∑ \\frac{1}{2} ça 👩‍🚀 déjà".encode()


# Oracles


def extract_by_trying(response: bytes) -> bytes | None:
    """Try each start from the right; walk byte by byte to where its brace closes."""
    if b"</think>" not in response:
        return None
    tail = response.split(b"</think>")[-1]
    for start in reversed(range(len(tail))):
        if tail[start : start + 7] != b"\\boxed{":
            continue
        depth = 1
        for end in range(start + 7, len(tail)):
            depth += (tail[end : end + 1] == b"{") - (tail[end : end + 1] == b"}")
            if depth == 0:
                return tail[start + 7 : end]
    return None


def match_by_sets(prediction: bytes | None, truth: list[bytes]) -> float:
    """The paper's sentence, word for word: the bytes agree, and the length is in the set of
    boundaries."""
    text = b"".join(truth)
    boundaries = {sum(len(token) for token in truth[:n]) for n in range(1, len(truth) + 1)}
    length = len(prediction or b"")
    return 1.0 if length > 0 and prediction == text[:length] and length in boundaries else 0.0


def reachable_by_trying(truth: list[bytes]) -> bool:
    prefixes = {b"".join(truth[:n]) for n in range(len(truth) + 1)} - {b""}
    return any(extract_by_trying(b"t </think> so \\boxed{" + p + b"} .") == p for p in prefixes)


def random_vocabulary(rng: random.Random) -> set[bytes]:
    """Every byte, and chunks of TEXT cut at any byte: many begin or end inside a character."""
    starts = [rng.randrange(len(TEXT)) for _ in range(60)]
    return {bytes([b]) for b in range(256)} | {TEXT[s : s + rng.randint(2, 6)] for s in starts}


def longest_match(text: bytes, vocabulary: set[bytes]) -> list[bytes]:
    tokens, at = [], 0
    while at < len(text):
        size = next(n for n in range(6, 0, -1) if text[at : at + n] in vocabulary)
        tokens.append(text[at : at + size])
        at += size
    return tokens


# extract_prediction


def test_extraction_is_the_last_box_that_closes():
    rng = random.Random(1)
    pieces = [b"\\boxed{", b"\\boxed{", b"{", b"}", b"}", b"</think>", b"a", b" ", b"\\",
              b"\\boxed", b"</think", b">"]
    found = 0
    for _ in range(200_000):
        response = b"".join(rng.choices(pieces, k=rng.randint(0, 14)))
        if rng.random() < 0.7:
            response = b"</think>" + response
        if rng.random() < 0.2:
            response += bytes(rng.choices(range(256), k=2))
        expected = extract_by_trying(response)
        assert extract_prediction(response) == expected, response
        found += expected is not None
    assert 20_000 < found < 180_000  # both outcomes were tried often


@pytest.mark.parametrize(
    "response, prediction",
    [
        (b"so \\boxed{3}?</think>\n\nSo, the next token is ' 4'.\n\n\\boxed{ 4}", b" 4"),
        (b"hm \\boxed{x</think>\n\n\\boxed{$}", b"$"),
        (b"</think>\\boxed{ }", b" "),
        (b"</think>\\boxed{\n}<|end|>", b"\n"),
        (b"</think>\\boxed{}", b""),
        (b"</think>\\boxed{a} or \\boxed{b}", b"b"),
        (b"</think>\\boxed{a} or \\boxed{b", b"a"),
        (b"</think>\\boxed{\\frac{1}{2}}", b"\\frac{1}{2}"),
        (b"</think>\\boxed{\\boxed{a}}", b"a"),
        (b"</think>\\boxed{a\\{b}", None),  # an escaped brace is a brace
        (b"</think>\\boxed{a} wait</think> no", None),  # the last end of thinking counts
        (b"</think>\\boxed{\xc3} \xa9", b"\xc3"),  # half a character is a prediction
        (b"<think>\\boxed{a}", None),
        (b"</think> 4", None),
        (b"</think>\\boxed {a}", None),
        (b"", None),
    ],
)
def test_extraction_reads_the_endings_of_the_case_study(response, prediction):
    assert extract_prediction(response) == prediction


@pytest.mark.parametrize(
    "tail, prediction",
    [
        (b"{" * MB, None),
        (b"\\boxed{a}" + b"{" * MB, b"a"),
        (b"}" * MB + b"\\boxed{a}", b"a"),
        (b"\\boxed{" * (MB // 7), None),
        (b"\\boxed{" * (MB // 8) + b"}" * (MB // 8), b""),
        (b"\\boxed{" * (MB // 7) + b"a}", b"a"),
        (b"\\boxed{a}" + b"\\boxed{{" * (MB // 8) + b"}", b"a"),
        (b"\\boxed{" + b"{" * (MB // 2) + b"}" * (MB // 2) + b"}",
         b"{" * (MB // 2) + b"}" * (MB // 2)),
        (b"</think>" * (MB // 8) + b"\\boxed{a}", b"a"),
    ],
    ids=range(9),
)
def test_extraction_of_a_hostile_megabyte_ends(tail, prediction):
    assert extract_prediction(b"</think>" + tail) == prediction


# prefix_match


def test_reward_boundaries_are_cumulative_token_bytes():
    truth = [b"a", b"\xc3", b"\xa9", b"bc"]  # "aébc": boundaries 1, 2, 3, 5
    text = b"".join(truth)
    assert [n for n in range(6) if prefix_match(text[:n], truth)] == [1, 2, 3, 5]


def test_prefix_match_agrees_with_the_set_of_boundaries_over_random_byte_vocabularies():
    rng = random.Random(2)
    right = split = 0
    for _ in range(400):
        vocabulary = random_vocabulary(rng)
        for _ in range(500):
            start = rng.randrange(len(TEXT))
            truth = longest_match(TEXT[start : start + rng.randint(0, 12)], vocabulary)
            if rng.random() < 0.2:
                truth.insert(rng.randint(0, len(truth)), b"")
            prediction = (b"".join(truth) + b"a")[: rng.randint(0, 10)]
            if rng.random() < 0.2 and prediction:
                at = rng.randrange(len(prediction))
                prediction = prediction[:at] + bytes([rng.randrange(256)]) + prediction[at + 1 :]
            expected = match_by_sets(prediction, truth)
            assert prefix_match(prediction, truth) == expected, (prediction, truth)
            right += expected == 1.0
            split += expected == 1.0 and "\ufffd" in prediction.decode(errors="replace")
    assert 20_000 < right < 180_000 and split > 5_000


def test_no_prediction_earns_nothing_whatever_the_truth():
    for truth in ([], [b""], [b"", b"a"], [b"a"]):
        assert prefix_match(None, truth) == prefix_match(b"", truth) == 0.0
    assert prefix_match(b"a", []) == prefix_match(b"a", [b""]) == 0.0
    assert prefix_match(b"a", [b"", b"a", b"", b"b"]) == 1.0


# reachable


def test_reachable_iff_some_boundary_prefix_comes_back_from_its_box():
    rng = random.Random(3)
    pieces = [b"{", b"}", b"a", b"", b"\\boxed", b"{", b"\\boxed{", b"</think>", b"</",
              b"think>", b"{}", b"}{"]
    counts = [0, 0]
    for _ in range(100_000):
        truth = rng.choices(pieces, k=rng.randint(0, 6))
        expected = reachable_by_trying(truth)
        assert reachable(truth) == expected, truth
        counts[expected] += 1
    assert min(counts) > 10_000


def test_reachable_ends_on_a_brace_that_never_closes():
    assert not reachable([b"{"] + [b"a"] * MB)
    assert not reachable([b"}"] + [b"a"] * MB)
    assert reachable([b"{"] + [b"a"] * MB + [b"}"])


# The schemes of appendix A

WORDS = {b" par", b"is", b" lon", b"don", b" the"}
CHANCES = {b" par": 0.5, b" lon": 0.25, b" the": 0.125, b"x": 0.0625}


def words(prediction: bytes) -> list[bytes]:
    return longest_match(prediction, WORDS | {bytes([b]) for b in range(256)})


def test_first_token_reward_ignores_the_rest():
    truth = [b" par", b"is"]
    for prediction in (b" par", b" paris", b" parade"):
        assert first_token_match(prediction, truth, words) == 1.0
    for prediction in (b" pa", b" lon", b" ", b"par", b"", None):
        assert first_token_match(prediction, truth, words) == 0.0
    for prediction in (b"a", b"", None):
        assert first_token_match(prediction, [], words) == 0.0


def test_dense_reward_is_one_if_right_else_the_probability_of_the_wrong_token():
    truth = [b" par", b"is"]
    rewards = [dense_reward(p, truth, words, CHANCES.__getitem__)
               for p in (b" paris", b" london", b"xyz", b"", None)]
    assert rewards == [1.0, 0.25, 0.0625, 0.0, 0.0]


def test_conditional_dense_reward_is_dense_only_where_one_of_the_group_is_right():
    truth = [b" par", b"is"]
    right, wrong = [b" lon", b" par", None, b" the"], [b" lon", None, b""]
    earned = conditional_dense_reward(right, truth, words, CHANCES.__getitem__, -1.0)
    assert earned == [0.25, 1.0, 0.0, 0.125]
    assert conditional_dense_reward(wrong, truth, words, CHANCES.__getitem__) == [0.0] * 3
    earned = conditional_dense_reward(wrong, truth, words, CHANCES.__getitem__, all_wrong=-0.1)
    assert earned == [-0.1] * 3
    assert conditional_dense_reward([], truth, words, CHANCES.__getitem__) == []


# answer_match


@pytest.mark.parametrize(
    "same",
    [
        ["1/2", "\\frac{1}{2}", "\\dfrac{1}{2}", "\\tfrac12", "$\\frac 12$", "2/4"]
        + ["0.5", ".5", "0.50.", "5e-1", "50\\%", "50%"],
        ["-1/2", "-\\frac{1}{2}", "\\frac{-1}{2}", "1/-2", "-0.5", "\u22120.5"],
        ["1000", "1,000", "1{,}000", "1\\,000", "1\\!000", "$1,000.00$", "\\$1,000", "1e3",
         "+1000", "\\text{1,000}"],
        ["1234567", "1,234,567", "long thought\n#### 1,234,567", "#### 5\n#### 1234567"],
        ["(1,234)", "(1, 234)", "\\left(1,\\,234\\right)", "\\( (1,234) \\)"],
        ["[1,234 + x]", "[1, 234 + x]"],
        ["\\text{Paris}", "Paris", " Paris. ", "\\mathrm{Paris}", "\\mbox{Paris}"],
        ["caf\u00e9", "cafe\u0301"],
        ["x^2 + 1", "x^2+1", "$x^2 +~1$", "x^2\\;+\\ 1"],
        ["5 \\text{ cm}", "5 cm", "5\\,\\text{cm}", "5cm"],
    ],
)
def test_answers_of_one_meaning_match_each_other(same):
    for prediction in same:
        for answer in same:
            if "####" not in prediction:  # only a reference answer carries its solution
                assert answer_match(prediction.encode(), answer) == 1.0, (prediction, answer)


def test_answers_of_different_meaning_do_not_match():
    different = ["1/2", "1/3", "0.3333", "50", "0.5001", "1 1/2", "11/2", "1 2", "12", "(1,234)",
                 "1234", "-5", "5"]
    different += ["5 cm", "--5", "0", "1/0", "\\frac{1}{0}", "1e999999999", "1e999999998"]
    different += ["1,2345", "12345", "0.1,234", "0.1234"]
    different += ["Paris", "paris", "\\leftarrow", "arrow"]
    for i, prediction in enumerate(different):
        for j, answer in enumerate(different):
            assert answer_match(prediction.encode(), answer) == float(i == j), (prediction, answer)


def test_an_empty_or_undecodable_answer_is_wrong():
    for prediction in (None, b"", b" ", b"$", b".", b"\xff", b"5\xc3"):
        for answer in ("", " ", "5", "####"):
            assert answer_match(prediction, answer) == 0.0


@pytest.mark.parametrize(
    "hostile",
    [
        "1e999999999",
        "-1e-999999999",
        "1e999/1e-999",
        "9" * MB,
        "9" * 9000,
        "1," * 4000,
        "1" + ",234" * 2000 + ")",
        "\\text{" * 1600,
        "\\text" + " " * 9000,
        "1" + " " * 9000 + "2",
        "\\frac{" * 1600,
        "a" + "\u0301\u0316" * 2400,
        "a" + "\u0301\u0316" * (MB // 4),
        "." * 9000 + "a",
    ],
    ids=range(14),
)
def test_a_hostile_answer_ends_and_is_wrong(hostile):
    for answer in ("5", "1e999", "1/3"):
        assert answer_match(hostile.encode(), answer) == 0.0


def test_fractions_compare_exactly():
    rng = random.Random(4)
    for _ in range(5_000):
        a, b, c, d = (rng.randint(1, 12) for _ in range(4))
        forms = [f"{c}/{d}", f"\\frac{{{c}}}{{{d}}}", f"\\dfrac{{{100 * c}}}{{{d}}}\\%"]
        assert answer_match(f"{a}/{b}".encode(), rng.choice(forms)) == float(a * d == b * c)


# The rewards of a group, as the trainer calls them

QUESTION = SimpleNamespace(truth=[b" par", b"is"], answer="1/2")
POLICY = SimpleNamespace(tokens=words, probability=lambda question, token: {
    id(QUESTION): CHANCES}[id(question)][token])


@pytest.mark.parametrize(
    "name, predictions, rewards",
    [
        ("prefix", [b" par", b" paris", b" pari", b" lon", b""], [1, 1, 0, 0, 0]),
        ("first-token", [b" par", b" paris", b" pari", b" lon", b""], [1, 1, 1, 0, 0]),
        ("dense", [b" par", b" lon", b" the end", b""], [1, 0.25, 0.125, 0]),
        ("dense", [b" lon", b" the"], [0.25, 0.125]),
        ("conditional-dense", [b" par", b" lon", b""], [1, 0.25, 0]),
        ("conditional-dense", [b" lon", b" the"], [0, 0]),
        ("answer", [b"0.5", b"\\frac12", b" par", b""], [1, 1, 0, 0]),
        ("format", [b" par", b"junk", b""], [1, 1, 0]),
    ],
)
def test_a_group_gets_one_float_per_response_and_an_unfinished_one_gets_nothing(
        name, predictions, rewards):
    responses = [b"hm</think>\\boxed{" + prediction + b"}" for prediction in predictions]
    got = REWARDS[name](responses + [b"", b"\\boxed{ par}"], QUESTION, POLICY)
    assert got == rewards + [0, 0] and all(type(reward) is float for reward in got)


def test_the_example_in_the_module_docstring_is_a_reward():
    example = textwrap.dedent(reward.__doc__.split("in REWARDS:\n")[1])
    rewards: dict = {}
    exec(example, vars(reward) | {"REWARDS": rewards})
    responses = [b"</think>\\boxed{ par}", b"</think>\\boxed{ paris}", b"</think>\\boxed{ pa}", b""]
    assert rewards["longer"](responses, QUESTION, POLICY) == [4.0, 6.0, 0.0, 0.0]


def test_every_reward_is_named():
    assert list(REWARDS) == [
        "prefix", "first-token", "dense", "conditional-dense", "answer", "format"]


def test_the_answer_reward_refuses_a_question_without_an_answer():
    with pytest.raises(ValueError, match="has no answer"):
        REWARDS["answer"]([b""], SimpleNamespace(truth=[b"a"], answer=None), POLICY)
