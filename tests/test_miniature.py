"""The miniature's bookkeeping, without its runs: commands that exist, equal compute, paired
claims."""

import importlib.util
import json

import pytest

import train
from paper import miniature


@pytest.fixture
def seeds(tmp_path):
    """Two seeds' folders, where model a is right on documents 0 and 1, b on document 0 alone."""
    folders = [tmp_path / str(seed) for seed in (0, 1)]
    for folder in folders:
        for name, right in (("a", (1, 1)), ("b", (1, 0))):
            (folder / name).mkdir(parents=True)
            rows = [{"document": d, "reasoning": [r], "length": [7]} for d, r in enumerate(right)]
            (folder / name / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folders


def test_every_command_is_one_that_train_understands():
    for line in (miniature.RUNS | miniature.CONTROLS).values():
        module, *words = line.split()
        assert importlib.util.find_spec(module)
        run = train.parse([*words, "--seed", "0", "--out", "here"])
        assert run.holdout == (0 if run.stage == "rlvr" or "lessons" in line else 500)
        assert run.stage == "ntp" or run.questions == 32


def test_every_part_is_built_after_what_it_needs():
    built = set()
    for names in miniature.ORDER:
        for name in names:
            line = (miniature.RUNS | miniature.CONTROLS).get(name, "")
            needs = {word.removesuffix("/model") for word in line.split() if "/model" in word}
            needs |= {"rpt"} if name in miniature.CONTROLS else set()
            assert needs <= built
        built |= set(names)
    assert built == {"base", *miniature.RUNS, *miniature.CONTROLS}


def test_controls_take_the_compute_of_rpt_and_what_is_finished_is_not_done_again(tmp_path,
                                                                                 monkeypatch):
    said = []

    def command(folder, line):
        said.append(line)
        if line.startswith("eval"):
            (folder / "sft" / "part").write_text("")
    monkeypatch.setattr(miniature, "command", command)
    for name, steps, each in (("rpt", 10, 300), ("sft", 2, 10)):
        (tmp_path / name).mkdir()
        rows = [json.dumps({"flops": each}) for _ in range(steps)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(rows))
    miniature.matched(tmp_path, "sft")
    steps = [int(line.split()[-1]) for line in said if line.startswith("train")]
    assert steps == [round(300 * share) for share in miniature.SHARES] and len(said) == 8
    miniature.matched(tmp_path, "sft")
    assert len(said) == 8


def test_claims_are_paired_over_the_documents_of_all_seeds(seeds):
    found = miniature.Findings(seeds)
    a, b = ("a/answers", "reasoning"), ("b/answers", "reasoning")
    assert len(set(found.values(*a)[1])) == 4
    assert found.claim("", a, b)[1:] == [
        "100.0 [100.0, 100.0]", "50.0 [0.0, 100.0]", "50.0 [0.0, 100.0]", "not shown"]
    assert found.claim("", a, ("a/answers", "length"))[-1] == "shown"
    assert found.claim("", ("a/answers", "length"), a)[-1] == "the opposite"


def test_a_chain_is_counted_against_the_swaps_of_its_story():
    story = "The ball is under A. 4 A B. 5 C D."
    for response, kind in (("A 4 A B B. 5 C D B.</think>B", "full"),
                           ("A 4 A B B.</think>", "partial"),
                           ("</think> 4 A B B. 5 C D B.", "none")):
        assert miniature.chain({"context": story, "response": response}) == kind


def test_perplexity_is_the_geometric_mean_over_seeds_which_are_independent(seeds):
    for folder, mean in zip(seeds, (2.0, 8.0)):
        (folder / "a" / "perplexity.jsonl").write_text(json.dumps([mean, mean / 2, mean * 2]))
    wide = 2 ** (1 / 2 ** 0.5)  # the factor 2 of one seed
    assert miniature.perplexity(seeds, "a") == f"4.000 [{4 / wide:.3f}, {4 * wide:.3f}]"
