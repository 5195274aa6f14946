"""A Qwen2 / Qwen3 / Llama decoder, its caches for training, and Hugging Face checkpoints.

The three families are one architecture (pre-norm blocks, RMSNorm, rotary positions, grouped-query
attention, SwiGLU) with four differences, all of them in ModelConfig: bias on q/k/v, normalised q
and k, explicit head size, tied head. Parameter names are those of the checkpoint files, so a state
dict *is* a checkpoint.

What a forward pass attends to is decided by its cache, and the caches follow the structure of the
method, in which the G completions of a group share one prompt:

    model(ids)                                  plain causal attention
    model(prompts, prefix := PrefixCache(...))  the same, and keeps keys and values with their graph
    model(completions, Continuation(prefix, rows))  many tokens at once after a prompt: training
    model(tokens, KVCache)                      one token a row after a prompt: see sampler.py

Left out: dropout, sliding windows, quantisation, mixtures of experts. A config that asks for one is
refused by name. Shapes: B rows, T tokens, S tokens attended to.
"""

import contextlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# torch.distributed.checkpoint takes a second to import: it is where it is used, not before --help.

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}  # model_type -> name of the class
FILE_BYTES = 5 * 2**30  # exported weights are split into files of about this size


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, read from Hugging Face's config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: dict | None  # None, or rope_type "llama3" / "yarn" with its own keys
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    dtype: str = "float32"  # of the files, not of the computation
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def from_dict(cls, hf: dict) -> "ModelConfig":
        """Reads both dialects (rope_theta / torch_dtype and rope_parameters / dtype).

        Raises ValueError, naming the key, for whatever this module would not compute faithfully.
        """
        refuse_unsupported(hf)
        try:
            kind, heads = hf["model_type"], hf["num_attention_heads"]
            bias = hf.get("attention_bias", False)
            theta, scaling = rope_settings(hf)
            derived = {
                "num_key_value_heads": hf.get("num_key_value_heads") or heads,
                "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
                "rope_theta": theta, "rope_scaling": scaling,
                "qkv_bias": kind == "qwen2" or bias, "o_bias": kind != "qwen2" and bias,
                "qk_norm": kind == "qwen3", "rms_norm_eps": hf.get("rms_norm_eps", 1e-6) * 1.0,
                "dtype": str(hf.get("dtype") or hf.get("torch_dtype") or "float32")}
            as_it_is = {field.name: hf[field.name] for field in fields(cls) if field.name in hf
                        or field.default is MISSING and field.name not in derived}
            config = cls(**as_it_is | derived)
            config.check()
        except KeyError as missing:
            raise ValueError(f"config.json: the key {missing} is missing") from None
        except (TypeError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"config.json: a value is of the wrong type ({error})") from None
        return config

    def check(self) -> None:
        """ValueError for a value that is not what its field says."""
        for field in fields(self):
            value, kind = getattr(self, field.name), None
            if field.type is int and (type(value) is not int or not 0 < value < 2**31):
                kind = "a positive whole number"
            if field.type is float and not 0 < value < math.inf:
                kind = "a positive number"
            if field.type is bool and type(value) is not bool:
                kind = "true or false"
            if kind:
                name = "attention_bias" if field.name in ("qkv_bias", "o_bias") else field.name
                raise ValueError(f"config.json: {name} must be {kind}, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError("config.json: num_attention_heads must be a multiple of "
                             "num_key_value_heads, head_dim even")
        if self.dtype not in DTYPES:
            raise ValueError(f"config.json: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    def to_dict(self) -> dict:
        """A config.json that transformers 4 and 5 and vLLM read."""
        ours = ("qkv_bias", "o_bias", "qk_norm")  # which model_type and attention_bias say there
        hf = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ours}
        return hf | {
            "architectures": [FAMILIES[self.model_type] + "ForCausalLM"],
            "torch_dtype": self.dtype, "hidden_act": "silu", "use_cache": True,
            "initializer_range": 0.02, "attention_bias": self.o_bias}


def refuse_unsupported(hf: dict) -> None:
    """ValueError, naming the key, for a config.json that asks for what is left out here."""
    if hf.get("model_type") not in (*FAMILIES,):
        raise ValueError(f"config.json: model_type {hf.get('model_type')!r} is not one of "
                         f"{', '.join(FAMILIES)}")
    if hf.get("quantization_config"):
        raise ValueError("config.json: quantization_config: quantized weights are not supported; "
                         "use the original")
    if hf.get("use_sliding_window") or "sliding_attention" in str(hf.get("layer_types")):
        raise ValueError("config.json: sliding window attention (use_sliding_window / layer_types) "
                         "is not supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported, "
                         "only silu")


def rope_settings(hf: dict) -> tuple[float, dict | None]:
    """rope_theta, and the scaling of Llama 3 or YaRN with its own keys, if any."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError("config.json: rope_parameters / rope_scaling must be an object, "
                         f"not {rope!r}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = (rope.get("rope_theta") or hf.get("rope_theta", 10000.0)) * 1.0  # TypeError for a list
    keys = {key: value for key, value in rope.items()
            if value is not None and key not in ("rope_type", "type", "rope_theta")}
    needed = {"default": set(), "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
              "yarn": {"factor"}}
    optional = {"original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
                "truncate"}
    if kind not in needed or not needed[kind] <= set(keys) <= needed[kind] | optional:
        raise ValueError(f"config.json: rope_type {kind!r} with keys {sorted(keys)} "
                         "is not supported")
    for key, value in keys.items():
        if key != "truncate" and not 0 < value < math.inf:
            raise ValueError(f"config.json: rope {key} must be a positive number, not {value!r}")
    return theta, {"rope_type": kind, **keys} if kind != "default" else None


# ------------------------------------------------------------------------------ the network


def rope_frequencies(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """Angle per position of each pair of channels [head_dim / 2], float32; the factor on cos, sin.

    Plain (Su et al. 2021), Llama-3 (long waves slowed by `factor`) and YaRN (Peng et al. 2023,
    section 3.2 and 3.4).
    """
    d, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    plain = theta ** -(torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
    if scaling is None:
        return plain, 1.0
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((original * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return plain * keep + plain / factor * (1 - keep), 1.0

    def channel(rotations: float) -> float:  # the pair that turns so often in the original context
        return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = channel(scaling.get("beta_fast") or 32)
    last = channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    pair = torch.arange(d // 2, device=device, dtype=torch.float32)
    slow = ((pair - first) / max(last - first, 0.001)).clamp(0, 1)
    scale = scaling.get("attention_factor") or 0.1 * math.log(factor) + 1
    return plain * (1 - slow) + plain / factor * slow, scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, heads, T, head_dim].

    Channel i turns with channel i + head_dim / 2; the first half of `sin` is negated. Both products
    are rounded, as in the published models: addcmul would round once, which shows in bfloat16.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention; q [B, heads, T, d], k and v [B, kv_heads, S, d] -> [B, T, heads * d].

    Without a mask it is causal, the last query on the last key (`is_causal` alone would align the
    *first* ones). With a boolean mask [B, 1, T, S], the queries of the heads that share a key head
    are laid one after the other, so that no kernel has to expand the keys.
    """
    B, heads, T, d = q.shape
    if mask is None and T == k.shape[2]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    elif mask is None:
        from torch.nn.attention.bias import causal_lower_right  # loads the compiler: when needed
        bias = causal_lower_right(T, k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    else:
        repeats = heads // k.shape[1]
        q = q.reshape(B, k.shape[1], repeats * T, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, repeats, 1))
        out = out.reshape(B, heads, T, d)
    return out.transpose(1, 2).reshape(B, T, heads * d)


class RMSNorm(nn.RMSNorm):
    """Normalisation in float32, rounded, then scaled: the order of the published models."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        width, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.qkv_bias)
        self.o_proj = nn.Linear(width, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, hidden_size] -> q [B, heads, T, head_dim], k, v [B, kv_heads, T, head_dim]."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (project(x).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q.transpose(1, 2), *rope), rotate(k.transpose(1, 2), *rope), v.transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer. With checkpoint_activations only its input is kept; the rest is computed again."""

    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.checkpoint_activations = layer, False
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self.compute, x, rope, cache, use_reentrant=False,
                              preserve_rng_state=False)
        return self.compute(x, rope, cache)

    def compute(self, x: Tensor, rope: tuple[Tensor, Tensor], cache) -> Tensor:
        q, k, v = self.self_attn(self.input_layernorm(x), rope)
        attended = attend(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the part whose names begin with `model.`"""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Transformer(nn.Module):
    """The decoder and its head. `model(ids, cache) -> hidden`, `model.logits(hidden)`.

    Weights are drawn from a normal distribution of deviation 0.02, with torch's default generator.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.model, self.lm_head = config, Decoder(config), None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, cache=None) -> Tensor:
        """ids [B, T] -> hidden [B, T, hidden_size] after the final norm, in the weights' dtype."""
        width = ids.shape[1]
        if cache is None:
            positions = torch.arange(width, device=ids.device)[None]
        else:
            positions = cache.positions(width)
        frequencies, scale = rope_frequencies(self.config, ids.device)
        angles = (positions[..., None].float() * frequencies)[:, None]  # [B or 1, 1, T, head_dim/2]
        x = self.model.embed_tokens(ids)
        cos, sin = (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)
        rope = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        for block in self.model.layers:
            x = block(x, rope, cache)
        return self.model.norm(x)

    @property
    def head(self) -> Tensor:
        """The output matrix [vocab_size, hidden_size]; the embedding itself if weights are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden_size] -> float32 logits [..., vocab_size]."""
        return F.linear(hidden, self.head).float()


def forward_flops(config: ModelConfig, tokens: float, context: float) -> float:
    """Floating-point operations of a forward pass over `tokens`, which attend to `context` others.

    Two per weight of every matrix and token, four per channel of queries and attended token.
    """
    c = config
    width, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = 2 * c.hidden_size * (width + kv) + 3 * c.hidden_size * c.intermediate_size
    weights = c.num_hidden_layers * block + c.vocab_size * c.hidden_size
    return tokens * (2 * weights + 4 * c.num_hidden_layers * width * context)


# ------------------------------------------------------------------------------ the caches


class PrefixCache:
    """Keys and values of right-padded prompts, each computed once for all that continues it.

    `keys` and `values` by layer, [n, kv_heads, T, head_dim], with their graph if there is one:
    padding stands on the right, so a causal mask already hides it from the prompt itself.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        """lengths: tokens of each prompt, without padding."""
        self.sizes = list(lengths)  # the same on the host: asking a device would make it wait
        self.lengths = torch.tensor(self.sizes, device=device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def positions(self, width: int) -> Tensor:
        return torch.arange(width, device=self.lengths.device)[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer == len(self.keys):  # not when activations are computed a second time
            self.keys.append(k)
            self.values.append(v)
        return attend(q, k, v)

    def tensors(self) -> list[Tensor]:
        return [*self.keys, *self.values]

    def detached(self) -> "PrefixCache":
        """The same values as leaves that gather the gradient of what continues the prompts."""
        copy = PrefixCache(self.sizes, self.lengths.device)
        copy.keys = [k.detach().requires_grad_() for k in self.keys]
        copy.values = [v.detach().requires_grad_() for v in self.values]
        return copy


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], x [n, ...] and rows int64 [B], with a gradient that is bitwise the same each time.

    Where rows repeat, as those of a group do, the gradient of x[rows] is added up on a CPU by
    whichever thread comes first, and that of index_select on CUDA likewise; an embedding's is not.
    """
    return F.embedding(rows, x.flatten(1)).unflatten(1, x.shape[1:])


class Continuation:
    """Many tokens at once behind shared prompts: row i continues prompt rows[i] of the prefix.

    It attends to the keys of its prompt and causally to its own, and stores nothing.
    """

    def __init__(self, prefix: PrefixCache, rows: Sequence[int]):
        self.prefix = prefix
        self.rows = torch.tensor(rows, dtype=torch.long, device=prefix.lengths.device)
        sizes = [prefix.sizes[row] for row in rows]
        self.columns, self.padded = max(sizes), min(sizes) < max(sizes)

    def positions(self, width: int) -> Tensor:
        """Where in their texts the tokens stand [B, width]; prepares the mask [B, 1, width, S]."""
        device, lengths = self.rows.device, self.prefix.lengths[self.rows]
        place, self.mask = torch.arange(width, device=device), None
        if self.padded:
            column = torch.arange(self.columns + width, device=device)
            filled = column < lengths[:, None, None, None]
            own = column <= self.columns + place[:, None]
            self.mask = torch.where(column < self.columns, filled, own)
        return lengths[:, None] + place

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = self.prefix.keys[layer], self.prefix.values[layer]
        k, v = (torch.cat((take_rows(prompts[:, :, : self.columns], self.rows), own), dim=2)
                for prompts, own in zip(before, (k, v)))
        return attend(q, k, v, self.mask)


# ------------------------------------------------------------------------------ processes


def all_gather(value: object) -> list:
    """A small object of every process, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_sum(*values: float) -> list[float]:
    """The sum over all processes of each value, in float64."""
    return [float(sum(column)) for column in zip(*all_gather(values))]


def choose_device(name: str = "") -> torch.device:
    """This process's device: `name`, or the accelerator if there is one. ValueError if it is not
    on this machine."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = ["cpu"]
    if there is not None and there.type != "mps":  # Apple's has no float64, which sampling needs
        known.append(there.type)
    if name not in ("", *known):
        raise ValueError(f"--device {name}: this machine has {' and '.join(known)}")
    kind = name or known[-1]
    return torch.device(kind, None if kind == "cpu" else int(os.environ.get("LOCAL_RANK", 0)))


@contextlib.contextmanager
def unsharded(model: "Transformer") -> Iterator[None]:
    """Holds the whole weights on every process, so that decoding needs no collective and may differ
    in length. `no_grad`, because tensors of inference mode would poison the next training step."""
    shards = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module in shards:
            module.reshard()  # or the next forward pass would see the weights before the update
            module.set_reshard_after_forward(module is not model, recurse=False)


# ------------------------------------------------------------------------------ checkpoints


def resolve(path_or_hub_id: str | os.PathLike) -> Path:
    """The directory of a model: the path itself, or the snapshot of a hub id, Qwen/Qwen3-0.6B.

    huggingface_hub does the fetching, so HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE mean what they
    mean elsewhere.
    """
    path, name = Path(path_or_hub_id), str(path_or_hub_id)
    if path.is_dir():
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise FileNotFoundError(f"{name}: no such model directory (and not a hub id of the form "
                                "owner/name)")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except Exception as error:  # the hub's client has many; the user can do the same about each
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{name}: neither a directory nor available from the hub "
                                f"({reason})") from None


def read_json(path: Path) -> dict:
    """A JSON object from a file; a ValueError of one sentence for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return value


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a safetensors file, from its header alone."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or corrupt ({error})") from None


def indexed_files(directory: Path) -> list[Path]:
    """The files of a checkpoint: those that its index names, or all where there is none."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{directory}: no weights (model.safetensors or {index.name})")
        return files
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"{index}: weight_map is missing or malformed")
    for name in set(names.values()):
        if Path(name).name != name:
            raise ValueError(f"{index}: names {name!r}, which is outside {directory}")
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{index}: names {name!r}, which does not exist")
    return [directory / name for name in sorted(set(names.values()))]


def checkpoint_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint; ValueError where two files hold one tensor.

    torch's reader opens every file of the directory, whatever the index says: a stale one, left
    over from an export of another size, could give the weights.
    """
    files, origin, shapes = indexed_files(directory), {}, {}
    for file in sorted({*files, *directory.glob("*.safetensors")}):
        for name, shape in tensor_shapes(file).items():
            if name in origin and {file, origin[name]} & set(files):
                raise ValueError(f"{directory}: {name} is in both {origin[name].name} and "
                                 f"{file.name}; remove the stale file")
            origin[name] = file
            if file in files:
                shapes[name] = shape
    return shapes


def read_config(directory: Path) -> ModelConfig:
    """The ModelConfig of a model directory."""
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory}: no config.json")
    return ModelConfig.from_dict(read_json(directory / "config.json"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warning that a program of one process has no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def load_weights(model: Transformer, directory: Path) -> None:
    """Copies a checkpoint into the model's parameters, plain or sharded, converting dtype.

    No process holds the whole. Raises ValueError with the lists of missing, unexpected and
    misshapen tensors before anything is read.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    there, state = checkpoint_shapes(directory), model.state_dict()
    if model.lm_head is None:
        there.pop("lm_head.weight", None)  # some tied checkpoints repeat the embedding
    there = {n: shape for n, shape in there.items() if not n.endswith("rotary_emb.inv_freq")}
    misshapen = [f"{name} {list(there[name])} instead of {list(state[name].shape)}"
                 for name in sorted(set(state) & set(there)) if there[name] != state[name].shape]
    wrong = {"missing": sorted(set(state) - set(there)),
             "unexpected": sorted(set(there) - set(state)), "misshapen": misshapen}
    lists = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
    if lists:
        raise ValueError(f"{directory}: weights do not fit config.json: {lists}")
    with quiet():
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(directory)))


def load_pretrained(path_or_hub_id: str | os.PathLike, device: str | torch.device = "cpu",
                    dtype: torch.dtype = torch.float32) -> Transformer:
    """A model from a Hugging Face directory or hub id, on `device` in `dtype`."""
    directory = resolve(path_or_hub_id)
    with torch.device("meta"):
        model = Transformer(read_config(directory)).to(dtype)
    model.to_empty(device=device)
    load_weights(model, directory)
    return model


def save_pretrained(model: Transformer, directory: str | os.PathLike, tokenizer=None) -> None:
    """Writes config.json, safetensors in the config's dtype and the tokenizer's files.

    Every process calls it. A whole model is written by the first; of a sharded one each process
    writes its parts, which are then joined.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    directory, dtype, rank = Path(directory), DTYPES[model.config.dtype], rank_and_world()[0]
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    files, filled = {}, 0
    for name, tensor in state.items():
        filled += tensor.nbytes
        files[name] = 1 + filled // FILE_BYTES
    sharded = any(hasattr(tensor, "full_tensor") for tensor in state.values())
    writer = HuggingFaceStorageWriter(str(directory), fqn_to_index_mapping=files,
                                      save_distributed=sharded, enable_consolidation=sharded)
    if sharded or rank == 0:
        with quiet():
            dcp.save(state, storage_writer=writer, no_dist=not sharded)
    if sharded and rank == 0:
        shutil.rmtree(directory / "sharded")
    (directory / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(directory)
