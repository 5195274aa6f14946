"""One step of RPT by hand, printed for reading.

    python -m toy.step [train.py's arguments]

A document and its entropies, a question and its prompt, the responses and what they earn, the loss
of every token of one of them, the update, and the same question afterwards. Nothing is computed
here: it calls the modules, and rpt.rpt_step does the same without a word. A few seconds on a CPU.
"""

import dataclasses
import sys
import tempfile

import numpy as np
import torch

import eval as evaluation
import train
from data import random_indices
from reward import REWARDS, extract_prediction, prefix_match
from rpt import Policy, policy_loss, rollout, token_logprobs, token_weight, update

BLOCKS = " ▁▂▃▄▅▆▇█"
HIGHEST = np.log(16)  # nats: the entropy of a uniform choice among 16 tokens


def heading(text):
    print(f"\n{text}\n{'-' * len(text)}")


def bars(corpus, entropy, document):
    """A document's tokens with a block as high as the entropy before each."""
    start, end = corpus.starts[document: document + 2]
    tops, texts = "", ""
    for place in range(start, end):
        token = evaluation.text(corpus.tokenizer.token_bytes(int(corpus.tokens[place])))
        token = token.replace("\n", "⏎")
        share = 0 if np.isnan(entropy[place]) else entropy[place] / HIGHEST
        tops += BLOCKS[round(8 * min(share, 1))] * len(token)
        texts += token
    for begin in range(0, len(texts), 96):
        print(f"  {tops[begin: begin + 96]}\n  {texts[begin: begin + 96]}")


def verdict(prediction, truth):
    """Why a prediction earns what it earns: where it ends among the truth's tokens."""
    if prediction is None:
        return "nothing is boxed after </think>"
    shown, text = "|".join(evaluation.text(token) for token in truth[:4]), b"".join(truth)
    if prefix_match(prediction, truth):
        return f"a prefix of {shown} that ends on a boundary |"
    if prediction and text.startswith(prediction):
        return f"a prefix of {shown} that ends inside a token"
    same = next((n for n, (a, b) in enumerate(zip(prediction, text)) if a != b), 0)
    return f"not a prefix of {shown}: differs from byte {same} on"


def show_group(group):
    """The responses with their predictions, rewards and advantages."""
    for n, (c, text, reward, advantage) in enumerate(zip(
            group.completions, group.responses, group.rewards, group.advantages)):
        prediction = extract_prediction(text) if c.finished else None
        print(f"  {n}: {evaluation.text(text)!r}\n     boxed {prediction!r}: "
              f"{verdict(prediction, group.question.truth)}\n"
              f"     reward {reward:g}, advantage {advantage:+.3f}")


def longest(group):
    """The index of the longest response."""
    return int(np.argmax([len(c.ids) for c in group.completions]))


def show_losses(policy, group, method):
    """The loss of every token of the longest response."""
    n = longest(group)
    c, advantage = group.completions[n], group.advantages[n]
    total = sum(len(each.ids) for each in group.completions)
    ids = torch.tensor([[*group.prompt, *c.ids]], device=policy.model.head.device)
    with torch.no_grad():
        hidden = policy.model(ids)[0, len(group.prompt) - 1: -1]
        logprobs, entropy = token_logprobs(policy.model, hidden, ids[0, len(group.prompt):],
                                           method.temperature)
    weight = torch.tensor(token_weight(len(c.ids), method, total, len(group.completions)))
    print(f"  of response {n}: A = {advantage:+.3f}, weight 1/{1 / float(weight):g} a token")
    print("  token         logprob   ratio  entropy     loss")
    for id, now, then, h in zip(c.ids, logprobs.cpu(), torch.tensor(c.logprobs), entropy):
        loss = policy_loss(now, then, torch.tensor(advantage), weight,
                           method.clip_low, method.clip_high)
        token = repr(evaluation.text(policy.tokenizer.token_bytes(id)))
        print(f"  {token:12} {now:8.4f} {(now - then).exp():7.5f} {h:8.4f} {loss:+8.5f}")


def main(argv=None):
    run = train.parse(sys.argv[1:] if argv is None else argv)
    run = dataclasses.replace(run, cache=run.cache or "runs/cache")
    if run.stage != "rpt":
        sys.exit("toy.step: a step of --stage rpt alone is shown")
    with train.one_sentence(), tempfile.TemporaryDirectory() as out:  # nothing of a run is left
        setup = train.prepare(dataclasses.replace(run, out=out))
        questions, _ = train.questions(setup)
    policy = Policy(train.build(setup.source, run, setup.device), setup.tokenizer)
    tokenizer, corpus = setup.tokenizer, questions.corpus
    for draw in range(100):  # until there is something to show: the longest response is right
        n = random_indices(len(questions), run.seed, 0, draw, 1)[0]
        group = rollout(policy, [((draw, 0), questions[n])], run, REWARDS[run.reward],
                        run.seed, 0)[0]
        if group.advantages[longest(group)] > 0:
            break
    question = group.question

    heading(f"1. A document ({question.document}), and how unsure the model is before each token")
    bars(corpus, questions.entropy, question.document)
    heading(f"2. The question: what follows token {question.position}, entropy "
            f"{question.entropy:.2f} nats?")
    print(f"  ...{evaluation.text(tokenizer.bytes_of(question.context[-40:]))!r}\n  truth, by "
          f"tokens: {'|'.join(evaluation.text(t) for t in question.truth[:6])!r}")
    heading(f"3. The prompt, {len(group.prompt)} tokens")
    print(f"  {group.prompt}\n  {evaluation.text(tokenizer.bytes_of(group.prompt))!r}")
    heading(f"4. {len(group.completions)} responses, and what they earn "
            f"(question {draw + 1} that was drawn)")
    show_group(group)
    heading("5. The loss, before the update: - weight min(r A, clip(r) A); r is 1 on-policy")
    show_losses(policy, group, run)
    heading("6. The update")
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=run.lr, betas=(0.9, run.beta2),
                                  weight_decay=run.weight_decay)
    metrics = update(policy.model, optimizer, [group], dataclasses.replace(run, questions=1))
    print(f"  loss {metrics['loss']:+.5f}, gradient's norm {metrics['grad_norm']:.3f}, "
          f"{metrics['trained_tokens']:g} tokens, learning rate {run.lr:g}")
    heading("7. The same question after the step, the same random numbers")
    after = rollout(policy, [(group.number, question)], run, REWARDS[run.reward], run.seed, 0)[0]
    show_group(after)
    print(f"\nmean reward {np.mean(group.rewards):.3f} -> {np.mean(after.rewards):.3f} on the one "
          "question it learned from; a run takes many questions a step")


if __name__ == "__main__":
    main()
