"""Real tokenizers, a real trained model and a real corpus, through the same commands. Needs
RPT_TEST_ASSETS."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
from data import HELD_OUT, Tokenizer, load_corpus
from helpers import ROOT, assert_rounds_to, in_float64, plain_logits
from model import ModelConfig, Transformer, load_pretrained, save_pretrained
from reward import reachable
from test_train import rows

ASSETS = Path(os.environ.get("RPT_TEST_ASSETS", "/nonexistent"))
pytestmark = pytest.mark.skipif(not ASSETS.is_dir(), reason="RPT_TEST_ASSETS is not set")
STORIES = ASSETS / "models" / "stories260K"
VOWELS = """
import train
def vowels(responses, question, policy):
    return [sum(map(response.count, b"aeiou")) / (1 + len(response)) for response in responses]
train.main(reward=vowels)
"""  # models that know nothing of \\boxed{} need a reward that they can earn


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A text corpus: the questions of a school-mathematics set, told as stories."""
    lines = rows(ASSETS / "data" / "gsm8k_train_2k.jsonl")[:120]
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": row["question"]}) + "\n" for row in lines))
    return file


@pytest.fixture(scope="module")
def r1_sized(tmp_path_factory):
    """A tiny random model with the R1-Distill tokenizer and its whole vocabulary, and 24 rows of
    OmniMATH.

    Every tenth token ends a response: of a model that knows nothing none would end otherwise, or
    earn a reward.
    """
    folder = tmp_path_factory.mktemp("r1")
    tokenizer = Tokenizer.from_dir(ASSETS / "tokenizers" / "deepseek_r1_distill_qwen")
    torch.manual_seed(0)
    config = ModelConfig.from_dict({
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "tie_word_embeddings": True, "max_position_embeddings": 1024, "dtype": "bfloat16"})
    save_pretrained(Transformer(config), folder / "model", tokenizer)
    (folder / "model" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": list(range(0, 151643, 10))}))
    omni = (ASSETS / "data" / "omni_math_rule.jsonl").read_text().splitlines()[:24]
    (folder / "omni.jsonl").write_text("\n".join(omni))
    return folder


def run_with_vowels(out, *arguments, processes=1):
    """`train.py` with the reward of `VOWELS`; (metrics, rollouts)."""
    script = out.parent / "vowels.py"
    script.write_text(VOWELS)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [*(launch if processes > 1 else []), script, "--eval-questions", 0, "--out", out,
             *arguments]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                          timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return rows(out / "metrics.jsonl"), rows(out / "rollouts.jsonl")


@pytest.mark.parametrize("stage", ["rpt", "ntp"])
def test_a_real_model_trains_resumes_and_is_exported(texts, tmp_path, stage):
    model = shutil.copytree(STORIES, tmp_path / "model", copy_function=shutil.copyfile)
    # a story's end is the BOS of the next
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    arguments = ["--stage", stage, "--model", model, "--corpus", texts, "--questions", 4,
                 "--group-size", 4, "--max-prompt", 100, "--max-response", 400, "--region", "all",
                 "--holdout", 20, "--save-every", 1, "--lr", 1e-3, "--filter-value", 1,
                 "--template", "plain"]
    out = tmp_path / "run"
    run_with_vowels(out, *arguments, "--steps", 1)
    metrics, _ = run_with_vowels(out, *arguments, "--steps", 3)
    assert [row["step"] for row in metrics] == [0, 1, 2]
    ours, base = load_pretrained(out / "model"), load_pretrained(STORIES)
    assert not torch.equal(ours.head, base.head)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    ids = Tokenizer.from_dir(STORIES).encode("Once upon a time")
    got, exact = theirs(torch.tensor([ids])).logits[0], plain_logits(in_float64(ours), ids)
    assert_rounds_to(got, exact.detach(), 64)  # five layers and sums over 64 channels
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer.eos_token_id == 2


def test_a_whole_step_on_omnimath_with_the_r1_vocabulary_on_one_and_two_processes(
        r1_sized, tmp_path):
    (metrics, rollouts), (others, their_rollouts) = (run_with_vowels(
        tmp_path / f"run{processes}", "--recipe", "paper", "--dtype", "float32", "--model",
        r1_sized / "model", "--corpus", r1_sized / "omni.jsonl", "--steps", 1, "--questions", 4,
        "--group-size", 8, "--max-prompt", 512, "--max-response", 16, "--holdout", 16, "--lr", 1e-3,
        processes=processes) for processes in (1, 2))
    assert len(rollouts) == 4 * 8
    assert [r["response"] for r in rollouts] == [r["response"] for r in their_rollouts]
    # of a thousand tokens, whose gradients of the head are added up one after the other
    assert metrics[0]["grad_norm"] > 0
    assert metrics[0]["grad_norm"] == pytest.approx(others[0]["grad_norm"], rel=256 * 2**-23)
    before, one, two = (load_pretrained(folder).head.detach() for folder in (
        r1_sized / "model", tmp_path / "run1" / "model", tmp_path / "run2" / "model"))
    assert not torch.equal(one, before)
    # AdamW moves a weight by the sign of its gradient at first: where that is rounding, the two
    # may differ
    assert ((one - two).abs() > 5e-4).float().mean() < 1e-3


def test_the_standard_accuracy_of_a_directory_equals_an_independent_computation(texts, tmp_path,
                                                                                capsys):
    out = tmp_path / "records.jsonl"
    evaluation.main(list(map(str, [
        STORIES, "--corpus", texts, "--holdout", 20, "--max-prompt", 300, "--max-response", 4,
        "--questions", 100000, "--region", "all", "--out", out, "--cache", tmp_path / "cache"])))
    said = capsys.readouterr().out
    records = rows(out)
    tokenizer, model = Tokenizer.from_dir(STORIES), load_pretrained(STORIES)
    corpus = load_corpus(texts, tokenizer, tmp_path / "cache", 20, 0)
    right = {0.5: [], 1.0: [], 1.5: []}
    for document in np.flatnonzero(corpus.split == HELD_OUT):
        ids = [*tokenizer.bos, *corpus.ids(document).tolist()][:301]
        logits = plain_logits(model, ids).detach()
        for position in range(2, len(ids)):  # one token of context behind the BOS
            top = logits[position - 1].softmax(-1).topk(16).values
            entropy = torch.distributions.Categorical(top).entropy()
            if not reachable([tokenizer.token_bytes(i) for i in ids[position: position + 32]]):
                continue
            for threshold in right:
                if entropy > threshold:
                    right[threshold].append(logits[position - 1].argmax() == ids[position])
    for threshold, name in zip(right, evaluation.SPLITS):
        mine = [r["standard"] for r in records if r["entropy"] > threshold]
        # an entropy or a likeliest token may be decided by rounding once
        assert abs(len(mine) - len(right[threshold])) <= 1 and len(mine) > 100
        assert abs(sum(mine) - sum(right[threshold])) <= 2
        assert f"{name} ({len(mine)})" in said
