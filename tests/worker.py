"""What test_distributed.py runs in several processes.

    torchrun worker.py steps OUT MICRO_TOKENS GROUP [FIRST]
        three RPT steps of a tiny model; what it sampled, its gradients, metrics and weights. With
        the OUT of another such run as FIRST, each step begins with that run's weights, and trains
        on what that run sampled: then all that differs is rounding.
    torchrun worker.py crash WHERE CALL RANK MARKER TRAIN_ARGUMENTS...
        train.py, in which RANK is killed at its CALL-th WHERE, once
    torchrun worker.py replay FILE TRAIN_ARGUMENTS...
        train.py, which trains on the completions in FILE; what it sampled itself goes to FILE.out
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # noqa: E402

import rpt  # noqa: E402
import train  # noqa: E402
from data import Question, toy_stories, toy_tokenizer  # noqa: E402
from helpers import tiny  # noqa: E402
from model import all_gather  # noqa: E402


def uneven(responses, question, policy):
    """Rewards such that some processes have much to train on and some nothing."""
    return [float(len(r) % 2) if question.document % 3 else 0.0 for r in responses]


class Replay:
    """Stands in for rpt.generate: notes what it samples, and returns what another run did."""

    def __init__(self, others: dict):
        self.others, self.mine, self.generate = others, {}, rpt.generate

    def __call__(self, model, prompts, *, keys, **how):
        sampled = self.generate(model, prompts, keys=keys, **how)
        self.mine |= {key: (prompt, group) for key, prompt, group in zip(keys, prompts, sampled)}
        return [self.others[key][1] if self.others else self.mine[key][1] for key in keys]

    def gathered(self) -> dict:
        """By key, the prompt and the completions that any process has sampled."""
        return {key: value for part in all_gather(self.mine) for key, value in part.items()}


def steps(out: str, micro_tokens: str, shard_group: str, first: str = "") -> None:
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
    reference = torch.load(first, weights_only=False) if first else []
    done, gradients = [], []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(
        {name: whole(p.grad) for name, p in model.named_parameters()}))
    for step in range(3):
        if reference:
            set_model_state_dict(model, reference[step]["weights"], options=StateDictOptions(full_state_dict=True))
        weights = {name: whole(p) for name, p in model.state_dict().items()}
        rpt.generate = replay = Replay(reference[step]["sampled"] if reference else {})
        groups, metrics = rpt.rpt_step(model, tokenizer, [optimizer], lambda s, retry: [
            questions[(11 * s + 5 * retry + n) % 40] for n in range(7)], step, method, uneven, seed=3)
        rpt.generate = replay.generate
        metrics.pop("time")
        mine = [(g.number, g.prompt, g.completions, g.rewards, g.advantages) for g in groups]
        done.append({"weights": weights, "sampled": replay.gathered(), "metrics": metrics, "gradient": gradients[-1],
                     "groups": sorted((g for part in all_gather(mine) for g in part), key=lambda g: g[0])})
    done.append({"weights": {name: whole(p) for name, p in model.state_dict().items()}})
    if dist.get_rank() == 0:
        torch.save(done, out)
    dist.destroy_process_group()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


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


def replay(file: str, *arguments: str) -> None:
    rpt.generate = sampler = Replay(torch.load(file, weights_only=False) if Path(file).exists() else {})
    train.REWARDS["prefix"] = lambda responses, question, policy: [float(len(r) % 2) for r in responses]  # any model's
    torch.set_num_threads(1)
    original = train.export

    def export(*args):
        sampled = sampler.gathered()
        if os.environ.get("RANK", "0") == "0":
            torch.save(sampled, file + ".out")
        original(*args)

    train.export = export
    train.main(list(arguments))


if __name__ == "__main__":
    {"steps": steps, "crash": crash, "replay": replay}[sys.argv[1]](*sys.argv[2:])
