r"""A start for thoughts that compute: a model learns to work calculations on paper, and to do so
before it predicts. Each stage is supervised training that begins with the model of the one before:

    python -m paper.recipes.worked_start ability a.jsonl --corpus b.jsonl --holdout 700 \
        --model BASE --out runs/ability --dtype bfloat16
    python -m paper.recipes.worked_start habit a.jsonl --corpus b.jsonl --holdout 700 \
        --model runs/ability/model --out runs/habit --dtype bfloat16
    python -m paper.recipes.worked_start mixed a.jsonl --corpus b.jsonl --holdout 700 \
        --model runs/habit/model --out runs/mixed --dtype bfloat16

Both files have calculator annotations such as <<120-40=80>>. b.jsonl is what RPT reads next (see
multi_step.py), with the same --holdout and --seed; a.jsonl has other texts. The other options are
train.py's, but prompts are of template toy. Use one process. Keep --steps and --questions, which
decide how many rows there are (except in mixed).

ability  plain text: random calculations worked place by place (calculations.py), single steps, and
         documents, so that language stays
habit    responses to contexts. A context is a document cut at an annotation, with a random
         calculation in the place of its own. Two in five responses work it (WORKED), the others box
         a quick guess of the model; the box holds the whole result
mixed    text that RPT trains on, and as many worked responses (Mixed SFT), so that RPT begins after
         supervised learning has had its turn; the 66 steps read one row in eleven

Of these only `mixed` reads more of the corpus than its expressions. None of them is ever worked as
it is spelled there, though it may be a step of another one.

After these stages the model boxes numbers at every position, and whole numbers only. So ask it at
the first digits of results. Two other runs of multi_step.py begin with one stage more:

choice   for --kind results --others, where RPT can learn *when* to calculate: responses to
         documents as they are, at results and elsewhere. They are the model's own, or a quick guess
         of it: a number at results, elsewhere a token
digits   for --all-digits: worked responses whose contexts may have some of the result already, so
         the box holds the rest or, if none is left, the >> behind it

For texts without annotations there is `format`, which takes the place of all of them. It teaches a
model that never boxes a prediction to box one, the token that the model itself says after a
context. RPT (with --template toy) then has something to reward, but no thoughts to begin with:

    python -m paper.recipes.worked_start format texts.jsonl --corpus FILE --model MODEL --out DIR

expected: after the three stages 93 % of responses to multi-step calculations work them, and 47.9 %
are right (paper/results.md). They take 84, 16 and 26 minutes on two idle cores, estimated from a
few steps of each. format and choice have only been run on the toy.
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path
from random import Random

import train
from data import TEMPLATES, Tokenizer, hold_out, read_documents
from model import DTYPES, load_pretrained, resolve
from paper.recipes.calculations import draw
from reward import box
from sampler import generate
from toy.make import write_rows

WORKED = {"habit": 0.4, "digits": 1.0}
TAIL = range(8, 97)  # tokens of a document that a context keeps
ROW = 430  # characters of a row of plain text, at least
# What is used of a model's own words: tokens at most, form.
NUMBER, TOKEN = (8, r"\d*\.?\d+"), (1, r"(?!<\|)[^{}\ufffd]+\Z")
RESPONSE = 128, r"[^\\]*</think>\\boxed{[^{}\\]+}\Z"
RESULT = "<<[^<>=]+="
STAGES = {"ability": dict(steps=250, questions=8, lr=4e-4), "habit": dict(steps=70, lr=1e-4),
          "mixed": dict(steps=66, lr=3e-5), "choice": dict(steps=100, lr=1e-4),
          "digits": dict(steps=48, lr=1e-4), "format": dict(steps=70, lr=1e-4)}
COMMON = dict(stage="ntp", recipe="small", weight_decay=0.0, max_prompt=512)


def read_texts(source):
    """Return the documents of a corpus as text."""
    return [document.given + document.text for document in read_documents(source)]


def ability_rows(random, texts, avoid, count):
    """Make rows of plain text: worked calculations and single steps. Every fourth row begins with
    two documents."""
    rows = []
    for n in range(count):
        lines = random.choices(texts, k=2) if n % 4 == 0 else []
        while sum(map(len, lines)) < ROW:
            lines.append(draw(random, avoid).thought)
            step = random.choice(draw(random, avoid).steps)
            lines += [step] if step.partition("=")[0] not in avoid else []
        rows.append({"text": "\n".join(lines)})
    return rows


def ask(random, tokenizer, ids, calculation="", response=""):
    """Return a row whose context is the end of a document and the start of a calculation."""
    context = tokenizer.bytes_of(ids[-random.choice(TAIL):]).decode(errors="ignore") + calculation
    return {"context": context, "response": response,
            "prompt": TEMPLATES["toy"].replace("{context}", context)}


def natural_rows(random, texts, tokenizer, count, end="(?s:.)"):
    """Make prompts that end anywhere in a document where `end` matches."""
    rows = []
    while len(rows) < count:
        ids = tokenizer.encode(random.choice(texts))
        row = ask(random, tokenizer, ids[: random.randrange(1, len(ids) + 1)])
        if re.search(f"{end}\\Z", row["context"]):
            rows.append(row)
    return rows


def worked_rows(random, texts, avoid, tokenizer, count, digits=False):
    """Make prompts that end in a random calculation, with responses that work it. With `digits` a
    prompt may have some of the result, and the box the others or, if none are left, >>."""
    rows = []
    for _ in range(count):
        calculation, parts = draw(random, avoid), random.choice(texts).split("<<")
        before, result = "<<".join(parts[: random.randrange(1, len(parts))]), calculation.result
        known = random.randint(0, len(result)) if digits else 0
        boxed = box((result[known:] or ">>").encode()).decode()
        rows.append(ask(random, tokenizer, tokenizer.encode(before),
                        f"<<{calculation.expression}={result[:known]}",
                        f"{calculation.thought}\n{boxed}"))
    return rows


def own_rows(run, tokenizer, rows, length, form):
    """Replace the responses by the model's own, or by a box of what it writes after the context.
    Leave out rows where that is not of the form."""
    model, kept = load_pretrained(run.model, run.device, DTYPES[run.dtype]), []
    responds = form == RESPONSE[1]
    prompts = [tokenizer.chat(row["prompt"]) if responds else
               [*tokenizer.bos, *tokenizer.encode(row["context"])] for row in rows]
    said = generate(model, prompts, max_new_tokens=length, eos_ids=tokenizer.eos_ids,
                    seed=run.seed)
    for row, (completion,) in zip(rows, said):
        ids = [id for id in completion.ids if id not in tokenizer.eos_ids]
        if text := re.match(form, tokenizer.bytes_of(ids).decode(errors="replace")):
            response = text[0] if responds else box(text[0].encode()).decode()
            kept.append(row | {"response": response})
    return kept


def make_rows(stage, run, texts, corpus):
    """Make the rows of a stage, as many as it draws."""
    random, avoid = Random(f"{run.seed} {stage}"), re.findall("<<([^<>=]+)=", "\n".join(corpus))
    source, count = (random, texts, set(avoid)), run.steps * run.questions
    if stage == "ability":
        return ability_rows(*source, count)
    tokenizer = Tokenizer(resolve(run.model))
    own, part = partial(own_rows, run, tokenizer), count // 16
    natural = partial(natural_rows, random, texts, tokenizer)
    if stage == "format":
        return own(natural(count), *TOKEN)
    if stage == "choice":  # 5 of 16 at results, where most responses are worked
        return (own(natural(3 * part, RESULT) + natural(2 * part, "[^=]"), *RESPONSE)
                + own(natural(2 * part, RESULT), *NUMBER) + own(natural(9 * part, "[^=]"), *TOKEN))
    if stage in WORKED:
        rows = worked_rows(*source, tokenizer, count, stage == "digits")
        split = round(WORKED[stage] * count)
        return rows[:split] + own(rows[split:], *NUMBER)
    held = hold_out(corpus, run.holdout, run.seed)
    rows = [{"text": text} for text, out in zip(corpus, held) if not out]
    return rows + worked_rows(*source, tokenizer, len(rows))


def main(argv=None):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("documents")
    named, options = parser.parse_known_args(argv)
    stage, defaults = named.stage, COMMON | STAGES[named.stage]
    run = train.parse(options, defaults)
    try:
        corpus = read_texts(run.corpus)
        texts = [text for text in read_texts(named.documents)
                 if stage == "format" or re.search(RESULT, text)]
        if not texts or set(texts) & set(corpus):
            raise ValueError(f"{named.documents}: needs other texts than --corpus, with "
                             "annotations unless the stage is format")
        rows, file = make_rows(stage, run, texts, corpus), Path(run.out) / "rows.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(file, rows)
    except (ValueError, OSError) as error:
        sys.exit(f"worked_start: error: {error}")
    train.main([*options, f"--corpus={file}", "--holdout=0"], defaults=defaults)


if __name__ == "__main__":
    main()
