"""The figures of every step for TensorBoard, in DIR/tensorboard (needs the package tensorboard).

    torchrun -m paper.recipes.tensorboard [train.py's arguments]

It writes what metrics.jsonl is told, after each step. Expected: the curves of reward, parsed share
and length that `python -m paper.report` draws too.
"""

from pathlib import Path

import train
from train import log


def main(argv=None):
    from torch.utils.tensorboard import SummaryWriter
    writers = []

    def also_log(file, step, *rows):
        log(file, step, *rows)
        if file.name == "metrics.jsonl" and train.is_first():
            writers[:] = writers or [SummaryWriter(str(Path(file.parent) / "tensorboard"))]
            for name, value in rows[0].items():
                if isinstance(value, (int, float)):
                    writers[0].add_scalar(name, value, step)
            writers[0].flush()

    train.log = also_log
    train.main(argv)


if __name__ == "__main__":
    main()
