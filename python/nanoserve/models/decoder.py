"""One decoder, described as data: the list of operations of a forward pass and the weights each reads.

    embedding (* scale) (+ learned positions)
    per layer:  (norm) -> qkv GEMM -> (QK-norm) -> (RoPE) + KV write -> paged attention -> output GEMM
                (norm) -> up (or gate|up) GEMM -> activation -> down GEMM
                each half ends on the residual stream: added by its GEMM, or normed first and added by the norm
    rows that sample:  gather + final norm -> head GEMM -> logits -> the largest of each block of them

The list knows nothing of a backend: executor.py binds it to compiled kernels, a test could interpret it in NumPy. A new
family changes a ModelConfig and a row of weight_names.py, not this file, as long as it is made of these parts.

Buffers are activations named by what they hold: `x` residual stream, `h` normed input, `qkv`, `att` attention output,
`mlp` hidden layer, `gate_up` before gating, `y` what a half of a layer gave, before its own norm, `last` the gathered rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    """out = norm(x) * weight (+ bias), added to out when `residual`; with `gather` only rows that sample, compacted.

    `groups` stretches of `cols` columns, from column `first` on, are normed each on its own with the same weight.
    """

    x: str
    out: str
    weight: str
    bias: str | None
    cols: int
    kind: str = "rmsnorm"
    gather: bool = False
    residual: bool = False
    first: int = 0
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Gemm:
    """out[m, n] = cap(act(sum_k x[m, k] * weight[n, k] + bias[n]) * scale) (+ out[m, n] when residual).

    cap(v) = softcap * tanh(v / softcap) unless softcap is 0. `out` may be "logits".
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


@dataclass(frozen=True, slots=True)
class KvWrite:
    """Rotate q and k of each qkv row in place (unless `rope` is None) and write k, v into the row's page slot."""

    qkv: str
    layer: int
    rope: Rope | None


@dataclass(frozen=True, slots=True)
class Attention:
    """out = causal attention of the q columns of `qkv` over the layer's pages, the last `window` keys of them (0: all)."""

    qkv: str
    out: str
    layer: int
    window: int = 0


@dataclass(frozen=True, slots=True)
class Gated:
    """out = act(gate) * up, where a row of x is [gate | up], each `cols` wide."""

    x: str
    out: str
    cols: int
    activation: str


@dataclass(frozen=True, slots=True)
class BlockMax:
    """The largest of each block of `cols` logits, NaN where one is not finite."""

    cols: int


Op = Embedding | Norm | Gemm | KvWrite | Attention | Gated | BlockMax


def buffers(config: ModelConfig) -> dict[str, int]:
    """Columns of each activation buffer."""
    heads = config.n_head * config.dim_per_head
    columns = {
        "x": config.n_embd,
        "qkv": heads + 2 * config.kv_heads * config.dim_per_head,
        "att": heads,
        "mlp": config.mlp_width,
        "last": config.n_embd,
    }
    if config.pre_norm:
        columns["h"] = config.n_embd
    if config.post_norm:
        columns["y"] = config.n_embd
    if config.gated_mlp:
        columns["gate_up"] = 2 * config.mlp_width
    return columns


def forward_ops(config: ModelConfig) -> Iterator[Op]:
    """The forward pass in execution order."""
    embedding = None if config.positions == "rope" else "pos_embed.weight"
    yield Embedding("x", "embed.weight", embedding, config.embedding_scale)
    for i in range(config.n_layer):
        yield from _attention_half(config, i)
        yield from _mlp_half(config, i)
    yield _norm(config, "x", "last", "final_norm", gather=True)
    yield Gemm(
        "last", "logits", "head.weight", config.n_embd, config.vocab_size,
        scale=config.logits_scale, softcap=config.logits_softcap,
    )  # fmt: skip
    yield BlockMax(config.vocab_size)


def _attention_half(config: ModelConfig, layer: int) -> Iterator[Op]:
    at, dim = f"layers.{layer}", config.dim_per_head
    heads, kv = config.n_head * dim, config.kv_heads * dim
    source = "x"
    if config.pre_norm:
        source = "h"
        yield _norm(config, "x", "h", f"{at}.attn_norm")
    yield Gemm(
        source, "qkv", f"{at}.qkv.weight", config.n_embd, heads + 2 * kv, _bias(config.qkv_bias, f"{at}.qkv")
    )
    if config.qk_norm is not None:
        by_head = config.qk_norm == "head"
        for name, first, cols in (("q_norm", 0, heads), ("k_norm", heads, kv)):
            width = dim if by_head else cols
            yield Norm("qkv", "qkv", f"{at}.{name}.weight", None, width, first=first, groups=cols // width)
    yield KvWrite("qkv", layer, config.layer_rope(layer))
    yield Attention("qkv", "att", layer, config.window(layer))
    yield from _onto_residual(config, "att", f"{at}.out", f"{at}.attn_post_norm", heads, config.out_bias)


def _mlp_half(config: ModelConfig, layer: int) -> Iterator[Op]:
    at, c, width = f"layers.{layer}", config.n_embd, config.mlp_width
    source = "x"
    if config.pre_norm:
        source = "h"
        yield _norm(config, "x", "h", f"{at}.mlp_norm")
    if config.gated_mlp:
        bias = _bias(config.mlp_bias, f"{at}.gate_up")
        yield Gemm(source, "gate_up", f"{at}.gate_up.weight", c, 2 * width, bias)
        yield Gated("gate_up", "mlp", width, config.activation)
    else:
        bias = _bias(config.mlp_bias, f"{at}.up")
        yield Gemm(source, "mlp", f"{at}.up.weight", c, width, bias, config.activation)
    yield from _onto_residual(config, "mlp", f"{at}.down", f"{at}.mlp_post_norm", width, config.mlp_bias)


def _onto_residual(config: ModelConfig, x: str, gemm: str, norm: str, n_in: int, bias: bool) -> Iterator[Op]:
    """The last GEMM of half a layer, and its way onto the residual stream."""
    normed, c = config.post_norm, config.n_embd
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
            shapes[op.weight] = (op.n_out, op.n_in)
            if op.bias:
                shapes[op.bias] = (op.n_out,)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in weight_shapes(config).values())
