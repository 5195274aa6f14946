"""What the test files share: a tiny model whose predictions are not uniform, and a guard against implicit devices."""

import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import data
import train
from model import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parent.parent
OURS = {str(ROOT / f"{name}.py") for name in ("model", "sampler", "reward", "data", "rpt", "train", "eval")}
TORCH = str(Path(torch.__file__).parent)
TINY = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_theta": 1000.0}


def tiny(model_type: str = "qwen2", seed: int = 0, **overrides) -> Transformer:
    """A small model in float32 on the CPU, with weights so large that it has opinions (qwen3: head_dim 12, not 8)."""
    config = TINY | ({"head_dim": 12} if model_type == "qwen3" else {}) | {"model_type": model_type} | overrides
    model, generator = Transformer(ModelConfig.from_dict(config)), torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    return model


class ExplicitDevices(TorchFunctionMode):
    """Raises where one of our files makes a tensor without saying on which device.

    A call counts as ours if our file is the nearest caller outside of torch. Backward passes are watched too.
    """

    FACTORIES = _device_constructors()  # torch.zeros, tensor, arange, as_tensor, ...: what `torch.device` redirects

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.FACTORIES and kwargs.get("device") is None:
            frame = sys._getframe(1)
            while frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(TORCH):
                frame = frame.f_back
            if frame.f_code.co_filename in OURS:
                raise AssertionError(
                    f"{frame.f_code.co_filename}:{frame.f_lineno}: torch.{func.__name__} without device=")
        if func is torch.Tensor.backward:  # would run the engine without this mode, so it is entered again around it
            assert kwargs.get("gradient") is None and args[0].ndim == 0
            with self:
                return torch.autograd.Variable._execution_engine.run_backward(
                    args, (torch.ones_like(args[0]),), bool(kwargs.get("retain_graph")), False, (),
                    allow_unreachable=True, accumulate_grad=True)
        return func(*args, **kwargs)


def weak_base(folder: Path) -> None:
    """Writes corpus.jsonl, answers.jsonl and base/model, a toy model that knows the format and little else."""
    data.write_toy(folder, seed=0, count=400)
    tokenizer = data.toy_tokenizer()
    torch.manual_seed(0)
    config = ModelConfig.from_dict(train.TOY_MODEL | {
        "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 96})
    train.export(Transformer(config), tokenizer, folder / "init")
    run, method, _ = train.parse(["--model", str(folder / "init"), "--corpus", "none", "--out", str(folder / "base"),
                                  "--stage", "ntp", "--optimizer", "muon", "--lr", "0.02", "--steps", "90",
                                  "--questions", "32", "--decay", "0.3", "--save-every", "1000"])
    held = data.split_holdout(data.read_corpus(folder / "corpus.jsonl"), 40, 0)[1]
    stories = data.toy_stories(90 * 32, seed=1, exclude=frozenset(d.text for d in held))
    train.ntp_stage(run, method, torch.device("cpu"), data.toy_runs(tokenizer, stories, 0))
