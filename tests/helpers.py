"""What the test files share: a tiny model whose predictions are not uniform, comparisons whose
bounds are arithmetic (float64, and multiples of an epsilon), a guard against implicit devices."""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from model import ModelConfig, Transformer
from sampler import Completion, uniforms

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("model", "sampler", "reward", "data", "rpt", "train", "eval")
OURS = {str(ROOT / f"{name}.py") for name in MODULES}
TORCH = str(Path(torch.__file__).parent)
ITS_OWN = (f"{TORCH}/utils/checkpoint.py", f"{TORCH}/optim/")
TINY = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "rope_theta": 1000.0}


def tiny(model_type: str = "qwen2", seed: int = 0, **overrides) -> Transformer:
    """A small model in float32 on the CPU, with weights so large that it has opinions.

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
    """Keeps float64 where our code would round it to float32: in norms and logits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func is torch.Tensor.to:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def in_float64(model: Transformer) -> Transformer:
    """A copy on the CPU in float64; what it computes inside `Float64()` is exact beside float32."""
    return copy.deepcopy(model).cpu().double()


def plain_logits(model: Transformer, ids: Sequence[int]) -> torch.Tensor:
    """float64 logits [T, V] behind every token of a text, by one plain forward; exact if the model
    is `in_float64`, else with what the model's own type rounds. Differentiable."""
    with Float64():
        logits = model.logits(model(torch.tensor([list(ids)], device=model.head.device)))[0]
        return logits.cpu().double()


@torch.no_grad()
def exact_logprobs(model: Transformer, texts: Sequence[tuple[Sequence[int], Sequence[int]]],
                   temperature: float = 1.0) -> tuple[list[torch.Tensor], float]:
    """For each text (prompt, ids): float64 log-probabilities [T, V] of all tokens where its ids
    stand; and by how much the model may be off, whatever the order in which it adds up.

    Another order of summation errs about as much as the model's own plain forward does on the same
    texts: twice the largest error of its log-probabilities, of all tokens there are, is
    allowed, and four epsilons of the largest for the softmax itself.
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


def exact_gradient(model: Transformer, rows: Sequence[tuple],
                   temperature: float = 1.0) -> tuple[dict, dict]:
    """By parameter, the float64 gradient of sum(coefficient * log-probability) over the tokens of
    rows (prompt, ids, a coefficient for each id), by plain forwards; and the magnitude of what was
    added up: the largest element of the sum of the rows' absolute gradients."""
    exact = in_float64(model)
    names, parameters = zip(*exact.named_parameters())
    total = magnitude = [torch.zeros_like(p) for p in parameters]
    for prompt, ids, coefficients in rows:
        logits = plain_logits(exact, [*prompt, *ids])[len(prompt) - 1: -1]
        logprobs = (logits / temperature).log_softmax(-1)[range(len(ids)), ids]
        weights = torch.tensor(list(coefficients), dtype=torch.float64, device="cpu")
        own = torch.autograd.grad((weights * logprobs).sum(), parameters)
        total = [a + b for a, b in zip(total, own)]
        magnitude = [a + b.abs() for a, b in zip(magnitude, own)]
    return dict(zip(names, total)), {n: m.max() for n, m in zip(names, magnitude)}


def assert_rounds_to(actual, exact, terms: float, scale=None) -> None:
    """|actual - exact| <= terms * epsilon of actual's dtype * scale, everywhere.

    actual: a tensor, or float64 numbers. exact: the same shape, computed in float64. scale: of the
    magnitudes that were added up, a number or a tensor; by default the largest |exact|. terms: how
    many roundings of that magnitude may add up; whoever calls says where the number comes from.
    What is not finite has to be equal.
    """
    actual, exact = (x.detach().cpu() if isinstance(x, torch.Tensor) else
                     torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (actual, exact))
    assert exact.dtype == torch.float64, f"the exact value is {exact.dtype}, not float64"
    assert actual.shape == exact.shape, f"{list(actual.shape)} is not {list(exact.shape)}"
    if not actual.numel():
        return
    scale = torch.as_tensor(exact.abs().max() if scale is None else scale).detach().cpu()
    rounding = torch.finfo(actual.dtype).eps * scale.double()
    off = torch.where(actual.double() == exact, 0.0, (actual.double() - exact).abs())
    wrong = ~(off <= terms * rounding)  # NaN is wrong too
    if wrong.any():
        at = int(torch.where(wrong, off.nan_to_num(torch.inf, torch.inf), -1.0).argmax())
        got, want = actual.flatten()[at].item(), exact.flatten()[at].item()
        roundings = (off / rounding).flatten()[at].item()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} are off: {got!r} instead of {want!r} is "
            f"{roundings:.3g} roundings of {actual.dtype}, {terms:g} are allowed")


def assert_same_completions(model: Transformer, prompts: Sequence[Sequence[int]],
                            ours: Sequence[Sequence[Completion]],
                            theirs: Sequence[Sequence[Completion]], temperature: float, seed: int,
                            keys: Sequence[int] | None = None) -> int:
    """Two ways of sampling from one model gave the same up to rounding; how many tokens it decided.

    ours, theirs: by [prompt][sample], as generate() returns them. Completions have equal tokens and
    ends, or else at the first token that differs the uniform number lies within rounding of the
    shares that both tokens have of the cumulative distribution in float64, so of a boundary (at
    temperature 0: both within rounding of the likeliest); what follows is not compared.
    Log-probabilities are within rounding (see `exact_logprobs`) of those in float64.
    """
    cases, texts = [], []
    for n, (prompt, mine, others) in enumerate(zip(prompts, ours, theirs, strict=True)):
        for sample, (a, b) in enumerate(zip(mine, others, strict=True)):
            if a == b:
                continue
            key = n if keys is None else keys[n]
            same = _equal_tokens(a, b, f"key {key}, sample {sample}")
            for one in (a, b):
                ids, logprobs = one.ids[: same + 1], one.logprobs[: same + 1]
                uniform = uniforms(seed, key, sample, same + 1)[same] if len(ids) > same else None
                texts.append((prompt, ids))
                cases.append((ids, logprobs, uniform))
    exact, allowed = exact_logprobs(model, texts, temperature or 1)
    for case, wanted in zip(cases, exact):
        _assert_drawn(*case, wanted, temperature, allowed)
    return sum(uniform is not None for *_, uniform in cases) // 2


def _equal_tokens(a: Completion, b: Completion, where: str) -> int:
    """With how many equal tokens two completions begin; fails if only one of them ends there."""
    shorter = min(len(a.ids), len(b.ids))
    same = next((n for n in range(shorter) if a.ids[n] != b.ids[n]), shorter)
    assert same < shorter or (a.ids, a.finished) == (b.ids, b.finished), (
        f"{where}: equal tokens, but one ends after {len(a.ids)} (finished: {a.finished}), "
        f"the other after {len(b.ids)} ({b.finished})")
    return same


def _assert_drawn(ids: Sequence[int], logprobs: Sequence[float], uniform: float | None,
                  exact: torch.Tensor, temperature: float, allowed: float) -> None:
    """The log-probabilities [T] of ids [T] are the exact ones [T, V], of which each may be off by
    `allowed`; and, if a uniform number is given, the last token is one that it may have chosen."""
    off = (torch.tensor(logprobs, dtype=torch.float64, device="cpu")
           - exact[range(len(ids)), ids]).abs().max()
    assert off <= allowed, f"a log-probability is off by {off:.3g}, {allowed:.3g} is allowed"
    if uniform is None:
        return
    last, token = exact[-1], ids[-1]
    if temperature == 0:
        outside = (last.max() - last[token]).item() - 2 * allowed
    else:  # errors of at most d that leave the sum at 1 move a part of it by at most d / 2
        below, above = last[:token].exp().sum().item(), last[: token + 1].exp().sum().item()
        outside = max(below - uniform, uniform - above) - allowed / 2
    assert outside <= 0, (f"token {len(ids) - 1} is {token} and not its twin's, by {outside:.3g} "
                          "more than rounding explains")


class ExplicitDevices(TorchFunctionMode):
    """Raises where one of our files makes a tensor without saying on which device.

    A call counts as ours if our file is the nearest caller outside of torch, but not what some
    releases' recomputation and optimizers make for themselves. Backward passes are watched too.
    """

    FACTORIES = _device_constructors()  # zeros, tensor, ...: what torch.device redirects

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.FACTORIES and kwargs.get("device") is None:
            frame = sys._getframe(1)
            while (file := frame.f_code.co_filename) == __file__ or file.startswith(TORCH):
                if file.startswith(ITS_OWN):
                    break
                frame = frame.f_back
            if file in OURS:
                raise AssertionError(f"{file}:{frame.f_lineno}: {func.__name__} without device=")
        if func is torch.Tensor.backward:  # leaves this mode: enter it again
            assert kwargs.get("gradient") is None and args[0].ndim == 0
            with self:
                return torch.autograd.Variable._execution_engine.run_backward(
                    args, (torch.ones_like(args[0]),), bool(kwargs.get("retain_graph")), False,
                    (), allow_unreachable=True, accumulate_grad=True)
        return func(*args, **kwargs)
