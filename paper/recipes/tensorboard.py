"""The figures of every step for TensorBoard, in DIR/tensorboard (needs the package tensorboard).

    torchrun -m paper.recipes.tensorboard [train.py's arguments]
"""

from pathlib import Path

import rpt
import train
from model import rank_and_world


def main(argv=None):
    from torch.utils.tensorboard import SummaryWriter
    run = train.parse(argv)
    first = rank_and_world()[0] == 0
    writer = SummaryWriter(str(Path(run.out) / "tensorboard")) if first else None

    def one_step(policy, optimizer, draw, step, *how):
        groups, metrics = rpt.rpt_step(policy, optimizer, draw, step, *how)
        if writer:
            for name, value in metrics.items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(name, value, step)
        return groups, metrics

    train.main(argv, one_step=one_step)


if __name__ == "__main__":
    main()
