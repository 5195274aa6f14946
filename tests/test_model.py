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
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import Tokenizer
from fixtures.make import CASES as ALL
from fixtures.make import IDS, POSITIONS, checksums, expected, fill, loss
from helpers import (OURS, ExplicitDevices, assert_rounds_to, exact_gradient, in_float64,
                     plain_logits, tiny)
from model import (Continuation, ModelConfig, Prompts, Transformer, last_hidden, load_pretrained,
                   pad, save_pretrained)
from rpt import token_logprobs

FIXTURES = Path(__file__).resolve().parent / "fixtures"
ASSETS = Path(os.environ.get("RPT_TEST_ASSETS", "/nonexistent"))
CASES = {name: config for name, config in ALL.items() if "yarn" not in name}
NEW = CASES["qwen2"]
CPU = torch.device("cpu")
BASE = Path(__file__).resolve().parent.parent / "toy/base"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
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


@pytest.mark.parametrize("name", CASES)
def test_both_dialects_of_config_json_are_one_config(name):
    new = CASES[name] | {"dtype": "bfloat16"}
    config = ModelConfig.from_dict(new)
    assert config.rope_theta == new["rope_parameters"]["rope_theta"]
    old = ModelConfig.from_dict(old_dialect(new))
    same = {"hf": config.hf, "rope_scaling": config.rope_scaling}
    assert dataclasses.replace(old, **same) == config
    assert bool(old.rope_scaling) == bool(config.rope_scaling)


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
    hidden = model(pad([ids for _, ids, _ in rows], CPU), Continuation(prefix, torch.tensor(places)))
    hidden = torch.cat((last[places][:, None], hidden[:, :-1]), dim=1)
    return [model.logits(hidden[i, : len(ids)]) for i, (_, ids, _) in enumerate(rows)]


def backward_in_two(model, batch) -> list[torch.Tensor]:
    """The gradient of sum(coefficient * log-probability), gathered on leaves: backward of the first
    continuation, of the others, then of the prompts. Returns the logits."""
    prompts, rows = rows_of(batch)
    prefix = Prompts(list(map(len, prompts)), CPU)
    last = last_hidden(model, prompts, prefix)
    roots = [*chain(*prefix.layers), last]
    *leaves, last = (root.detach().requires_grad_() for root in roots)
    prefix.layers = list(zip(leaves[::2], leaves[1::2]))
    logits = continued(model, batch, prefix, last)
    for part in (slice(0, 1), slice(1, None)):
        terms = [torch.tensor(c) @ x.log_softmax(-1)[range(len(ids)), ids]
                 for (_, ids, c), x in zip(rows[part], logits[part])]
        if terms:
            sum(terms).backward(retain_graph=True)
    torch.autograd.backward(roots, [leaf.grad for leaf in (*leaves, last)])
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
        prefix = Prompts(lengths, CPU)
        model(prompts, prefix)
        hidden = model(own, Continuation(prefix, torch.arange(3)))
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


def test_bfloat16_files_land_in_float32_weights_exactly(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}))
    files = load_file(checkpoint / "model.safetensors")
    for name, tensor in load_pretrained(checkpoint).state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, files[name].float())


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


# ------------------------------------------------------------------------------ law 11: devices


def training_gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
    """A forward and backward pass with all that training uses: prompts, ragged continuations, the
    fused head."""
    with torch.device("cpu"):
        model = tiny("qwen3", rope_parameters=CASES["llama_llama3"]["rope_parameters"])
        targets, weights = torch.arange(8), torch.linspace(-1, 1, 8)
    for block in model.model.layers:
        block.checkpoint_activations = checkpointing
    with ExplicitDevices():
        prefix = Prompts([5, 3], CPU)
        model(pad([[1, 2, 3, 4, 5], [6, 7, 8]], CPU), prefix)
        own = pad([[9, 10, 11, 12], [13, 14, 15, 16]], CPU)
        hidden = model(own, Continuation(prefix, torch.tensor([1, 0], device=CPU))).flatten(0, 1)
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


def test_no_file_uses_a_tensor_constructor_which_has_no_device():
    for file in OURS:
        for node in ast.walk(ast.parse(Path(file).read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            implicit = name == "Tensor" or name.startswith("torch.") and name.endswith("Tensor")
            assert not implicit, f"{file}:{node.lineno}"


def test_the_gradient_of_shared_prompts_is_the_same_bits_again_on_two_threads():
    """What a resumed run repeats. Indexing with repeated rows fails here: its threads race."""
    random = torch.Generator("cpu").manual_seed(0)
    prefix, rows = Prompts([200] * 8, torch.device("cpu")), torch.arange(64) % 8
    leaves = [torch.randn(8, 2, 200, 16, generator=random, requires_grad=True) for _ in "kv"]
    prefix.layers, seen, threads = [tuple(leaves)], set(), torch.get_num_threads()
    q, k, v = (torch.randn(64, heads, 3, 16, generator=random) for heads in (4, 2, 2))
    torch.set_num_threads(2)
    try:
        for _ in range(50):
            continuation = Continuation(prefix, rows)
            continuation.positions(3)
            gradients = torch.autograd.grad(continuation.attend(0, q, k, v).square().sum(),
                                            leaves)
            seen.add(b"".join(gradient.numpy().tobytes() for gradient in gradients))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1


def rewritten(folder: Path, change, **config) -> Path:
    """A copy of the toy's base with other tensors and keys of config.json."""
    shutil.copytree(BASE, folder)
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    change(state)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(state, file)
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | config))
    return folder


def test_a_head_of_its_own_is_used_whatever_config_json_says(tmp_path):
    head = torch.randn(load_pretrained(BASE).head.shape)
    model = load_pretrained(rewritten(tmp_path / "m", lambda s: s.update({HEAD: head})))
    assert torch.equal(model.head, head) and model.lm_head is not None
    save_pretrained(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_pretrained(tmp_path / "out").head, head)


def test_an_equal_head_stays_tied_and_a_tied_file_may_keep_either_name(tmp_path):
    wanted = load_pretrained(BASE).head
    twice = rewritten(tmp_path / "a", lambda s: s.update({HEAD: s[EMBEDDING].clone()}))
    other = rewritten(tmp_path / "b", lambda s: s.update({HEAD: s.pop(EMBEDDING)}))
    for folder in (twice, other):
        model = load_pretrained(folder)
        assert model.lm_head is None and torch.equal(model.head, wanted)


@pytest.mark.parametrize("change, named", [
    (lambda s: s.pop("model.norm.weight"), "model.norm.weight"),
    (lambda s: s.update({"x.bias": torch.zeros(2)}), "x.bias"),
    (lambda s: s.update({"model.norm.weight": torch.zeros(3)}), "model.norm.weight")])
def test_missing_unknown_and_misshapen_tensors_are_named(change, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        load_pretrained(rewritten(tmp_path / "m", change))


@pytest.mark.parametrize("keys, named", [
    ({"model_type": "gemma"}, "model_type 'gemma'"), ({"use_sliding_window": True}, "sliding"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "yarn"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'")])
def test_what_would_not_be_computed_faithfully_is_refused_by_name(keys, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_dict(CASES["qwen2"] | keys)
