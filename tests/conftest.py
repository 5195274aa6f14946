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
