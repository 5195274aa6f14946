"""The entropy pass, the measurements on a model and the tables, through eval.py's functions and its
command line. (The statistics: test_statistics.py.)

    torchrun --nproc-per-node 2 tests/test_eval.py OUT      what two processes do, see below
"""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from helpers import ROOT, assert_rounds_to, in_float64, plain_logits, tiny  # noqa: E402

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from data import (HELD_OUT, TRAIN, Corpus, PositionFilter, Question, Tokenizer,  # noqa: E402
                  answer_sets, load_corpus, prompt_ids)
from eval import (SPLITS, Proxy, bootstrap_interval, corpus_entropy, evaluate,  # noqa: E402
                  next_token_entropy, perplexity, question_sets, read_choices, summary, table)
from model import load_pretrained, save_pretrained  # noqa: E402
from reward import extract_prediction, prefix_match  # noqa: E402
from rpt import Method, Policy  # noqa: E402
from sampler import Completion, generate  # noqa: E402

CPU = torch.device("cpu")
METHOD = Method(template="toy", max_prompt=128, max_response=24)
# A float32 forward of tiny() errs by some roundings of its largest logit (sums over 32 channels, 2
# layers, 211 positions): an entropy was off by 4 to 9 of them on three instruction sets.
ROUNDINGS = 32


@pytest.fixture(scope="module")
def base(toy):
    return Policy(load_pretrained(toy / "base"), Tokenizer.from_dir(toy / "base"))


@pytest.fixture(scope="module")
def corpus(toy, base, tmp_path_factory):
    """A tenth of the toy's documents."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = (toy / "corpus.jsonl").read_text().splitlines(keepends=True)
    (folder / "some.jsonl").write_text("".join(rows[:120]))
    return load_corpus(folder / "some.jsonl", base.tokenizer, folder, 20, 0)


@pytest.fixture(scope="module")
def questions(corpus):
    """The last word of forty stories, two of a document, with entropies on both sides of each
    split."""
    out = []
    for number in range(40):
        ids = corpus.ids(number).tolist()
        truth = tuple(map(corpus.tokenizer.token_bytes, ids[-2:]))
        entropy = 0.6 + 0.03 * number
        out.append(Question(tuple(ids[:-2]), truth, number // 2, len(ids) - 2, entropy))
    return out


def random_policy():
    """Random weights over the toy's tokens."""
    tokenizer = Tokenizer.from_dir(ROOT / "toy" / "base")
    model = tiny(vocab_size=len(tokenizer) + 8, max_position_embeddings=128)
    return Policy(model, tokenizer)


def random_proxy(folder):
    """A proxy with these weights, in a folder that is empty, with its cache there."""
    policy = random_policy()
    save_pretrained(policy.model, folder, policy.tokenizer)
    return Proxy(folder, folder / "cache", WINDOW, CPU, torch.float32)


# ---- entropy


def exact_entropies(model, ids):
    """Sort, keep the sixteen most probable, renormalise, -sum p ln p; float64 [T]."""
    with torch.no_grad():
        p = plain_logits(in_float64(model), ids).softmax(-1)
    p = p.sort(descending=True).values[:, :16]
    p = p / p.sum(-1, keepdim=True)
    return -(p * p.log()).sum(-1)


def largest_logit(model, ids):
    with torch.no_grad():
        return plain_logits(model, ids).abs().max()


def test_the_entropy_is_that_of_the_renormalised_most_probable_tokens():
    model = tiny()
    ids = torch.randint(40, (3, 211), generator=torch.Generator("cpu").manual_seed(0))
    with torch.no_grad():
        entropy = next_token_entropy(model, model(ids).flatten(0, 1))  # the head takes two
    for row, got in zip(ids.tolist(), entropy.view(ids.shape)):
        assert_rounds_to(got, exact_entropies(model, row), ROUNDINGS, largest_logit(model, row))


WINDOW = 16
LENGTHS = (5, 16, 17, 1, 60, 24, 25, 9, 41, 16, 2, 7)


def random_corpus(bos=(), chat=False):
    """Twelve documents of the toy's tokens; with `chat` the last is a prompt of three tokens and a
    response."""
    tokenizer = Tokenizer.from_dir(ROOT / "toy" / "base")
    tokenizer.bos = list(bos)
    tokens = np.random.default_rng(0).integers(0, 300, sum(LENGTHS)).astype(np.uint32)
    starts = np.cumsum([0, *LENGTHS])
    regions, is_chat = starts[:-1].copy(), np.zeros(len(LENGTHS), bool)
    regions[-1], is_chat[-1] = starts[-2] + 3, chat
    split = np.full(len(LENGTHS), HELD_OUT, np.int8)
    return Corpus(tokenizer, tokens, starts, regions, is_chat, split, "name")


def read_before(corpus, document, position):
    """What the pass reads before a token: windows overlap by half, the last ends with the text."""
    ids, begin = corpus.ids(document).tolist(), 0
    if position >= WINDOW:
        half = WINDOW // 2
        begin = min(WINDOW + (1 + (position - WINDOW) // half) * half, len(ids)) - WINDOW
    bos = [] if corpus.is_chat[document] else corpus.tokenizer.bos
    return [*bos, *ids[begin:position]]


@pytest.mark.parametrize("bos", [(), (3,)])
def test_the_pass_gives_each_token_the_entropy_before_it(bos, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 40)
    corpus, model = random_corpus(bos), random_policy().model
    values = corpus_entropy(random_proxy(tmp_path), corpus)
    assert values.dtype == np.float32 and len(values) == len(corpus.tokens)
    for document, start in enumerate(corpus.starts[:-1]):
        for position in range(LENGTHS[document]):
            before, got = read_before(corpus, document, position), values[start + position]
            if not before:
                assert math.isnan(got)
                continue
            assert_rounds_to(torch.tensor(got), exact_entropies(model, before)[-1], ROUNDINGS,
                             largest_logit(model, before))


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """The pass, in small parts, with a model that only counts: any function of what precedes, and
    of what else is in the batch. Calls it records, and raises KeyboardInterrupt after `last`."""
    state = SimpleNamespace(calls=0, last=10**9, loads=0, proxy=random_proxy(tmp_path))

    class Counts:
        head = torch.empty(0, device=CPU)

        def __call__(self, ids):
            if state.calls == state.last:
                raise KeyboardInterrupt
            state.calls += 1
            return ((ids + 1.0).cumsum(1).sqrt() + ids.float().mean())[..., None]

    def load(*how):
        state.loads += 1
        return Counts()

    monkeypatch.setattr(evaluation, "load_pretrained", load)
    monkeypatch.setattr(evaluation, "next_token_entropy", lambda model, hidden, _: hidden[:, 0])
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 40)
    monkeypatch.setattr(evaluation, "PART_WINDOWS", 3)
    return state


def test_an_interrupted_pass_resumes_to_the_same_bits(counted):
    def bits():
        return corpus_entropy(counted.proxy, random_corpus()).tobytes()

    content, calls = bits(), counted.calls
    assert bits() == content and counted.loads == 1  # it needs no model any more
    (file,), computed_twice = counted.proxy.cache.glob("*.f32"), []
    for counted.last in range(calls):
        file.unlink()
        counted.calls = 0
        with pytest.raises(KeyboardInterrupt):
            bits()
        first, counted.last = counted.calls, 10**9
        assert bits() == content
        computed_twice.append(counted.calls - calls)
    assert max(computed_twice) <= 3 and min(computed_twice) == 0  # of one part of three windows
    for size in (*range(0, len(content), 37), len(content) + 4):  # killed while it wrote
        file.write_bytes((content + bytes(4))[:size])
        assert bits() == content
    file.write_bytes(bytes(4) + content)  # of a wrong length: none of it is believed
    assert bits() == content


def test_two_that_begin_together_on_one_file_measure_once(counted):
    found, barrier = [], threading.Barrier(2)  # as processes do: a lock belongs to an open file

    def begin():
        barrier.wait(20)
        found.append(np.array(corpus_entropy(counted.proxy, random_corpus())))

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted.loads == 1 and len(found) == 2 and len(found[0]) == sum(LENGTHS)
    assert np.array_equal(*found, equal_nan=True)


def test_entropies_are_named_by_the_content_of_what_matters(counted, tmp_path):
    proxy, corpus = counted.proxy, random_corpus()

    def measured_again(proxy, corpus=corpus):
        before = counted.loads
        corpus_entropy(proxy, corpus)
        return counted.loads > before

    moved = replace(proxy, model=tmp_path / "moved")
    shutil.copytree(tmp_path, moved.model)
    assert measured_again(proxy) and not measured_again(proxy)
    (moved.model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert not measured_again(moved)
    assert measured_again(replace(proxy, window=32))
    assert measured_again(replace(proxy, dtype=torch.bfloat16))
    assert measured_again(proxy, replace(corpus, fingerprint="other texts"))
    assert measured_again(proxy, replace(random_corpus([3]), fingerprint=corpus.fingerprint))
    config = json.loads((moved.model / "config.json").read_text())
    (moved.model / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    assert measured_again(moved)
    model = random_policy().model
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    save_pretrained(model, tmp_path, corpus.tokenizer)
    assert measured_again(proxy) and not measured_again(proxy)


def test_a_proxy_that_cannot_measure_this_text_is_refused(tmp_path):
    proxy, corpus = random_proxy(tmp_path), random_corpus()
    longest, file = max(LENGTHS), tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"max_position_embeddings": longest - 1}))
    with pytest.raises(ValueError, match=f"up to {longest} tokens, but the model only"):
        corpus_entropy(replace(proxy, window=100), corpus)
    file.write_text(json.dumps(config))
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"A"', '"\\u0000"').replace(
        '"B"', '"A"').replace('"\\u0000"', '"B"'))  # of the same size, but A and B are exchanged
    with pytest.raises(ValueError, match=str(tmp_path)):
        corpus_entropy(proxy, corpus)


def test_questions_are_of_their_split_and_held_out_ones_above_half_a_nat(toy, corpus, tmp_path):
    proxy = Proxy(toy / "base", tmp_path, 64, CPU, torch.float32)
    where = PositionFilter("top", 0.1, min_context=4, max_context=40, region="solution")
    train, held, text = question_sets(corpus, proxy, where)
    entropy = corpus_entropy(proxy, corpus)
    for found, split in ((train, TRAIN), (held, HELD_OUT)):
        assert len(found) > 10 and f"{len(found):,}" in text
        for n in range(len(found)):
            question = found[n]
            place = corpus.starts[question.document] + question.position
            assert corpus.split[question.document] == split and place >= corpus.regions[
                question.document]
            assert 4 <= question.position <= 40 and question.entropy == entropy[place]
    assert held.entropy[held.positions].min() > 0.5
    with pytest.raises(ValueError, match="no position is left to ask about"):
        question_sets(corpus, proxy, replace(where, kind="threshold", value=100.0))
    unmeasured = replace(proxy, model=tmp_path / "none")  # it is not even looked for
    with pytest.raises(ValueError, match="no document is longer than --min-context 10000"):
        question_sets(corpus, unmeasured, replace(where, min_context=10000))


# ---- measurements


def test_a_record_says_what_standard_prediction_and_each_response_got_right(base, questions):
    model, tokenizer = base.model, base.tokenizer
    records = evaluate(base, questions, METHOD, samples=3, seed=5)
    prompts = [prompt_ids(tokenizer, question, "toy", 128) for question in questions]
    responses = generate(model, prompts, samples=3, max_new_tokens=24, temperature=0.8, seed=5,
                         eos_ids=tokenizer.eos_ids, keys=[1 << 60 | n for n in range(40)])
    for n, (record, question, group) in enumerate(zip(records, questions, responses)):
        with torch.no_grad():  # the oracle: one plain forward for each question
            logits = model.logits(model(torch.tensor([question.context])))[0, -1]
        right = tokenizer.token_bytes(int(logits.argmax())) == question.truth[0]
        assert record["standard"] == float(right)
        said = [extract_prediction(tokenizer.bytes_of(c.ids[:-1])) if c.finished else None
                for c in group]
        assert record["reasoning"] == [prefix_match(p, question.truth) for p in said]
        assert record["parsed"] == [float(p is not None) for p in said]
        assert record["predictions"] == [None if p is None else p.decode() for p in said]
        assert record["length"] == [len(c.ids) for c in group]
        assert record["responses"] == [
            tokenizer.bytes_of(c.ids[:-1] if c.finished else c.ids).decode(
                errors="backslashreplace") for c in group]
        assert (record["question"], record["document"], record["position"], record["entropy"]) == (
            n, question.document, question.position, question.entropy)
    json.dumps(records, allow_nan=False)


@pytest.fixture
def says(base, monkeypatch):
    """Makes the model say what a test wants: texts of the samples of every question; one that ends
    in `...` is not finished."""
    def make(*texts):
        def completion(text):
            ids = base.tokenizer.response_ids(text.removesuffix("..."))
            if finished := not text.endswith("..."):
                ids = [*ids, base.tokenizer.eos_ids[0]]
            return Completion(ids, [0.0] * len(ids), finished)
        monkeypatch.setattr(evaluation, "generate", lambda model, prompts, **_: [
            [*map(completion, texts)] for _ in prompts])
    return make


def test_only_whole_tokens_that_were_boxed_in_time_are_right(base, says):
    question = Question((1, 2), (b" Ab", b"cd", b"e"), 0, 2, 1.0)
    texts = {"x</think>\\boxed{ Abcd}": (1, 1), "</think>\\boxed{ Abc}": (0, 1),
             "\\boxed{ Ab}": (0, 0), "</think>\\boxed{ Abcd}...": (0, 0)}
    says(*texts)
    (record,) = evaluate(base, [question], METHOD, samples=len(texts))
    assert list(zip(record["reasoning"], record["parsed"])) == list(texts.values())
    assert record["truth"] == " Abcde" and record["vote"] == 1.0
    answer = Question((1, 2), (), 0, 0, answer="1/2")
    says("</think>\\boxed{0.5}", "</think>\\boxed{2}", "</think>\\boxed{0.5}...")
    (record,) = evaluate(base, [answer], METHOD, samples=3)
    assert record["reasoning"] == [1, 0, 0] and record["truth"] == "1/2" and record["vote"] == 1
    assert "standard" not in record and "entropy" not in record


def test_standard_prediction_reads_the_end_of_a_context_and_may_span_two_tokens():
    policy, method = random_policy(), replace(METHOD, max_prompt=47, max_response=1)
    contexts = torch.from_numpy(np.random.default_rng(1).integers(0, 300, (20, 60)))
    with torch.no_grad():
        logits = policy.model.logits(policy.model(contexts[:, -47:]))[:, -1]
    likeliest = list(map(policy.tokenizer.token_bytes, logits.argmax(-1).tolist()))
    n, token = next((n, token) for n, token in enumerate(likeliest) if len(token) > 1)
    truths = [(n, (each, b"x")) for n, each in enumerate(likeliest)]
    truths += [(n, (token[:1], token[1:], b"x")), (n, (token + b"x", b"x"))]
    asked = [Question(tuple(contexts[n].tolist()), truth, n, 60) for n, truth in truths]
    records = evaluate(policy, asked, method)
    assert [record["standard"] for record in records] == [1.0] * 21 + [0.0]


def test_splits_are_nested_and_their_intervals_are_over_documents(base, questions):
    records = evaluate(base, questions, METHOD, samples=3, seed=5)
    found = summary(records)
    for split, threshold in SPLITS.items():
        chosen = [r for r in records if r["entropy"] > threshold]
        documents = [r["document"] for r in chosen]
        assert found[split]["questions"] == len(chosen) > len(set(documents)) > 1
        for name, value in {
                "standard": lambda r: r["standard"], "reasoning": lambda r: np.mean(r["reasoning"]),
                "pass@3": lambda r: any(r["reasoning"]), "majority vote": lambda r: r["vote"],
                "parsed": lambda r: np.mean(r["parsed"]), "length": lambda r: np.mean(r["length"]),
        }.items():
            values = [float(value(r)) for r in chosen]
            assert found[split][name] == bootstrap_interval(values, documents)
    assert len({found[split]["questions"] for split in SPLITS}) == 3


def test_what_was_not_measured_is_absent_and_never_nan(base, says):
    says("</think>\\boxed{ A}")
    one = Question((1, 2), (b" A",), 4, 2, 0.7)
    found = summary(evaluate(base, [one], METHOD))  # one document, two empty splits
    assert found["medium"] == {"questions": 0} and found["easy"]["reasoning"] == (1, None, None)
    text = table({"model": found})
    assert re.search(r"^model, reasoning +100.0 +- +-$", text, re.M) and "nan" not in text
    answers = [Question((1, n), (), n, 0, answer="A") for n in range(3)]
    asked = summary(evaluate(base, answers, METHOD))
    assert list(asked) == ["all"] and asked["all"]["reasoning"] == (1, 1, 1)
    assert not {"standard", "pass@1"} & asked["all"].keys()
    assert "all (3)" in table({"model": asked})
    json.dumps([found, asked], allow_nan=False)


PLAIN = replace(METHOD, template="plain")


def test_multiple_choice_takes_the_likeliest_letter_and_the_boxed_letter(toy, says):
    policy = random_policy()
    tokenizer = policy.tokenizer
    rows = list(map(json.loads, (toy / "choices.jsonl").read_text().splitlines()))[:12]
    says("</think>\\boxed{B}")
    choices = read_choices(toy / "choices.jsonl", tokenizer)[:12]
    for record, row, choice in zip(evaluate(policy, choices, PLAIN), rows, choices):
        letters = "ABCDEFGH"[: len(row["options"])]
        lines = [row["question"], *map("({}) {}".format, letters, row["options"])]
        assert tokenizer.bytes_of(choice.context).decode() == "\n".join(lines)
        assert record["reasoning"] == [float(row["answer_index"] == 1)]
        prompt = [*tokenizer.bos, *tokenizer.encode("\n".join([*lines, "Answer:"]))]
        likelihoods = []
        for letter in letters:
            option = tokenizer.encode_inside(f" {letter}")
            logprobs = plain_logits(in_float64(policy.model), prompt + option).log_softmax(-1)
            likelihoods.append(sum(logprobs[len(prompt) - 1 + n, token].item()
                                   for n, token in enumerate(option)))
        assert record["standard"] == float(np.argmax(likelihoods) == row["answer_index"])


@pytest.mark.parametrize("wrong", [{"answer_index": 2}, {"options": "12"}, {"question": None},
                                   {"options": list(map(str, range(27)))}])
def test_a_row_that_is_no_multiple_choice_is_named(base, tmp_path, wrong):
    file = tmp_path / "rows.jsonl"
    row = {"question": "1 + 1?", "options": ["1", 2], "answer": "B", "answer_index": 1}
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | wrong) + "\n")
    with pytest.raises(ValueError, match="rows.jsonl line 2: expected question"):
        read_choices(file, base.tokenizer)


@pytest.mark.parametrize("bos, chat", [((), False), ((3,), True)])
def test_perplexity_is_that_of_every_token_behind_what_precedes_it(bos, chat):
    model, corpus, losses, documents = random_policy().model, random_corpus(bos, chat), [], []
    for document in range(len(LENGTHS)):
        first = 3 if corpus.is_chat[document] else 0
        for position in range(first, LENGTHS[document]):
            if before := read_before(corpus, document, position):
                with torch.no_grad():
                    logprobs = plain_logits(in_float64(model), before)[-1].log_softmax(-1)
                token = int(corpus.ids(document)[position])
                losses.append(-logprobs[token].item())
                documents.append(document)
    exact = torch.tensor(bootstrap_interval(losses, documents), dtype=torch.float64)
    found = torch.tensor(perplexity(model, corpus, WINDOW), dtype=torch.float64).log().float()
    assert_rounds_to(found, exact, ROUNDINGS, largest_logit(model, corpus.ids(4).tolist()))


# ---- several processes


def by_key(model, prompts, *, keys, samples, **_):
    """Stands for generate(): completions that depend on key and sample alone."""
    return [[Completion([key % 97 + sample, 1], [0.0] * 2, True) for sample in range(samples)]
            for key in keys]


def measured_in(folder):
    """What eleven questions, entropies and perplexity give, for JSON."""
    evaluation.generate = by_key
    proxy = Proxy(folder / "model", folder / f"cache{dist.is_initialized()}", WINDOW, CPU,
                  torch.float32)
    asked = [Question((n + 1, n + 2), (), n, 0, answer="A") for n in range(11)]
    records = evaluate(random_policy(), asked, METHOD, 2, 7)
    values = np.nan_to_num(corpus_entropy(proxy, random_corpus()), nan=-1).tolist()
    return [records, values, perplexity(random_policy().model, random_corpus(), WINDOW)]


def as_one_of_several(out):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(measured_in(out)))
    dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path, monkeypatch):
    random_proxy(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, __file__, str(tmp_path)], capture_output=True, text=True,
                          timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    monkeypatch.setattr(evaluation, "generate", by_key)
    records, values, losses = measured_in(tmp_path)
    assert first == second and first[0] == records
    scale = largest_logit(random_policy().model, random_corpus().ids(4).tolist())
    assert_rounds_to(torch.tensor(first[1]), torch.tensor(values).double(), 2 * ROUNDINGS, scale)
    alone = torch.tensor(losses, dtype=torch.float64)
    assert_rounds_to(torch.tensor(first[2]).log(), alone.log(), 2 * ROUNDINGS, scale)


def test_records_are_written_as_they_come(base, toy, tmp_path, monkeypatch):
    questions = evaluation.answer_questions(str(toy / "answers.jsonl"), base.tokenizer)[:10]
    few = replace(PLAIN, max_rows=1)  # four questions at a time
    every, sampled = evaluate(base, questions, few), []
    assert every == evaluate(base, questions, PLAIN)

    def interrupted(*how, **more):
        if len(sampled) == 2:
            raise KeyboardInterrupt
        sampled.append(more)
        return generate(*how, **more)

    monkeypatch.setattr(evaluation, "generate", interrupted)
    with open(tmp_path / "records", "w") as out, pytest.raises(KeyboardInterrupt):
        evaluate(base, questions, few, out=out)
    assert [json.loads(line) for line in open(tmp_path / "records")] == every[:8]


# ---- the command line


@pytest.fixture
def command(toy, tmp_path, capsys):
    """Runs eval.py in a short form; (what it printed, records)."""
    def run(*arguments, directory=None):
        options = ["--max-prompt", "128", "--max-response", "24", "--cache", tmp_path / "cache",
                   "--out", tmp_path / "records.jsonl", "--questions", "20", "--device", "cpu"]
        evaluation.main([str(directory or toy / "base"), *map(str, [*options, *arguments])])
        lines = (tmp_path / "records.jsonl").read_text().splitlines()
        return capsys.readouterr().out, list(map(json.loads, lines))
    return run


def test_the_command_measures_a_model_on_a_corpus(toy, command):
    said, records = command("--corpus", toy / "corpus.jsonl", "--holdout", "30", "--region",
                            "solution", "--template", "toy", "--samples", "2")
    assert "base, standard" in said and "base, majority vote" in said and "base, pass@2" in said
    assert len(records) == 20 and all(len(record["responses"]) == 2 for record in records)
    said, [found] = command("--corpus", toy / "corpus.jsonl", "--holdout", "30", "--perplexity")
    assert 1 < found[1] < found[0] < found[2]
    assert "perplexity of held-out documents {:.3f} [{:.3f}, {:.3f}]".format(*found) in said


def test_the_command_measures_answers_and_multiple_choice(toy, base, command, tmp_path):
    rows = [{"question": "The ball is under A. Where is the ball?", "answer": f"So\n#### {x}"}
            for x in "ABC"]
    file = tmp_path / "gsm8k.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said, records = command("--answers", file, "--samples", "4")
    assert "all (3)" in said and "base, pass@4" in said
    accuracy = 100 * np.mean([record["reasoning"] for record in records])
    assert re.search(rf"^base, reasoning +{accuracy:.1f} \[", said, re.M)
    said, records = command("--choices", toy / "choices.jsonl")
    choices = evaluation.subset(read_choices(toy / "choices.jsonl", base.tokenizer), 20, 0)
    assert records == evaluate(base, choices, PLAIN)
    assert re.search(r"^base, standard +\d+\.\d \[", said, re.M) and "all (20)" in said


@pytest.fixture
def a_run(toy, tmp_path):
    """A run on a copy of a part of a file of the toy, in the same folder, and that copy."""
    def make(name="corpus.jsonl", *options):
        source = tmp_path / "there" / name
        source.parent.mkdir()
        rows = (toy / name).read_text().splitlines(keepends=True)
        source.write_text("".join(rows[:400]))
        train.main(list(map(str, [
            "--recipe", "toy", "--corpus", source, "--out", source.parent / "run", "--answers=",
            "--choices=", "--steps", 1, "--questions", 2, "--group-size", 2, "--max-prompt", 128,
            "--max-response", 4, "--holdout", 25, "--seed", 3, "--eval-questions", 0, *options])))
        return source.parent / "run", source
    return make


def test_a_run_that_was_moved_is_measured_on_its_own_held_out_documents_whatever_the_seed(
        a_run, base, command, tmp_path):
    folder, source = a_run()
    corpus = load_corpus(source, base.tokenizer, tmp_path, 25, 3)
    folder.parent.rename(tmp_path / "elsewhere")
    _, records = command("--seed", "4", "--holdout", "300", directory=tmp_path / "elsewhere/run")
    documents = {record["document"] for record in records}
    assert len(records) == 20 and all(corpus.split[d] == HELD_OUT for d in documents)
    assert all("entropy" in record for record in records)


def test_a_run_is_not_measured_on_a_corpus_that_it_was_not_trained_on(a_run, command, capsys):
    folder, source = a_run()
    with open(source, "a") as out:
        out.write('{"text": "One line more."}\n')
    with pytest.raises(SystemExit) as stop:
        command(directory=folder)
    assert stop.value.code == 2 and "trained on another content" in capsys.readouterr().err


def test_a_run_with_answers_is_asked_its_held_out_questions(a_run, base, command):
    folder, source = a_run("answers.jsonl", "--stage", "rlvr")
    said, records = command("--samples", "2", directory=folder)
    held = {question.document for question in answer_sets(source, base.tokenizer, 25, 3)[1]}
    assert len(records) == 20 and {record["document"] for record in records} <= held
    assert "all (20)" in said and "standard" not in said and "pass@2" in said


def test_what_cannot_be_measured_is_said_before_any_work(a_run, command, capsys, monkeypatch):
    folder, source = a_run("answers.jsonl", "--stage", "rlvr")
    monkeypatch.setattr(evaluation, "load_pretrained", None)
    for options in (["--perplexity"], ["--answers", source, "--choices", source]):
        with pytest.raises(SystemExit) as stop:
            command(*options, directory=folder)
        assert stop.value.code == 2 and "one of --ask, --choices" in capsys.readouterr().err
    (folder / "model").rename(folder / "elsewhere")
    with pytest.raises(SystemExit) as stop:
        command(directory=folder)
    assert stop.value.code == 2 and "has not exported its model yet" in capsys.readouterr().err


STORY = "The ball is under A. 1 A B.\n\nThe ball is now under"
SMALL = ["--max-prompt", "128", "--max-response", "24", "--device", "cpu"]


def test_a_text_is_answered_by_thoughts_their_votes_and_plain_prediction(toy, base, capsys):
    evaluation.main([str(toy / "base"), *SMALL, "--template", "toy", "--ask", STORY])
    said = capsys.readouterr().out
    ids = base.tokenizer.encode(STORY)
    prompt = prompt_ids(base.tokenizer, Question(tuple(ids), (), 0, 0), "toy", 128)
    (group,) = generate(base.model, [prompt], samples=8, max_new_tokens=24, temperature=0.8,
                        eos_ids=base.tokenizer.eos_ids, keys=[1 << 60])
    thoughts, boxed = [], []
    for completion in group:
        response = base.tokenizer.bytes_of(completion.ids[:-1])
        thoughts.append(response.decode().split("</think>")[0].strip())
        boxed.append(extract_prediction(response).decode())
    assert re.findall(r"^\d\. ?((?:.|\n)*?)\n   boxed (.*)$", said, re.M) == [
        *zip(thoughts, map(repr, boxed))]
    counts = [(str(count), repr(each)) for each, count in Counter(boxed).most_common()]
    assert re.findall(r"^(\d) x ('[^']*')", said, re.M) == counts
    shares, tokens = plain_logits(in_float64(base.model), ids)[-1].softmax(-1).topk(8)
    shown = re.findall(r" ([01]\.\d{4}) ('.*')$", said, re.M)
    assert [token for _, token in shown] == [
        repr(base.tokenizer.token_bytes(token).decode()) for token in tokens.tolist()]
    for (share, _), exact in zip(shown, shares.tolist(), strict=True):
        assert abs(float(share) - exact) < 0.5e-4 + 1e-6  # of the last figure that is shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind, prompts", [(io.StringIO, 0), (Terminal, 4)])
def test_without_a_text_each_line_that_is_typed_is_asked_as_the_run_was(
        a_run, capsys, monkeypatch, kind, prompts):
    folder, _ = a_run()
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", kind("The ball is\n\nnow under\n"))
    evaluation.main([str(folder), "--device", "cpu", "--samples", "2", "--ask"])
    said = capsys.readouterr().out
    assert said.count("plain next token") == 2 and said.count("> ") == prompts
    assert said.count("boxed None") == 4  # of the run's four tokens none is left for a box


def test_bad_input_is_one_sentence(toy, tmp_path, capsys):
    rows, base = tmp_path / "rows.jsonl", str(toy / "base")
    rows.write_text('{"problem": "1 + 1?", "answer": "2"}\n{"problem": "1 + 2?"}\n')
    few = [*SMALL[:4], "--cache", str(tmp_path / "cache")]
    corpus = ["--corpus", str(toy / "corpus.jsonl"), *few]
    for arguments, words in (
            (["nowhere/at/all"], "no such model directory"),
            ([base, *few], "--corpus is missing"),
            ([base, "--corpus", str(toy / "corpus.jsonl")], "up to 12,288 tokens, but the model"),
            ([base, *few, "--corpus", str(tmp_path / "none")], "none"),
            ([base, *corpus, "--out", str(tmp_path / "no/such/folder")], "No such file"),
            ([base, *few, "--answers", str(rows)], "has no `answer`"),
            ([base, *corpus, "--samples", "0"], "--samples 0: must be at least 1"),
            ([base, *corpus, "--temperature", "nan"], "--temperature nan: must be"),
            ([base, *corpus, "--device", "gpu"], "--device gpu: this machine has"),
            ([base, *corpus, "--dtype", "int4"], "choose from"),
            ([base, *corpus, "--template", "v9"], "choose from")):
        with pytest.raises(SystemExit) as stop:
            evaluation.main(arguments)
        assert stop.value.code == 2 and words in capsys.readouterr().err
        assert not list(tmp_path.rglob("*.[uf]32"))  # said before any work


if __name__ == "__main__":
    as_one_of_several(Path(sys.argv[1]))
