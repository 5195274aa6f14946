"""Random bytes in, documented errors out. What comes from a model or a corpus can say anything."""

import json
import random

from data import read_corpus
from model import ModelConfig, tensor_shapes

GOOD = {"model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_theta": 1e4, "tie_word_embeddings": True}
ODD = [None, True, False, 0, -1, 1, 3, 1.5, 2**70, float("nan"), float("inf"), "", "x", "1", [],
       [1], {}, {"rope_type": "yarn"}, {"rope_type": "llama3", "factor": 0}, {"type": "linear"},
       {"rope_type": "default", "rope_theta": "x"}, "qwen2", "llama"]
KEYS = [*GOOD, "head_dim", "rope_scaling", "rope_parameters", "dtype", "torch_dtype", "qkv_bias",
        "max_position_embeddings", "rms_norm_eps", "layer_types", "quantization_config",
        "use_sliding_window", "hidden_act", "attention_bias", "mlp_bias", "eos_token_id"]


def test_any_config_is_read_or_refused_with_a_value_error():
    chance, outcomes = random.Random(0), {True: 0, False: 0}
    for _ in range(20_000):
        config = dict(GOOD)
        for key in chance.sample(KEYS, chance.randrange(1, 4)):
            config[key] = chance.choice(ODD)
        try:
            read = ModelConfig.from_dict(config)
            assert read.num_attention_heads % read.num_key_value_heads == 0 and read.vocab_size > 0
            assert read.qkv_bias is True or read.model_type != "qwen2"
            outcomes[True] += 1
        except ValueError as error:
            assert "config.json" in str(error) and "\n" not in str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 1_000


def outcome(file) -> bool:
    """Whether a corpus can be read; what is no document raises a ValueError that names the file."""
    try:
        documents = read_corpus(file)
    except ValueError as error:
        assert str(file) in str(error) and "\n" not in str(error)
        return False
    assert all(document.text.strip() for document in documents)
    return True


def test_any_row_is_a_document_or_refused_with_a_value_error(tmp_path):
    chance, file, outcomes = random.Random(1), tmp_path / "corpus.jsonl", []
    values = [*ODD, "a text", "é\ud800", "\x00", "  ", "problem", {"text": "x"}]
    keys = ["text", "problem", "question", "solution", "answer", "prompt", "response", "other"]
    for _ in range(3_000):
        some = chance.sample(keys, chance.randrange(0, 4))
        row = {key: chance.choice(values) for key in some}
        file.write_text(json.dumps(row if chance.random() < 0.9 else chance.choice(ODD)))
        outcomes.append(outcome(file))
    assert 150 < sum(outcomes) < len(outcomes) - 150


def test_any_corpus_file_is_read_or_refused_with_a_value_error(tmp_path):
    chance, file, outcomes = random.Random(2), tmp_path / "corpus.jsonl", []
    pieces = [b'{"text": "', b'"}', b"\n", b"{", b"}", b"[" * 50, b"\xff\xfe", b"\xc3\xa9",
              b"\\u0041", b"\\ud800", b"null", b",", b" ", b'"problem": "a", ',
              b'{"text": "fine"}\n', b"\x00", b"1e999"]
    for _ in range(2_000):
        file.write_bytes(b"".join(chance.choices(pieces, k=chance.randrange(4))))
        outcomes.append(outcome(file))
    assert 25 < sum(outcomes) < len(outcomes) - 25


def test_any_safetensors_header_is_read_or_refused_with_a_value_error(tmp_path):
    chance, file, outcomes = random.Random(3), tmp_path / "model.safetensors", []
    shapes = [[2, 2]] * 3 + [[-1], "x", None, [2**60]]
    offsets = [[0, 16]] * 3 + [[0], [16, 0], "x", None, [0, 2**70], [0, "y"]]
    for _ in range(4_000):
        entry = {"dtype": "F32", "shape": chance.choice(shapes),
                 "data_offsets": chance.choice(offsets)}
        header = chance.choice([{"w": entry}] * 4 + [{"w": 1}, [entry], {}, "x",
                                                     {"__metadata__": 1, "w": entry}])
        header = json.dumps(header).encode()
        n = len(header)
        length = chance.choice([n, n, n, n + 1, 0, 2**63, 2**64 - 1, 5])
        content = length.to_bytes(8, "little") + header + b"\0" * chance.choice([0, 15, 16])
        file.write_bytes(content[: chance.randrange(0, 400)])
        try:
            outcomes.append(tensor_shapes(file) in ({"w": (2, 2)}, {}))
        except ValueError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            outcomes.append(False)
    assert 10 < sum(outcomes) < len(outcomes) - 100
