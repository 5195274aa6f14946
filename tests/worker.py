"""What test_distributed.py runs in several processes: train.py, recorded, replayed, killed.

    torchrun worker.py OUT FIRST DEATH TRAIN_ARGUMENTS...

OUT receives, by step, the weights before it, what all processes sampled, and the gradient that the
optimizer saw. With the OUT of another such run as FIRST, each step begins with that run's weights
and trains on what that run sampled: then all that differs is rounding. DEATH, "WHERE:CALL:RANK",
kills process RANK at its CALL-th WHERE, once.
"""

import os
import signal
import sys
from pathlib import Path
from zlib import crc32

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions, set_model_state_dict)

import rpt  # noqa: E402
import train  # noqa: E402
from model import all_gather, rank_and_world  # noqa: E402

PLACES = {"training": (rpt, "policy_loss"), "writing": (dcp, "save"),
          "renaming": (train, "write_json")}


def coin(responses, question, policy):
    """A reward that any model can earn: 1 for half of all responses, 0 for b""."""
    return [float(crc32(response) % 2) for response in responses]


def uneven(responses, question, policy):
    """Rewards such that some processes have much to train on and some nothing."""
    if question.document % 3 == 0:
        return [0.0] * len(responses)
    return coin(responses, question, policy)


class Record:
    """A step for train.main that notes what goes in and comes out, or repeats another's."""

    def __init__(self, out: str, first: str):
        self.out, self.done, self.generate = out, {}, rpt.generate
        self.first = torch.load(first, weights_only=False) if first else {}
        rpt.generate = self.sample

    def sample(self, model, prompts, *, keys, **how):
        mine = self.generate(model, prompts, keys=keys, **how)
        self.now["sampled"] |= {k: (p, g) for k, p, g in zip(keys, prompts, mine)}
        return [self.first[self.step]["sampled"][key][1] for key in keys] if self.first else mine

    def one_step(self, policy, optimizer, draw, step, *how):
        model, self.step = policy.model, step
        self.now = self.done[step] = {"sampled": {}, "weights": whole(model)}
        if self.first:
            set_model_state_dict(model, self.first[step]["weights"],
                                 options=StateDictOptions(full_state_dict=True))
        note = optimizer.register_step_pre_hook(
            lambda *_: self.now.update(gradient=whole(model, lambda p: p.grad)))
        groups, metrics = rpt.rpt_step(policy, optimizer, draw, step, *how)
        note.remove()
        mine = [(g.number, g.prompt, g.completions, g.rewards, g.advantages)
                for g in groups if g.kept]
        self.now["groups"] = sorted((g for part in all_gather(mine) for g in part),
                                    key=lambda g: g[0])
        parts = all_gather(self.now["sampled"])
        self.now["sampled"] = {key: value for part in parts for key, value in part.items()}
        if rank_and_world()[0] == 0:
            torch.save(self.done, self.out)
        return groups, metrics


def whole(model, of=lambda parameter: parameter):
    """By name, all of each parameter (or of something of it), whatever part this process holds."""
    tensors = {name: of(p).detach() for name, p in model.named_parameters()}
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()
            for name, t in tensors.items()}


def die_at(where: str, call: str, rank: str, marker: Path) -> None:
    owner, name = PLACES[where]
    original, calls = getattr(owner, name), [0]

    def deadly(*args, **kwargs):
        calls[0] += 1
        if calls[0] == int(call) and os.environ["RANK"] == rank and not marker.exists():
            if where == "writing":  # half of it is on the disk
                original(*args, **kwargs)
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


if __name__ == "__main__":
    out, first, death, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    if death:
        die_at(*death.split(":"), marker=Path(out + ".killed"))
    train.main(arguments, reward=uneven, one_step=Record(out, first).one_step)
