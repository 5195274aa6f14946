"""The toy world: a shell game told in text, and a weak base model that has read about it.

    python -m toy.make --seed 0 [--out toy]            seven minutes of one core

    The ball is under C. 4 C A. 5 D B. 6 A B.          problem: a start, numbered swaps of two cups

    The ball is now under B.                           solution

One forward pass of a small model cannot follow the ball through many swaps, but a chain of thought
can. A story's only uncertain token is its last cup. Its entropy is about log(cups) nats, so two
cups make an easy question, three or four a medium one, and six to eight a hard one.

This writes corpus.jsonl (problem, solution), answers.jsonl (problem, answer) and choices.jsonl (the
same, with options), whose stories are all different. It also writes base/, a Qwen2 of 0.1 million
parameters with its tokenizer, trained by train.py's stage ntp on other stories of the same kind:

    20 % plain stories.
    55 % solved problems, a fifth of them multiple choice. The annotator follows the ball swap by
         swap, takes a random cup after a swap with probability ERRS, and goes on from there.
    25 % next-token questions. The annotator guesses 19 of 20 without any reasoning, and follows the
         ball in the others.

So the base reasons badly about problems, and seldom about the next token. RPT can mend both from
plain stories alone. Nothing here is a finding about language. With seed 0 the base answers 79 % of
the problems and 70 % of the choices. Of held-out stories it predicts 40, 25 and 21 % without
reasoning (above 0.5, 1.0, 1.5 nats), and 32, 24 and 21 % with it.

The text is bitwise the same on every machine; training differs by rounding.
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
KINDS = ((2, 2), (3, 4), (6, 8))  # fewest and most cups of a story; all kinds are equally likely
SWAPS = 8  # at most
TOUCH = 0.5  # share of swaps that move the ball, if there are more than two cups
ERRS = 0.15  # probability that the annotator picks a random cup after a swap
QUESTION = "\nWhere is the ball?"
SIZES = {"corpus": 4500, "answers": 1500, "choices": 1500}
ROWS = 40_000  # to pre-train on
MODEL = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=64,
             intermediate_size=192, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             rms_norm_eps=1e-6, tie_word_embeddings=True, rope_theta=1000.0, dtype="float32")
SPREAD = 0.1  # standard deviation of the first weights; with the usual 0.02 it learns to copy late
TRAINING = ((3000, 3e-3), (600, 1e-3))  # steps and learning rate of each run of stage ntp
OPTIONS = ("--stage ntp --questions 64 --beta2 0.99 --weight-decay 0 --max-prompt 256 --holdout 0 "
           "--device cpu").split()
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # Qwen's
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHAT = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
        "+ message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}")


@dataclass(frozen=True)
class Story:
    """A shell game."""

    cups: str
    first: int  # number of the first swap
    swaps: tuple[str, ...]  # two cups each
    ball: str  # its cup at the start and after each swap

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

    @property
    def options(self) -> str:
        return "".join(f"\n({cup}) {cup}" for cup in self.cups)


def after(ball: str, swap: str) -> str:
    """Return the cup of a ball after a swap of two cups."""
    return swap[1 - swap.index(ball)] if ball in swap else ball


def tell(random: Random, choice: bool = False) -> Story:
    """Make up a story. With `choice` it has three cups or more, called A, B, C and so on."""
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
    """Make up a story whose problem is not among the known ones."""
    while (story := tell(random, choice)).problem in known:
        pass
    return story


def row(name: str, story: Story) -> dict:
    """Return the row of a story in the file of that name."""
    if name == "corpus":
        return {"problem": story.problem, "solution": story.solution}
    options = story.options if name == "choices" else ""
    return {"problem": story.problem + QUESTION + options, "answer": story.ball[-1]}


def annotate(story: Story, random: Random) -> tuple[str, str]:
    """Return an annotator's reasoning, which follows the ball, and the cup where it ends. After
    each swap, with probability ERRS, a random cup is taken for the ball's and followed."""
    ball = thought = story.ball[0]
    for n, swap in enumerate(story.swaps, story.first):
        ball = after(ball, swap)
        if random.random() < ERRS:
            ball = random.choice(story.cups)
        thought += f" {n} {swap[0]} {swap[1]} {ball}."
    return thought + "\n", ball


def lesson(random: Random, known: set[str]) -> dict:
    """Return a row that the base is pre-trained on: text, or prompt and response."""
    kind, effort = random.random(), random.random()
    choice = 0.2 <= kind < 0.75 and effort < 0.2
    story = new_story(random, known, choice)
    if kind < 0.2:
        return {"text": story.text}
    thought, cup = annotate(story, random)
    if kind < 0.75:
        return {"prompt": story.problem + QUESTION + (story.options if choice else ""),
                "response": f"{thought}</think>\n\n\\boxed{{{cup}}}"}
    if effort < 0.95:
        thought, cup = "", random.choice(story.cups)
    return {"prompt": TEMPLATES["toy"].format(context=story.text[:-len(" A.")]),
            "response": f"{thought}</think>\n\n\\boxed{{ {cup}}}"}


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE with Qwen's splitting and special tokens, the same for every seed."""
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
    """Write a .jsonl file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_texts(out: Path, seed: int) -> set[str]:
    """Write the three files of stories, all different. Return their problems."""
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
    """Pre-train the base in the folder `work` and copy it to out/base."""
    model = work / "start"
    work.mkdir(parents=True, exist_ok=True)
    write_tokenizer(work)
    tokenizer = Tokenizer(work)
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
        train.main([*OPTIONS, f"--model={model}", f"--corpus={work / 'lessons.jsonl'}",
                    f"--out={run}", f"--steps={steps}", f"--lr={rate}", f"--seed={seed + number}",
                    f"--save-every={steps}"])
        model = run / "model"
    shutil.rmtree(out / "base", ignore_errors=True)
    shutil.copytree(model, out / "base")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the stories and the training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to fill")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        train_base(args.out, Path(work), args.seed, write_texts(args.out, args.seed))


if __name__ == "__main__":
    main()
