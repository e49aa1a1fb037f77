"""ModelConfig: everything that distinguishes one decoder from another, as numbers and names.

With only the sizes set it describes a GPT-2-like model (layer norm, learned positions, GELU, biases, tied head). config_file.py
fills the rest from a checkpoint's config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanoserve.checks import number, shown, truth, whole_number
from nanoserve.models.rope import Rope
from nanoserve.models.weight_names import WEIGHT_NAMES

NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu_tanh", "gelu_erf", "silu")
POSITIONS = ("learned", "rope")
QK_NORMS = ("head", "row")
MAX_NUMBER = 1e30  # of anything that is multiplied with: far from float32's end
# Beyond any model there is, and small enough that no loop over them and no product of two of them runs away.
_LIMITS = {
    "vocab_size": 2**24,
    "n_layer": 4096,
    "n_head": 2**14,
    "n_embd": 2**20,
    "n_kv_head": 2**14,
    "head_dim": 2**14,
    "max_seq_len": 2**31 - 1,
    "intermediate_size": 2**22,
    "sliding_window": 2**31 - 1,
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and options of a decoder-only transformer.

    Raises:
        ValueError: naming the field, its value and its limit.
    """

    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: n_embd / n_head
    max_seq_len: int = 1024  # positions the model knows
    intermediate_size: int | None = None  # width of the MLP; None: 4 * n_embd
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    gated_mlp: bool = False  # act(gate) * up instead of act(up)
    positions: str = "learned"
    rope_theta: float = 10000.0  # of plain rotary positions; `rope` says more
    qkv_bias: bool = True
    out_bias: bool = True  # attention output projection
    mlp_bias: bool = True
    tie_embeddings: bool = True
    family: str = "gpt2"  # which names a checkpoint uses (WEIGHT_NAMES)
    eos_token_ids: tuple[int, ...] = ()
    # Normalisation beyond one norm before each half of a layer.
    pre_norm: bool = True
    post_norm: bool = False  # of what each half adds to the residual stream
    qk_norm: str | None = None  # RMS norm of queries and keys: per "head", or over the whole "row" of heads
    # Attention.
    rope: Rope | None = None  # None: plain, of the whole head
    local_rope: Rope | None = None  # of the sliding layers; None: as the others
    rope_layers: tuple[bool, ...] | None = None  # layers that rotate; None: all
    sliding_window: int | None = None  # keys a token sees, itself included; None: all
    sliding_layers: tuple[bool, ...] | None = None  # layers with the window; None: all
    attention_scale: float | None = None  # of scores; None: 1 / sqrt(head_dim)
    attention_softcap: float = 0.0  # cap * tanh(score / cap); 0: none
    # Multipliers.
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what each half of a layer adds
    logits_scale: float = 1.0
    logits_softcap: float = 0.0

    def __post_init__(self) -> None:
        for name, most in _LIMITS.items():
            optional = name in ("n_kv_head", "head_dim", "intermediate_size", "sliding_window")
            if not optional or getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 1, most)
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd: {self.n_embd} must be a multiple of n_head={self.n_head}, or set head_dim"
            )
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_kv_head: {self.kv_heads} must divide n_head={self.n_head}")
        for name, allowed in (("norm", NORMS), ("activation", ACTIVATIONS), ("positions", POSITIONS),
                              ("qk_norm", (None, *QK_NORMS)), ("family", tuple(WEIGHT_NAMES))):  # fmt: skip
            if getattr(self, name) not in allowed:
                listed = ", ".join(map(str, allowed))
                raise ValueError(f"{name}: {shown(getattr(self, name))} must be one of {listed}")
        for name in ("norm_eps", "rope_theta", "embedding_scale", "residual_scale", "logits_scale"):
            number(name, getattr(self, name), 0, MAX_NUMBER)
        for name in ("attention_softcap", "logits_softcap"):
            number(name, getattr(self, name), 0, MAX_NUMBER, or_zero=True)
        if self.attention_scale is not None:
            number("attention_scale", self.attention_scale, 0, MAX_NUMBER)
        for name in (
            "gated_mlp",
            "qkv_bias",
            "out_bias",
            "mlp_bias",
            "tie_embeddings",
            "pre_norm",
            "post_norm",
        ):
            truth(name, getattr(self, name))
        for name in ("rope_layers", "sliding_layers"):
            layers = getattr(self, name)
            if layers is not None and len(layers) != self.n_layer:
                raise ValueError(f"{name}: {len(layers)} entries, there are n_layer={self.n_layer} layers")
        if self.positions == "rope" and self.rope is None and self.dim_per_head % 2:
            raise ValueError(f"head_dim: {self.dim_per_head} must be even for rotary positions")
        for name in ("rope", "local_rope"):
            rope = getattr(self, name)
            if rope is not None and rope.dims > self.dim_per_head:
                raise ValueError(f"{name}: {rope.dims} dimensions rotate, a head has {self.dim_per_head}")
        if self.post_norm and self.residual_scale != 1:
            raise ValueError(f"residual_scale: {self.residual_scale} with post_norm is not supported, only 1")
        for token in self.eos_token_ids:
            whole_number("eos_token_ids", token, 0, self.vocab_size - 1)

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def dim_per_head(self) -> int:
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        return 4 * self.n_embd if self.intermediate_size is None else self.intermediate_size

    @property
    def kv_values_per_token(self) -> int:
        """Numbers of K and V that one token takes in the pool."""
        return 2 * self.n_layer * self.kv_heads * self.dim_per_head

    @property
    def switch_len(self) -> int | None:
        """Sequences longer than this turn by other angles, all of their tokens (Rope.switch_len)."""
        return None if self.rope is None else self.rope.switch_len

    def window(self, layer: int) -> int:
        """Keys a token of the layer sees, itself included; 0: all before it."""
        slides = self.sliding_layers is None or self.sliding_layers[layer]
        return self.sliding_window if slides and self.sliding_window is not None else 0

    def layer_rope(self, layer: int) -> Rope | None:
        """How the layer's queries and keys rotate."""
        if self.positions != "rope" or (self.rope_layers is not None and not self.rope_layers[layer]):
            return None
        if self.local_rope is not None and self.window(layer):
            return self.local_rope
        return Rope(self.dim_per_head, self.rope_theta) if self.rope is None else self.rope

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ModelConfig:
        """Read `config.json` of a Hugging Face checkpoint directory (or the file itself).

        Raises:
            CheckpointError: no such file, not JSON, an unsupported architecture, or a field that is not understood.
        """
        from nanoserve.models.config_file import read_config  # it makes ModelConfigs

        return read_config(Path(path))
