"""Laws of model.py: its oracle is transformers where installed, and numbers frozen from it (fixtures/) where not."""

import ast
import dataclasses
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import Tokenizer
from fixtures.make import CASES, IDS, POSITIONS, checksums, expected, fill, loss
from helpers import OURS, ExplicitDevices, tiny
from model import ModelConfig, Segment, Transformer, load_pretrained, save_pretrained
from rpt import token_logprobs
from sampler import generate, pad

FIXTURES = Path(__file__).resolve().parent / "fixtures"
ASSETS = Path(os.environ.get("RPT_TEST_ASSETS", "/nonexistent"))
NEW = CASES["qwen2"]
CPU = torch.device("cpu")


def old_dialect(config: dict) -> dict:
    """The config.json that transformers 4 would have written for one of transformers 5."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    rope = dict(config["rope_parameters"])
    old |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.get("dtype", "float32")}
    rope_type = rope.pop("rope_type")
    return old if rope_type == "default" else old | {"rope_scaling": {"type": rope_type, **rope}}


def close(a, b, tolerance: float) -> bool:
    """Largest difference within `tolerance` of the largest value of b."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def forward(model: Transformer, ids) -> torch.Tensor:
    return model.logits(model(torch.tensor(ids)))


# ---------------------------------------------------------------------------------------------- law 1: transformers


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_frozen_from_transformers(name):
    frozen = json.loads((FIXTURES / f"{name}.json").read_text())
    assert frozen["config"] == CASES[name]
    model = Transformer(ModelConfig.from_dict(frozen["config"]))
    fill(model)
    logits = forward(model, [IDS])
    loss(logits).backward()
    assert close(logits[0, list(POSITIONS)], frozen["logits"], 1e-5)
    gradients = checksums(model)
    assert set(gradients) == set(frozen["gradients"])
    for parameter, (norm, product) in frozen["gradients"].items():
        scale = max(norm, 1e-3)  # a key's bias has no gradient but rounding: softmax does not see a constant
        assert gradients[parameter] == pytest.approx([norm, product], abs=3e-5 * scale), parameter


@pytest.mark.parametrize("name", CASES)
def test_frozen_numbers_are_what_transformers_computes(name):
    pytest.importorskip("transformers")
    fresh, frozen = expected(CASES[name]), json.loads((FIXTURES / f"{name}.json").read_text())
    assert close(fresh["logits"], frozen["logits"], 1e-5)
    for parameter, values in frozen["gradients"].items():
        assert fresh["gradients"][parameter] == pytest.approx(values, abs=3e-5 * max(values[0], 1e-3)), parameter


def theirs(name: str, directory: Path, dtype: torch.dtype, **save):
    """A random transformers model with norms and biases that are not trivial, and its files."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**CASES[name] | {
            "initializer_range": 1.2 / CASES[name]["hidden_size"] ** 0.5}), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(directory, **save)
    return transformers.AutoModelForCausalLM.from_pretrained(directory)  # anew: .to() rounded its rotary frequencies


@pytest.mark.parametrize("shard", ["5GB", "6KB"])
@pytest.mark.parametrize("name", CASES)
def test_transformers_files_give_transformers_logits_and_gradients(name, shard, tmp_path):
    reference = theirs(name, tmp_path, torch.float32, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "6KB")
    model = load_pretrained(tmp_path)
    ids = torch.randint(32, (3, 33), generator=torch.Generator("cpu").manual_seed(1))
    target = torch.randn(3, 33, 32, generator=torch.Generator("cpu").manual_seed(2))
    logits, wanted = model.logits(model(ids)), reference(input_ids=ids).logits
    assert close(logits, wanted, 3e-6)
    (logits * target).sum().backward()
    (wanted * target).sum().backward()
    ours, others = dict(model.named_parameters()), dict(reference.named_parameters())
    assert set(ours) == set(others)
    for parameter, other in others.items():
        scale = other.grad.abs().max().clamp_min(1e-3)
        assert (ours[parameter].grad - other.grad).abs().max() <= 1e-5 * scale, parameter


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_logits_are_those_of_transformers(name, tmp_path):
    reference = theirs(name, tmp_path, torch.bfloat16)
    model = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.config.dtype == "bfloat16" and all(p.dtype == torch.bfloat16 for p in model.parameters())
    ids = torch.randint(32, (3, 33), generator=torch.Generator("cpu").manual_seed(1))
    with torch.no_grad():
        logits, wanted = model.logits(model(ids)), reference(input_ids=ids).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, wanted.float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_what_is_saved(name, dtype, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = Transformer(ModelConfig.from_dict(CASES[name] | {"dtype": dtype}))
    fill(model)
    save_pretrained(model, tmp_path)
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert str(reference.dtype) == f"torch.{dtype}"
    with torch.no_grad():
        wanted = reference(input_ids=torch.tensor([IDS])).logits.float()
        assert close(forward(model.to(reference.dtype), [IDS]), wanted, 3e-6 if dtype == "float32" else 0)
    assert dataclasses.asdict(load_pretrained(tmp_path).config) == dataclasses.asdict(model.config)
    assert ModelConfig.from_dict(reference.config.to_dict()) == dataclasses.replace(
        model.config, bos_token_id=reference.config.bos_token_id, eos_token_id=reference.config.eos_token_id,
        rope_scaling=model.config.rope_scaling)


@pytest.mark.parametrize("name", CASES)
def test_both_dialects_of_config_json_are_one_config(name):
    new = CASES[name] | {"dtype": "bfloat16"}
    config = ModelConfig.from_dict(new)
    assert config.dtype == "bfloat16" and config.rope_theta == new["rope_parameters"]["rope_theta"]
    assert ModelConfig.from_dict(old_dialect(new)) == config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_llama2c_publishes_the_greedy_text_that_its_model_gives():
    if not (ASSETS / "models/stories260K").is_dir():
        pytest.skip("RPT_TEST_ASSETS is not set")
    directory = ASSETS / "models/stories260K"
    wanted = json.loads((ASSETS / "vectors/stories260K_greedy_200.json").read_text())["text"]
    model, tokenizer = load_pretrained(directory), Tokenizer.from_dir(directory)
    for eos_ids in (tokenizer.eos_ids, []):
        [[completion]] = generate(model, [[1]], max_new_tokens=200, temperature=0, eos_ids=eos_ids)
        assert len(completion.ids) == 200 and not completion.finished
        assert tokenizer.bytes_of(completion.ids).decode().strip() == wanted.strip()


# ---------------------------------------------------------------------------------------------- law 2: segments

# A forest of token runs: each level is a batch of (tokens, the row of the level before, after how many of its tokens).
END = None  # the run continues the whole row
FORESTS = {
    "one run": [[(9, 0, END)]],
    "a ragged batch": [[(9, 0, END), (4, 0, END), (1, 0, END), (13, 0, END)]],
    "a prompt and its continuation": [[(7, 0, END)], [(5, 0, END)]],
    "one token at a time": [[(3, 0, END)], [(1, 0, END)], [(1, 0, END)], [(1, 0, END)]],
    "children of one prompt": [[(7, 0, END)], [(5, 0, END), (2, 0, END), (1, 0, END), (6, 0, END)]],
    "equal lengths": [[(6, 0, END), (6, 0, END)], [(4, 1, END), (4, 0, END), (4, 1, END)], [(3, 0, END), (3, 2, END)]],
    "ragged prompts and ragged children": [[(7, 0, END), (2, 0, END), (10, 0, END)],
                                           [(5, 2, END), (3, 0, END), (6, 0, END), (1, 1, END), (4, 2, END)]],
    "children in the middle of a row": [[(8, 0, END), (8, 0, END), (5, 0, END)],
                                        [(3, 0, 4), (2, 0, 8), (5, 1, 1), (4, 2, 5), (1, 2, 3)]],
    "all children at one place": [[(8, 0, END)], [(3, 0, 5), (3, 0, 5)]],
    "three generations": [[(7, 0, END), (4, 0, END)], [(5, 0, END), (2, 1, END), (3, 0, END)],
                          [(4, 2, END), (1, 0, END), (6, 1, END), (2, 2, END)]],
    "three generations, parted in the middle": [[(7, 0, END), (4, 0, END)], [(5, 0, 6), (2, 1, 1), (3, 0, 7)],
                                                [(4, 2, 8), (1, 0, 9), (6, 0, 11), (2, 1, 3), (3, 2, 4)]],
}


def texts_of(forest) -> list[list[tuple[list[int], list[int]]]]:
    """For every run (what stands before it, its own tokens), random ids."""
    generator, levels = torch.Generator("cpu").manual_seed(7), []
    for level in forest:
        rows = []
        for count, parent, at in level:
            before = sum(levels[-1][parent], []) if levels else []
            own = torch.randint(40, (count,), generator=generator).tolist()
            rows.append((before[:at], own))
        levels.append(rows)
    return levels


def plain_logits(model, forest) -> list[torch.Tensor]:
    """Of every run's tokens, each text computed whole and alone."""
    return [forward(model, [before + own])[0, len(before):] for level in texts_of(forest) for before, own in level]


def segment_logits(model, forest) -> list[torch.Tensor]:
    """The same, each level one forward that attends to the level before."""
    parent, out = None, []
    for level, texts in zip(forest, texts_of(forest)):
        places = None if all(at is END for _, _, at in level) else [len(before) for before, _ in texts]
        lengths, rows = [count for count, _, _ in level], [row for _, row, _ in level]
        segment = Segment(lengths, CPU) if parent is None else Segment(lengths, CPU, parent, rows, places)
        hidden = model(pad([own for _, own in texts], CPU), segment)
        out += [model.logits(hidden[row, :count]) for row, count in enumerate(lengths)]
        parent = segment
    return out


def gradients(model, runs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a fixed random linear function of all logits."""
    generator = torch.Generator("cpu").manual_seed(3)
    value = sum((run * torch.randn(run.shape, generator=generator)).sum() for run in runs)
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(value, list(model.parameters()))))


@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_segments_give_the_logits_and_gradients_of_plain_forwards(model_type, forest):
    model = tiny(model_type)
    wanted, runs = plain_logits(model, forest), segment_logits(model, forest)
    for run, other in zip(runs, wanted, strict=True):
        assert close(run, other, 3e-6)
    right = gradients(model, wanted)
    for name, gradient in gradients(model, runs).items():
        assert (gradient - right[name]).abs().max() <= 1e-5 * right[name].abs().max().clamp_min(1e-2), name


def test_what_stands_in_the_padding_has_no_effect():
    model, lengths = tiny("qwen3"), [7, 2, 5]
    outputs = []
    for filler in (0, 39):
        prompts, own = (torch.full((3, width), filler) for width in (9, 6))  # wider than the longest run, too
        for row in range(3):
            prompts[row, : lengths[row]] = torch.arange(lengths[row]) + row
            own[row, : row + 1] = torch.arange(row + 1) + 20
        parent = Segment(lengths, CPU)
        model(prompts, parent)
        hidden = model(own, Segment([1, 2, 3], CPU, parent, [0, 1, 2]))
        outputs.append([hidden[row, : row + 1] for row in range(3)])
    for a, b in zip(*outputs):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["ragged prompts and ragged children", "three generations, parted in the middle"])
def test_activation_checkpointing_changes_no_gradient_and_computes_blocks_again(name):
    model, passes = tiny("qwen3", tie_word_embeddings=True), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    right = gradients(model, segment_logits(model, FORESTS[name]))
    levels = len(passes)
    for block in model.model.layers:
        block.checkpoint_activations = True
    for parameter, gradient in gradients(model, segment_logits(model, FORESTS[name])).items():
        assert torch.equal(gradient, right[parameter]), parameter
    assert len(passes) == 3 * levels
    with torch.no_grad():
        segment_logits(model, FORESTS[name])
    assert len(passes) == 4 * levels


def test_tied_weights_are_one_parameter_whose_gradient_is_the_sum_of_both_uses():
    tied, untied = tiny(tie_word_embeddings=True), tiny()
    untied.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.model.embed_tokens.weight})
    assert "lm_head.weight" not in tied.state_dict() and tied.head is tied.model.embed_tokens.weight
    assert len(list(tied.parameters())) == len(list(untied.parameters())) - 1
    assert tied.to(torch.float64).to(torch.float32).head is tied.model.embed_tokens.weight
    for model in (tied, untied):
        (forward(model, [IDS]) ** 2).sum().backward()
    both = untied.model.embed_tokens.weight.grad + untied.lm_head.weight.grad
    assert close(tied.head.grad, both, 1e-5)
    assert not close(untied.lm_head.weight.grad, both, 0.1)


# ---------------------------------------------------------------------------------------------- loading and saving


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """The directory of a small saved model: config.json and one file model.safetensors, without an index."""
    model = Transformer(ModelConfig.from_dict(NEW))
    fill(model)
    (tmp_path / "config.json").write_text(json.dumps(NEW))
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    return tmp_path


def rewrite(directory: Path, change) -> None:
    """Applies a change to the name -> tensor dictionary of a checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def shard(directory: Path, parts: int = 3) -> None:
    """Divides a checkpoint's one file into several with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    place = {name: f"model-{1 + i % parts:05}-of-{parts:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(place.values()):
        save_file({name: tensor for name, tensor in tensors.items() if place[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))


def test_one_file_and_shards_load_the_same_model(checkpoint):
    whole = load_pretrained(checkpoint).state_dict()
    files = load_file(checkpoint / "model.safetensors")
    shard(checkpoint)
    for name, tensor in load_pretrained(checkpoint).state_dict().items():
        assert torch.equal(tensor, whole[name]) and torch.equal(tensor, files[name])
    for name, tensor in load_pretrained(checkpoint, dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(tensor, files[name].bfloat16())


def test_bfloat16_files_land_in_float32_weights_exactly(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    files = load_file(checkpoint / "model.safetensors")
    for name, tensor in load_pretrained(checkpoint).state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, files[name].float())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_is_the_model_that_was_saved(dtype, tied, tmp_path):
    model = tiny("qwen3", dtype=dtype, tie_word_embeddings=tied)
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(getattr(torch, dtype)).float()), name
    written = {n: t for file in tmp_path.glob("*.safetensors") for n, t in load_file(file).items()}
    assert set(written) == set(model.state_dict()) and all(t.dtype == getattr(torch, dtype) for t in written.values())


def test_a_tied_checkpoint_may_repeat_its_embedding_and_old_ones_their_frequencies(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps(NEW | {"tie_word_embeddings": True}))
    rewrite(checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert load_pretrained(checkpoint).lm_head is None


def test_missing_unexpected_and_misshapen_tensors_are_listed_in_one_error(checkpoint):
    def change(tensors):
        tensors.pop("model.norm.weight"), tensors.pop("model.layers.1.self_attn.q_proj.bias")
        tensors.update({"surplus.weight": torch.ones(2), "model.layers.0.mlp.up_proj.weight": torch.ones(24, 17)})

    rewrite(checkpoint, change)
    with pytest.raises(ValueError) as error:
        load_pretrained(checkpoint)
    for part in ("missing: model.layers.1.self_attn.q_proj.bias, model.norm.weight", "unexpected: surplus.weight",
                 "misshapen: model.layers.0.mlp.up_proj.weight [24, 17] instead of [24, 16]"):
        assert part in str(error.value)
    assert "model.layers.0.mlp.down_proj.weight" not in str(error.value)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_in_two_files_is_refused(indexed, checkpoint):
    if indexed:
        shard(checkpoint, parts=1)
    save_file({"model.norm.weight": torch.zeros(16)}, checkpoint / "another.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight is in both another.safetensors and model"):
        load_pretrained(checkpoint)


UNSUPPORTED = {  # a change of config.json -> what the error must name; "key": ... removes the key
    "model_type": {"model_type": "mixtral"},
    "'qwen2_moe'": {"model_type": "qwen2_moe"},
    "model_type None": {"model_type": ...},
    "rope_type 'dynamic'": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "rope_type 'linear'": {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_type 'llama3'": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
    "mscale": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "partial_rotary_factor": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "use_sliding_window": {"use_sliding_window": True},
    "layer_types": {"layer_types": ["full_attention", "sliding_attention"]},
    "quantization_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "hidden_act 'gelu'": {"hidden_act": "gelu"},
    "dtype 'float8_e4m3fn'": {"dtype": "float8_e4m3fn"},
    "hidden_size": {"hidden_size": ...},
    "num_attention_heads": {"num_attention_heads": ...},
    "vocab_size": {"vocab_size": ...},
    "num_hidden_layers": {"num_hidden_layers": 0},
    "intermediate_size": {"intermediate_size": "24"},
    "num_key_value_heads": {"num_key_value_heads": 3},
    "head_dim": {"head_dim": 5},
}


@pytest.mark.parametrize("named", UNSUPPORTED)
def test_a_config_that_would_not_be_computed_faithfully_is_refused_by_name(named):
    ModelConfig.from_dict(NEW | {
        "use_sliding_window": False, "layer_types": ["full_attention"] * 2, "sliding_window": 4096})
    changed = {key: value for key, value in (NEW | UNSUPPORTED[named]).items() if value is not ...}
    with pytest.raises(ValueError, match=named) as error:
        ModelConfig.from_dict(changed)
    assert "\n" not in str(error.value)


def test_unusable_weight_files_are_refused_in_one_sentence(checkpoint):
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8: 8 + length])
    name = next(name for name in header if name != "__metadata__")

    def with_header(value) -> bytes:
        text = json.dumps(value).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length:]

    broken = {
        "empty": b"", "a few bytes": whole[:5], "cut in the header": whole[: 8 + length // 2],
        "cut in the data": whole[:-1], "longer than its header says": whole + b"\0",
        "absurd header size": b"\xff" * 8 + whole[8:],
        "header beyond the file": (len(whole)).to_bytes(8, "little") + whole[8:],
        "not JSON": whole[:8] + b"\0" * length,
        "a list": with_header([1]), "no shape": with_header({name: {"data_offsets": [0, 4]}}),
        "no offsets": with_header(header | {name: {"dtype": "F32", "shape": [1]}}),
        "offsets that are words": with_header(header | {name: header[name] | {"data_offsets": ["a", "b"]}}),
        "a shape that is a number": with_header(header | {name: header[name] | {"shape": 3}}),
    }
    for what, content in broken.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors") as error:
            load_pretrained(checkpoint)
        assert "\n" not in str(error.value), what
    file.write_bytes(whole)
    load_pretrained(checkpoint)


def test_an_index_cannot_name_files_outside_of_its_directory_or_missing_ones(checkpoint):
    index = checkpoint / "model.safetensors.index.json"
    inner = checkpoint / "inner"
    inner.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / file, inner / file)
    names = list(load_file(checkpoint / "model.safetensors"))
    for outside in ("../model.safetensors", str(checkpoint / "model.safetensors"), "..", "",
                    "../inner/model.safetensors"):
        (inner / index.name).write_text(json.dumps({"weight_map": {name: outside for name in names}}))
        with pytest.raises(ValueError, match="outside"):
            load_pretrained(inner)
    index.write_text(json.dumps({"weight_map": {name: "model-00001-of-00002.safetensors" for name in names}}))
    with pytest.raises(FileNotFoundError, match="model-00001-of-00002.safetensors"):
        load_pretrained(checkpoint)
    for malformed in ({}, {"weight_map": []}, {"weight_map": {names[0]: 3}}):
        index.write_text(json.dumps(malformed))
        with pytest.raises(ValueError, match="weight_map"):
            load_pretrained(checkpoint)
    index.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_pretrained(checkpoint)


def test_a_directory_without_config_or_weights_says_so(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_pretrained(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_pretrained(checkpoint)
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        load_pretrained(checkpoint / "absent")


# ---------------------------------------------------------------------------------------------- law 11: devices


def training_gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
    """One forward and backward pass with everything that training uses: plain and ragged runs, the fused head."""
    with torch.device("cpu"):
        model = tiny("qwen3", rope_parameters=CASES["llama_yarn"]["rope_parameters"])
        targets, weights = torch.arange(8), torch.linspace(-1, 1, 8)
    for block in model.model.layers:
        block.checkpoint_activations = checkpointing
    with ExplicitDevices():
        parent = Segment([5, 3], CPU)
        model(pad([[1, 2, 3, 4, 5], [6, 7, 8]], CPU), parent)
        own = Segment([4, 4], CPU, parent, [1, 0])
        hidden = model(pad([[9, 10, 11, 12], [13, 14, 15, 16]], CPU), own).flatten(0, 1)
        logprobs, entropy = token_logprobs(model, hidden, targets, 0.8)
        plain = model.logits(model(pad([[17, 18, 19]], CPU)))
        ((weights * (logprobs + entropy)).sum() + plain.sum()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_training_pass_creates_nothing_on_an_implicit_device():
    right = training_gradients(checkpointing=True)
    try:  # without checkpointing, because torch's enters the default device's context twice and then never leaves it
        torch.set_default_device("meta")
        elsewhere = training_gradients(checkpointing=False)
    finally:
        torch.set_default_device(None)
    for name, gradient in elsewhere.items():
        assert torch.equal(gradient, right[name]), name


def test_the_guard_sees_forward_backward_and_checkpoints():
    calls = ("zeros(2)", "tensor([1])", "arange(3)", "rand(2)", "full((2,), 1)", "empty(2)", "eye(2)",
             "linspace(0, 1, 3)")
    source = "import torch\n" + "".join(f"def f{i}(*_): torch.{call}; return _[-1]\n" for i, call in enumerate(calls))
    place = {}
    exec(compile(source, min(OURS), "exec"), place)  # as if one of our files did it
    x = torch.ones(2, requires_grad=True)

    class Identity(torch.autograd.Function):
        forward, backward = staticmethod(lambda ctx, x: x * 1), staticmethod(place["f0"])

    with ExplicitDevices():
        torch.zeros(2)  # not ours
        for i in range(len(calls)):
            with pytest.raises(AssertionError, match="without device="):
                place[f"f{i}"](x)
        with pytest.raises(AssertionError, match="without device="):
            Identity.apply(x).sum().backward()
    Identity.apply(x).sum().backward()
    assert x.grad.tolist() == [1, 1]


def test_no_file_uses_a_tensor_constructor_which_has_no_device():
    for file in OURS:
        for node in ast.walk(ast.parse(Path(file).read_text())) if Path(file).exists() else ():
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert not (name.startswith("torch.") and name.endswith("Tensor")) and name != "Tensor", (
                f"{file}:{node.lineno}")


def test_a_library_user_reads_no_warning_of_torch_distributed(tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_pretrained(tiny(), tmp_path)
        load_pretrained(tmp_path)
    assert [str(warning.message) for warning in said] == []
