"""What all tests share: one thread, and the toy world with its base model."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices gain nothing from a second

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def toy() -> Path:
    """The folder of corpus.jsonl, answers.jsonl, choices.jsonl and base/, a model with its
    tokenizer."""
    return Path(__file__).resolve().parent.parent / "toy"


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """The first command of the README with small numbers, and what else is given."""
    cache = tmp_path_factory.mktemp("cache")

    def arguments(out, *more):
        return list(map(str, ["--out", out, "--cache", cache, "--steps", 3, "--questions", 5,
                              "--group-size", 4, "--max-response", 40, "--holdout", 40,
                              "--save-every", 1, "--keep", 3, "--eval-questions", 6, *more]))

    return arguments
