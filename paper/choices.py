r"""Ask multiple-choice questions in MMLU-Pro's format, zero-shot (table 3).

    python -m paper.choices MODEL_OR_RUN --choices FILE [--samples 4] [train.py's options]

Rows have question, options and answer_index. A choice counts however its label is boxed: `B`,
`(B)`, `\text{(B)}`, `B)`, `(B) two` or `B: two`, but not by the text of an option alone. A question
that is longer than --max-prompt loses its beginning.
"""

import argparse
import re
import sys
from dataclasses import replace
from random import Random
from string import ascii_uppercase as LABELS

from data import Question, Tokenizer, read_files
from eval import evaluate, summary, table
from paper.ask import load
from reward import predictions_of, value


def read_choices(file: str, tokenizer: Tokenizer) -> list[Question]:
    """Return the rows of a file as questions with answers; each option is a line, "(A) text"."""
    questions = []
    for n, (row, _) in enumerate(read_files(file)):
        options = (f"\n({label}) {text}" for label, text in zip(LABELS, row["options"]))
        ids = tokenizer.encode(row["question"] + "".join(options))
        questions.append(Question(tuple(ids), (), n, 0, answer=LABELS[row["answer_index"]]))
    return questions


def label_of(prediction: str) -> str | None:
    """Return the label of the choice that a prediction names, None if it names none."""
    found = re.match(r"\(?([A-Z])(?:[).:]|$)", str(value(prediction)))
    return found and found[1]


def is_right(responses, question, policy) -> list[float]:
    """Return 1.0 for each response that boxes the label of the answer."""
    return [float(label_of((p or b"").decode(errors="replace")) == question.answer)
            for p in predictions_of(responses)]


def main(argv=None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="paper.choices", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--choices", required=True)
    args, options = parser.parse_known_args(argv)
    run, policy = load(args.model, options)
    questions = read_choices(args.choices, policy.tokenizer)
    Random(run.seed).shuffle(questions)  # files are often sorted by subject
    if not questions[: run.eval_questions]:
        raise ValueError(f"{args.choices}: no questions to ask")
    records = evaluate(policy, questions[: run.eval_questions], replace(run, template="plain"),
                       is_right)
    print(table({args.model: summary(records)}, "choices"))


if __name__ == "__main__":
    try:
        main()
    except KeyError as error:
        sys.exit(f"paper.choices: error: a row of --choices has no {error}")
    except (ValueError, OSError) as error:
        sys.exit(f"paper.choices: error: {error}")
