"""The entropy pass, the measurements on a model and the tables, through eval.py's functions and its
command line. (The statistics: test_statistics.py.)

    torchrun --nproc-per-node 2 tests/test_eval.py OUT      what two processes do, see below
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
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
from data import (HELD_OUT, TRAIN, Corpus, PositionFilter, Question, Tokenizer,  # noqa: E402
                  answer_sets, fingerprint, load_corpus, prompt_ids)
from eval import (SPLITS, Choice, Proxy, bootstrap_interval, corpus_entropy, evaluate,  # noqa: E402
                  measure_entropy, multiple_choice, next_token_entropy, perplexity, question_sets,
                  read_choices, standard_predictions, summary, table)
from model import load_pretrained, save_pretrained  # noqa: E402
from reward import extract_prediction, prefix_match  # noqa: E402
from rpt import Method, Policy  # noqa: E402
from sampler import Completion, generate  # noqa: E402

CPU = torch.device("cpu")
METHOD = Method(template="toy", max_prompt=128, max_response=24)
PROXY = Proxy("", Path(), 64, CPU, torch.float32)
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


# ---- entropy


def exact_entropies(model, ids, top_k=16):
    """Sort, keep the most probable, renormalise, -sum p ln p; float64 [T]."""
    with torch.no_grad():
        p = plain_logits(in_float64(model), ids).softmax(-1)
    p = p.sort(descending=True).values[:, :top_k]
    p = p / p.sum(-1, keepdim=True)
    return -(p * p.log()).sum(-1)


def largest_logit(model, ids):
    with torch.no_grad():
        return plain_logits(model, ids).abs().max()


@pytest.mark.parametrize("top_k", [1, 5, 16, 1000])
def test_the_entropy_is_that_of_the_renormalised_most_probable_tokens(top_k):
    model = tiny()
    ids = torch.randint(40, (3, 211), generator=torch.Generator("cpu").manual_seed(0))
    with torch.no_grad():
        entropy = next_token_entropy(model, ids, top_k)  # 633 positions: the head takes two
    for row, got in zip(ids.tolist(), entropy):
        assert_rounds_to(got, exact_entropies(model, row, top_k), ROUNDINGS,
                         largest_logit(model, row))


def test_the_entropy_of_sixteen_equal_tokens_is_the_logarithm_of_sixteen():
    model = tiny()
    with torch.no_grad():
        model.head.zero_()
        entropy = next_token_entropy(model, torch.zeros(1, 3, dtype=torch.long, device=CPU))
    assert_rounds_to(entropy, torch.full((1, 3), math.log(16), dtype=torch.float64), 4)


WINDOW = 16
LENGTHS = (5, 16, 17, 1, 60, 24, 25, 9, 41, 16, 2, 7)


def toy_tokens(bos=(), chat=False):
    """A corpus of twelve documents over tiny()'s vocabulary; with `chat` the last is a prompt of
    three tokens and a response."""
    tokens = np.random.default_rng(0).integers(0, 40, sum(LENGTHS)).astype(np.uint32)
    starts = np.cumsum([0, *LENGTHS])
    regions, is_chat = starts[:-1].copy(), np.zeros(len(LENGTHS), bool)
    regions[-1], is_chat[-1] = starts[-2] + 3, chat
    return Corpus(SimpleNamespace(bos=list(bos)), tokens, starts, regions, is_chat,
                  np.full(len(LENGTHS), HELD_OUT, np.int8), "name")


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
    model, corpus = tiny(), toy_tokens(bos)
    values = measure_entropy(lambda: model, corpus, tmp_path / "e.f32", WINDOW)
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
def counted(monkeypatch):
    """The pass, in small parts, with a model that only counts: any function of what precedes, and
    of what else is in the batch. Calls it records, and raises KeyboardInterrupt after `last`."""
    state = SimpleNamespace(calls=0, last=10**9, loads=0, model=SimpleNamespace(head=torch.empty(
        0, device=CPU)))

    def entropy_of_prefixes(model, ids):
        if state.calls == state.last:
            raise KeyboardInterrupt
        state.calls += 1
        return (ids + 1.0).cumsum(1).sqrt() + ids.float().mean()

    def load():
        state.loads += 1
        return state.model

    state.load = load
    monkeypatch.setattr(evaluation, "next_token_entropy", entropy_of_prefixes)
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 40)
    monkeypatch.setattr(evaluation, "PART_WINDOWS", 3)
    return state


def test_an_interrupted_pass_resumes_to_the_same_bits(counted, tmp_path):
    corpus, file = toy_tokens(), tmp_path / "e.f32"
    measure_entropy(counted.load, corpus, file, WINDOW)
    content, calls = file.read_bytes(), counted.calls
    measure_entropy(counted.load, corpus, file, WINDOW)
    assert counted.loads == 1 and file.read_bytes() == content  # it needs no model any more
    computed_twice = []
    for counted.last in range(calls):
        file.unlink()
        counted.calls = 0
        with pytest.raises(KeyboardInterrupt):
            measure_entropy(counted.load, corpus, file, WINDOW)
        assert not file.exists()  # nobody takes what is not complete
        first, counted.last = counted.calls, 10**9
        measure_entropy(counted.load, corpus, file, WINDOW)
        assert file.read_bytes() == content
        computed_twice.append(counted.calls - calls)
    assert max(computed_twice) <= 3 and min(computed_twice) == 0  # of one part of three windows
    part = file.with_suffix(".part")
    for size in (*range(0, len(content), 37), len(content), len(content) + 4):
        file.unlink()  # killed while it wrote; and more than there can be
        part.write_bytes((content + bytes(4))[:size])
        measure_entropy(counted.load, corpus, file, WINDOW)
        assert file.read_bytes() == content


def test_entropies_of_a_wrong_length_are_never_used(counted, tmp_path):
    corpus, file = toy_tokens(), tmp_path / "e.f32"
    measure_entropy(counted.load, corpus, file, WINDOW)
    content = file.read_bytes()
    for wrong in (content[:-4], content + bytes(4), b""):
        file.write_bytes(wrong)
        measure_entropy(counted.load, corpus, file, WINDOW)
        assert file.read_bytes() == content


def test_two_that_begin_together_on_one_file_measure_once(counted, tmp_path):
    corpus, file, found = toy_tokens(), tmp_path / "e.f32", []
    barrier = threading.Barrier(2)  # threads stand for processes: a lock belongs to an open file

    def begin():
        barrier.wait(20)
        found.append(np.array(measure_entropy(counted.load, corpus, file, WINDOW)))

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted.loads == 1 and len(found) == 2 and len(found[0]) == len(corpus.tokens)
    assert np.array_equal(*found, equal_nan=True)


def test_entropies_are_named_by_the_content_of_what_matters(toy, corpus, tmp_path, monkeypatch):
    loads, load = [], load_pretrained
    monkeypatch.setattr(evaluation, "load_pretrained", lambda *a: loads.append(a) or load(*a))
    for name in ("one", "moved"):
        shutil.copytree(toy / "base", tmp_path / name)
    proxy = replace(PROXY, cache=tmp_path / "cache", model=tmp_path / "one")

    def measured_again(proxy, corpus=corpus):
        before = len(loads)
        corpus_entropy(proxy, corpus)
        return len(loads) > before

    assert measured_again(proxy) and not measured_again(proxy)
    settings = tmp_path / "moved/tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert not measured_again(replace(proxy, model=tmp_path / "moved"))
    assert measured_again(replace(proxy, window=32))
    assert measured_again(replace(proxy, dtype=torch.bfloat16))
    assert measured_again(proxy, replace(corpus, fingerprint="other texts"))
    config = tmp_path / "moved/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 5000.0}))
    assert measured_again(replace(proxy, model=tmp_path / "moved"))
    other, proxy = load(toy / "base"), replace(proxy, model=tmp_path / "two")
    for _ in range(2):
        with torch.no_grad():
            other.model.norm.weight[0] += 1
        save_pretrained(other, tmp_path / "two", corpus.tokenizer)
        assert measured_again(proxy) and not measured_again(proxy)


def test_a_proxy_that_cannot_measure_this_text_is_refused(toy, corpus, tmp_path):
    save_pretrained(load_pretrained(toy / "base"), tmp_path, corpus.tokenizer)
    proxy = replace(PROXY, model=tmp_path, cache=tmp_path)
    longest = max(np.diff(corpus.starts))
    config = json.loads((tmp_path / "config.json").read_text())
    few = json.dumps(config | {"max_position_embeddings": int(longest) - 1})
    (tmp_path / "config.json").write_text(few)
    with pytest.raises(ValueError, match=f"up to {longest} tokens, but the model only"):
        corpus_entropy(proxy, corpus)
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"A"', '"\\u0000"').replace(
        '"B"', '"A"').replace('"\\u0000"', '"B"'))  # of the same size, but A and B are exchanged
    with pytest.raises(ValueError, match=str(tmp_path)):
        corpus_entropy(proxy, corpus)


def test_questions_are_of_their_split_and_held_out_ones_above_half_a_nat(toy, corpus, tmp_path):
    proxy = replace(PROXY, model=toy / "base", cache=tmp_path)
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
    with pytest.raises(ValueError, match="no document is longer than --min-context 10000"):
        question_sets(corpus, proxy, replace(where, min_context=10000))


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
        assert record["length"] == [len(c.ids) for c in group]
        assert [text.encode() for text in record["responses"]] == [
            tokenizer.bytes_of(c.ids[:-1] if c.finished else c.ids).decode(
                errors="backslashreplace").encode() for c in group]
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
    texts = {"x</think>\\boxed{ Ab}": (1, 1), "</think>\\boxed{ Abcd}": (1, 1),
             "</think>\\boxed{ Abc}": (0, 1), "</think>\\boxed{ A}": (0, 1), "\\boxed{ Ab}": (0, 0),
             "</think>\\boxed{ Ab}...": (0, 0)}
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
    policy, _ = asked_of_tiny()
    contexts = np.random.default_rng(1).integers(0, 300, (20, 16)).tolist()
    asked = [Question(tuple(context), (b"A",), n, 16, 1.0) for n, context in enumerate(contexts)]
    predicted, oracle = standard_predictions(policy, asked, 7), {}
    for name, part in (("end", slice(-7, None)), ("beginning", slice(0, 7))):
        with torch.no_grad():
            ids = torch.tensor([[*policy.tokenizer.bos, *context[part]] for context in contexts])
            tokens = policy.model.logits(policy.model(ids))[:, -1].argmax(-1).tolist()
        oracle[name] = list(map(policy.tokenizer.token_bytes, tokens))
    assert predicted == oracle["end"] != oracle["beginning"]
    n, token = next((n, token) for n, token in enumerate(predicted) if len(token) > 1)
    truths = {(token, b"x"): 1, (token[:1], token[1:], b"x"): 1, (token + b"x", b"x"): 0}
    method = replace(METHOD, max_prompt=7 + 40, max_response=1)
    asked = [replace(asked[n], context=asked[n].context[-7:], truth=truth) for truth in truths]
    records = evaluate(policy, asked, method)
    assert [record["standard"] for record in records] == list(truths.values())


def by_key(model, prompts, *, keys, samples, **_):
    """Stands for generate(): completions that depend on key and sample alone."""
    return [[Completion([key % 97 + sample, 1], [0.0] * 2, True) for sample in range(samples)]
            for key in keys]


def test_records_are_written_as_they_come(tmp_path, monkeypatch):
    lines, (policy, questions) = [], asked_of_tiny()

    def watched(*args, **more):
        lines.append(len((tmp_path / "out").read_text().splitlines()))
        return by_key(*args, **more)

    monkeypatch.setattr(evaluation, "generate", watched)
    with open(tmp_path / "out", "w") as out:
        records = evaluate(policy, questions, replace(METHOD, max_rows=2), 2, 0, out)
    assert lines == [0, 4, 8]
    assert [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()] == records
    monkeypatch.setattr(evaluation, "generate", by_key)
    assert records == evaluate(policy, questions, METHOD, 2, 0)


def test_splits_are_nested_and_their_intervals_are_over_documents(base, questions):
    records = evaluate(base, questions, METHOD, samples=3, seed=5)
    found = summary(records)
    for split, threshold in SPLITS.items():
        chosen = [r for r in records if r["entropy"] > threshold]
        documents = [r["document"] for r in chosen]
        assert found[split]["questions"] == len(chosen) > len(set(documents)) > 1
        for name, value in {
                "standard": lambda r: r["standard"], "reasoning": lambda r: np.mean(r["reasoning"]),
                "pass@3": lambda r: max(r["reasoning"]), "majority vote": lambda r: r["vote"],
                "parsed": lambda r: np.mean(r["parsed"]), "length": lambda r: np.mean(r["length"]),
        }.items():
            values = [float(value(r)) for r in chosen]
            assert found[split][name] == bootstrap_interval(values, documents)
    assert len({found[split]["questions"] for split in SPLITS}) == 3
    alike = [r | {"length": [r["document"]]} for r in records]  # within a document
    rows = [float(r["document"]) for r in alike if r["entropy"] > SPLITS["easy"]]
    assert summary(alike)["easy"]["length"] != bootstrap_interval(rows, range(len(rows)))
    assert "pass@1" not in summary(evaluate(base, questions[:2], METHOD))["easy"]


@pytest.mark.parametrize("samples", [1, 8])
def test_what_was_not_measured_is_absent_and_never_nan(base, says, samples):
    says(*["</think>\\boxed{ A}"] * samples)
    one = Question((1, 2), (b" A",), 4, 2, 0.7)
    found = summary(evaluate(base, [one], METHOD, samples))  # one document, two empty splits
    assert found["medium"] == {"questions": 0} and found["easy"]["reasoning"] == (1, None, None)
    text = table({"model": found})
    assert re.search(r"^model, reasoning +100.0 +- +-$", text, re.M) and "nan" not in text
    answers = [Question((1, n), (), n, 0, answer="A") for n in range(3)]
    asked = summary(evaluate(base, answers, METHOD, samples))
    assert list(asked) == ["all"] and asked["all"]["reasoning"] == (1, 1, 1)
    assert "standard" not in asked["all"] and "all (3)" in table({"model": asked})
    nothing = summary([])
    table({"model": nothing})
    json.dumps([found, asked, nothing], allow_nan=False)


def test_multiple_choice_takes_the_likeliest_letter_and_the_boxed_letter(base, toy, says):
    model, tokenizer = base.model, base.tokenizer
    choices = read_choices(toy / "choices.jsonl")[:12]
    says("</think>\\boxed{B}")
    for record, choice in zip(multiple_choice(base, choices, METHOD), choices):
        assert record["reasoning"] == [float(choice.answer == 1)]
        likelihoods = []
        for letter in "ABCDEFGH"[: len(choice.options)]:
            prompt = [*tokenizer.bos, *tokenizer.encode(choice.prompt + "\nAnswer:")]
            option = tokenizer.encode_inside(f" {letter}")
            logprobs = plain_logits(in_float64(model), prompt + option).log_softmax(-1)
            likelihoods.append(sum(logprobs[len(prompt) - 1 + n, token].item()
                                   for n, token in enumerate(option)))
        assert record["standard"] == float(np.argmax(likelihoods) == choice.answer)


def test_rows_of_mmlu_pros_format_are_choices(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"question": "1 + 1?", "options": ["1", "2"], "answer": "B", "answer_index": 1}
    file.write_text(json.dumps(row) + "\n")
    assert read_choices(file) == [Choice("1 + 1?", ("1", "2"), 1)]
    assert read_choices(file)[0].prompt == "1 + 1?\n(A) 1\n(B) 2" and read_choices("") == []
    for wrong in ({"answer_index": 2}, {"answer_index": True}, {"options": "12"},
                  {"options": list(map(str, range(27)))}, {"question": None}):
        file.write_text(json.dumps(row) + "\n" + json.dumps(row | wrong) + "\n")
        with pytest.raises(ValueError, match="rows.jsonl line 2: expected question"):
            read_choices(file)


@pytest.mark.parametrize("bos, chat", [((), False), ((3,), True)])
def test_perplexity_is_that_of_every_token_behind_what_precedes_it(bos, chat):
    model, corpus, losses, documents = tiny(), toy_tokens(bos, chat), [], []
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


def asked_of_tiny():
    """A policy of random weights over the toy's tokens, and eleven questions with answers."""
    tokenizer = Tokenizer.from_dir(ROOT / "toy" / "base")
    model = tiny(vocab_size=len(tokenizer) + 8, max_position_embeddings=128)
    questions = [Question((n + 1, n + 2), (), n, 0, answer="A") for n in range(11)]
    return Policy(model, tokenizer), questions


def as_one_of_several(out):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    policy, questions = asked_of_tiny()
    evaluation.generate = by_key
    with open(f"{out}/{dist.get_rank()}.jsonl", "w") as file:
        records = evaluate(policy, questions, replace(METHOD, max_rows=2), 2, 7, file)
    values = measure_entropy(tiny, toy_tokens(), Path(out) / "e.f32", WINDOW)
    found = perplexity(tiny(), toy_tokens(), WINDOW)
    name = f"{out}/found{dist.get_rank()}.json"
    Path(name).write_text(json.dumps([records, np.nan_to_num(values, nan=-1).tolist(), found]))
    dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, __file__, str(tmp_path)], capture_output=True, text=True,
                          timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    records, values, losses = found[0]
    monkeypatch.setattr(evaluation, "generate", by_key)
    policy, questions = asked_of_tiny()
    assert records == evaluate(policy, questions, METHOD, 2, 7)
    lines = (tmp_path / "0.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == records and not (tmp_path / "1.jsonl").read_text()
    one = np.nan_to_num(measure_entropy(tiny, toy_tokens(), tmp_path / "o.f32", WINDOW), nan=-1)
    scale = largest_logit(tiny(), toy_tokens().ids(4).tolist())
    assert_rounds_to(torch.tensor(values), torch.tensor(one).double(), 2 * ROUNDINGS, scale)
    alone = torch.tensor(perplexity(tiny(), toy_tokens(), WINDOW), dtype=torch.float64)
    assert_rounds_to(torch.tensor(losses).log(), alone.log(), 2 * ROUNDINGS, scale)


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
    said, _ = command("--corpus", toy / "corpus.jsonl", "--holdout", "30", "--perplexity")
    assert re.search(r"perplexity of held-out documents \[\d", said)


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
    choices = evaluation.subset(read_choices(toy / "choices.jsonl"), 20, 0)
    assert records == multiple_choice(base, choices, replace(METHOD, temperature=0.8))
    assert re.search(r"^base, standard +\d+\.\d \[", said, re.M) and "all (20)" in said


@pytest.fixture
def a_run(toy, base, tmp_path):
    """A run's folder as train.py leaves it: paths of what exists are relative to the folder."""
    def make(stage="rpt", corpus="corpus.jsonl", **more):
        folder = tmp_path / "there" / "run"
        folder.mkdir(parents=True)
        (folder / "model").symlink_to(toy / "base")
        source = tmp_path / "corpus.jsonl"
        source.write_bytes((toy / corpus).read_bytes())
        if stage == "rlvr":
            train, held, _ = answer_sets(source, base.tokenizer, 25, 3)
            content = fingerprint(*((q.context, q.answer) for q in (*train, *held)))
        else:
            content = load_corpus(source, base.tokenizer, tmp_path / "cache", 25, 3).fingerprint
        settings = {
            "stage": stage, "model": "model", "corpus": "../../corpus.jsonl", "proxy": "",
            "cache": "../../cache", "holdout": 25, "seed": 3, "region": "solution",
            "min_context": 1, "max_context": 0, "dtype": "float32", "template": "toy",
            "temperature": 0.8, "max_prompt": 128, "max_response": 4, "max_rows": 64,
            "cache_tokens": 0, "questions": 4, "device": "cuda", "out": "elsewhere",
            "answers": "a", "inputs": {"corpus": content}}
        (folder / "run.json").write_text(json.dumps(settings | more))
        return folder, source
    return make


def test_a_run_is_measured_on_its_own_held_out_documents_whatever_the_seed(
        a_run, base, command, tmp_path):
    folder, source = a_run()
    corpus = load_corpus(source, base.tokenizer, tmp_path / "cache", 25, 3)
    for more in (["--seed", "4", "--holdout", "300"], []):
        said, records = command(*more, directory=folder)
        documents = {record["document"] for record in records}
        assert len(records) == 20 and all(corpus.split[d] == HELD_OUT for d in documents)
        assert "next-token accuracy" in said
        folder = folder.parent.rename(tmp_path / "elsewhere") / "run" if more else folder
        if more:  # a folder that was moved is the same run
            (tmp_path / "elsewhere").rename(tmp_path / "there")
            folder = tmp_path / "there" / "run"


def test_a_run_is_not_measured_on_a_corpus_that_it_was_not_trained_on(a_run, command, capsys):
    folder, source = a_run()
    with open(source, "a") as out:
        out.write('{"text": "One line more."}\n')
    with pytest.raises(SystemExit) as stop:
        command(directory=folder)
    assert stop.value.code == 2 and "trained on another content" in capsys.readouterr().err


def test_a_run_with_answers_is_asked_its_held_out_questions(a_run, base, command):
    folder, source = a_run("rlvr", "answers.jsonl", template="plain")
    said, records = command("--samples", "2", directory=folder)
    held = {question.document for question in answer_sets(source, base.tokenizer, 25, 3)[1]}
    assert len(records) == 20 and {record["document"] for record in records} <= held
    assert "questions with answers" in said and "standard" not in said and "pass@2" in said


def test_bad_input_is_one_sentence(toy, tmp_path, capsys):
    rows, base = tmp_path / "rows.jsonl", str(toy / "base")
    rows.write_text('{"problem": "1 + 1?", "answer": "2"}\n{"problem": "1 + 2?"}\n')
    few = ["--max-prompt", "128", "--max-response", "9", "--cache", str(tmp_path / "cache")]
    corpus = ["--corpus", str(toy / "corpus.jsonl"), *few]
    for arguments, words in (
            (["nowhere/at/all"], "no such model directory"),
            ([base, *few], "--corpus is missing"),
            ([base, "--corpus", str(toy / "corpus.jsonl")], "prompt and response has up to 12,288"),
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
    as_one_of_several(sys.argv[1])
