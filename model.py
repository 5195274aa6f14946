"""A Qwen2 / Qwen3 / Llama decoder, its caches, and Hugging Face checkpoints in and out.

The three families are one architecture (pre-norm blocks, RMSNorm, rotary positions, grouped-query attention,
SwiGLU) with four differences, all of them in ModelConfig: bias on q/k/v, normalised q and k, explicit head size,
tied head. Parameter names are those of the checkpoint files, so a state dict *is* a checkpoint.

What a forward pass attends to is decided by its cache, and the caches follow the structure of the method, in which
the G completions of a group share one prompt:

    model(ids)                              plain causal attention
    model(prompts, prompt := Segment(...))  the same, and keeps the keys and values (with their graph, if any)
    model(completions, Segment(..., prompt, rows))   many tokens at once after a shared prompt: training
    model(tokens, DecodeCache)              one token per row after a shared prompt: sampling (see sampler.py)

Left out: dropout, sliding windows, quantisation, mixtures of experts. A config that asks for one is refused by name.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# torch's checkpoints and sharded tensors take a second to import: that is done where they are used, not before --help.

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_HEADER = 100 * 2**20  # bytes; safetensors' own limit for the JSON header of a file
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
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # None, or rope_type "llama3" / "yarn" with its own keys
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
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
            kind, heads, bias = hf["model_type"], hf["num_attention_heads"], hf.get("attention_bias", False)
            theta, scaling = rope_settings(hf)
            config = cls(
                model_type=kind, vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"],
                intermediate_size=hf["intermediate_size"], num_hidden_layers=hf["num_hidden_layers"],
                num_attention_heads=heads, num_key_value_heads=hf.get("num_key_value_heads") or heads,
                head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
                max_position_embeddings=hf.get("max_position_embeddings", 32768),
                rms_norm_eps=hf.get("rms_norm_eps", 1e-6) * 1.0, rope_theta=theta, rope_scaling=scaling,
                tie_word_embeddings=hf.get("tie_word_embeddings", False),
                qkv_bias=kind == "qwen2" or bias, o_bias=kind != "qwen2" and bias, mlp_bias=hf.get("mlp_bias", False),
                qk_norm=kind == "qwen3", dtype=str(hf.get("dtype") or hf.get("torch_dtype") or "float32"),
                bos_token_id=hf.get("bos_token_id"), eos_token_id=hf.get("eos_token_id"))
            config._check()
        except KeyError as missing:
            raise ValueError(f"config.json: the key {missing} is missing") from None
        except (TypeError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"config.json: a value is of the wrong type or size ({error})") from None
        return config

    def _check(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or not 0 < value < 2**31):
                raise ValueError(f"config.json: {field.name} must be a positive whole number, not {value!r}")
            if field.type is float and not 0 < value < math.inf:
                raise ValueError(f"config.json: {field.name} must be a positive number, not {value!r}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"config.json: {field.name} (or attention_bias) must be true or false, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError("config.json: num_attention_heads must be a multiple of num_key_value_heads, "
                             "head_dim even")
        if self.dtype not in DTYPES:
            raise ValueError(f"config.json: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    def to_dict(self) -> dict:
        """A config.json that transformers 4 and 5 and vLLM read."""
        hf = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("qkv_bias", "o_bias", "qk_norm")}
        return hf | {
            "architectures": [{"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[self.model_type] + "ForCausalLM"],
            "torch_dtype": self.dtype, "hidden_act": "silu", "use_cache": True, "initializer_range": 0.02,
            "attention_bias": self.o_bias}


def refuse_unsupported(hf: dict) -> None:
    """ValueError, naming the key, for a config.json whose model this module does not compute faithfully."""
    if hf.get("model_type") not in ("qwen2", "qwen3", "llama"):
        raise ValueError(f"config.json: model_type {hf.get('model_type')!r} is not one of qwen2, qwen3, llama")
    if hf.get("quantization_config"):
        raise ValueError("config.json: quantization_config: quantized weights are not supported; use the original")
    if hf.get("use_sliding_window") or "sliding_attention" in str(hf.get("layer_types")):
        raise ValueError("config.json: sliding window attention (use_sliding_window / layer_types) is not supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported, only silu")


def rope_settings(hf: dict) -> tuple[float, dict | None]:
    """rope_theta, and the scaling of Llama 3 or YaRN with its own keys, if any."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_parameters / rope_scaling must be an object, not {rope!r}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = (rope.get("rope_theta") or hf.get("rope_theta", 10000.0)) * 1.0  # a string or a list is a TypeError
    keys = {k: v for k, v in rope.items() if v is not None and k not in ("rope_type", "type", "rope_theta")}
    needed = {"default": set(), "llama3": {"factor", "low_freq_factor", "high_freq_factor"}, "yarn": {"factor"}}
    optional = {"original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"}
    if kind not in needed or not needed[kind] <= set(keys) <= needed[kind] | optional:
        raise ValueError(f"config.json: rope_type {kind!r} with keys {sorted(keys)} is not supported")
    if wrong := [k for k, v in keys.items() if k != "truncate" and not 0 < v < math.inf]:
        raise ValueError(f"config.json: rope {wrong[0]} must be a positive number, not {keys[wrong[0]]!r}")
    return theta, {"rope_type": kind, **keys} if kind != "default" else None


# ---------------------------------------------------------------------------------------------- the network


def rope_frequencies(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """Angle per position of each pair of channels [head_dim / 2], float32, and the factor on cos and sin.

    Plain (Su et al. 2021), Llama-3 (long waves slowed by `factor`) and YaRN (Peng et al. 2023, section 3.2 and 3.4).
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

    def channel(rotations: float) -> float:  # the pair that turns so often within the original context
        return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel(scaling.get("beta_fast") or 32), channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    pair = torch.arange(d // 2, device=device, dtype=torch.float32)
    slow = ((pair - first) / max(last - first, 0.001)).clamp(0, 1)
    return plain * (1 - slow) + plain / factor * slow, scaling.get("attention_factor") or 0.1 * math.log(factor) + 1


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, heads, T, head_dim]; channel i turns with channel i + head_dim / 2.

    The first half of `sin` is negated.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention; q [B, heads, T, d], k and v [B, kv_heads, S, d] -> [B, T, heads * d].

    Without a mask it is causal, the last query on the last key (`is_causal` alone would align the *first* ones).
    With a boolean mask [B or 1, 1, T, S], the queries of the heads that share a key head are laid one after the
    other, so that no kernel has to expand the keys.
    """
    B, heads, T, d = q.shape
    if mask is None and T == k.shape[2]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    elif mask is None:
        from torch.nn.attention.bias import causal_lower_right  # loads the compiler: not before it is needed
        bias = causal_lower_right(T, k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    else:
        repeats = heads // k.shape[1]
        q = q.reshape(B, k.shape[1], repeats * T, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, repeats, 1))
        out = out.reshape(B, heads, T, d)
    return out.transpose(1, 2).reshape(B, T, heads * d)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation: in float32, rounded, then scaled, the order of the published models."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, hidden_size] -> queries [B, heads, T, head_dim], keys and values [B, kv_heads, T, head_dim]."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
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
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.checkpoint_activations = layer, False
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self._forward, x, rope, cache, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x, rope, cache)

    def _forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache) -> Tensor:
        q, k, v = self.before(x, rope)
        return self.after(x, attend(q, k, v) if cache is None else cache.attend(self.layer, q, k, v))

    def before(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn(self.input_layernorm(x), rope)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the part of the model whose names begin with `model.`"""

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
        self.config, self.compiled = config, False
        self.model = Decoder(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, cache=None) -> Tensor:
        """ids [B, T] -> hidden [B, T, hidden_size] after the final norm, in the dtype of the weights."""
        width = ids.shape[1]
        positions = torch.arange(width, device=ids.device)[None] if cache is None else cache.positions(width)
        frequencies, scale = rope_frequencies(self.config, ids.device)
        angles = (positions[..., None].float() * frequencies)[:, None]  # [B or 1, 1, T, head_dim / 2]
        x = self.model.embed_tokens(ids)
        cos, sin = (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)
        rope = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        for block in self.model.layers:
            x = block(x, rope, cache)
        return self.model.norm(x)

    def compile_blocks(self) -> None:
        """Has torch.compile fuse the small operations of blocks and of decoding; one compilation serves all layers."""
        self.compiled = True
        for block in self.model.layers:
            block.before, block.after = (torch.compile(f, dynamic=True) for f in (block.before, block.after))

    @property
    def head(self) -> Tensor:
        """The output matrix [vocab_size, hidden_size]; the embedding itself where weights are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden_size] -> float32 logits [..., vocab_size]."""
        return F.linear(hidden, self.head).float()


def forward_flops(config: ModelConfig, tokens: float, context: float) -> float:
    """Floating-point operations of a forward pass over `tokens`, each attending to `context` others on average.

    Two per weight of every matrix and token, and four per channel of the queries and attended token.
    """
    c = config
    width, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = 2 * c.hidden_size * (width + kv) + 3 * c.hidden_size * c.intermediate_size
    weights = c.num_hidden_layers * block + c.vocab_size * c.hidden_size
    return tokens * (2 * weights + 4 * c.num_hidden_layers * width * context)


# ---------------------------------------------------------------------------------------------- the cache


class Segment:
    """Keys and values of a right-padded batch of token runs, each of which may continue a row of `parent`.

    A prompt is a Segment without a parent. The completions of its group are a Segment whose rows all name that
    prompt: its keys and values are computed once and, in training, receive the gradient of every completion. Padding
    stands on the right, so a causal mask already hides it from the run itself; only descendants have to mask it.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, parent: "Segment | None" = None,
                 rows: Sequence[int] = (), at: Sequence[int] | None = None):
        """lengths: tokens of each run. rows: which row of `parent` each run continues. at: after which of its
        tokens (default: its last)."""
        self.parent, self.device = parent, device
        self.keys: dict[int, Tensor] = {}  # by layer, [B, kv_heads, T, head_dim]
        self.values: dict[int, Tensor] = {}
        starts = [0] * len(lengths) if parent is None else at or [parent.ends[r] for r in rows]
        self.ends = [start + length for start, length in zip(starts, lengths)]
        self.whole = parent is None or parent.gapless and set(starts) == set(parent.ends)  # no column to mask
        self.gapless = self.whole and len(set(self.ends)) == 1
        self.rows = torch.tensor(rows, dtype=torch.long, device=device)
        self.starts = torch.tensor(starts, device=device)
        self.lengths = torch.tensor(list(lengths), device=device)

    def positions(self, width: int) -> Tensor:
        return self.starts[:, None] + torch.arange(width, device=self.device)

    def valid(self, width: int) -> Tensor:
        """Which columns of this segment, behind those of its ancestors, hold a token: [B, columns]."""
        own = torch.arange(width, device=self.device) < self.lengths[:, None]
        return own if self.parent is None else torch.cat((self._parent_valid(), own), dim=1)

    def _parent_valid(self) -> Tensor:
        valid = self.parent.valid(self.parent.keys[0].shape[2])[self.rows]
        return valid & (valid.cumsum(1) <= self.starts[:, None])

    def all_keys(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the ancestors and of this segment, [B, kv_heads, columns, head_dim]."""
        k, v = self.keys[layer], self.values[layer]
        if self.parent is None:
            return k, v
        before_k, before_v = self.parent.all_keys(layer)
        return torch.cat((before_k[self.rows], k), dim=2), torch.cat((before_v[self.rows], v), dim=2)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys[layer], self.values[layer] = k, v
        if self.parent is None:
            return attend(q, k, v)
        if layer == 0:
            self.mask = None if self.whole else self._mask(q.shape[2])
        return attend(q, *self.all_keys(layer), self.mask)

    def _mask(self, width: int) -> Tensor:
        before = self._parent_valid()[:, None].expand(-1, width, -1)
        own = torch.ones(width, width, dtype=torch.bool, device=self.device).tril().expand(len(before), -1, -1)
        return torch.cat((before, own), dim=2)[:, None]


# ---------------------------------------------------------------------------------------------- processes


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


# ---------------------------------------------------------------------------------------------- checkpoints


def resolve(path_or_hub_id: str | os.PathLike) -> Path:
    """The directory of a model: the path itself, or the downloaded snapshot of a hub id such as Qwen/Qwen3-0.6B.

    huggingface_hub does the fetching, so HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE mean what they mean elsewhere.
    """
    path, name = Path(path_or_hub_id), str(path_or_hub_id)
    if path.is_dir():
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise FileNotFoundError(f"{name}: no such model directory (and not a hub id of the form owner/name)")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub's client has many; whichever it was, the user can do the same about it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{name}: neither a directory nor available from the hub ({reason})") from None


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
    """Name -> shape of the tensors in a safetensors file, from its header, checked before anything is allocated."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"{file}: truncated or corrupt (its header claims {length} bytes, the file has {size})")
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            ends = [int(entry["data_offsets"][1]) for entry in header.values()]
            shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
            raise ValueError(f"{file}: corrupt safetensors header") from None
    if max(ends, default=0) != size - 8 - length:
        raise ValueError(f"{file}: truncated or corrupt (tensors end at byte {max(ends, default=0)} of "
                         f"{size - 8 - length})")
    return shapes


def checkpoint_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint directory, from its one file or its index and shards."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{directory}: no weights (model.safetensors or model.safetensors.index.json)")
    else:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise ValueError(f"{index}: weight_map is missing or malformed")
        files = [directory / name for name in sorted(set(names.values()))]
        for file in files:
            if file.parent != directory or file.name in ("", ".."):
                raise ValueError(f"{index}: names {file.name!r}, which is outside {directory}")
            if not file.is_file():
                raise FileNotFoundError(f"{index}: names {file.name}, which does not exist")
    found, there = {}, {}
    for file in sorted({*files, *directory.glob("*.safetensors")}):  # the reader opens all, whatever the index says
        for name, shape in tensor_shapes(file).items():
            if name in found and {file, found[name]} & set(files):
                raise ValueError(f"{directory}: {name} is in both {found[name].name} and {file.name}; remove the stale "
                                 "file")
            found[name] = file
            if file in files:
                there[name] = shape
    return there


def read_config(directory: Path) -> ModelConfig:
    """The ModelConfig of a model directory."""
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory}: no config.json")
    return ModelConfig.from_dict(read_json(directory / "config.json"))


def load_weights(model: Transformer, directory: Path) -> None:
    """Copies a checkpoint into the model's parameters, plain or sharded, converting dtype; no rank holds it whole.

    Raises ValueError with the lists of missing, unexpected and misshapen tensors before anything is read.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    there, state = checkpoint_shapes(directory), model.state_dict()
    if model.lm_head is None:
        there.pop("lm_head.weight", None)  # some tied checkpoints repeat the embedding
    there = {name: shape for name, shape in there.items() if not name.endswith("rotary_emb.inv_freq")}
    wrong = {"missing": sorted(set(state) - set(there)), "unexpected": sorted(set(there) - set(state)),
             "misshapen": [f"{n} {list(there[n])} instead of {list(state[n].shape)}"
                           for n in sorted(set(state) & set(there)) if there[n] != tuple(state[n].shape)]}
    if any(wrong.values()):
        lists = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise ValueError(f"{directory}: weights do not fit config.json: {lists}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # that there is one process is no news
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
    """Writes config.json, safetensors in the config's dtype and the tokenizer's files; every rank calls it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    directory, dtype = Path(directory), DTYPES[model.config.dtype]
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    files, filled = {}, 0
    for name, tensor in state.items():
        filled += tensor.numel() * tensor.element_size()
        files[name] = 1 + filled // FILE_BYTES
    sharded = any(hasattr(tensor, "full_tensor") for tensor in state.values())
    writer = HuggingFaceStorageWriter(str(directory), fqn_to_index_mapping=files, save_distributed=sharded,
                                      enable_consolidation=sharded)
    if sharded:
        dcp.save(state, storage_writer=writer)
        if rank_and_world()[0] == 0:
            shutil.rmtree(directory / "sharded")  # the parts, after they have been joined
    elif rank_and_world()[0] == 0:  # a whole model that every process holds is written by one
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")
            dcp.save(state, storage_writer=writer, no_dist=True)
    (directory / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(directory)
