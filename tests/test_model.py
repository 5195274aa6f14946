"""Laws of model.py. Its oracles: transformers where installed, numbers frozen from it (fixtures/)
where not, and the same model in float64.

How many roundings are allowed: about three times what the worst of all cases and parameters erred
by, with ATEN_CPU_CAPABILITY default, avx2 and native.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.make import CASES, IDS, POSITIONS, checksums, fill, loss
from helpers import (OURS, assert_rounds_to, exact_gradient, in_float64,
                     plain_logits, tiny)
from model import (Continuation, ModelConfig, Prompts, Transformer, last_hidden, load_pretrained,
                   pad, rope, save_pretrained)

FIXTURES = Path(__file__).resolve().parent / "fixtures"
CPU = torch.device("cpu")
BASE = Path(__file__).resolve().parent.parent / "toy/base"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LOGITS = 40  # roundings of the largest logit: the layers' sums one after the other err by 1 to 11
GRADIENTS = 160  # of a gradient's magnitude: sums over layers and tokens err by 2 to 45


def forward(model: Transformer, ids) -> torch.Tensor:
    return model.logits(model(torch.tensor(ids)))


def scales(magnitudes: dict) -> dict[str, torch.Tensor]:
    """Of gradients by parameter: their magnitude, at least a thirtieth of the largest. A key's bias
    has no gradient but rounding, for softmax does not see a constant; nor has what makes queries
    where there is one key."""
    tensors = {name: torch.as_tensor(x).double() for name, x in magnitudes.items()}
    return {name: x.clamp_min(max(tensors.values()) / 30) for name, x in tensors.items()}


# ------------------------------------------------------------------------------ law 1: transformers


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_frozen_from_transformers(name):
    frozen = json.loads((FIXTURES / f"{name}.json").read_text())
    model = Transformer(ModelConfig.from_dict(CASES[name]))
    fill(model)
    logits = forward(model, [IDS])
    loss(logits).backward()
    kept, gradients = logits[0, list(POSITIONS)], checksums(model)
    assert frozen["config"] == CASES[name] and set(gradients) == set(frozen["gradients"])
    assert_rounds_to(kept, torch.tensor(frozen["logits"], dtype=torch.float64), LOGITS)
    scale = scales({name: norm for name, (norm, _) in frozen["gradients"].items()})
    for name, wanted in frozen["gradients"].items():
        wanted = torch.tensor(wanted, dtype=torch.float64)
        assert_rounds_to(torch.tensor(gradients[name]), wanted, GRADIENTS, scale[name])


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
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


@pytest.mark.parametrize("name", ["qwen2_tied", "llama_llama3"])
def test_both_dialects_of_config_json_are_one_config(name):
    scaling = dict(CASES[name]["rope_parameters"])
    old = {"rope_parameters": None, "rope_theta": scaling.pop("rope_theta"),
           "rope_scaling": {"type": scaling.pop("rope_type"), **scaling}}
    new, old = (ModelConfig.from_dict(CASES[name] | keys) for keys in ({}, old))
    places = torch.arange(40)[None]
    for a, b in zip(rope(new, places, torch.float32), rope(old, places, torch.float32)):
        assert torch.equal(a, b)
    same = {"hf": new.hf, "rope_scaling": new.rope_scaling}
    assert dataclasses.replace(old, **same) == new


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


def continued(model, batch) -> list[torch.Tensor]:
    """The logits [T, V] that predict the tokens of each continuation. The gradient of
    sum(coefficient * log-probability) is left on the parameters."""
    (prompts, rows), places = rows_of(batch), torch.tensor([row for row, _ in batch[1]])
    prefix = Prompts(list(map(len, prompts)), CPU)
    last = last_hidden(model, prompts, prefix)
    hidden = model(pad([ids for _, ids, _ in rows], CPU), Continuation(prefix, places))
    hidden = torch.cat((last[places][:, None], hidden[:, :-1]), dim=1)
    logits = [model.logits(hidden[i, : len(ids)]) for i, (_, ids, _) in enumerate(rows)]
    sum(torch.tensor(c) @ x.log_softmax(-1)[range(len(ids)), ids]
        for (_, ids, c), x in zip(rows, logits)).backward()
    return logits


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_prompts_computed_once_give_the_logits_and_gradients_of_plain_forwards(model_type, batch):
    model, (_, rows) = tiny(model_type), rows_of(batch)
    exact = in_float64(model)
    for (prompt, ids, _), logits in zip(rows, continued(model, batch), strict=True):
        assert_rounds_to(logits, plain_logits(exact, prompt + ids)[len(prompt) - 1: -1], LOGITS)
    wanted, magnitudes = exact_gradient(model, rows)
    scale = scales(magnitudes)
    for name, gradient in gradients(model).items():
        assert_rounds_to(gradient, wanted[name], GRADIENTS, scale[name])


@pytest.mark.parametrize("name", ["a group", "ragged prompts, a group of each"])
def test_recomputed_activations_change_no_gradient_and_blocks_run_again(name):
    plain, model, passes = tiny("qwen3"), tiny("qwen3"), []
    continued(plain, BATCHES[name])
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    for block in model.model.layers:
        block.checkpoint_activations = True
    continued(model, BATCHES[name])
    assert len(passes) == 2 + 2  # prompts, continuations; each again
    for parameter, gradient in gradients(model).items():
        assert torch.equal(gradient, plain.get_parameter(parameter).grad), parameter
    with torch.no_grad():
        forward(model, [IDS])
    assert len(passes) == 5


def test_tied_weights_are_one_parameter_whose_gradient_is_the_sum_of_both_uses():
    tied, untied = tiny(tie_word_embeddings=True), tiny()
    embedding = tied.model.embed_tokens.weight
    untied.load_state_dict(tied.state_dict() | {"lm_head.weight": embedding})
    assert "lm_head.weight" not in tied.state_dict() and tied.head is embedding
    assert len(list(tied.parameters())) == len(list(untied.parameters())) - 1
    for model in (tied, untied):
        (forward(model, [IDS]) ** 2).sum().backward()
    parts = [untied.model.embed_tokens.weight.grad, untied.lm_head.weight.grad]
    assert_rounds_to(tied.head.grad, sum(part.double() for part in parts), 2)  # one addition
    assert min(part.abs().max() for part in parts) > 0


def test_no_file_uses_a_tensor_constructor_which_has_no_device():
    for file in OURS:
        assert not re.search(r"Tensor\(", Path(file).read_text()), file


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


# ------------------------------------------------------------------------------ loading and saving


def rewritten(folder: Path, change) -> Path:
    """A copy of the toy's base with other tensors."""
    shutil.copytree(BASE, folder)
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    change(state)
    save_file(state, file)
    return folder


def test_bfloat16_files_land_in_float32_weights_exactly(tmp_path):
    folder = rewritten(tmp_path / "m", lambda s: s.update({k: x.bfloat16() for k, x in s.items()}))
    wanted = load_pretrained(BASE).state_dict()
    for name, tensor in load_pretrained(folder).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, wanted[name].bfloat16().float())


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
