"""A Qwen2 / Qwen3 / Llama decoder, its prompt cache for training, and Hugging Face checkpoints.

The three families are one architecture: pre-norm blocks, RMSNorm, rotary positions, grouped-query
attention, SwiGLU. Parameter names are those of the checkpoint files, so a state dict *is* a
checkpoint. The cache that is passed to a forward pass decides what its tokens attend to:

    model(ids)                                   plain causal attention
    model(prompts, cache := Prompts(...))        the same, and keeps keys and values with gradients
    model(responses, Continuation(cache, rows))  row i continues prompt rows[i]: training
    model(tokens, KVCache)                       one token per row: sampler.py

Not supported, and refused by name: other families, sliding windows, YaRN, quantized weights.
Letters in shapes: B rows, T tokens, P columns of prompts, d channels of a head.
"""

import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.utils.checkpoint import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES = ("qwen2", "qwen3", "llama")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs no group


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, in the names of Hugging Face's config.json."""

    hf: dict  # config.json as it was read, to be saved with the model
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: dict | None  # Llama 3's, with its own keys
    attention_bias: bool = False  # Qwen2 has a bias on q, k and v whatever this says
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6

    @classmethod
    def from_dict(cls, hf: dict) -> "ModelConfig":
        """Read config.json as transformers 4 or 5 writes it. Raise ValueError, naming the key, for
        anything that this module would not compute faithfully."""
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        refused = {"model_type": hf.get("model_type") not in FAMILIES,
                   "rope_type": kind not in ("default", "llama3"),
                   "use_sliding_window": hf.get("use_sliding_window"),
                   "hidden_act": hf.get("hidden_act", "silu") != "silu"}
        if keys := [f"{key} {hf.get(key, kind)!r}" for key, bad in refused.items() if bad]:
            raise ValueError(f"config.json: {' and '.join(keys)} is not supported")
        heads = hf["num_attention_heads"]
        known = {field.name: hf[field.name] for field in fields(cls) if field.name in hf}
        return cls(**known | {
            "hf": hf, "num_key_value_heads": hf.get("num_key_value_heads") or heads,
            "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
            "rope_theta": rope.get("rope_theta") or hf.get("rope_theta", 10000.0),
            "rope_scaling": rope if kind == "llama3" else None})


# ------------------------------------------------------------------------------ the network


def rope(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin [B or 1, 1, T, d] for positions [B or 1, T]. The angles are float32."""
    channels = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequencies = config.rope_theta ** -(channels.float() / config.head_dim)
    if scaling := config.rope_scaling:  # Llama 3 turns slow channels even slower, by `factor`
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / scaling["factor"])
    angles = (positions[..., None].float() * frequencies)[:, None].repeat(1, 1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x [B, heads, T, d]: channel i rotates with channel i + d / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend from q [B, heads, T, d] to k and v [B, kv_heads, S, d]; returns [B, T, heads * d].

    mask: bool [B, 1, T, S]; without one attention is causal, and S must be T.
    """
    if mask is not None:  # CUDA's memory-efficient kernel needs as many key heads as query heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                         enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


class RMSNorm(nn.RMSNorm):
    """Normalise in float32, round to x's dtype, then scale: the order of the published models."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim, bias = c.head_dim, c.attention_bias or c.model_type == "qwen2"
        width, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=bias)
        self.o_proj = nn.Linear(width, c.hidden_size, bias=c.attention_bias)
        self.q_norm = self.k_norm = nn.Identity()
        if c.model_type == "qwen3":
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map x [B, T, hidden_size] to q [B, heads, T, d] and to k, v [B, kv_heads, T, d]."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer. With checkpoint_activations, backward recomputes all but the layer's input."""

    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.checkpoint_activations = layer, False
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, *inputs) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self.compute, *inputs, use_reentrant=False)
        return self.compute(*inputs)

    def compute(self, x: Tensor, cos: Tensor, sin: Tensor, cache) -> Tensor:
        q, k, v = self.self_attn(self.input_layernorm(x), cos, sin)
        attended = attend(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the part whose parameter names begin with `model.`"""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Transformer(nn.Module):
    """The decoder and its head: `model(ids, cache) -> hidden`, `model.logits(hidden)`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.model, self.lm_head = config, Decoder(config), None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, cache=None) -> Tensor:
        """Map ids [B, T] to hidden [B, T, hidden_size] after the final norm."""
        width = ids.shape[1]
        positions = (torch.arange(width, device=ids.device)[None] if cache is None
                     else cache.positions(width))
        x = self.model.embed_tokens(ids)
        cos, sin = rope(self.config, positions, x.dtype)
        for block in self.model.layers:
            x = block(x, cos, sin, cache)
        return self.model.norm(x)

    @property
    def head(self) -> Tensor:
        """The output matrix [vocab_size, hidden_size], which is the embedding if they are tied."""
        return (self.lm_head or self.model.embed_tokens).weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden [..., hidden_size] to float32 logits [..., vocab_size]."""
        return F.linear(hidden, self.head).float()


# ------------------------------------------------------------------------------ prompt caches


class Prompts:
    """Keys and values of right-padded prompts, computed once for all rows that continue them.

    Padding needs no mask here, because a causal mask hides what stands on the right.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.lengths = torch.tensor(lengths, device=device)
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys, values [n, kv_heads, P, d]

    def positions(self, width: int) -> Tensor:
        return torch.arange(width, device=self.lengths.device)[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer == len(self.layers):  # not again when activations are recomputed
            self.layers.append((k, v))
        return attend(q, k, v)


class Continuation:
    """A forward pass over responses to shared prompts: row i continues prompt rows[i]."""

    def __init__(self, prompts: Prompts, rows: Tensor):
        self.prompts, self.rows = prompts, rows

    def positions(self, width: int) -> Tensor:
        """Return positions [B, width] in each row's text; set the mask [B, 1, width, P + width]."""
        lengths = self.prompts.lengths[self.rows, None]
        columns = torch.arange(self.prompts.layers[0][0].shape[2], device=lengths.device)
        place = torch.arange(width, device=lengths.device)
        prompt = (columns < lengths)[:, None].expand(-1, width, -1)
        own = (place <= place[:, None]).expand(len(lengths), -1, -1)
        self.mask = torch.cat((prompt, own), dim=2)[:, None]
        return lengths + place

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.cat((take_rows(shared, self.rows), own), dim=2)
                for shared, own in zip(self.prompts.layers[layer], (k, v)))
        return attend(q, k, v, self.mask)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return x[rows] with a bitwise reproducible gradient.

    Where rows repeat, threads add up the gradient of an indexing in any order. The gradient of an
    embedding has a fixed order.
    """
    return F.embedding(rows, x.flatten(1)).unflatten(1, x.shape[1:])


def pad(sequences: Sequence[Sequence], device: torch.device, dtype=torch.long) -> Tensor:
    """Return sequences as one right-padded tensor [n, longest]."""
    rows = [torch.tensor(sequence, dtype=dtype, device="cpu") for sequence in sequences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


def last_hidden(model: Transformer, sequences: Sequence[Sequence[int]], cache=None) -> Tensor:
    """Return the hidden state [n, hidden_size] that predicts the token after each sequence."""
    hidden = model(pad(sequences, model.head.device), cache)
    return hidden[range(len(sequences)), [len(sequence) - 1 for sequence in sequences]]


# ------------------------------------------------------------------------------ processes


def rank_and_world() -> tuple[int, int]:
    """Return this process's number and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    """Tell whether this process writes and speaks for all."""
    return rank_and_world()[0] == 0


def all_gather(value: object) -> list:
    """Return one object from each process, in the order of ranks."""
    values = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def all_sum(*values: float) -> list[float]:
    """Return the sum of each value over all processes, in float64."""
    return [float(sum(column)) for column in zip(*all_gather(values))]


@contextmanager
def unsharded(model: Transformer) -> Iterator[None]:
    """Hold the whole weights on every process, beside its float32 shard, without gradients.

    Decoding then needs no collective, so processes may decode for different numbers of steps.
    (FSDP2 refuses to train after a first forward pass in inference_mode; no_grad is fine.)
    """
    shards = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module in shards:
            module.reshard()  # a forward pass after optimizer.step() would use the old weights
            module.set_reshard_after_forward(module is not model, recurse=False)


# ------------------------------------------------------------------------------ checkpoints


def resolve(name: str | os.PathLike) -> Path:
    """Return the directory of a model: the path itself, or the snapshot of a hub id."""
    if Path(name).is_dir():
        return Path(name)
    try:
        patterns = ["*.json", "*.jinja", "model*.safetensors"]
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds
        raise FileNotFoundError(f"{name}: no such directory, and not available from the hub "
                                f"({str(error).splitlines()[0]})") from None


def shapes_of(directory: Path) -> dict[str, torch.Size]:
    """Return the shape of each tensor in a directory's safetensors files."""
    metadata = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    return {name: tensor.size for name, tensor in metadata.items()}


def read_config(directory: Path) -> ModelConfig:
    """Read a directory's config.json.

    The weights decide whether the head is tied. Fine-tuned and merged checkpoints often hold a head
    of their own although config.json still says tie_word_embeddings.
    """
    hf, there = json.loads((directory / "config.json").read_bytes()), shapes_of(directory)
    if hf.get("tie_word_embeddings") and {EMBEDDING, HEAD} <= there.keys():
        both = {name: torch.empty(there[name]) for name in (EMBEDDING, HEAD)}
        dcp.load(both, storage_reader=HuggingFaceStorageReader(str(directory)))
        hf["tie_word_embeddings"] = torch.equal(both[EMBEDDING], both[HEAD])
    return ModelConfig.from_dict(hf)


def load_weights(model: Transformer, directory: Path) -> None:
    """Copy a checkpoint into the parameters, plain or sharded; each process reads its own part.

    Raise ValueError for tensors that are missing, misshapen, or unknown to the model. Quantized
    weights and unsupported biases show up as unknown tensors.
    """
    state, there = model.state_dict(), shapes_of(directory)
    if model.lm_head is None and HEAD in there:
        if EMBEDDING in there:
            del there[HEAD]  # an equal copy, see read_config
        else:
            state[HEAD] = state.pop(EMBEDDING)  # a tied file may keep either name
    wrong = [name for name in sorted(state.keys() | there.keys())
             if name not in state or there.get(name) != state[name].shape]
    if wrong:
        raise ValueError(f"{directory}: these weights are missing, unknown, or have another shape "
                         f"than config.json says: {', '.join(wrong[:8])}")
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(directory)))


def load_pretrained(name: str | os.PathLike, device: str | torch.device = "cpu",
                    dtype: torch.dtype = torch.float32) -> Transformer:
    """Load a model from a Hugging Face directory or hub id."""
    directory = resolve(name)
    config = read_config(directory)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    load_weights(model, directory)
    return model


def save_pretrained(model: Transformer, directory: str | os.PathLike, tokenizer=None) -> None:
    """Write config.json, safetensors in the config's dtype, and the tokenizer's files.

    Every process must call this. Rank 0 gathers the tensors in its memory and writes the files.
    """
    directory, state = Path(directory), {}
    hf = model.config.hf | {"tie_word_embeddings": model.lm_head is None}
    dtype = DTYPES[hf.get("dtype") or hf.get("torch_dtype") or "float32"]
    for name, tensor in model.state_dict().items():
        tensor = tensor.to(dtype)
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if rank_and_world()[0] == 0:
            state[name] = whole.cpu()
    if state:
        directory.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(state, directory)
        (directory / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(directory)
