r"""Reinforcement Pre-Training (RPT, arXiv 2506.08007) in one file. To run it: python -m toy.mini

The corpus tells shell games: "The ball is under C. 4 C A. 5 D B.\n\nThe ball is now under A." Here
swap 4 exchanges cups C and A. The last cup is hard to guess, but easy to find by following the
ball. So RPT stops the text before that cup and asks for the next token. The model reasons, then
boxes a prediction: "C 4 C A A. 5 D B A.\n</think>\n\n\boxed{ A}". The reward is 1 if the text goes
on with the boxed bytes, else 0. Of several responses to a question, GRPO makes the better ones more
likely. No labels are needed. In two minutes, held-out accuracy rises from 32 % to more than 90 %.

What the seven modules add is speed and scale:
    rollout      sampler.generate and KVCache compute each prompt once for its whole group
    policy_loss  rpt.token_logprobs makes logits in chunks, rpt.accumulate runs each prompt once
    main         train.py shards the model with FSDP2, writes checkpoints and resumes from them"""

import json
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

STEPS, QUESTIONS, GROUP = 80, 32, 8  # a step asks 32 questions, 8 times each
TEMPERATURE = 0.8  # of sampling
MAX_TOKENS = 128  # of a prompt and its response; to follow the ball through 8 swaps takes 121
MIN_ENTROPY = 0.5  # nats; where the model is sure of the next token, it has nothing to reason about
HELD_OUT = 300  # documents to evaluate on, never trained on
TOY = Path(__file__).parent
tokenizer = tokenizers.Tokenizer.from_file(str(TOY / "base/tokenizer.json"))
END = tokenizer.token_to_id("<|im_end|>")
# The reward compares bytes, because a token may end in the middle of a character. The vocabulary
# spells a printable byte as that character, and the other bytes as the characters from 256 on.
alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
byte_of = dict(zip(alphabet, sorted(range(256), key=lambda byte: chr(byte) not in alphabet)))
token_bytes = {id: bytes(map(byte_of.get, token)) for token, id in tokenizer.get_vocab().items()}


def decode(ids):
    return b"".join(token_bytes[id] for id in ids)


class Qwen2:
    """A transformer: a dictionary of weights, and functions that apply the weights `at` a name."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        weights = load_file(next(folder.glob("*.safetensors")))
        self.weights = {name: weight.requires_grad_() for name, weight in weights.items()}

    def norm(self, at, x):
        return F.rms_norm(x, x.shape[2:], self.weights[f"{at}.weight"], self.config["rms_norm_eps"])

    def linear(self, at, x):
        return F.linear(x, self.weights[f"{at}.weight"], self.weights.get(f"{at}.bias"))

    def rotate(self, x, start):
        """Apply rotary position embeddings; the first token of x is at position `start`."""
        position, channel = torch.arange(start, start + x.shape[2]), torch.arange(0, x.shape[3], 2)
        angle = torch.outer(position, self.config["rope_theta"] ** (-channel / x.shape[3]))
        (a, b), cos, sin = x.chunk(2, dim=-1), angle.cos(), angle.sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def attention(self, at, x, cache):
        q, k, v = (self.linear(f"{at}.{part}_proj", x)
                   .unflatten(-1, (-1, self.config["head_dim"])).transpose(1, 2)
                   for part in "qkv")  # [B, heads, T, head_dim]
        start = cache[at][0].shape[2] if at in cache else 0
        q, k = self.rotate(q, start), self.rotate(k, start)
        if start:
            k, v = (torch.cat(pair, dim=2) for pair in zip(cache[at], (k, v)))
        cache[at] = k, v
        # A single new token may look at the whole cache, so only a first call needs a causal mask.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0, enable_gqa=True)
        return self.linear(f"{at}.o_proj", y.transpose(1, 2).flatten(2))

    def __call__(self, ids, cache=None):
        """Return the logits [B, T, vocabulary] of the token after each of ids [B, T]. A cache, at
        first {}, keeps keys and values: after the first call, pass only the one new token."""
        cache = {} if cache is None else cache
        x = self.weights["model.embed_tokens.weight"][ids]
        for n in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{n}"
            x = x + self.attention(f"{at}.self_attn", self.norm(f"{at}.input_layernorm", x), cache)
            y = self.norm(f"{at}.post_attention_layernorm", x)
            gate, up = self.linear(f"{at}.mlp.gate_proj", y), self.linear(f"{at}.mlp.up_proj", y)
            x = x + self.linear(f"{at}.mlp.down_proj", F.silu(gate) * up)
        return self.linear("model.embed_tokens", self.norm("model.norm", x))  # tied weights


@torch.no_grad()
def find_questions(model, rows):
    """Yield (context, truth), both in ids, before each token of a solution that is hard to predict:
    the entropy of the 16 likeliest candidates, the paper's measure, is above MIN_ENTROPY."""
    for row in rows:
        problem = row["problem"] + "\n\n"
        ids = tokenizer.encode(problem + row["solution"]).ids
        first = len(tokenizer.encode(problem).ids)
        top = model(torch.tensor([ids]))[0].topk(16).values.softmax(-1)
        entropy = torch.special.entr(top).sum(-1)  # entropy[n - 1] is that of token n
        yield from ((ids[:n], ids[n:]) for n in range(first, len(ids))
                    if entropy[n - 1] > MIN_ENTROPY)


def make_prompt(context):
    """Put a context into the chat format, as ids: its text might become other tokens here."""
    return (tokenizer.encode("<|im_start|>user\nNext token?\n").ids + context
            + tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n<think>\n").ids)


def extract_prediction(text):
    r"""Return the bytes inside the last \boxed{...} that closes after </think>, or b""."""
    _, mark, answer = text.rpartition(b"</think>")
    for box in reversed(answer.split(b"\\boxed{")[1:] if mark else []):
        for end in range(len(box)):  # it closes at the first } that no { in it has opened
            if box.count(b"}", 0, end + 1) > box.count(b"{", 0, end + 1):
                return box[:end]
    return b""


def reward(response, truth):
    """Return 1 if the prediction is, byte for byte, the next token or the next few tokens, else 0.
    If any prefix of the truth counted, a single space would nearly always be right."""
    prediction = extract_prediction(decode(response)) if response[-1] == END else b""
    return float(prediction in [decode(truth[:n + 1]) for n in range(len(truth))])


@torch.no_grad()
def rollout(model, questions):
    """Sample and reward a response to each question. Return ids [B, T], the mask of response tokens
    [B, T] and rewards [B]. All rows grow together, and a longer prompt supplies its own tokens."""
    prompts = [make_prompt(context) for context, _ in questions]
    ids = torch.tensor([prompt + [END] * (MAX_TOKENS - len(prompt)) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    is_response = torch.zeros_like(ids, dtype=torch.bool)
    cache, start = {}, 0
    for now in range(min(lengths), MAX_TOKENS):
        ended = (is_response & (ids == END)).any(1)
        if ended.all():
            break
        logits = model(ids[:, start:now], cache)[:, -1]
        sampled = (logits / TEMPERATURE).softmax(-1).multinomial(1)[:, 0]
        is_response[:, now] = (now >= lengths) & ~ended
        ids[:, now] = torch.where(is_response[:, now], sampled, ids[:, now])
        start = now
    responses = [row[mask].tolist() for row, mask in zip(ids, is_response)]
    rewards = [reward(response, truth) for response, (_, truth) in zip(responses, questions)]
    return ids, is_response, torch.tensor(rewards)


def policy_loss(model, ids, is_response, advantages):
    """Return GRPO's loss: minus the mean of r A over all response tokens, end tokens included. r is
    a token's probability over the one it was sampled with. It is 1, because we learn from a batch
    once, so PPO's clipping would do nothing. Its gradient is that of the log-probability."""
    rows = advantages != 0  # the others have no gradient
    logits = model(ids[rows])[:, :-1] / TEMPERATURE  # as sampled; logits n predict token n + 1
    logprobs = logits.log_softmax(-1).gather(-1, ids[rows, 1:, None])[..., 0]
    ratio = (logprobs - logprobs.detach()).exp()
    return -(advantages[rows, None] * ratio * is_response[rows, 1:]).sum() / is_response.sum()


def train_step(model, optimizer, questions):
    """Learn from a batch of questions. Return the mean reward and the mean length of a response."""
    ids, is_response, rewards = rollout(model, [q for q in questions for _ in range(GROUP)])
    groups = rewards.view(-1, GROUP)
    # How many standard deviations above its group is a reward? 0 if all are right, or all wrong.
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    if advantages.any():  # otherwise AdamW's momentum would still move the weights
        policy_loss(model, ids, is_response, advantages.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return rewards.mean(), is_response.sum() / len(ids)


@torch.no_grad()
def evaluate(model, questions):
    """Print how often the boxed prediction is right, and how often the likeliest next token is."""
    reasoning = rollout(model, questions)[2].mean()
    argmax = sum(model(torch.tensor([context]))[0, -1].argmax() == truth[0]
                 for context, truth in questions) / len(questions)
    print(f"held-out accuracy: reasoning {reasoning:.1%}, argmax {argmax:.1%}", flush=True)


def main(seed=0):
    torch.manual_seed(seed)
    model = Qwen2(TOY / "base")
    rows = [json.loads(line) for line in (TOY / "corpus.jsonl").open()]
    held_out = list(find_questions(model, rows[:HELD_OUT]))
    questions = list(find_questions(model, rows[HELD_OUT:]))
    optimizer = torch.optim.AdamW(model.weights.values(), 5e-4, (0.9, 0.99), weight_decay=0)
    evaluate(model, held_out)
    for step in range(STEPS):
        batch = [questions[n] for n in torch.randperm(len(questions))[:QUESTIONS]]
        mean_reward, length = train_step(model, optimizer, batch)
        if step % 10 == 0 or step == STEPS - 1:
            print(f"step {step:2}: reward {mean_reward:.3f}, length {length:.1f}", flush=True)
    evaluate(model, held_out)


if __name__ == "__main__":
    main()
