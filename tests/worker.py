"""What test_distributed.py runs in several processes.

    torchrun worker.py steps OUT MICRO_TOKENS GROUP   three RPT steps of a tiny model; rollouts, metrics, weights
    torchrun worker.py crash WHERE CALL RANK MARKER TRAIN_ARGUMENTS...
                                                      train.py, in which RANK is killed at its CALL-th WHERE, once
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402

import rpt  # noqa: E402
import train  # noqa: E402
from data import Question, toy_stories, toy_tokenizer  # noqa: E402
from helpers import tiny  # noqa: E402
from model import all_gather  # noqa: E402


def uneven(responses, question, policy):
    """Rewards such that some processes have much to train on and some nothing."""
    return [float(len(r) % 2) if question.document % 3 else 0.0 for r in responses]


def steps(out: str, micro_tokens: str, shard_group: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    tokenizer = toy_tokenizer()
    tokenizer.eos_ids = list(range(0, len(tokenizer), 9))
    stories = toy_stories(40, seed=5)
    questions = [Question(tuple(tokenizer.encode(s.text)[:-2]), (b" A", b"."), n, 0, 1.0)
                 for n, s in enumerate(stories)]
    model = tiny(vocab_size=len(tokenizer), tie_word_embeddings=True)
    if dist.get_world_size() > 1:
        train.shard(model, train.Run(shard_group=int(shard_group)), "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    method = rpt.Method(questions=7, group_size=4, max_prompt=128, max_response=40, template="toy", max_rows=10,
                        micro_tokens=int(micro_tokens), dynamic_from=2, max_refills=3, grad_clip=0.5)
    rollouts, metrics = [], []
    for step in range(3):
        groups, measured = rpt.rpt_step(model, tokenizer, [optimizer], lambda s, retry: [
            questions[(11 * s + 5 * retry + n) % 40] for n in range(7)], step, method, uneven, seed=3)
        measured.pop("time")
        metrics.append(measured)
        mine = [(g.number, [c.ids for c in g.completions], g.rewards) for g in groups]
        rollouts.append(sorted(g for part in all_gather(mine) for g in part))
    weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.state_dict().items()}
    if dist.get_rank() == 0:
        torch.save({"rollouts": rollouts, "metrics": metrics, "weights": weights}, out)
    dist.destroy_process_group()


def crash(where: str, call: str, rank: str, marker: str, *arguments: str) -> None:
    owner, name = {"rollout": (rpt, "generate"), "training": (rpt, "policy_loss"), "writing": (dcp, "save"),
                   "renaming": (train, "write_json"), "logging": (train.RunFolder, "log"),
                    "memory": (rpt, "policy_loss")}[where]
    original, calls = getattr(owner, name), [0]

    def deadly(*args, **kwargs):
        calls[0] += 1
        if calls[0] == int(call) and os.environ.get("RANK", "0") == rank and not Path(marker).exists():
            if where in ("writing", "logging"):  # half of it is on the disk
                original(*args, **kwargs)
            Path(marker).touch()
            if where == "memory":
                raise torch.OutOfMemoryError("Tried to allocate 8 GiB")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)
    torch.set_num_threads(1)
    train.main(list(arguments))


if __name__ == "__main__":
    {"steps": steps, "crash": crash}[sys.argv[1]](*sys.argv[2:])
