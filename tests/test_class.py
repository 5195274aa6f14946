"""The class speaks of today's code."""

import re

from helpers import ROOT


def test_each_mutation_of_the_class_fits_the_code_and_its_test_exists():
    text = (ROOT / "paper/class.md").read_text()
    mutations = re.findall(r"^\| \d+ \| `([\w/]+\.py)` \| `(.+?)` \| `(.+?)` \|$", text, re.M)
    tests = re.findall(r"^\| \d+ \| `(test_\w+\.py)::(test_\w+)` \|", text, re.M)
    assert len(mutations) == len(tests) == 10
    for file, old, new in mutations:
        assert (ROOT / file).read_text().count(old) == 1 and old != new, old
    for file, test in tests:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), test
