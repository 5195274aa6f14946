"""What all tests share: one thread, and a weak base model for those that need a policy with opinions."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on small matrices a second thread costs more than it brings

import pytest  # noqa: E402
from helpers import weak_base  # noqa: E402


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with corpus.jsonl, answers.jsonl, and base/model: format learned, stories hardly followed."""
    folder = tmp_path_factory.mktemp("toy")
    weak_base(folder)
    return folder
