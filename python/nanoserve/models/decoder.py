"""One decoder, described as data: the list of operations of a forward pass and the weights each reads.

    embedding (+ learned positions)
    per layer:  norm -> qkv GEMM -> (RoPE) + KV write -> paged attention -> output GEMM + residual
                norm -> up (or gate|up) GEMM -> activation -> down GEMM + residual
    rows that sample:  gather + final norm -> head GEMM -> logits

The list knows nothing of a backend: executor.py binds it to compiled kernels, a test could interpret it in NumPy. A new
family changes a ModelConfig and a weight-name map, not this file, as long as it is made of these parts.

Buffers are activations named by what they hold: `x` residual stream, `h` normed input, `qkv`, `att` attention output,
`mlp` hidden layer, `gate_up` before gating, `last` the gathered rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nanoserve.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Embedding:
    """out[row] = table[id] (+ pos_table[position])."""

    out: str
    table: str
    pos_table: str | None


@dataclass(frozen=True, slots=True)
class Norm:
    """out = norm(x) * weight (+ bias); with `gather` only the rows that sample, compacted."""

    x: str
    out: str
    weight: str
    bias: str | None
    gather: bool = False


@dataclass(frozen=True, slots=True)
class Gemm:
    """out[m, n] = act(sum_k x[m, k] * weight[n, k] + bias[n]) (+ out[m, n] when residual). `out` may be "logits"."""

    x: str
    out: str
    weight: str
    n_in: int
    n_out: int
    bias: str | None = None
    activation: str | None = None
    residual: bool = False


@dataclass(frozen=True, slots=True)
class KvWrite:
    """Rotate q and k of each qkv row in place (when `rope`) and write k, v into the row's page slot."""

    qkv: str
    layer: int
    rope: bool


@dataclass(frozen=True, slots=True)
class Attention:
    """out = causal attention of the q columns of `qkv` over the layer's pages."""

    qkv: str
    out: str
    layer: int


@dataclass(frozen=True, slots=True)
class Gated:
    """out = act(gate) * up, where a row of x is [gate | up], each `cols` wide."""

    x: str
    out: str
    cols: int
    activation: str


Op = Embedding | Norm | Gemm | KvWrite | Attention | Gated


def buffers(config: ModelConfig) -> dict[str, int]:
    """Columns of each activation buffer."""
    heads = config.n_head * config.dim_per_head
    columns = {
        "x": config.n_embd,
        "h": config.n_embd,
        "qkv": heads + 2 * config.kv_heads * config.dim_per_head,
        "att": heads,
        "mlp": config.mlp_width,
        "last": config.n_embd,
    }
    if config.gated_mlp:
        columns["gate_up"] = 2 * config.mlp_width
    return columns


def forward_ops(config: ModelConfig) -> Iterator[Op]:
    """The forward pass in execution order."""
    c, heads, width = config.n_embd, config.n_head * config.dim_per_head, config.mlp_width
    qkv = heads + 2 * config.kv_heads * config.dim_per_head
    rope = config.positions == "rope"

    def norm(x: str, out: str, name: str, gather: bool = False) -> Norm:
        return Norm(x, out, f"{name}.weight", f"{name}.bias" if config.norm == "layernorm" else None, gather)

    def gemm(
        x: str,
        out: str,
        name: str,
        n_in: int,
        n_out: int,
        bias: bool,
        act: str | None = None,
        add: bool = False,
    ) -> Gemm:
        return Gemm(x, out, f"{name}.weight", n_in, n_out, f"{name}.bias" if bias else None, act, add)

    yield Embedding("x", "embed.weight", None if rope else "pos_embed.weight")
    for i in range(config.n_layer):
        at = f"layers.{i}"
        yield norm("x", "h", f"{at}.attn_norm")
        yield gemm("h", "qkv", f"{at}.qkv", c, qkv, config.qkv_bias)
        yield KvWrite("qkv", i, rope)
        yield Attention("qkv", "att", i)
        yield gemm("att", "x", f"{at}.out", heads, c, config.out_bias, add=True)
        yield norm("x", "h", f"{at}.mlp_norm")
        if config.gated_mlp:
            yield gemm("h", "gate_up", f"{at}.gate_up", c, 2 * width, config.mlp_bias)
            yield Gated("gate_up", "mlp", width, config.activation)
        else:
            yield gemm("h", "mlp", f"{at}.up", c, width, config.mlp_bias, act=config.activation)
        yield gemm("mlp", "x", f"{at}.down", width, c, config.mlp_bias, add=True)
    yield norm("x", "last", "final_norm", gather=True)
    yield gemm("last", "logits", "head", c, config.vocab_size, False)


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
            shapes[op.weight] = (config.n_embd,)
            if op.bias:
                shapes[op.bias] = (config.n_embd,)
        elif isinstance(op, Gemm):
            if op.weight == "head.weight" and config.tie_embeddings:
                continue
            shapes[op.weight] = (op.n_out, op.n_in)
            if op.bias:
                shapes[op.bias] = (op.n_out,)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    total = 0
    for shape in weight_shapes(config).values():
        size = 1
        for dim in shape:
            size *= dim
        total += size
    return total
