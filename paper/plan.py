"""What a run would take, without hardware: memory of each process, and floating-point operations.

    python -m paper.plan --recipe paper --model DIR --processes 8 --memory 80

It takes train.py's options. The model is a directory or hub id of which config.json is enough.
Counts, no seconds: how long that takes depends on the machine, and a guess was seven times too
kind. Expected for paper/configs/r1-distill-qwen-14b: 14.77 billion parameters, so 59.1 / 8 = 7.4 GB
of float32 master weights on each of 8 processes, twice that of AdamW's moments, 29.5 GB of bfloat16
in a rollout.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

import train
from model import DTYPES, Transformer, forward_flops, read_config, resolve
from rpt import head_chunk

GB = 1e9
USABLE = 0.92  # of an accelerator's memory: the rest is the driver's, or between allocations


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, about in (("processes", 8, "accelerators"), ("memory", 80, "GB of each"),
                                 ("prompt-tokens", 600, "mean length of a prompt"),
                                 ("response-tokens", 900, "mean length of a response")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about} ({default})")
    machine, rest = parser.parse_known_args(argv)
    run = train.parse([*rest, "--corpus", "-"])
    try:
        with torch.device("meta"):
            model = Transformer(read_config(resolve(run.model)))
    except (ValueError, OSError) as error:
        sys.exit(f"paper.plan: error: {error}")
    parts = training_memory(model, run, machine.processes)
    fixed = parts["master weights"] + parts["optimizer"] + parts["rollout weights"]
    training = sum(parts.values()) - parts["rollout weights"]
    memory, cache = USABLE * GB * machine.memory, cache_tokens(run, machine.processes)
    c = model.config
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * DTYPES[run.dtype].itemsize
    room = int((memory - fixed) / kv)
    print(f"{machine.processes} x {machine.memory} GB, GB per process: "
          + ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items()))
    print(f"rollout {(fixed + cache * kv) / GB:.1f} with keys and values of {cache:,} tokens; "
          f"training {training / GB:.1f}")
    if room < run.max_prompt + run.max_response:
        print("DOES NOT FIT: weights and optimizer leave no room for keys and values: more "
              "processes or memory, or a smaller model")
    elif cache > room:
        fitting = room // 1000 * 1000
        print(f"DOES NOT FIT as it is: --cache-tokens {fitting} makes the rollout fit")
    if training > memory:
        print("DOES NOT FIT: training needs less --micro-tokens, --checkpoint-activations or more "
              "processes")
    print(flops(model, run, machine))


def training_memory(model: Transformer, run: train.Run, processes: int) -> dict[str, float]:
    """Bytes of each process by what they hold."""
    c, width, size = model.config, DTYPES[run.dtype].itemsize, run.shard_group or processes
    whole = sum(p.numel() for p in model.parameters())
    mine = sum(-(-len(p) // size) * p[0].numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    # the root stays, and a block is fetched while another computes
    gathered = whole - (c.num_hidden_layers - 2) * block
    kv, heads = 2 * c.num_key_value_heads * c.head_dim, c.num_attention_heads * c.head_dim
    inner = run.micro_tokens * width * (6 * c.hidden_size + 2 * heads + 4 * c.intermediate_size)
    kept = inner
    if run.checkpoint_activations:
        kept = run.micro_tokens * width * (c.hidden_size + kv)
    chunk = head_chunk(c.vocab_size, torch.device("cuda"))
    return {"master weights": 4 * mine, "gradients": 4 * mine, "optimizer": 8 * mine,
            "rollout weights": width * whole,
            "gathered weights and gradients": 2 * width * gathered,
            "activations": c.num_hidden_layers * kept + inner,
            "logits and head gradient": 4 * c.vocab_size * (4 * chunk + c.hidden_size)}


def cache_tokens(run: train.Run, processes: int) -> int:
    """Tokens whose keys and values a process may hold: its bound, or the longest there can be."""
    rows = min(run.max_rows, -(-run.questions * run.group_size // processes))
    prompts = -(-rows // run.group_size)
    worst = rows * run.max_response + prompts * run.max_prompt
    return min(worst, run.cache_tokens or worst)


def flops(model: Transformer, run: train.Run, machine: argparse.Namespace) -> str:
    """The work of a step in which every group is informative."""
    prompt, response = machine.prompt_tokens, machine.response_tokens
    group = run.group_size
    prefill = run.questions * forward_flops(model.config, prompt, prompt / 2)
    decode = run.questions * forward_flops(model.config, group * response, prompt + response / 2)
    learn = (4 if run.checkpoint_activations else 3) * run.updates * (prefill + decode)
    return (f"a step of {run.questions * (prompt + group * response):,} tokens: "
            f"{prefill + decode + learn:.2e} FLOP (prefill {prefill:.2e}, decode {decode:.2e}, "
            f"training {learn:.2e})")


if __name__ == "__main__":
    main()
