"""A real tokenizer with its whole vocabulary and a real corpus, through the same commands. Needs
RPT_TEST_ASSETS."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import Tokenizer
from helpers import ROOT, assert_rounds_to, in_float64, plain_logits
from model import ModelConfig, Transformer, load_pretrained, save_pretrained
from test_train import refusal, rows

ASSETS = Path(os.environ.get("RPT_TEST_ASSETS", "/nonexistent"))
pytestmark = pytest.mark.skipif(not ASSETS.is_dir(), reason="RPT_TEST_ASSETS is not set")
PROGRAM = """
import train
def vowels(responses, question, policy):
    return [sum(map(response.count, b"aeiou")) / (1 + len(response)) for response in responses]
if __name__ == "__main__":
    train.main(reward=vowels)
"""  # a model that knows nothing of \\boxed{} needs a reward that it can earn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with the R1-Distill tokenizer, and a step on short rows of OmniMATH by
    one and by two processes.

    Every tenth token ends a response, because few would end otherwise.
    """
    folder = tmp_path_factory.mktemp("r1")
    tokenizer = Tokenizer(ASSETS / "tokenizers" / "deepseek_r1_distill_qwen")
    tokenizer.eos_ids = list(range(3, 151643, 10))
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_dict({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936,
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
        "max_position_embeddings": 1024}))
    torch.nn.init.normal_(model.head, std=0.1)  # any token may follow
    save_pretrained(model, folder / "model", tokenizer)
    omni = (ASSETS / "data" / "omni_math_rule.jsonl").read_text().splitlines(keepends=True)
    (folder / "omni.jsonl").write_text("".join(sorted(omni, key=len)[:16]))
    (folder / "vowels.py").write_text(PROGRAM)
    for name, launch in (("one", ""),
                         ("two", "-m torch.distributed.run --standalone --nproc-per-node=2")):
        words = (f"{launch} {folder}/vowels.py --recipe paper --dtype float32 --steps 1 "
                 f"--model {folder}/model --corpus {folder}/omni.jsonl --cache {folder} "
                 f"--out {folder}/{name} --questions 4 --group-size 8 --max-prompt 512 "
                 "--max-response 16 --holdout 8 --eval-questions 0 --lr 1e-3")
        done = subprocess.run([sys.executable, *words.split()], capture_output=True, text=True,
                              timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def test_one_and_two_processes_step_alike_on_omnimath_with_the_r1_vocabulary(folder):
    (first, second), ((one,), (two,)) = (
        [rows(folder / name / log) for name in ("one", "two")]
        for log in ("rollouts.jsonl", "metrics.jsonl"))
    assert [r["responses"] for r in first] == [r["responses"] for r in second] and len(first) == 4
    # of a thousand tokens, whose gradients of the head are added up one after the other
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=256 * 2**-23)
    before, one, two = (load_pretrained(place / "model").head.detach()
                        for place in (folder, folder / "one", folder / "two"))
    assert not torch.equal(one, before)
    # AdamW moves a weight by the sign of its gradient at first: where that is rounding, the two
    # may differ
    assert ((one - two).abs() > 5e-4).float().mean() < 1e-3


@pytest.mark.parametrize("processes", ["one", "two"])
def test_transformers_loads_what_is_exported(folder, processes):
    transformers, exported = pytest.importorskip("transformers"), folder / processes / "model"
    problem, tokenizer = rows(folder / "omni.jsonl")[0]["problem"], Tokenizer(exported)
    ids = tokenizer.chat(problem)
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    assert ids == theirs.apply_chat_template([{"role": "user", "content": problem}],
                                             add_generation_prompt=True)["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    exact = plain_logits(in_float64(load_pretrained(exported)), ids).detach()
    # two layers and sums over 16 channels
    assert_rounds_to(model(torch.tensor([ids])).logits[0], exact, 64)


def test_a_tokenizer_of_another_kind_is_refused_by_name(tmp_path):
    arguments = f"--model {ASSETS}/models/stories260K --corpus none --out {tmp_path}".split()
    assert "stories260K: no tokenizer.json of a byte-level BPE" in refusal(arguments)
