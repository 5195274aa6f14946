"""The stored figures are those that the command draws."""

import re
from xml.etree import ElementTree

from helpers import ROOT

from paper import figures


def test_the_stored_figures_are_what_the_command_draws(tmp_path, monkeypatch):
    """The same elements, classes and texts; another machine may round numbers differently."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper/results/figures").mkdir(parents=True)
    figures.main()
    for name, mark, count in (("group", "response", 8), ("prompts", "flow", 2),
                              ("entropies", "c1 chosen", 1)):
        file = f"paper/results/figures/{name}.svg"
        stored, drawn = (re.sub(r"[-+]?\d+\.\d+", "#", (root / file).read_text())
                         for root in (ROOT, tmp_path))
        assert drawn == stored and ElementTree.fromstring(drawn) is not None
        assert len(re.findall(f'class="{mark}', drawn)) == count
