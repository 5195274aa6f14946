"""The toy world: a shell game told in text, and a weak base model that has read about it.

    python -m toy.make --seed 0 [--out toy]            seven minutes of one core

    The ball is under C. 4 C A. 5 D B. 6 A B.          problem: a start, numbered swaps of two cups

    The ball is now under B.                           solution

One forward pass of a small model cannot follow the ball through many swaps, a chain of thought
can. All that is uncertain in a story is its last cup, and how uncertain it is depends on how many
cups there are: about log(cups) nats, so that two cups are an easy question, three or four a medium
one, six to eight a hard one.

Written are corpus.jsonl (problem, solution), answers.jsonl (problem, answer) and choices.jsonl
(question, options, answer_index), stories that are all different, and base/, a Qwen2 of 0.1
million parameters with its tokenizer, trained by train.py's own stage ntp on none of these
stories but on others of the same kind:

    20 % plain stories;
    55 % solved problems, a fifth of them multiple choice. The annotator follows the ball swap by
         swap, at each swap errs with probability ERRS, and goes on from the wrong cup;
    25 % next-token questions. Here the annotator nearly always guesses one of the cups without a
         thought; one time in twenty he follows the ball, as well as he can.

So the base knows how to reason, but does it badly elsewhere and seldom here: there is something
to mend, and it can be mended from plain stories alone. Nothing here is a finding about language.
With seed 0 it answers 79 % of the questions and 70 % of the choices, and of held-out stories it
knows the cup in 35, 21 and 18 % without a thought (above 0.5, 1.0, 1.5 nats), 28, 19 and 14 % with.

The text is the same to the bit on every machine. Training is not, to rounding.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

import train
from data import TEMPLATES, Tokenizer
from model import ModelConfig, Transformer, save_pretrained

CUPS = "ABCDEFGHIJKL"
KINDS = ((2, 2), (3, 4), (6, 8))  # fewest and most cups of a story, each kind as likely
SWAPS = 8  # at most
TOUCH = 0.5  # of the swaps move the ball, where there are cups enough to choose
ERRS = 0.15  # how often the annotator takes any cup for the ball's after a swap
QUESTION = "\nWhere is the ball?"
SIZES = {"corpus": 4500, "answers": 1500, "choices": 1500}
ROWS = 40_000  # to pre-train on
MODEL = dict(model_type="qwen2", hidden_size=64, intermediate_size=192, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             tie_word_embeddings=True, rope_theta=1000.0)
SPREAD = 0.1  # standard deviation of the first weights; at the usual 0.02 it learns to copy late
TRAINING = ((3000, 3e-3), (600, 1e-3))  # steps and learning rate of each run of stage ntp
OPTIONS = ("--stage ntp --questions 64 --beta2 0.99 --weight-decay 0 --max-prompt 256 --holdout 0 "
           "--device cpu")
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # Qwen's
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHAT = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
        "+ message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}")


@dataclass(frozen=True)
class Story:
    """A shell game: cups, swaps of two of them numbered from `first`, and the ball's cup at the
    start and after each swap."""

    cups: str
    first: int
    swaps: tuple[str, ...]  # two letters each
    ball: str

    @property
    def problem(self) -> str:
        swaps = (f" {n} {a} {b}." for n, (a, b) in enumerate(self.swaps, self.first))
        return f"The ball is under {self.ball[0]}.{''.join(swaps)}"

    @property
    def solution(self) -> str:
        return f"The ball is now under {self.ball[-1]}."

    @property
    def text(self) -> str:
        return f"{self.problem}\n\n{self.solution}"


def after(ball: str, swap: str) -> str:
    """Where a ball is after a swap of two cups."""
    return swap[1 - swap.index(ball)] if ball in swap else ball


def tell(random: Random, choice: bool = False) -> Story:
    """A story. With `choice` it can be asked with options: three cups or more, called A, B, C..."""
    fewest, most = KINDS[random.randrange(choice, len(KINDS))]
    count, length = random.randint(fewest, most), random.randint(1, SWAPS)
    cups = CUPS[:count] if choice else "".join(random.sample(CUPS, count))
    ball, swaps = random.choice(cups), []
    for _ in range(length):
        pair = random.sample(cups.replace(ball[-1], ""), min(2, count - 1))
        if count == 2 or random.random() < TOUCH:
            pair = random.sample([ball[-1], pair[0]], 2)
        swaps.append("".join(pair))
        ball += after(ball[-1], swaps[-1])
    return Story(cups, random.randint(1, 10 - length), tuple(swaps), ball)


def new_story(random: Random, known: set[str], choice: bool = False) -> Story:
    """A story whose problem is not among the known ones."""
    while (story := tell(random, choice)).problem in known:
        pass
    return story


def row(name: str, story: Story) -> dict:
    """The row of a story in the file of that name."""
    asked, cup = story.problem + QUESTION, story.ball[-1]
    if name == "corpus":
        return {"problem": story.problem, "solution": story.solution}
    if name == "answers":
        return {"problem": asked, "answer": cup}
    return {"question": asked, "options": [*story.cups], "answer_index": story.cups.index(cup)}


def annotate(story: Story, random: Random) -> tuple[str, str]:
    """An annotator's thought, which follows the ball, and the cup where it ends. After each swap he
    takes any cup for the ball's with probability ERRS, and goes on from there."""
    ball = thought = story.ball[0]
    for n, swap in enumerate(story.swaps, story.first):
        ball = after(ball, swap)
        if random.random() < ERRS:
            ball = random.choice(story.cups)
        thought += f" {n} {swap[0]} {swap[1]} {ball}."
    return thought + "\n", ball


def lesson(random: Random, known: set[str]) -> dict:
    """A row that the base is pre-trained on: text, or prompt and response."""
    kind, effort = random.random(), random.random()
    choice = 0.2 <= kind < 0.75 and effort < 0.2
    story = new_story(random, known, choice)
    if kind < 0.2:
        return {"text": story.text}
    thought, cup = annotate(story, random)
    if kind < 0.75:
        options = "".join(f"\n({cup}) {cup}" for cup in story.cups) if choice else ""
        return {"prompt": story.problem + QUESTION + options,
                "response": f"{thought}</think>\n\n\\boxed{{{cup}}}"}
    if effort < 0.95:
        thought, cup = "", random.choice(story.cups)
    return {"prompt": TEMPLATES["toy"].format(context=story.text[:-len(" A.")]),
            "response": f"{thought}</think>\n\n\\boxed{{ {cup}}}"}


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE with Qwen's splitting and special tokens, the same for every seed."""
    random, texts = Random("tokenizer"), []
    for story in (tell(random) for _ in range(3000)):
        texts += [story.text, annotate(story, random)[0].strip()]
    texts += ["Next token?\n", QUESTION, "user\n", "assistant\n", "\n\n\\boxed{"] * 1000
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.decoder = decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=512, min_frequency=100, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    bpe.add_tokens([AddedToken(text, normalized=False, special="|" in text) for text in SPECIAL])
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_rows(file: Path, rows: Iterable[dict]) -> None:
    """JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_texts(out: Path, seed: int) -> set[str]:
    """The three files of stories, all different; the problems of all of them."""
    out.mkdir(parents=True, exist_ok=True)
    known: set[str] = set()
    for name, count in SIZES.items():
        random, stories = Random(f"{name} {seed}"), []
        for _ in range(count):
            stories.append(new_story(random, known, name == "choices"))
            known.add(stories[-1].problem)
        write_rows(out / f"{name}.jsonl", (row(name, story) for story in stories))
    return known


def train_base(out: Path, work: Path, seed: int, known: set[str]) -> None:
    """Pre-trains the base in the folder `work` and puts it in out/base."""
    model = work / "start"
    model.mkdir(parents=True)
    write_tokenizer(model)
    tokenizer = Tokenizer.from_dir(model)
    config = MODEL | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_ids[0]}
    start = Transformer(ModelConfig.from_dict(config))
    torch.manual_seed(seed)
    for weight in start.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=SPREAD)
    save_pretrained(start, model, tokenizer)
    random = Random(f"lessons {seed}")
    write_rows(work / "lessons.jsonl", (lesson(random, known) for _ in range(ROWS)))
    for number, (steps, rate) in enumerate(TRAINING):
        run = work / f"run{number}"
        train.main([*OPTIONS.split(), f"--model={model}", f"--corpus={work / 'lessons.jsonl'}",
                    f"--out={run}", f"--steps={steps}", f"--lr={rate}", f"--seed={seed + number}",
                    f"--save-every={steps}"])
        model = run / "model"
    shutil.rmtree(out / "base", ignore_errors=True)
    shutil.copytree(model, out / "base")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the stories and of the training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to fill")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        train_base(args.out, Path(work), args.seed, write_texts(args.out, args.seed))


if __name__ == "__main__":
    main()
