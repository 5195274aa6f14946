"""Count the floating-point operations of a run from what it logged.

    python -m paper.flops RUN [RUN ...]

For each token, a forward pass takes two operations per weight of a matrix, and four per channel of
the queries and token that is attended to. Sampling is a forward pass in which a prompt is computed
once for its group. Training takes three such passes for each update of an informative group. Not
counted: evaluations, recomputed activations, and what a recipe adds. Stage ntp logs no texts, so
they are drawn again from the corpus.
"""

import sys
from pathlib import Path

import numpy as np

from data import Tokenizer, load_corpus, random_indices, read_json, sequences
from model import ModelConfig, resolve
from paper.report import read_rows
from train import Run


def forward(c: ModelConfig, tokens: float, context: float) -> float:
    """Return the FLOPs of a forward pass over `tokens`, each attending to `context` others."""
    width, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = 2 * c.hidden_size * (width + kv) + 3 * c.hidden_size * c.intermediate_size
    weights = c.num_hidden_layers * block + c.vocab_size * c.hidden_size
    return tokens * (2 * weights + 4 * c.num_hidden_layers * width * context)


def spend(folder: Path) -> np.ndarray:
    """Return the FLOPs of each step of a run, float64 [steps]."""
    run = Run(**read_json(folder / "run.json"))
    config = ModelConfig.from_dict(read_json(resolve(run.model) / "config.json"))
    flops = np.zeros(len(read_rows(folder / "metrics.jsonl")))
    if run.stage == "ntp":
        tokenizer = Tokenizer(resolve(run.model), run.date)
        texts = sequences(load_corpus(run.corpus, tokenizer, run.holdout, run.seed, run.max_prompt))
        costs = np.array([3 * forward(config, len(ids), len(ids) / 2) for ids, _ in texts])
        for step in range(len(flops)):
            flops[step] = costs[random_indices(len(texts), run.seed, step, 0, run.questions)].sum()
    for row in read_rows(folder / "rollouts.jsonl"):
        prompt = row["prompt_tokens"]
        once = forward(config, prompt, prompt / 2)
        once += sum(forward(config, n, prompt + n / 2) for n in row["tokens"])
        trained = row["kept"] and len(set(row["rewards"])) > 1
        flops[row["step"]] += once * (1 + 3 * run.updates * trained)
    return flops


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        if not (Path(name) / "metrics.jsonl").exists():
            sys.exit(f"paper.flops: error: {name}: no metrics.jsonl; give the folder of a run")
        flops = spend(Path(name))
        print(f"{name}: {flops.sum():.3e} FLOP in {len(flops)} steps")
