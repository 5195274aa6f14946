"""A weak base model on the toy world, pre-trained once for all tests that need a policy with opinions."""

import pytest
from helpers import weak_base


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with corpus.jsonl, answers.jsonl, and base/model: format learned, stories hardly followed."""
    folder = tmp_path_factory.mktemp("toy")
    weak_base(folder)
    return folder
