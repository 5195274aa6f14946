r"""A start for thoughts that compute: a model learns to work calculations on paper, and to do so
before it predicts. It learns no truth of any question that RPT asks, until the last stage.

    python -m paper.recipes.worked_start --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --documents gsm8k-a.jsonl --corpus gsm8k-b.jsonl --holdout 400 --out runs/worked

Both files have calculator annotations such as <<120-40=80>>. The corpus is what RPT reads next (see
multi_step.py), with the same --holdout and --seed; the documents are other texts. Three stages of
supervised training, each from the model of the one before:

1. ability: plain text. Random calculations worked place by place (calculations.py), single steps,
   and documents, so that language stays.
2. habit: prompts and responses. A context is a document cut at an annotation, and a random
   calculation takes the place of its own. WORKED of the responses work it. The others box a quick
   guess of the model after stage 1. The whole result is in the box.
3. mixed: the documents that RPT trains on, and as many worked responses (Mixed SFT). RPT then
   begins where supervised learning has had its turn.

A random calculation is none of the corpus's or the documents', though one of its steps may be. The
same command continues where it stopped. Use one process.

expected: not yet measured on this code. A sketch took 52, 6 and 12 minutes on two cores.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from random import Random

import train
from data import TEMPLATES, Tokenizer, hold_out, read_documents
from model import DTYPES, load_pretrained, resolve
from paper.recipes.calculations import draw
from reward import box
from sampler import generate

WORKED = 0.4
TAIL = range(8, 97)  # tokens of a document that precede the calculation in a context
ROW = 430  # characters of a row of plain text, at least
STAGES = {"ability": dict(steps=250, questions=8, lr=4e-4), "habit": dict(steps=70, lr=1e-4),
          "mixed": dict(steps=66, lr=3e-5)}
COMMON = dict(stage="ntp", recipe="small", weight_decay=0.0, max_prompt=512, dtype="bfloat16")


def read_texts(source):
    """Return the documents of a corpus as text."""
    return [document.given + document.text for document in read_documents(source)]


def expressions(texts):
    """Return the expressions of all annotations."""
    return set(re.findall(r"<<([^<>=]+)=", "\n".join(texts)))


def ability_rows(random, texts, avoid, count):
    """Make rows of plain text: worked calculations and single steps, in every fourth row after two
    documents."""
    rows = []
    for n in range(count):
        lines = random.choices(texts, k=2) if n % 4 == 0 else []
        while sum(map(len, lines)) < ROW:
            step = random.choice(draw(random, avoid).steps)
            lines.append(draw(random, avoid).thought)
            lines += [step] if step.partition("=")[0] not in avoid else []
        rows.append({"text": "\n".join(lines)})
    return rows


def ask(random, texts, avoid, tokenizer, count):
    """Return `count` contexts that end in a random calculation, each with it."""
    texts, asked = [text for text in texts if "<<" in text], []
    for _ in range(count):
        calculation, text = draw(random, avoid), random.choice(texts)
        ids = tokenizer.encode(text[: random.choice([m.start() for m in re.finditer("<<", text)])])
        tail = tokenizer.bytes_of(ids[-random.choice(TAIL):]).decode(errors="ignore")
        asked.append((f"{tail}<<{calculation.expression}=", calculation))
    return asked


def respond(context, thought, prediction):
    """Return a row of a prompt, and a response that boxes a prediction."""
    return {"prompt": TEMPLATES["toy"].replace("{context}", context),
            "response": thought + box(prediction.encode()).decode()}


def worked_rows(asked):
    return [respond(context, f"{calculation.thought}\n", calculation.result)
            for context, calculation in asked]


def quick_rows(asked, run, tokenizer):
    """Make rows that box what the model writes after the context, where that is a number."""
    model = load_pretrained(run.model, run.device, DTYPES[run.dtype])
    prompts = [[*tokenizer.bos, *tokenizer.encode(context)] for context, _ in asked]
    said = generate(model, prompts, max_new_tokens=8, eos_ids=tokenizer.eos_ids, seed=run.seed)
    texts = [tokenizer.bytes_of(completion.ids).decode(errors="replace") for (completion,) in said]
    guesses = [re.match(r"\d*\.?\d+", text) for text in texts]
    return [respond(context, "", guess[0]) for (context, _), guess in zip(asked, guesses) if guess]


def make_rows(stage, run, texts, corpus):
    """Make the rows of a stage, as many as it draws."""
    tokenizer, count = Tokenizer(resolve(run.model)), run.steps * run.questions
    random, avoid = Random(f"{run.seed} {stage}"), expressions(texts + corpus)
    if stage == "ability":
        return ability_rows(random, texts, avoid, count)
    if stage == "habit":
        asked, split = ask(random, texts, avoid, tokenizer, count), round(WORKED * count)
        return worked_rows(asked[:split]) + quick_rows(asked[split:], run, tokenizer)
    held = hold_out(corpus, run.holdout, run.seed)
    rows = [{"text": text} for text, out in zip(corpus, held) if not out]
    return rows + worked_rows(ask(random, texts, avoid, tokenizer, len(rows)))


def main(argv=None):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--documents", required=True)
    own, options = parser.parse_known_args(argv)
    defaults = COMMON | STAGES[own.stage]
    run = train.parse(options, defaults)
    texts, corpus = read_texts(own.documents), read_texts(run.corpus)
    if set(texts) & set(corpus) or not expressions(texts):
        sys.exit("worked_start: error: --documents must have annotations, and no text of --corpus")
    rows, file = make_rows(own.stage, run, texts, corpus), Path(run.out) / "rows.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train.main([*options, f"--corpus={file}", "--holdout=0"], defaults=defaults)


if __name__ == "__main__":
    main()
