"""Ask a model what comes next in a text: its thoughts, its predictions, and plain next tokens.

    python -m paper.ask MODEL_OR_RUN "The ball is now under" [--samples 8] [train.py's options]

The options of a run are the defaults. It prints each thought with the box that follows, the votes,
and the most probable next tokens without a thought.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import train
from data import Question, Tokenizer, read_json
from eval import record, to_text
from model import DTYPES, load_pretrained, resolve
from reward import prefix
from rpt import Policy, rollout


def load(name: str, options: Sequence[str], **defaults) -> tuple[train.Run, Policy]:
    """Load the model of a run, directory or hub id. Return the options to ask it with, and it."""
    known = read_json(Path(name) / "run.json")
    model = Path(name) / "model" if known else name
    known.pop("device", None)  # it may be another machine's
    run = train.parse([f"--model={model}", "--steps=0", *options], defaults=known | defaults)
    directory = resolve(run.model)
    return run, Policy(load_pretrained(directory, run.device, DTYPES[run.dtype]),
                       Tokenizer(directory, run.date))


def ask(policy: Policy, text: str, run: train.Run) -> str:
    """Return lines that show how the model continues a text."""
    question = Question(tuple(policy.tokenizer.encode(text)), (), 0, 0)
    (group,) = rollout(policy, {(0, 0, 0): question}, replace(run, group_size=run.samples), prefix,
                       run.seed)
    said, lines = record(group, policy.tokenizer), []
    for n, (response, prediction) in enumerate(zip(said["responses"], said["predictions"]), 1):
        lines.append(f"{n}. {response.partition('</think>')[0].strip()}\n   boxed {prediction!r}")
    votes = Counter(said["predictions"]).most_common()
    likely = policy.next_logits(question).softmax(-1).topk(8)
    plain = [(to_text(policy.tokenizer.token_bytes(token)), f"{share:.3f}")
             for share, token in zip(*(part.tolist() for part in likely))]
    for title, pairs in (("votes", votes), ("plain next token", plain)):
        lines.append(f"{title}: {', '.join(f'{token!r} {count}' for token, count in pairs)}")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        run, policy = load(sys.argv[1], sys.argv[3:], samples=8)
        print(ask(policy, sys.argv[2], run))
    except (ValueError, OSError) as error:
        sys.exit(f"paper.ask: error: {error}")
