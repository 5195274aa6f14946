"""Laws of model.py. Its oracles: transformers where installed, numbers frozen from it (fixtures/)
where not, and the same model in float64.

How many roundings are allowed: about three times what the worst of all cases and parameters erred
by, with ATEN_CPU_CAPABILITY default, avx2 and native.
"""

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
from helpers import (OURS, ExplicitDevices, assert_rounds_to, exact_gradient, in_float64,
                     plain_logits, tiny)
from model import (Continuation, ModelConfig, PrefixCache, Transformer, choose_device,
                   load_pretrained, save_pretrained)
from rpt import token_logprobs
from sampler import generate, last_hidden, pad

FIXTURES = Path(__file__).resolve().parent / "fixtures"
ASSETS = Path(os.environ.get("RPT_TEST_ASSETS", "/nonexistent"))
NEW = CASES["qwen2"]
CPU = torch.device("cpu")
LOGITS = 40  # roundings of the largest logit: the layers' sums one after the other err by 1 to 11,
#              and by 14 with YaRN's attention_factor, which sharpens attention
GRADIENTS = 160  # of a gradient's magnitude: sums over layers and tokens err by 2 to 45


def old_dialect(config: dict) -> dict:
    """The config.json that transformers 4 would have written for one of transformers 5."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    rope = dict(config["rope_parameters"])
    old |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.get("dtype", "float32")}
    rope_type = rope.pop("rope_type")
    if rope_type != "default":
        old["rope_scaling"] = {"type": rope_type, **rope}
    return old


def forward(model: Transformer, ids) -> torch.Tensor:
    return model.logits(model(torch.tensor(ids)))


def scales(magnitudes: dict) -> dict[str, torch.Tensor]:
    """Of gradients by parameter: their magnitude, at least a thirtieth of the largest. A key's bias
    has no gradient but rounding, for softmax does not see a constant; nor has what makes queries
    where there is one key."""
    tensors = {name: torch.as_tensor(x).double() for name, x in magnitudes.items()}
    return {name: x.clamp_min(max(tensors.values()) / 30) for name, x in tensors.items()}


# ------------------------------------------------------------------------------ law 1: transformers


def assert_frozen(logits: torch.Tensor, gradients: dict, name: str) -> None:
    """Logits [len(POSITIONS), V] and checksums are the fixture's, float32's rounding apart."""
    frozen = json.loads((FIXTURES / f"{name}.json").read_text())
    assert frozen["config"] == CASES[name] and set(gradients) == set(frozen["gradients"])
    assert_rounds_to(logits, torch.tensor(frozen["logits"], dtype=torch.float64), LOGITS)
    scale = scales({name: norm for name, (norm, _) in frozen["gradients"].items()})
    for name, wanted in frozen["gradients"].items():
        wanted = torch.tensor(wanted, dtype=torch.float64)
        assert_rounds_to(torch.tensor(gradients[name]), wanted, GRADIENTS, scale[name])


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_frozen_from_transformers(name):
    model = Transformer(ModelConfig.from_dict(CASES[name]))
    fill(model)
    logits = forward(model, [IDS])
    loss(logits).backward()
    assert_frozen(logits[0, list(POSITIONS)], checksums(model), name)


@pytest.mark.parametrize("name", CASES)
def test_frozen_numbers_are_what_transformers_computes(name):
    pytest.importorskip("transformers")
    fresh = expected(CASES[name])
    assert_frozen(torch.tensor(fresh["logits"]), fresh["gradients"], name)


def theirs(name: str, directory: Path, dtype: torch.dtype, **save):
    """A random transformers model with norms and biases that are not trivial, and its files."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    case = CASES[name] | {"initializer_range": 1.2 / CASES[name]["hidden_size"] ** 0.5}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**case), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(directory, **save)
    # Loaded anew, because .to() rounded its rotary frequencies.
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("shard", ["5GB", "6KB"])
@pytest.mark.parametrize("name", CASES)
def test_transformers_files_give_transformers_logits_and_gradients(name, shard, tmp_path):
    reference = theirs(name, tmp_path, torch.float32, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "6KB")
    model = load_pretrained(tmp_path)
    ids = torch.randint(32, (3, 33), generator=torch.Generator("cpu").manual_seed(1))
    target = torch.randn(3, 33, 32, generator=torch.Generator("cpu").manual_seed(2))
    logits, wanted = model.logits(model(ids)), reference(input_ids=ids).logits
    assert_rounds_to(logits, wanted.double(), LOGITS)
    (logits * target).sum().backward()
    (wanted * target).sum().backward()
    ours, others = dict(model.named_parameters()), dict(reference.named_parameters())
    assert set(ours) == set(others)
    scale = scales({name: other.grad.abs().max() for name, other in others.items()})
    for name, other in others.items():
        assert_rounds_to(ours[name].grad, other.grad.double(), GRADIENTS, scale[name])


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_logits_are_those_of_transformers(name, tmp_path):
    reference = theirs(name, tmp_path, torch.bfloat16)
    model = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.config.dtype == "bfloat16"
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    ids = torch.randint(32, (3, 33), generator=torch.Generator("cpu").manual_seed(1))
    with torch.no_grad():
        logits, wanted = model.logits(model(ids)), reference(input_ids=ids).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, wanted.float())  # the same products, in the same order


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_what_is_saved(name, dtype, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = Transformer(ModelConfig.from_dict(CASES[name] | {"dtype": dtype}))
    fill(model)
    save_pretrained(model, tmp_path)
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert str(reference.dtype) == f"torch.{dtype}"
    with torch.no_grad():
        wanted = reference(input_ids=torch.tensor([IDS])).logits.double()
        ours = forward(model.to(reference.dtype), [IDS])
        assert_rounds_to(ours, wanted, LOGITS if dtype == "float32" else 0)
    assert load_pretrained(tmp_path).config == model.config
    config = reference.config
    assert ModelConfig.from_dict(config.to_dict()) == dataclasses.replace(
        model.config, bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)


@pytest.mark.parametrize("name", CASES)
def test_both_dialects_of_config_json_are_one_config(name):
    new = CASES[name] | {"dtype": "bfloat16"}
    config = ModelConfig.from_dict(new)
    assert config.dtype == "bfloat16"
    assert config.rope_theta == new["rope_parameters"]["rope_theta"]
    assert ModelConfig.from_dict(old_dialect(new)) == config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_llama2c_publishes_the_greedy_text_that_its_model_gives():
    directory = ASSETS / "models/stories260K"
    if not directory.is_dir():
        pytest.skip("RPT_TEST_ASSETS is not set")
    vectors = json.loads((ASSETS / "vectors/stories260K_greedy_200.json").read_text())
    model, tokenizer = load_pretrained(directory), Tokenizer.from_dir(directory)
    for eos_ids in (tokenizer.eos_ids, []):
        how = {"max_new_tokens": 200, "temperature": 0, "eos_ids": eos_ids}
        [[completion]] = generate(model, [[1]], **how)
        assert len(completion.ids) == 200 and not completion.finished
        assert tokenizer.bytes_of(completion.ids).decode().strip() == vectors["text"].strip()


# ------------------------------------------------------------------------------ law 2: prompts once

BATCHES = {  # lengths of the prompts; (row of its prompt, length) of each continuation
    "one": ([7], [(0, 5)]),
    "one token after one token": ([1], [(0, 1)]),
    "a group": ([7], [(0, 5), (0, 2), (0, 1), (0, 6)]),
    "equal prompts": ([6, 6], [(1, 4), (0, 4), (1, 2)]),
    "ragged prompts, a group of each": ([7, 2, 10], [(2, 5), (0, 3), (0, 6), (1, 1), (2, 4)]),
    "a slice of one group among others": ([10, 4, 6], [(2, 3), (2, 5)]),
    "a prompt without continuation": ([3, 9], [(0, 8), (0, 2)]),
}


def rows_of(batch) -> list[tuple]:
    """Prompts, and (prompt, ids, a coefficient for each id) of the continuations: all random."""
    generator = torch.Generator("cpu").manual_seed(7)
    lengths, continuations = batch
    prompts = [torch.randint(40, (n,), generator=generator).tolist() for n in lengths]
    return prompts, [(prompts[row], torch.randint(40, (n,), generator=generator).tolist(),
                      torch.randn(n, generator=generator).tolist()) for row, n in continuations]


def continued(model, batch, prefix, last) -> list[torch.Tensor]:
    """Of each continuation the logits [T, V] that predict its tokens."""
    places, (_, rows) = [row for row, _ in batch[1]], rows_of(batch)
    hidden = model(pad([ids for _, ids, _ in rows], CPU), Continuation(prefix, places))
    hidden = torch.cat((last[places][:, None], hidden[:, :-1]), dim=1)
    return [model.logits(hidden[i, : len(ids)]) for i, (_, ids, _) in enumerate(rows)]


def backward_in_two(model, batch) -> list[torch.Tensor]:
    """The gradient of sum(coefficient * log-probability), gathered on leaves: backward of the first
    continuation, of the others, then of the prompts. Returns the logits."""
    prompts, rows = rows_of(batch)
    prefix = PrefixCache(list(map(len, prompts)), CPU)
    last = last_hidden(model, prompts, prefix)
    roots = [*prefix.tensors(), last]
    leaves, last = prefix.detached(), last.detach().requires_grad_()
    for leaf, root in zip(leaves.tensors(), prefix.tensors(), strict=True):
        assert leaf.is_leaf and leaf.data_ptr() == root.data_ptr()
    logits = continued(model, batch, leaves, last)
    for part in (slice(0, 1), slice(1, None)):
        terms = [torch.tensor(c) @ x.log_softmax(-1)[range(len(ids)), ids]
                 for (_, ids, c), x in zip(rows[part], logits[part])]
        if terms:
            sum(terms).backward(retain_graph=True)
    torch.autograd.backward(roots, [leaf.grad for leaf in (*leaves.tensors(), last)])
    for kept, root in zip(prefix.tensors(), roots[:-1], strict=True):
        assert kept is root  # also where activations were computed again
    return logits


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_prompts_computed_once_give_the_logits_and_gradients_of_plain_forwards(model_type, batch):
    model, (_, rows) = tiny(model_type), rows_of(batch)
    exact = in_float64(model)
    for (prompt, ids, _), logits in zip(rows, backward_in_two(model, batch), strict=True):
        assert_rounds_to(logits, plain_logits(exact, prompt + ids)[len(prompt) - 1: -1], LOGITS)
    wanted, magnitudes = exact_gradient(model, rows)
    scale = scales(magnitudes)
    for name, gradient in gradients(model).items():
        assert_rounds_to(gradient, wanted[name], GRADIENTS, scale[name])


def test_what_stands_in_the_padding_has_no_effect():
    model, lengths = tiny("qwen3"), [7, 2, 5]
    outputs = []
    for filler in (0, 39):
        prompts, own = torch.full((3, 9), filler), torch.full((3, 6), filler)  # wider than needed
        for row in range(3):
            prompts[row, : lengths[row]] = torch.arange(lengths[row]) + row
            own[row, : row + 1] = torch.arange(row + 1) + 20
        prefix = PrefixCache(lengths, CPU)
        model(prompts, prefix)
        hidden = model(own, Continuation(prefix, [0, 1, 2]))
        outputs.append([hidden[row, : row + 1] for row in range(3)])
    for a, b in zip(*outputs):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["a group", "ragged prompts, a group of each"])
def test_recomputed_activations_change_no_gradient_and_blocks_run_again(name):
    plain, model, passes = tiny("qwen3"), tiny("qwen3"), []
    backward_in_two(plain, BATCHES[name])
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    for block in model.model.layers:
        block.checkpoint_activations = True
    backward_in_two(model, BATCHES[name])
    assert len(passes) == 2 + 2 + 1  # prompts, continuations; each again; the second half once more
    for parameter, gradient in gradients(model).items():
        assert torch.equal(gradient, plain.get_parameter(parameter).grad), parameter
    with torch.no_grad():
        forward(model, [IDS])
    assert len(passes) == 6


def test_tied_weights_are_one_parameter_whose_gradient_is_the_sum_of_both_uses():
    tied, untied = tiny(tie_word_embeddings=True), tiny()
    embedding = tied.model.embed_tokens.weight
    untied.load_state_dict(tied.state_dict() | {"lm_head.weight": embedding})
    assert "lm_head.weight" not in tied.state_dict() and tied.head is embedding
    assert len(list(tied.parameters())) == len(list(untied.parameters())) - 1
    assert tied.to(torch.float64).to(torch.float32).head is tied.model.embed_tokens.weight
    for model in (tied, untied):
        (forward(model, [IDS]) ** 2).sum().backward()
    parts = [untied.model.embed_tokens.weight.grad, untied.lm_head.weight.grad]
    assert_rounds_to(tied.head.grad, sum(part.double() for part in parts), 2)  # one addition
    assert min(part.abs().max() for part in parts) > 0


# ------------------------------------------------------------------------------ loading and saving


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """The directory of a small model: config.json and model.safetensors, without an index."""
    model = Transformer(ModelConfig.from_dict(NEW))
    fill(model)
    (tmp_path / "config.json").write_text(json.dumps(NEW))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def rewrite(directory: Path, change) -> None:
    """Applies a change to the name -> tensor dictionary of a checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def write_index(directory: Path, names: dict) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))


def shard(directory: Path, parts: int = 3) -> None:
    """Divides a checkpoint's one file into several with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    place = {name: f"model-{1 + i % parts:05}-of-{parts:05}.safetensors"
             for i, name in enumerate(tensors)}
    for file in set(place.values()):
        its = {name: tensor for name, tensor in tensors.items() if place[name] == file}
        save_file(its, directory / file)
    write_index(directory, place)


def test_one_file_and_shards_load_the_same_model(checkpoint):
    whole = load_pretrained(checkpoint).state_dict()
    files = load_file(checkpoint / "model.safetensors")
    shard(checkpoint)
    for name, tensor in load_pretrained(checkpoint).state_dict().items():
        assert torch.equal(tensor, whole[name]) and torch.equal(tensor, files[name])
    for name, tensor in load_pretrained(checkpoint, dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(tensor, files[name].bfloat16())


def test_bfloat16_files_land_in_float32_weights_exactly(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}))
    files = load_file(checkpoint / "model.safetensors")
    for name, tensor in load_pretrained(checkpoint).state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, files[name].float())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("file_bytes", [2**30, 5_000])
def test_a_saved_model_is_the_model_that_was_saved(dtype, tied, file_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("model.FILE_BYTES", file_bytes)
    model = tiny("qwen3", dtype=dtype, tie_word_embeddings=tied)
    save_pretrained(model, tmp_path)
    again, dtype = load_pretrained(tmp_path), getattr(torch, dtype)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(dtype).float()), name
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (file_bytes < 2**30)
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(written) == set(model.state_dict())
    assert all(tensor.dtype == dtype for tensor in written.values())


def test_loading_and_saving_as_a_library_prints_nothing(checkpoint, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pretrained(load_pretrained(checkpoint), checkpoint / "again")
        load_pretrained(checkpoint / "again")
    assert capfd.readouterr() == ("", "")


def test_a_tied_checkpoint_may_repeat_its_embedding_and_old_ones_their_frequencies(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps(NEW | {"tie_word_embeddings": True}))
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    rewrite(checkpoint, lambda tensors: tensors.update(frequencies))
    assert load_pretrained(checkpoint).lm_head is None


def test_missing_unexpected_and_misshapen_tensors_are_listed_in_one_error(checkpoint):
    def change(tensors):
        tensors.pop("model.norm.weight"), tensors.pop("model.layers.1.self_attn.q_proj.bias")
        tensors["surplus.weight"] = torch.ones(2)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(24, 17)

    rewrite(checkpoint, change)
    with pytest.raises(ValueError) as error:
        load_pretrained(checkpoint)
    for part in ("missing: model.layers.1.self_attn.q_proj.bias, model.norm.weight",
                 "unexpected: surplus.weight",
                 "misshapen: model.layers.0.mlp.up_proj.weight [24, 17] instead of [24, 16]"):
        assert part in str(error.value)
    assert "model.layers.0.mlp.down_proj.weight" not in str(error.value)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_in_two_files_is_refused(indexed, checkpoint):
    if indexed:
        shard(checkpoint, parts=1)
    save_file({"model.norm.weight": torch.zeros(16)}, checkpoint / "another.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight is in both another.safetensors and mo"):
        load_pretrained(checkpoint)


MSCALE = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.5}
UNSUPPORTED = {  # a change of config.json -> what the error must name; "key": ... removes the key
    "model_type": {"model_type": "mixtral"},
    "'qwen2_moe'": {"model_type": "qwen2_moe"},
    "model_type None": {"model_type": ...},
    "rope_type 'dynamic'": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "rope_type 'linear'": {"rope_parameters": ...,
                           "rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_type 'llama3'": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
    "mscale": {"rope_parameters": MSCALE},
    "partial_rotary_factor": {"rope_parameters": PARTIAL},
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
    "attention_bias": {"model_type": "llama", "attention_bias": "yes"},
}


@pytest.mark.parametrize("named", UNSUPPORTED)
def test_a_config_that_would_not_be_computed_faithfully_is_refused_by_name(named):
    ModelConfig.from_dict(NEW | {"use_sliding_window": False, "sliding_window": 4096,
                                 "layer_types": ["full_attention"] * 2})
    changed = {key: value for key, value in (NEW | UNSUPPORTED[named]).items() if value is not ...}
    with pytest.raises(ValueError, match=named) as error:
        ModelConfig.from_dict(changed)
    assert "\n" not in str(error.value)


def test_unusable_weight_files_are_refused_in_one_sentence(checkpoint):
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8: 8 + length])
    entry = header["model.norm.weight"]

    def with_header(value) -> bytes:
        text = json.dumps(value).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length:]

    def with_entry(**change) -> bytes:
        return with_header(header | {"model.norm.weight": entry | change})

    broken = {
        "empty": b"", "a few bytes": whole[:5], "cut in the header": whole[: 8 + length // 2],
        "cut in the data": whole[:-1], "longer than its header says": whole + b"\0",
        "absurd header size": b"\xff" * 8 + whole[8:],
        "header beyond the file": len(whole).to_bytes(8, "little") + whole[8:],
        "not JSON": whole[:8] + b"\0" * length, "a list": with_header([1]),
        "no shape": with_header({"model.norm.weight": {"data_offsets": [0, 4]}}),
        "offsets that are words": with_entry(data_offsets=["a", "b"]),
        "a shape that is a number": with_entry(shape=3),
        "a shape that does not fit": with_entry(shape=[2**60]),
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
    for outside in ("../model.safetensors", str(checkpoint / "model.safetensors"),
                    "../inner/model.safetensors", "./model.safetensors"):
        write_index(inner, dict.fromkeys(names, outside))
        with pytest.raises(ValueError, match="outside"):
            load_pretrained(inner)
    for absent in ("model-00001-of-00002.safetensors", "..", "", "inner"):
        write_index(checkpoint, dict.fromkeys(names, absent))
        with pytest.raises(FileNotFoundError, match=f"'{absent}', which does not exist"):
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


# ------------------------------------------------------------------------------ law 11: devices


def training_gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
    """A forward and backward pass with all that training uses: prompts, ragged continuations, the
    fused head."""
    with torch.device("cpu"):
        model = tiny("qwen3", rope_parameters=CASES["llama_yarn"]["rope_parameters"])
        targets, weights = torch.arange(8), torch.linspace(-1, 1, 8)
    for block in model.model.layers:
        block.checkpoint_activations = checkpointing
    with ExplicitDevices():
        prefix = PrefixCache([5, 3], CPU)
        model(pad([[1, 2, 3, 4, 5], [6, 7, 8]], CPU), prefix)
        own = pad([[9, 10, 11, 12], [13, 14, 15, 16]], CPU)
        hidden = model(own, Continuation(prefix, [1, 0])).flatten(0, 1)
        logprobs, _ = token_logprobs(model, hidden, targets, 0.8)
        plain = model.logits(last_hidden(model, [[17, 18, 19]]))
        ((weights * logprobs).sum() + plain.sum()).backward()
    return gradients(model)


def test_a_training_pass_creates_nothing_on_an_implicit_device():
    right = training_gradients(checkpointing=True)
    try:  # not checkpointing: torch's enters the default device's context and never leaves it
        torch.set_default_device("meta")
        elsewhere = training_gradients(checkpointing=False)
    finally:
        torch.set_default_device(None)
    for name, gradient in elsewhere.items():
        assert torch.equal(gradient, right[name]), name


def test_the_guard_sees_forward_backward_and_checkpoints():
    calls = ("zeros(2)", "tensor([1])", "arange(3)", "rand(2)", "full((2,), 1)", "empty(2)",
             "eye(2)", "linspace(0, 1, 3)")
    functions = (f"def f{i}(*_): torch.{call}; return _[-1]\n" for i, call in enumerate(calls))
    place = {}
    source = "import torch\n" + "".join(functions)
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


@pytest.mark.parametrize("there, chosen", [(None, "cpu"), ("cuda", "cuda:3"), ("xpu", "xpu:3"),
                                           ("mps", "cpu")])  # without float64
def test_the_device_is_the_accelerator_that_is_there(there, chosen, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(there))
    assert choose_device() == torch.device(chosen) and choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device vulkan: this machine has cpu"):
        choose_device("vulkan")


def test_no_file_uses_a_tensor_constructor_which_has_no_device():
    for file in OURS:
        for node in ast.walk(ast.parse(Path(file).read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            implicit = name == "Tensor" or name.startswith("torch.") and name.endswith("Tensor")
            assert not implicit, f"{file}:{node.lineno}"


def test_the_gradient_of_shared_prompts_is_the_same_bits_again_on_two_threads():
    """What a resumed run repeats. Indexing with repeated rows fails here: its threads race."""
    random = torch.Generator("cpu").manual_seed(0)
    prefix, rows = PrefixCache([200] * 8, torch.device("cpu")), [n % 8 for n in range(64)]
    prefix.keys, prefix.values = ([torch.randn(8, 2, 200, 16, generator=random)] for _ in "kv")
    prefix, seen, threads = prefix.detached(), set(), torch.get_num_threads()
    q, k, v = (torch.randn(64, heads, 3, 16, generator=random) for heads in (4, 2, 2))
    torch.set_num_threads(2)
    try:
        for _ in range(50):
            continuation = Continuation(prefix, rows)
            continuation.positions(3)
            gradients = torch.autograd.grad(continuation.attend(0, q, k, v).square().sum(),
                                            prefix.tensors())
            seen.add(b"".join(gradient.numpy().tobytes() for gradient in gradients))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1
