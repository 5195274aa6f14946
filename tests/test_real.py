"""Real tokenizers, a real trained model and a real corpus, through the same commands. Needs RPT_TEST_ASSETS."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train
from data import Tokenizer, read_corpus, split_holdout
from model import ModelConfig, Transformer, load_pretrained, save_pretrained

ASSETS = Path(os.environ.get("RPT_TEST_ASSETS", "/nonexistent"))
pytestmark = pytest.mark.skipif(not ASSETS.is_dir(), reason="RPT_TEST_ASSETS is not set")
STORIES = ASSETS / "models" / "stories260K"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A text corpus: the questions of a school-mathematics set, told as stories."""
    rows = [json.loads(line) for line in (ASSETS / "data" / "gsm8k_train_2k.jsonl").read_text().splitlines()[:120]]
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": row["question"]}) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def r1_sized(tmp_path_factory):
    """A tiny random model with the R1-Distill tokenizer and its whole vocabulary, and 24 rows of OmniMATH."""
    folder = tmp_path_factory.mktemp("r1")
    tokenizer = Tokenizer.from_dir(ASSETS / "tokenizers" / "deepseek_r1_distill_qwen")
    torch.manual_seed(0)
    save_pretrained(Transformer(ModelConfig.from_dict({
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "dtype": "bfloat16"})),
        folder / "model", tokenizer)
    rows = (ASSETS / "data" / "omni_math_rule.jsonl").read_text().splitlines()[:24]
    (folder / "omni.jsonl").write_text("\n".join(rows))
    return folder


@pytest.mark.parametrize("stage", ["rpt", "ntp"])
def test_a_real_model_trains_resumes_and_is_exported(texts, tmp_path, stage):
    def arguments(steps):
        return ["--stage", stage, "--model", str(STORIES), "--corpus", str(texts), "--out", str(tmp_path / "run"),
                "--steps", steps, "--questions", "4", "--group-size", "2", "--max-prompt", "200",
                "--max-response", "8", "--part", "all", "--holdout", "20", "--save-every", "1",
                "--template", "v0" if stage == "ntp" else "plain", "--select", "1.0"]

    train.main(arguments("1"))
    train.main(arguments("3"))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [0, 1, 2]
    ours, base = load_pretrained(tmp_path / "run" / "model"), load_pretrained(STORIES)
    moved = not torch.equal(ours.head, base.head)
    assert moved == (stage == "ntp")  # eight tokens of a story hold no \boxed{}: rewards are equal, nothing is learned
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = torch.tensor([Tokenizer.from_dir(STORIES).encode("Once upon a time")])
    torch.testing.assert_close(theirs(ids).logits, ours.logits(ours(ids)), rtol=1e-5, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model").eos_token_id == 2


def test_a_whole_step_on_omnimath_with_the_r1_vocabulary_on_one_and_two_processes(r1_sized, tmp_path):
    rollouts, weights = [], []
    for processes in (1, 2):
        out = tmp_path / f"run{processes}"
        command = (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
                   if processes > 1 else [])
        done = subprocess.run([
            sys.executable, *command, str(Path(train.__file__)), "--recipe", "paper", "--dtype", "float32", "--model",
            str(r1_sized / "model"), "--corpus", str(r1_sized / "omni.jsonl"), "--out", str(out), "--steps", "1",
            "--questions", "4", "--group-size", "8", "--max-prompt", "512", "--max-response", "12", "--holdout", "16",
            "--reward", "format"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        rollouts.append([json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()])
        weights.append(load_file(next((out / "model").glob("*.safetensors"))))
    assert len(rollouts[0]) == 4 * 8 and [r["response"] for r in rollouts[0]] == [r["response"] for r in rollouts[1]]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert weights[0]["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_the_standard_accuracy_of_a_directory_equals_an_independent_computation(texts, tmp_path, capsys):
    out = tmp_path / "records.jsonl"
    evaluation.main([str(STORIES), "--corpus", str(texts), "--holdout", "20", "--max-prompt", "300",
                     "--max-response", "4", "--template", "plain", "--questions", "100000", "--out", str(out),
                     "--cache", str(tmp_path / "cache")])
    said = capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    tokenizer, model = Tokenizer.from_dir(STORIES), load_pretrained(STORIES)
    right = {0.5: [], 1.0: [], 1.5: []}
    for document in split_holdout(read_corpus(texts), 20, 0)[1]:
        ids = [1, *tokenizer.encode(document.text)][:301]
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids])))[0].double()
        for position in range(2, len(ids)):  # min_context is 1 token behind the BOS
            probabilities = logits[position - 1].softmax(-1)
            top = probabilities.sort(descending=True).values[:16]
            entropy = -sum(p * np.log(p) for p in (top / top.sum()).tolist())
            truth = tokenizer.token_bytes(ids[position])
            if b"{" in truth or b"}" in truth:
                continue
            for threshold in right:
                if entropy > threshold:
                    right[threshold].append(float(int(logits[position - 1].argmax()) == ids[position]))
    for threshold, name in zip(right, evaluation.SPLITS):
        mine = [r["standard"] for r in records if r["entropy"] > threshold]
        assert len(mine) == pytest.approx(len(right[threshold]), abs=1) and len(mine) > 100
        assert np.mean(mine) == pytest.approx(np.mean(right[threshold]), abs=2 / len(mine))
        assert f"{name} ({len(mine)})" in said
