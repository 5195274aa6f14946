"""Count what a run would take, without hardware: memory of each process, floating-point operations.

    python -m paper.plan --recipe paper --model DIR --processes 8 --memory 80

It takes train.py's options, and the mean lengths --prompt-tokens and --response-tokens. --memory is
that of each process, in GB. The model is a directory or hub id; only its config.json is read.
Seconds are not counted, because they depend on the machine. Expected for
paper/configs/r1-distill-qwen-14b: 14.77 billion parameters, so 59.1 / 8 = 7.4 GB of float32 master
weights on each of 8 processes, twice that for AdamW's moments, and 29.5 GB of bfloat16 weights in a
rollout.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download

import train
from data import read_json
from model import DTYPES, ModelConfig, Transformer
from paper.flops import forward
from rpt import HEAD_CHUNK

GB = 1e9
USABLE = 0.92  # share of an accelerator's memory; the driver and fragmentation take the rest


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("--processes", 8), ("--memory", 80), ("--prompt-tokens", 600),
                          ("--response-tokens", 900)):
        parser.add_argument(name, type=int, default=default)
    machine, rest = parser.parse_known_args(argv)
    run = train.parse([*rest, "--corpus", "-"])
    file = Path(run.model) / "config.json"
    if not file.exists():
        file = Path(hf_hub_download(run.model, "config.json"))
    c = ModelConfig.from_dict(read_json(file))
    parts = training_memory(c, run, machine.processes)
    weights, usable = parts["rollout weights"], USABLE * GB * machine.memory
    fixed, training = parts["master weights"] * 3 + weights, sum(parts.values()) - weights
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * DTYPES[run.dtype].itemsize
    groups = min(max(1, run.max_rows // run.group_size), -(-run.questions // machine.processes))
    worst = groups * (run.group_size * run.max_response + run.max_prompt)
    room, cache = int((usable - fixed) / kv), min(worst, run.cache_tokens)
    shown = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items())
    print(f"{machine.processes} x {machine.memory} GB, GB per process: {shown}")
    print(f"rollout {(fixed + cache * kv) / GB:.1f} with keys and values of {cache:,} tokens; "
          f"training {training / GB:.1f}")
    if room < run.max_prompt + run.group_size * run.max_response:
        print("DOES NOT FIT: weights and optimizer leave no room for keys and values: more "
              "processes or memory, or a smaller model")
    elif cache > room:
        print(f"DOES NOT FIT as it is: --cache-tokens {room // 1000 * 1000} makes the rollout fit")
    if training > usable:
        print("DOES NOT FIT: training needs less --micro-tokens, --checkpoint-activations or more "
              "processes")
    print(work(c, run, machine.prompt_tokens, machine.response_tokens))


def training_memory(c: ModelConfig, run: train.Run, processes: int) -> dict[str, float]:
    """Return the bytes of each process by what they hold."""
    with torch.device("meta"):
        model = Transformer(c)
    size = DTYPES[run.dtype].itemsize
    whole, block = (sum(p.numel() for p in part.parameters())
                    for part in (model, model.model.layers[0]))
    mine = sum(-(-len(p) // processes) * p[0].numel() for p in model.parameters())
    # The root stays, and a block is gathered while another computes.
    gathered = whole - (c.num_hidden_layers - 2) * block
    kv, heads = 2 * c.num_key_value_heads * c.head_dim, c.num_attention_heads * c.head_dim
    inner = kept = 6 * c.hidden_size + 2 * heads + 4 * c.intermediate_size
    if run.checkpoint_activations:
        kept = c.hidden_size + kv
    return {"master weights": 4 * mine, "gradients": 4 * mine, "optimizer": 8 * mine,
            "rollout weights": size * whole,
            "gathered weights and gradients": 2 * size * gathered,
            "activations": run.micro_tokens * size * (c.num_hidden_layers * kept + inner),
            "logits and head gradient": 4 * c.vocab_size * (4 * HEAD_CHUNK + c.hidden_size)}


def work(c: ModelConfig, run: train.Run, prompt: int, response: int) -> str:
    """Describe the FLOPs of a step in which every group is informative."""
    responses = run.group_size * response
    prefill = run.questions * forward(c, prompt, prompt / 2)
    decode = run.questions * forward(c, responses, prompt + response / 2)
    learn = (4 if run.checkpoint_activations else 3) * run.updates * (prefill + decode)
    return (f"a step of {run.questions * (prompt + responses):,} tokens: "
            f"{prefill + decode + learn:.2e} FLOP (prefill {prefill:.2e}, decode {decode:.2e}, "
            f"training {learn:.2e})")


if __name__ == "__main__":
    main()
