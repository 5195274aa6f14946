"""Shared by the test files: a tiny model whose predictions are not uniform, comparisons whose
bounds are arithmetic (float64, and multiples of an epsilon), a guard against implicit devices."""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from model import ModelConfig, Transformer
from sampler import uniforms

ROOT = Path(__file__).resolve().parent.parent
OURS = {str(ROOT / f"{name}.py")
        for name in ("model", "sampler", "reward", "data", "rpt", "train", "eval")}
TORCH = str(Path(torch.__file__).parent)
ITS_OWN = (f"{TORCH}/utils/checkpoint.py", f"{TORCH}/optim/")
TINY = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "rope_theta": 1000.0}


def tiny(model_type: str = "qwen2", seed: int = 0, **overrides) -> Transformer:
    """Return a small model in float32 on the CPU, with weights so large that it has opinions.

    qwen3 has head_dim 12, which is not hidden_size / heads.
    """
    config = TINY | {"model_type": model_type}
    if model_type == "qwen3":
        config["head_dim"] = 12
    model = Transformer(ModelConfig.from_dict(config | overrides))
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    return model


# ---- closeness


class Float64(TorchFunctionMode):
    """Keep float64 where our code would round it to float32: in norms and logits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def in_float64(model: Transformer) -> Transformer:
    """Return a copy on the CPU whose computation inside `Float64()` is exact next to float32."""
    return copy.deepcopy(model).cpu().double()


def plain_logits(model: Transformer, ids: Sequence[int]) -> torch.Tensor:
    """Return float64 logits [T, V] after every token of a text, by one plain forward. They are
    exact if the model is `in_float64`, else rounded as the model's own type does."""
    with Float64():
        logits = model.logits(model(torch.tensor([list(ids)], device=model.head.device)))[0]
        return logits.cpu().double()


@torch.no_grad()
def exact_logprobs(model: Transformer, texts: Sequence[tuple],
                   temperature: float = 1.0) -> tuple[list[torch.Tensor], float]:
    """For each text (prompt, ids), return float64 log-probabilities [T, V] of all tokens at the
    positions of its ids; and how far off the model may be, whatever its order of summation.

    Another order of summation errs about as much as the model's own plain forward does on the same
    texts. Twice the largest error of its log-probabilities, over all tokens there are, is allowed,
    and four epsilons of the largest for the softmax itself.
    """
    exact, out, error, scale = in_float64(model), [], 0.0, 0.0
    for prompt, ids in texts:
        wanted, plain = (
            (plain_logits(m, [*prompt, *ids])[len(prompt) - 1: -1] / temperature).log_softmax(-1)
            for m in (exact, model))
        error = max(error, (plain - wanted).abs().max().item())
        scale = max(scale, wanted.abs().max().item())
        out.append(wanted)
    return out, 2 * error + 4 * torch.finfo(model.head.dtype).eps * scale


def gradient_of(model: Transformer, rows: Sequence[tuple],
                temperature: float = 1.0) -> tuple[dict, dict]:
    """By parameter, return the gradient of sum(coefficient * log-probability) over the tokens of
    rows (prompt, ids, a coefficient for each id), by plain forwards in the model's own type; and
    the magnitude of what was added up: the largest element of the sum of the rows' absolute
    gradients."""
    names, parameters = zip(*model.named_parameters())
    total = magnitude = [torch.zeros_like(p) for p in parameters]
    for prompt, ids, coefficients in rows:
        logits = plain_logits(model, [*prompt, *ids])[len(prompt) - 1: -1]
        logprobs = (logits / temperature).log_softmax(-1)[range(len(ids)), ids]
        weights = torch.tensor(list(coefficients), dtype=torch.float64)
        own = torch.autograd.grad((weights * logprobs).sum(), parameters)
        total = [a + b for a, b in zip(total, own)]
        magnitude = [a + b.abs() for a, b in zip(magnitude, own)]
    return dict(zip(names, total)), {n: m.max() for n, m in zip(names, magnitude)}


def exact_gradient(model: Transformer, *how):
    """Return what `gradient_of` gives in float64."""
    return gradient_of(in_float64(model), *how)


def roundings(actual, exact, scale=None) -> float:
    """Return the largest |actual - exact| in epsilons of actual's dtype times scale.

    actual: a tensor, or float64 numbers. exact: the same shape, computed in float64. scale: of the
    magnitudes that were added up, a number or a tensor; by default the largest |exact|. Numbers
    that are not finite have to be equal.
    """
    actual, exact = (x.detach().cpu() if isinstance(x, torch.Tensor) else
                     torch.as_tensor(x, dtype=torch.float64) for x in (actual, exact))
    assert exact.dtype == torch.float64 and actual.shape == exact.shape, (actual, exact)
    scale = torch.as_tensor(exact.abs().max() if scale is None else scale).double()
    off = (actual.double() - exact).abs() / (torch.finfo(actual.dtype).eps * scale)
    return float(torch.where(actual.double() == exact, 0.0, off.nan_to_num(torch.inf)).max())


def assert_rounds_to(actual, exact, terms: float, scale=None) -> None:
    """Check that at most `terms` roundings add up in any element (see `roundings`). The caller says
    where that number comes from."""
    worst = roundings(actual, exact, scale)
    assert worst <= terms, f"off by {worst:.3g} roundings, {terms:g} are allowed"


def assert_same_completions(model: Transformer, prompts: Sequence, ours: Sequence, theirs: Sequence,
                            temperature: float, seed: int, keys: Sequence = ()) -> None:
    """Check that two ways of sampling from one model gave the same up to rounding.

    ours, theirs: completions by [prompt][sample], as generate() returns them. They have equal
    tokens and ends, or else at the first token that differs the uniform number lies within rounding
    of the shares that both tokens have of the cumulative distribution in float64, so of a boundary
    (at temperature 0: both within rounding of the likeliest). The rest is not compared.
    Log-probabilities are within rounding (see `exact_logprobs`) of those in float64.
    """
    cases = []  # prompt, ids, log-probabilities, the number that decided the last of ids
    for key, prompt, mine, others in zip(keys or range(len(prompts)), prompts, ours, theirs,
                                         strict=True):
        for sample, (a, b) in enumerate(zip(mine, others, strict=True)):
            if a == b:
                continue
            pairs = list(zip(a.ids, b.ids))
            same = next((t for t, (x, y) in enumerate(pairs) if x != y), len(pairs))
            assert same < len(pairs) or (a.ids, a.finished) == (b.ids, b.finished), key
            number = uniforms(seed, key, sample, same + 1)[same] if same < len(pairs) else None
            cases += [(prompt, c.ids[: same + 1], c.logprobs[: same + 1], number) for c in (a, b)]
    exact, allowed = exact_logprobs(model, [case[:2] for case in cases], temperature or 1)
    for (_, ids, logprobs, number), wanted in zip(cases, exact):
        off = torch.tensor(logprobs).double() - wanted[range(len(ids)), ids]
        assert off.abs().max() <= allowed, f"a log-probability is off by {off.abs().max():.3g}"
        if number is not None:
            assert beyond(wanted[-1], ids[-1], number, temperature, allowed) <= 0, ids


def beyond(logprobs, token: int, number: float, temperature: float, allowed: float) -> float:
    """Return by how much more than rounding a token misses being the one that was to be drawn from
    float64 logprobs [V], each of which may be off by `allowed`."""
    if temperature == 0:
        return float(logprobs.max() - logprobs[token]) - 2 * allowed
    # Errors of at most d that leave the sum at 1 move a part of it by at most d / 2.
    below, above = (float(logprobs[:end].exp().sum()) for end in (token, token + 1))
    return max(below - number, number - above) - allowed / 2


class ExplicitDevices(TorchFunctionMode):
    """Raise where one of our files makes a tensor without saying on which device.

    A call counts as ours if our file is the nearest caller outside of torch, but not what torch's
    recomputation and optimizers make for themselves.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None:
            frame = sys._getframe(1)
            while ((file := frame.f_code.co_filename).startswith((__file__, TORCH))
                   and not file.startswith(ITS_OWN)):
                frame = frame.f_back
            assert file not in OURS, f"{file}:{frame.f_lineno}: {func.__name__} without device="
        return func(*args, **kwargs)
