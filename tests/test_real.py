"""Real tokenizers, a real trained model and a real corpus, through the same commands. Needs RPT_TEST_ASSETS."""

import json
import os
import shutil
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
VOWELS = """
import reward, train
reward.REWARDS["vowels"] = lambda responses, question, policy: [
    sum(response.count(letter) for letter in b"aeiou") / (1 + len(response)) for response in responses]
train.main()
"""  # models that know nothing of \\boxed{} need a reward that they can earn


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A text corpus: the questions of a school-mathematics set, told as stories."""
    rows = [json.loads(line) for line in (ASSETS / "data" / "gsm8k_train_2k.jsonl").read_text().splitlines()[:120]]
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": row["question"]}) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def r1_sized(tmp_path_factory):
    """A tiny random model with the R1-Distill tokenizer and its whole vocabulary, and 24 rows of OmniMATH.

    Every tenth token ends a response: of a model that knows nothing none would end otherwise, or earn a reward.
    """
    folder = tmp_path_factory.mktemp("r1")
    tokenizer = Tokenizer.from_dir(ASSETS / "tokenizers" / "deepseek_r1_distill_qwen")
    torch.manual_seed(0)
    save_pretrained(Transformer(ModelConfig.from_dict({
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "dtype": "bfloat16"})),
        folder / "model", tokenizer)
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, 151643, 10))}))
    rows = (ASSETS / "data" / "omni_math_rule.jsonl").read_text().splitlines()[:24]
    (folder / "omni.jsonl").write_text("\n".join(rows))
    return folder


def run_with_vowels(folder, *arguments, processes=1):
    """`train.py` with the reward of `VOWELS`; (metrics, rollouts)."""
    script, out = folder / "vowels.py", folder / f"run{processes}"
    script.write_text(VOWELS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([sys.executable, *(torchrun if processes > 1 else []), str(script), *map(str, arguments),
                           "--reward", "vowels", "--out", str(out)], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return tuple([json.loads(line) for line in (out / name).read_text().splitlines()]
                 for name in ("metrics.jsonl", "rollouts.jsonl"))


@pytest.mark.parametrize("stage", ["rpt", "ntp"])
def test_a_real_model_trains_resumes_and_is_exported(texts, tmp_path, stage):
    model = shutil.copytree(STORIES, tmp_path / "model", copy_function=shutil.copyfile)
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')  # a story's end is the BOS of the next
    fixed = ["--stage", stage, "--model", model, "--corpus", texts, "--questions", 4, "--group-size", 4,
             "--max-prompt", 100, "--max-response", 400, "--part", "all", "--holdout", 20, "--save-every", 1, "--lr",
             1e-3, "--template", "v0" if stage == "ntp" else "plain", "--select", "1.0"]
    run_with_vowels(tmp_path, *fixed, "--steps", 1)
    run_with_vowels(tmp_path, *fixed, "--steps", 3)
    (tmp_path / "run1").rename(tmp_path / "run")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [0, 1, 2]
    ours, base = load_pretrained(tmp_path / "run" / "model"), load_pretrained(STORIES)
    assert not torch.equal(ours.head, base.head)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = torch.tensor([Tokenizer.from_dir(STORIES).encode("Once upon a time")])
    torch.testing.assert_close(theirs(ids).logits, ours.logits(ours(ids)), rtol=1e-5, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model").eos_token_id == 2


def test_a_whole_step_on_omnimath_with_the_r1_vocabulary_on_one_and_two_processes(r1_sized, tmp_path):
    (metrics, rollouts), (others, their_rollouts) = (run_with_vowels(
        tmp_path, "--recipe", "paper", "--dtype", "float32", "--model", r1_sized / "model", "--corpus",
        r1_sized / "omni.jsonl", "--steps", 1, "--questions", 4, "--group-size", 8, "--max-prompt", 512,
        "--max-response", 16, "--holdout", 16, "--lr", 1e-3, processes=processes) for processes in (1, 2))
    assert len(rollouts) == 4 * 8 and [r["response"] for r in rollouts] == [r["response"] for r in their_rollouts]
    assert all(row["grad_norm"] > 0 for row in metrics)
    assert [row["grad_norm"] for row in metrics] == pytest.approx([row["grad_norm"] for row in others], rel=1e-4)
    before, one, two = (load_file(next(folder.glob("*.safetensors")))["model.embed_tokens.weight"] for folder in
                        (r1_sized / "model", tmp_path / "run1" / "model", tmp_path / "run2" / "model"))
    assert one.dtype == torch.bfloat16 and not torch.equal(one, before)
    # AdamW moves a weight by the sign of its gradient at first: where that is rounding, the two may differ
    assert ((one - two).float().abs() > 1e-3).float().mean() < 1e-3


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
