"""Calculations are worked rightly; rows tell nothing of the corpus; the text before a position
alone selects it; the chain from ability to evaluation runs."""

import re
import sys
from fractions import Fraction
from random import Random

import numpy as np
import pytest

import train
from data import Tokenizer, hold_out, load_corpus
from eval import show_interval, summary
from helpers import ROOT
from paper.compare import by_first, differences
from paper.recipes import calculations, multi_step, skill, worked_start
from paper.recipes.calculations import draw, work
from paper.report import read_rows
from sampler import Completion

TRAIN = "--questions 16 --lr 0.005 --max-prompt 384 --steps"
ASK = ("--region all --min-entropy 0.01 --template toy --samples 2 --max-prompt 384 "
       "--max-response 100 --steps 2 --questions 4 --group-size 4")
STAGES = {"format": 2, "ability": 16, "habit": 50, "choice": 2, "mixed": 2, "digits": 2}


def exact(expression):
    """Evaluate an expression by Python's own parser, with fractions for its numbers."""
    return eval(re.sub(r"([\d.]+)", r"Fraction('\1')", expression))


def test_every_step_and_every_result_is_right_and_steps_are_small():
    for n in range(5000):
        expression, steps, result, _ = draw(Random(n))
        assert Fraction(result) == exact(expression) > 0
        for a, sign, b, right in (skill.STEP.fullmatch(step).groups() for step in steps):
            assert exact(a + sign + b) == Fraction(right) and skill.is_right(a, sign, b, right)
            places = sorted(len(re.findall("[1-9]", number)) for number in (a, b))
            assert "/" in expression or places[0] == 1 and (sign != "*" or places[1] < 3)


def test_the_examples_of_the_docstring_are_worked_so():
    right = [", ".join(work(expression)[0]) == steps for expression, steps
             in re.findall(r"^    (\S+): (.*)", calculations.__doc__, re.M)]
    assert right == [True] * 3


@pytest.mark.parametrize(("kind", "texts"), [
    ("multi-step", "120-40-24 = <<120-40-24=|<<24*36=|<<24*36=86|<<2+3+4="),
    ("one-step", "<<24*30=|<<400*250=|<<.05*12=|<<12=|<<24*36=<<2*3="),
    ("elsewhere", "<<2*3*4=24>>24+12=|24*36=|<<24*36|<<24*36=864>>|")])
def test_a_calculation_is_multi_step_by_its_numbers(kind, texts):
    assert {multi_step.kind_of(text.encode()) for text in texts.split("|")} == {kind}


@pytest.mark.parametrize("all_digits", [False, True])
def test_the_text_before_a_position_alone_selects_it(toy, tmp_path, all_digits):
    text = "So <<24*36=864>>864 and <<2*3=6>>6. <<1+2+3="
    for end in ("6>>6.", "7<<24*36", ">>"):
        (tmp_path / "corpus.txt").write_text(text + end)
        corpus = load_corpus(tmp_path / "corpus.txt", Tokenizer(toy / "base"), 0, 0, 512)
        multi, one, both, every = ([len(corpus.tokenizer.bytes_of(question.context)) for question in
                                    multi_step.results(*how, corpus, np.ones(len(corpus.tokens)),
                                                       False, 0.5)]
                                   for how in (*((kind, all_digits, False)
                                                 for kind in multi_step.KINDS),
                                               ("results", all_digits, True)))
        assert multi[:5] == [11, 12, 13, 14, 44] if all_digits else multi == [11, 44]
        assert one == ([30, 31] if all_digits else [30])
        assert both == sorted(multi + one)
        assert len(every) == 2 * len(both) and {*both} < {*every}


@pytest.fixture(scope="module")
def chain(toy, tmp_path_factory):
    """The stages, a run and its evaluation, with the toy's model."""
    out, model = tmp_path_factory.mktemp("chain"), toy / "base"
    for name in ("texts", "corpus"):
        found = (draw(Random(f"{name} {n}")) for n in range(200))
        (out / f"{name}.txt").write_text("<|endoftext|>".join(
            f"{name} <<{c.expression}={c.result}>>" for c in found))
    corpus = f"--corpus {out}/corpus.txt --holdout 80 --cache {out}"
    for stage, steps in STAGES.items():
        worked_start.main(f"{stage} {out}/texts.txt {corpus} --model {model} --out {out}/{stage} "
                          f"{TRAIN} {steps}".split())
        if stage not in ("choice", "digits"):  # which are side branches here
            model = out / stage / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "select_positions", train.select_positions)
        patch.setattr(sys, "argv", ["skill", out / "run/rollouts.jsonl", out / "run/skill.svg"])
        multi_step.main(f"--model {model} {corpus} {ASK} --out {out}/run".split())
        skill.main()
        multi_step.main(f"eval {out}/run --kind results".split())
    return out


def test_rows_work_no_expression_of_the_corpus_and_only_the_last_stage_has_its_texts(chain):
    corpus = worked_start.read_texts(chain / "corpus.txt")
    avoid, held = set(re.findall("<<([^=]+)=", "\n".join(corpus))), hold_out(corpus, 80, 0)
    for stage in set(STAGES) - {"choice"}:
        said = (chain / stage / "rows.jsonl").read_text()
        assert [text in said for text in corpus] == [stage == "mixed" and not out for out in held]
        assert avoid.isdisjoint(re.findall(r'(?:"|\\n)([^ :="]+)[:=]', said))
        assert (len(re.findall('response": "[^<]', said))
                == {"habit": 320, "mixed": 120, "digits": 32}.get(stage, 0))
        for row in read_rows(chain / stage / "rows.jsonl"):
            context, response = row.get("context", ""), row.get("response", "")
            assert row.get("prompt", "Next token?\n") == f"Next token?\n{context}"
            if response.startswith("</think>"):  # a guess
                assert "|>" not in response
                assert stage == "format" or re.search("<<[^<>=]+=$", context)
            elif response:
                expression, value, boxed = re.fullmatch(
                    r"(\S+): .*=(.*)\n</think>\\boxed{(.*)}", response).groups()
                assert exact(expression) == Fraction(value)
                before, _, known = context.rpartition("=")
                assert before.endswith(f"<<{expression}")
                assert known + boxed in (value, f"{value}>>")
                assert stage == "digits" or not known
        boxed = said.count(r"</think>\\boxed{")
        assert (boxed == said.count("\n")) == (stage not in ("ability", "mixed"))


def test_a_choice_is_between_the_models_own_responses_and_guesses(chain):
    rows = read_rows(chain / "choice/rows.jsonl")
    begin = [row["response"][0] for row in rows if row["context"][-1] == "="]
    assert len(begin) > 7 and len({*begin}) > 1  # worked or guessed


def test_a_guess_is_a_whole_token_of_text(toy, monkeypatch):
    tokenizer = Tokenizer(toy / "base")
    said = [tokenizer.eos_ids, *map(tokenizer.encode, (" D}", " D")), tokenizer.encode("é")[:1]]
    monkeypatch.setattr(worked_start, "generate",
                        lambda *_, **how: [[Completion(ids, [], True)] for ids in said])
    rows = worked_start.natural_rows(Random(4), ["é"], tokenizer, 4)  # half an é is no context
    (row,) = worked_start.own_rows(train.parse([]), tokenizer, rows, *worked_start.TOKEN)
    assert (row["context"], row["response"]) == ("é", "</think>\\boxed{ D}")


@pytest.mark.parametrize("words", [
    "abilty a", "habit a --model m --corpus no/such/file",
    f"format {ROOT}/toy/corpus.jsonl --model m --corpus {ROOT}/toy/corpus.jsonl"])
def test_what_a_user_can_mend_is_one_sentence(words, capsys):
    with pytest.raises(SystemExit) as ended:
        worked_start.main(words.split())
    said = f"{ended.value} {capsys.readouterr().err}"
    assert re.search("invalid choice: 'abilty'|/file: no such file|needs other texts", said)


def test_the_chain_asks_at_results_and_counts_worked_thoughts(chain):
    groups, asked = (skill.examine(read_rows(chain / "run" / file))
                     for file in ("rollouts.jsonl", "eval/records.jsonl"))
    assert set(groups) == {"multi-step, quarter 1", "multi-step, quarter 3"}  # of two steps
    assert set(asked) == {"multi-step, quarter 1", "one-step, quarter 1"}
    assert any(group["worked"] for group in groups.values())
    curves = re.findall('<polyline class="line c(.)".*? points="(.*?)"',
                        (chain / "run/skill.svg").read_text())
    heights = [[float(point.split(",")[1]) for point in points.split()] for _, points in curves]
    wanted = [[np.mean([(row[0], bool(np.isfinite(row[2])), row[1] / 100)[n]
                        for how in group.values() for row in how]) for group in groups.values()]
              for n in range(3)]  # two steps are two quarters
    slope, start = np.polyfit(np.ravel(wanted), np.ravel(heights), 1)
    np.testing.assert_allclose(heights, slope * np.array(wanted) + start, atol=0.06)


def test_the_figures_of_responses():
    record = {"step": 0, "context": "<<24*3=", "truth": "72>>", "rewards": [1.0, 0.0],
              "predictions": ["72", None], "tokens": [9, 2],
              "responses": ["20*3=60, 4*3=13, 3/2=1.5, 2/3=.66</think>", "no"]}
    np.testing.assert_equal(skill.examine([record])["one-step, quarter 1"], {
        "worked": [(1, 9, 2 / 3)], "quick": [(0, 2, np.nan)]})


@pytest.mark.parametrize("seed", ["", "seed1-"])
def test_the_recorded_figures_are_those_of_the_recorded_responses(seed):
    """Accuracies, paired differences, counts and the picture of the runs on real text."""
    real, page = ROOT / "paper/results/real", (ROOT / "paper/results.md").read_text()
    found = {name: read_rows(real / f"worked-{seed}{name}-records.jsonl")
             for name in ("base", "start", "rpt", "sft")}
    first, rows = {name: by_first(records) for name, records in found.items()}, []
    for records, name, *more in (
            (found, "base"), (found, "start", "reasoning", "majority vote", "pass@8"),
            (found, "rpt", "reasoning", "majority vote", "pass@8"), (found, "sft", "reasoning"),
            *((first, name, "reasoning") for name in ("start", "rpt", "sft"))):
        splits = summary(records[name]).values()
        title = {"start": "before RPT", "rpt": "RPT", "sft": "Mixed SFT"}.get(name, name)
        for measure in more if records is first else ("standard", *more):
            said = measure.replace("vote", "of 8") + ", first digit" * (records is first)
            bold = "**" * (name == "rpt" and measure == "reasoning")
            rows.append((f"{bold}{title}, {said}{bold}", *(
                f"{bold}{show_interval(of[measure], 100)}{bold}" for of in splits)))
    for other, *more in (("base", "standard"), ("start", "standard", "reasoning"),
                         ("rpt", "standard"), ("sft", "standard", "reasoning")):
        who = {"rpt": "its own", "sft": "Mixed SFT's"}.get(other, f"the {other}'s")
        for records in (found, first):
            lines = differences(records[other], records["rpt"])
            rows += [(f"{who} {measure}", *(line.partition(": ")[2] for line in lines
                                            if f"B's reasoning less A's {measure}" in line))
                     for measure in more]
    for row in rows:
        assert f"| {' | '.join(row)} |" in page.replace(" (argmax)", ""), row
    groups = read_rows(real / f"worked-{seed}rollouts.jsonl")
    with_gradient = sum(len(set(group["rewards"])) > 1 for group in groups)
    format_alone = sum(len({p is None for p in group["predictions"]}) > 1 for group in groups)
    assert (f"Of {len(groups)} groups {with_gradient} carried a gradient; with a reward for the "
            f"format alone {format_alone} would have.") in " ".join(page.split())
    if not seed:
        assert skill.picture(groups) == (ROOT / "paper/results/worked.svg").read_text()
        found = (read_rows(real / f"worked-one-step-{name}-records.jsonl")
                 for name in ("start", "rpt"))
        assert " to ".join(show_interval(summary(records)["easy"]["reasoning"], 100)
                           for records in found) in " ".join(page.split())
