"""A weak base model on the toy world, pre-trained once for all tests that need a policy with opinions."""

import dataclasses

import pytest
import torch

import data
import train
from model import ModelConfig, Transformer


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with corpus.jsonl, answers.jsonl, and base/model: format learned, stories hardly followed."""
    folder = tmp_path_factory.mktemp("toy")
    data.write_toy(folder, seed=0, count=400)
    tokenizer = data.toy_tokenizer()
    torch.manual_seed(0)
    config = ModelConfig.from_dict(train.TOY_MODEL | {"vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 96})
    train.export(Transformer(config), tokenizer, folder / "init")
    run, method, _ = train.parse(["--model", str(folder / "init"), "--corpus", "unused", "--out", str(folder / "base"),
                                  "--optimizer", "muon", "--lr", "0.02", "--steps", "90", "--questions", "32",
                                  "--decay", "0.3", "--stage", "ntp"])
    held = data.split_holdout(data.read_corpus(folder / "corpus.jsonl"), 40, 0)[1]
    stories = data.toy_stories(90 * 32, seed=1, exclude=frozenset(d.text for d in held))
    train.ntp_stage(dataclasses.replace(run, save_every=1000), method, torch.device("cpu"), data.toy_runs(tokenizer, stories, 0))
    return folder
