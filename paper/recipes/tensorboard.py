"""Write the figures of every step for TensorBoard to DIR/tensorboard (needs tensorboard).

    torchrun -m paper.recipes.tensorboard [train.py's options]

It writes the numbers of metrics.jsonl. Expect the curves of reward, parsed share and length that
`python -m paper.report` draws too.
"""

from functools import cache

import train
from train import log


def main(argv=None):
    from torch.utils.tensorboard import SummaryWriter
    writer = cache(SummaryWriter)  # one for each run

    def also_log(file, step, *rows):
        log(file, step, *rows)
        if file.name == "metrics.jsonl" and train.is_first():
            events = writer(file.parent / "tensorboard")
            for name, value in rows[0].items():
                if isinstance(value, (int, float)):
                    events.add_scalar(name, value, step)
            events.flush()

    train.log = also_log
    train.main(argv)


if __name__ == "__main__":
    main()
