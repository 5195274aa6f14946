"""toy/mini.py and the seven modules share no code and do the same: each is the other's oracle for
questions, rewards, samples and gradients."""

import random
from itertools import product

import pytest
import torch

import reward
import rpt
from data import Question, Tokenizer, prompt_ids
from model import load_pretrained
from paper.report import read_rows
from sampler import Completion, generate
from toy import mini

# Both compute in float32 and add up in different orders. Each operation rounds by at most 6e-8 of
# its result, and the results pass through two layers, the head, and sums over up to 192 channels
# and a few thousand tokens, where errors of random sign grow with the square root of the count. We
# saw 1.3e-6 of the largest logit and up to 1e-6 of the gradient's norm. A real difference, such as
# a missing end token or a biased standard deviation, is larger than 1e-3.
FLOAT32 = 1e-5


def make_question(tokenizer, context, truth) -> Question:
    return Question(tuple(context), tuple(map(tokenizer.token_bytes, truth)), 0, len(context))


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients of every step by name and changes no weight."""

    def __init__(self, weights):
        super().__init__(weights.values(), lr=0.0)
        self.weights, self.steps = weights, []

    def step(self):
        self.steps.append({name: weight.grad.clone() for name, weight in self.weights.items()})


@pytest.fixture(scope="module")
def tokenizer(toy):
    return Tokenizer(toy / "base")


@pytest.fixture(scope="module")
def model(toy):
    return load_pretrained(toy / "base")


@pytest.fixture
def mini_model(toy):
    return mini.Qwen2(toy / "base")


@pytest.fixture(scope="module")
def rows(toy):
    return read_rows(toy / "corpus.jsonl")[:200]


@pytest.fixture(scope="module")
def questions(toy, rows):
    """(context, truth) in ids, as mini.py finds them."""
    return list(mini.find_questions(mini.Qwen2(toy / "base"), rows))


# ---- questions


def test_mini_knows_the_bytes_of_every_token(tokenizer):
    ids = range(len(tokenizer))
    assert [mini.token_bytes[id] for id in ids] == [tokenizer.token_bytes(id) for id in ids]
    assert [mini.END] == tokenizer.eos_ids


@torch.no_grad()
def test_mini_asks_at_the_positions_of_solutions_above_the_threshold(
        tokenizer, model, rows, questions):
    expected = []
    for row in rows:
        problem = f"{row['problem']}\n\n"
        ids = tokenizer.encode(problem + row["solution"])
        logits = model.logits(model(torch.tensor([ids])))[0].double()
        p = logits.sort(descending=True).values[:, :16].softmax(-1)
        entropy = -(p * p.log()).sum(-1)
        assert (entropy - mini.MIN_ENTROPY).abs().min() > 1e-4, "rounding may decide"
        for n in range(1, len(ids)):
            is_solution = len(tokenizer.bytes_of(ids[:n])) >= len(problem)
            if is_solution and entropy[n - 1] > mini.MIN_ENTROPY:
                expected.append((ids[:n], ids[n:]))
    assert len(expected) > 100
    assert questions == expected


def test_mini_makes_the_prompts_of_the_template_toy(tokenizer, questions):
    letters = [id for byte in b" now under" for id in tokenizer.encode(chr(byte))]
    assert tokenizer.encode(" now under") != letters  # as text, they would be other tokens
    for context in [letters, *(context for context, _ in questions)]:
        question = make_question(tokenizer, context, [])
        assert mini.make_prompt(context) == prompt_ids(tokenizer, question, "toy", 256)


# ---- rewards


def random_response(rng: random.Random, tokenizer: Tokenizer, truth: list[int]) -> list[int]:
    """Pieces of a right response, and of what can go wrong with it, in ids."""
    letters = {content: id for id, content in mini.token_bytes.items() if len(content) == 1}
    spelled = [letters[bytes([byte])] for byte in tokenizer.bytes_of(truth)]
    texts = ["</think>", "\\boxed{", "\\boxed{", "}", "}", "{", "\\{", "\\}", " ", ".", "\\boxed"]
    pieces = [*map(tokenizer.encode, texts), tokenizer.encode("</think>")[:-1],
              mini.tokenizer.encode("</think>").ids, [rng.randrange(len(tokenizer))], truth,
              *(truth[:n] for n in range(1, 4)), *(spelled[:n] for n in range(1, 6))]
    written = rng.choices(pieces, k=rng.randint(0, 6))
    if rng.random() < 0.8:  # without a box in its place hardly any response earns something
        written += [*map(tokenizer.encode, ["</think>", "\\boxed{"]), rng.choice(pieces),
                    tokenizer.encode("}"), *rng.choices(pieces, k=rng.randint(0, 3))]
    ids = [id for piece in written for id in piece]
    if mini.END in ids:
        ids = ids[:ids.index(mini.END)]
    return ids + [mini.END] if rng.random() < 0.9 or not ids else ids


def test_mini_rewards_what_the_prefix_reward_rewards(tokenizer, rows):
    rng = random.Random(0)
    texts = [f" {row['solution']}" for row in rows[:20]]
    texts += ["{x}^2 is", "a}b{c", "\\frac{1}{2}", "\\boxed{7} is", "é 😀, naïve", "</think> A"]
    truths = [tokenizer.encode(text)[n:] for text, n in product(texts, range(4))]
    right = inside_a_token = 0
    for n in range(6000):
        truth = truths[n % len(truths)]
        response = random_response(rng, tokenizer, truth)
        said = tokenizer.bytes_of(response[:-1]) if response[-1] == mini.END else b""
        question = make_question(tokenizer, [], truth)
        [expected] = reward.REWARDS["prefix"]([said], question, None)
        assert mini.reward(response, truth) == expected, (said, question.truth)
        right += expected
        prediction = reward.extract_prediction(said)
        is_prefix = prediction and b"".join(question.truth).startswith(prediction)
        inside_a_token += bool(is_prefix and not expected)
    assert right > 500 and inside_a_token > 200


@pytest.mark.parametrize("answer, prediction", [
    (r"\boxed{A}\boxed{B}", b"B"), (r"\boxed{A}\boxed{B", b"A"), (r"\boxed{a\boxed{A}b}", b"A"),
    (r"\boxed{A}\boxed{{B}", b"A"), (r"\boxed{{A}}", b"{A}"), (r"\boxed{\{A\}}", rb"\{A\}"),
    (r"{\boxed{A}", b"A"), (r"\boxed{A}}", b"A"), (r"\boxed{\boxed{A}", b"A"), (r"\boxed{}", b""),
    (r"\boxed{A}\boxed{B{\boxed{C}", b"C"), (r"\boxed{ A}", b" A"), (r"\boxed{A</think>}", b"")])
def test_mini_reads_the_last_box_that_closes(answer, prediction):
    text = f"\\boxed{{no}}</think>{answer}".encode()
    assert mini.extract_prediction(text) == prediction
    assert (reward.extract_prediction(text) or b"") == prediction


# ---- samples


@torch.no_grad()
def test_mini_computes_the_models_logits_at_once_and_token_by_token(model, mini_model, questions):
    longest = max((mini.make_prompt(context) for context, _ in questions), key=len)
    ids = torch.tensor([longest, longest[::-1]])
    expected = model.logits(model(ids))
    cache, begin = {}, 5
    steps = [mini_model(ids[:, :begin], cache)]
    steps += [mini_model(ids[:, n:n + 1], cache) for n in range(begin, len(longest))]
    for logits in (mini_model(ids), torch.cat(steps, dim=1)):
        assert (logits - expected).abs().max() <= FLOAT32 * expected.abs().max()


def test_mini_samples_what_generate_samples(model, mini_model, questions, monkeypatch):
    asked = questions[:24]
    prompts = [mini.make_prompt(context) for context, _ in asked]
    lengths = list(map(len, prompts))
    limit = max(lengths) + 5  # too short for a response to the longest prompt
    completions = generate(model, prompts, max_new_tokens=limit - min(lengths), temperature=0,
                           eos_ids=[mini.END])
    monkeypatch.setattr(mini, "MAX_TOKENS", limit)
    monkeypatch.setattr(mini, "TEMPERATURE", 1e-6)  # greedy: a gap of 1e-4 is a ratio of e^100
    ids, is_response, _ = mini.rollout(mini_model, asked)
    unfinished = 0
    for row, mask, prompt, [completion] in zip(ids, is_response, prompts, completions):
        response = row[mask].tolist()
        assert row[:len(prompt) + len(response)].tolist() == prompt + response
        assert response == completion.ids[:limit - len(prompt)]
        unfinished += response[-1] != mini.END
    assert 0 < unfinished < len(prompts)


# ---- gradients


def step_of_mini(mini_model, rollout, monkeypatch) -> tuple[list[float], list[dict]]:
    """The losses and the gradients by name of one train_step on a given rollout."""
    losses, policy_loss = [], mini.policy_loss

    def recording_loss(*arguments):
        loss = policy_loss(*arguments)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(mini, "rollout", lambda model, questions: rollout)
    monkeypatch.setattr(mini, "policy_loss", recording_loss)
    recorder = Recorder(mini_model.weights)
    mini.train_step(mini_model, recorder, [])
    return losses, recorder.steps


def test_mini_has_the_loss_and_gradient_of_rpt_update(model, mini_model, questions, monkeypatch):
    torch.manual_seed(0)
    asked = questions[:6]
    rewards_QG = torch.randint(2, (len(asked), mini.GROUP)).float()
    rewards_QG[0, :2] = torch.tensor([0, 1])
    rewards_QG[1] = 1  # a group with equal rewards
    ids, is_response, _ = mini.rollout(mini_model, [q for q in asked for _ in range(mini.GROUP)])
    is_response[0, is_response[0].nonzero().max()] = False  # unfinished: it loses its end token
    rollout = ids, is_response, rewards_QG.flatten()
    [loss], [gradients] = step_of_mini(mini_model, rollout, monkeypatch)

    groups = []
    for n, (context, _) in enumerate(asked):
        rows = slice(n * mini.GROUP, (n + 1) * mini.GROUP)
        responses = [row[mask].tolist() for row, mask in zip(ids[rows], is_response[rows])]
        # On-policy, the loss does not ask for the sampler's log-probabilities.
        completions = [Completion(r, [0.0] * len(r), True) for r in responses]
        groups.append(rpt.Group((0, 0, n), None, mini.make_prompt(context), completions, [],
                                rewards_QG[n].tolist()))
    assert [group.informative for group in groups] == [True, False, True, True, True, True]
    method = rpt.Method(questions=len(asked), group_size=mini.GROUP, temperature=mini.TEMPERATURE,
                        max_prompt=256, max_response=96, template="toy", micro_tokens=1024,
                        grad_clip=1e9)
    recorder = Recorder(dict(model.named_parameters()))
    metrics = rpt.update(model, recorder, groups, method)
    [expected] = recorder.steps

    assert abs(loss - metrics["loss"]) <= FLOAT32 * abs(metrics["loss"])
    assert gradients.keys() == expected.keys()
    off = torch.stack([(gradients[name] - expected[name]).norm() for name in expected]).norm()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert off <= FLOAT32 * norm


def test_mini_leaves_out_a_step_without_a_gradient(mini_model, questions, monkeypatch):
    ids, is_response, _ = mini.rollout(mini_model, questions[:mini.GROUP])
    rollout = ids, is_response, torch.ones(mini.GROUP)
    assert step_of_mini(mini_model, rollout, monkeypatch) == ([], [])
