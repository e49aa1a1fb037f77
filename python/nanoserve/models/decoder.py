"""One decoder, described as data: the list of operations of a forward pass and the weights each reads.

    embedding (* scale) (+ learned positions)
    per layer:  (norm) -> qkv GEMM -> (QK-norm) + (RoPE) + KV write -> paged attention -> output GEMM
                (norm) -> up (or gate and up) GEMM with its activation -> down GEMM
                each half ends on the residual stream: added by its GEMM, or normed first and added by the norm
    rows that sample:  gather + final norm -> head GEMM -> logits -> the largest of each block of them

The residual stream, what projections give, and logits are float32. The rows that GEMMs read have the precision's type, and
whatever makes them writes them so; where a maker sees only a part of a row that needs a scale of its own, Convert follows.

The list knows nothing of a backend: executor.py binds it to compiled kernels, a test could interpret it in NumPy. A new
family changes a ModelConfig and a row of weight_names.py, not this file, as long as it is made of these parts.

Buffers are activations named by what they hold: `x` residual stream, `h` normed input, `qkv`, `att` attention output,
`mlp` hidden layer, `y` what a half of a layer gave, before its own norm, `last` the gathered rows; `att_in` and `mlp_in` are
`att` and `mlp` converted.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from nanoserve.models.config import ModelConfig
from nanoserve.models.rope import Rope


@dataclass(frozen=True, slots=True)
class Embedding:
    """out[row] = table[id] * scale (+ pos_table[position])."""

    out: str
    table: str
    pos_table: str | None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Norm:
    """out = norm(x) * weight (+ bias), added to out when `residual`; with `gather` only rows that sample, compacted."""

    x: str
    out: str
    weight: str
    bias: str | None
    cols: int
    kind: str = "rmsnorm"
    gather: bool = False
    residual: bool = False


@dataclass(frozen=True, slots=True)
class Gemm:
    """out[m, n] = cap(act(sum_k x[m, k] * weight[n, k] + bias[n]) * scale) (+ out[m, n] when residual).

    cap(v) = softcap * tanh(v / softcap) unless softcap is 0. When `gated`, weight and bias have n_out rows of a gate before
    the n_out others, and out = act(gate) * other. `out` may be "logits".
    """

    x: str
    out: str
    weight: str
    n_in: int
    n_out: int
    bias: str | None = None
    activation: str | None = None
    residual: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    gated: bool = False


@dataclass(frozen=True, slots=True)
class KvWrite:
    """Norm q and k of each qkv row ("head": each head by itself, "row": all heads together), rotate them unless `rope` is
    None, and write k, v into the row's page slot."""

    qkv: str
    layer: int
    rope: Rope | None
    qk_norm: str | None
    q_weight: str
    k_weight: str


@dataclass(frozen=True, slots=True)
class Attention:
    """out = causal attention of the q columns of `qkv` over the layer's pages, the last `window` keys of them (0: all)."""

    qkv: str
    out: str
    layer: int
    window: int = 0


@dataclass(frozen=True, slots=True)
class Convert:
    """out = x in the type that GEMMs read."""

    x: str
    out: str
    cols: int


@dataclass(frozen=True, slots=True)
class BlockMax:
    """The largest of each block of `cols` logits, NaN where one is not finite."""

    cols: int


Op = Embedding | Norm | Gemm | KvWrite | Attention | Convert | BlockMax


@dataclass(frozen=True, slots=True)
class Buffer:
    """Activations: columns of an element type ("f32", "bf16", "u8"; the last with a float32 scale per row)."""

    cols: int
    element: str = "f32"


def buffers(config: ModelConfig, gemm_input: str = "f32") -> dict[str, Buffer]:
    """The activation buffers by name."""
    heads = config.n_head * config.dim_per_head
    # A head, or a panel of columns, is not a whole row: what needs a scale per row is converted afterwards.
    partial = "f32" if gemm_input == "u8" else gemm_input
    made = {
        "x": Buffer(config.n_embd),
        "qkv": Buffer(heads + 2 * config.kv_heads * config.dim_per_head),
        "att": Buffer(heads, partial),
        "mlp": Buffer(config.mlp_width, partial),
        "last": Buffer(config.n_embd, gemm_input),
    }
    if config.pre_norm or gemm_input != "f32":
        made["h"] = Buffer(config.n_embd, gemm_input)
    if config.post_norm:
        made["y"] = Buffer(config.n_embd)
    if partial != gemm_input:
        made |= {f"{name}_in": Buffer(made[name].cols, gemm_input) for name in ("att", "mlp")}
    return made


def forward_ops(config: ModelConfig, gemm_input: str = "f32") -> Iterator[Op]:
    """The forward pass in execution order; `gemm_input` is the element type of the rows that GEMMs read."""
    embedding = None if config.positions == "rope" else "pos_embed.weight"
    yield Embedding("x", "embed.weight", embedding, config.embedding_scale)
    for i in range(config.n_layer):
        yield from _attention_half(config, i, gemm_input)
        yield from _mlp_half(config, i, gemm_input)
    yield _norm(config, "x", "last", "final_norm", gather=True)
    yield Gemm(
        "last", "logits", "head.weight", config.n_embd, config.vocab_size,
        scale=config.logits_scale, softcap=config.logits_softcap,
    )  # fmt: skip
    yield BlockMax(config.vocab_size)


def _attention_half(config: ModelConfig, layer: int, gemm_input: str) -> Iterator[Op]:
    at, dim = f"layers.{layer}", config.dim_per_head
    heads, kv = config.n_head * dim, config.kv_heads * dim
    source = yield from _normed_input(config, f"{at}.attn_norm", gemm_input)
    bias = _bias(config.qkv_bias, f"{at}.qkv")
    yield Gemm(source, "qkv", f"{at}.qkv.weight", config.n_embd, heads + 2 * kv, bias)
    yield KvWrite(
        "qkv", layer, config.layer_rope(layer), config.qk_norm, f"{at}.q_norm.weight", f"{at}.k_norm.weight"
    )
    yield Attention("qkv", "att", layer, config.window(layer))
    yield from _onto_residual(
        config, "att", f"{at}.out", f"{at}.attn_post_norm", heads, config.out_bias, gemm_input
    )


def _mlp_half(config: ModelConfig, layer: int, gemm_input: str) -> Iterator[Op]:
    at, c, width, gated = f"layers.{layer}", config.n_embd, config.mlp_width, config.gated_mlp
    source = yield from _normed_input(config, f"{at}.mlp_norm", gemm_input)
    up = f"{at}.gate_up" if gated else f"{at}.up"
    bias = _bias(config.mlp_bias, up)
    yield Gemm(source, "mlp", f"{up}.weight", c, width, bias, config.activation, gated=gated)
    yield from _onto_residual(
        config, "mlp", f"{at}.down", f"{at}.mlp_post_norm", width, config.mlp_bias, gemm_input
    )


def _normed_input(config: ModelConfig, name: str, gemm_input: str) -> Generator[Op, None, str]:
    """What the first GEMM of half a layer reads, and where."""
    if config.pre_norm:
        yield _norm(config, "x", "h", name)
    elif gemm_input != "f32":
        yield Convert("x", "h", config.n_embd)
    else:
        return "x"
    return "h"


def _onto_residual(
    config: ModelConfig, x: str, gemm: str, norm: str, n_in: int, bias: bool, gemm_input: str
) -> Iterator[Op]:
    """The last GEMM of half a layer, and its way onto the residual stream."""
    normed, c = config.post_norm, config.n_embd
    if gemm_input == "u8":
        yield Convert(x, f"{x}_in", n_in)
        x = f"{x}_in"
    yield Gemm(
        x, "y" if normed else "x", f"{gemm}.weight", n_in, c, _bias(bias, gemm),
        residual=not normed, scale=config.residual_scale,
    )  # fmt: skip
    if normed:
        yield _norm(config, "y", "x", norm, residual=True)


def _norm(
    config: ModelConfig, x: str, out: str, name: str, *, gather: bool = False, residual: bool = False
) -> Norm:
    bias = _bias(config.norm == "layernorm", name)
    return Norm(x, out, f"{name}.weight", bias, config.n_embd, config.norm, gather, residual)


def _bias(there: bool, name: str) -> str | None:
    return f"{name}.bias" if there else None


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight the forward pass reads, in the order it reads them.

    A tied head is not a weight of its own: `head.weight` is left out and `embed.weight` serves both.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for op in forward_ops(config):
        if isinstance(op, Embedding):
            shapes[op.table] = (config.vocab_size, config.n_embd)
            if op.pos_table:
                shapes[op.pos_table] = (config.max_seq_len, config.n_embd)
        elif isinstance(op, Norm):
            shapes[op.weight] = (op.cols,)
            if op.bias:
                shapes[op.bias] = (op.cols,)
        elif isinstance(op, Gemm):
            if op.weight == "head.weight" and config.tie_embeddings:
                continue
            rows = 2 * op.n_out if op.gated else op.n_out
            shapes[op.weight] = (rows, op.n_in)
            if op.bias:
                shapes[op.bias] = (rows,)
        elif isinstance(op, KvWrite) and op.qk_norm is not None:
            dim, by_head = config.dim_per_head, op.qk_norm == "head"
            shapes[op.q_weight] = (dim if by_head else config.n_head * dim,)
            shapes[op.k_weight] = (dim if by_head else config.kv_heads * dim,)
    return shapes


def gemm_weights(config: ModelConfig) -> set[str]:
    """Names of the weights that are packed for GEMMs; a tied head goes by its embedding's."""
    names = {op.weight for op in forward_ops(config) if isinstance(op, Gemm)}
    return names - {"head.weight"} | {"embed.weight"} if config.tie_embeddings else names


def num_parameters(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in weight_shapes(config).values())
