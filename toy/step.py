"""One step of RPT by hand, printed for reading.

    python -m toy.step [train.py's options]

It shows a document and its entropies, a question and its prompt, the responses and what they earn,
the loss of every token of one of them, the update, and the same question afterwards. It computes
nothing itself: it calls the modules, and rpt.rpt_step does the same without printing. A few seconds
on a CPU.
"""

from os.path import commonprefix

import numpy as np
import torch

import train
from data import Tokenizer, load_corpus, random_indices, select_positions
from eval import corpus_entropy, to_text
from model import DTYPES, load_pretrained, resolve
from reward import REWARDS, extract_prediction, prefix_match
from rpt import Policy, group_advantages, policy_loss, rollout, token_logprobs, update

BLOCKS = " ▁▂▃▄▅▆▇█"
HIGHEST = np.log(16)  # nats: the entropy of a uniform choice among 16 tokens


def heading(text):
    """Print an underlined line."""
    print(f"\n{text}\n{'-' * len(text)}")


def show_entropy(corpus, entropy, document):
    """Print a document's tokens under blocks as high as the entropy before each."""
    values = np.nan_to_num(entropy[slice(*corpus.starts[document: document + 2])])
    tops, texts = "", ""
    for token, nats in zip(corpus.ids(document), values):
        token = to_text(corpus.tokenizer.token_bytes(token)).replace("\n", "⏎")
        tops += BLOCKS[round(8 * min(nats / HIGHEST, 1))] * len(token)
        texts += token
    for begin in range(0, len(texts), 96):
        print(f"    {tops[begin: begin + 96]}\n    {texts[begin: begin + 96]}")


def explain(prediction, truth):
    """Return why a prediction earns what it earns: where it ends among the truth's tokens."""
    if prediction is None:
        return "nothing is boxed after </think>"
    shown, text = "|".join(map(to_text, truth[:4])), b"".join(truth)
    if prefix_match(prediction, truth):
        return f"a prefix of {shown} that ends on a boundary |"
    if prediction and text.startswith(prediction):
        return f"a prefix of {shown} that ends inside a token"
    return f"not a prefix of {shown}: differs from byte {len(commonprefix([prediction, text]))} on"


def sample(policy, run, number, question):
    """Return the group of responses to a question, and their advantages."""
    (group,) = rollout(policy, {number: question}, run, REWARDS[run.reward], run.seed)
    return group, group_advantages(torch.tensor([group.rewards]), run.scale_by_std)[0].tolist()


def show_group(group, advantages):
    """Print the responses with their predictions, rewards and advantages."""
    for n, (c, text, reward, advantage) in enumerate(zip(
            group.completions, group.responses, group.rewards, advantages)):
        prediction = extract_prediction(text) if c.finished else None
        print(f"    {n}: {to_text(text)!r}\n       boxed {prediction!r}: "
              f"{explain(prediction, group.question.truth)}\n"
              f"       reward {reward:g}, advantage {advantage:+.3f}")


@torch.no_grad()
def show_losses(policy, group, n, advantage, run):
    """Print the loss of every token of a response."""
    c, begin = group.completions[n], len(group.prompt)
    total = sum(len(each.ids) for each in group.completions)
    ids = torch.tensor([[*group.prompt, *c.ids]], device=policy.model.head.device)
    hidden = policy.model(ids)[0, begin - 1: -1]
    logprobs, entropy = token_logprobs(policy.model, hidden, ids[0, begin:], run.temperature)
    print(f"    of response {n}: A = {advantage:+.3f}, weight 1/{total} a token")
    print("    token         logprob   ratio  entropy     loss")
    for id, now, then, h in zip(c.ids, logprobs.cpu(), torch.tensor(c.logprobs), entropy):
        loss = policy_loss(now, then, torch.tensor(advantage), torch.tensor(1 / total))
        token = repr(to_text(policy.tokenizer.token_bytes(id)))
        print(f"    {token:12} {now:8.4f} {(now - then).exp():7.5f} {h:8.4f} {loss:+8.5f}")


def main(argv=None):
    run = train.parse(argv)
    tokenizer = Tokenizer(resolve(run.model), run.date)
    corpus = load_corpus(run.corpus, tokenizer, run.holdout, run.seed, run.max_prompt)
    questions = select_positions(corpus, corpus_entropy(run, corpus), False, run.min_entropy,
                                 run.region, run.min_context)
    policy = Policy(load_pretrained(run.model, run.device, DTYPES[run.dtype]), tokenizer)
    for draw in range(100):  # until there is something to show: the longest response is right
        place = random_indices(len(questions), run.seed, 0, draw, 1)[0]
        group, advantages = sample(policy, run, (0, draw, 0), questions[place])
        lengths = [len(c.ids) for c in group.completions]
        n = lengths.index(max(lengths))
        if advantages[n] > 0 and lengths[n] > 2 * min(lengths):
            break
    question = group.question

    heading(f"1. A document ({question.document}), and how unsure the model is before each token")
    show_entropy(corpus, questions.entropy, question.document)
    heading(f"2. The question: what follows token {question.position}, entropy "
            f"{question.entropy:.2f} nats?")
    print(f"    ...{to_text(tokenizer.bytes_of(question.context[-40:]))!r}\n    truth, by tokens: "
          f"{'|'.join(map(to_text, question.truth[:6]))!r}")
    heading(f"3. The prompt, {len(group.prompt)} tokens")
    print(f"    {group.prompt}\n    {to_text(tokenizer.bytes_of(group.prompt))!r}")
    heading(f"4. {len(group.completions)} responses, and what they earn "
            f"(drawn as number {draw + 1})")
    show_group(group, advantages)
    heading("5. The loss, before the update: - weight min(r A, clip(r) A); r is 1 on-policy")
    show_losses(policy, group, n, advantages[n], run)
    heading("6. The update")
    optimizer = torch.optim.AdamW(policy.model.parameters(), run.lr, weight_decay=run.weight_decay)
    metrics = update(policy.model, optimizer, [group], run)
    print(f"    loss {metrics['loss']:+.5f}, gradient's norm {metrics['grad_norm']:.3f}, "
          f"{metrics['trained_tokens']:g} tokens, learning rate {run.lr:g}")
    heading("7. The same question after the step, the same random numbers")
    after, advantages = sample(policy, run, group.number, question)
    show_group(after, advantages)
    print(f"\nmean reward {np.mean(group.rewards):.3f} -> {np.mean(after.rewards):.3f} on the one "
          "question it learned from; a run takes many questions a step")


if __name__ == "__main__":
    main()
