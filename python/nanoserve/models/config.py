"""ModelConfig: everything that distinguishes one decoder from another, as numbers and names.

With only the sizes set it describes a GPT-2-like model (layer norm, learned positions, GELU, biases, tied head). A
family is a row of `FAMILIES`: which config.json field feeds which of ours, which fields must hold one value because any
other would change the result, and which cannot matter. A field in none of the three is refused by name, never ignored:
a silently dropped option is a wrong answer with status 200.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoserve.checks import shown, truth, whole_number
from nanoserve.errors import CheckpointError

NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu_tanh", "gelu_erf", "silu")
POSITIONS = ("learned", "rope")
_LIMIT = 2**31 - 1


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
    rope_theta: float = 10000.0
    qkv_bias: bool = True
    out_bias: bool = True  # attention output projection
    mlp_bias: bool = True
    tie_embeddings: bool = True
    family: str = "gpt2"  # which weight names a checkpoint uses
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "max_seq_len"):
            whole_number(name, getattr(self, name), 1, _LIMIT)
        for name in ("n_kv_head", "head_dim", "intermediate_size"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 1, _LIMIT)
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd: {self.n_embd} must be a multiple of n_head={self.n_head}, or set head_dim"
            )
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_kv_head: {self.kv_heads} must divide n_head={self.n_head}")
        for name, allowed in (("norm", NORMS), ("activation", ACTIVATIONS), ("positions", POSITIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {shown(getattr(self, name))} must be one of {', '.join(allowed)}")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e30:
                raise ValueError(f"{name}: {shown(value)} must be a number in (0, 1e30]")
        for name in ("gated_mlp", "qkv_bias", "out_bias", "mlp_bias", "tie_embeddings"):
            truth(name, getattr(self, name))
        if self.positions == "rope" and self.dim_per_head % 2:
            raise ValueError(f"head_dim: {self.dim_per_head} must be even for rotary positions")
        if self.family not in FAMILIES:
            raise ValueError(f"family: {self.family!r} must be one of {', '.join(FAMILIES)}")
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
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V one token takes in the pool (float32)."""
        return 2 * 4 * self.n_layer * self.kv_heads * self.dim_per_head

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ModelConfig:
        """Read `config.json` of a Hugging Face checkpoint directory (or the file itself).

        Raises:
            CheckpointError: no such file, not JSON, an unsupported architecture, or a field that is not understood.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file")
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file.name}: not valid JSON ({error})") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{file.name}: must hold an object, holds {type(raw).__name__}")
        return config_from_dict(raw)


@dataclass(frozen=True, slots=True)
class Family:
    """How one `model_type` of config.json is read."""

    fields: Mapping[str, str]  # config.json name -> ModelConfig name
    fixed: Mapping[str, Any]  # ModelConfig values every member has
    required: Mapping[
        str, tuple[Any, ...]
    ]  # config.json name -> values that leave the result as we compute it
    harmless: frozenset[str] = field(default_factory=frozenset)


# Bookkeeping every config.json may carry; none of it changes a forward pass at inference.
_BOOKKEEPING = frozenset(
    """_name_or_path architectures model_type transformers_version dtype torch_dtype use_cache bos_token_id eos_token_id
    pad_token_id initializer_range return_dict output_hidden_states output_attentions id2label label2id problem_type
    task_specific_params is_encoder_decoder chunk_size_feed_forward tokenizer_class torchscript use_bfloat16
    attention_dropout""".split()
)
_ACTIVATION_NAMES = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu_erf",
    "silu": "silu",
    "swish": "silu",
}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        fields={
            "vocab_size": "vocab_size",
            "n_layer": "n_layer",
            "n_head": "n_head",
            "n_embd": "n_embd",
            "n_positions": "max_seq_len",
            "n_inner": "intermediate_size",
            "activation_function": "activation",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        },
        fixed={},
        required={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
        },
        harmless=frozenset(
            """attn_pdrop embd_pdrop resid_pdrop n_ctx summary_activation summary_first_dropout summary_proj_to_labels
            summary_type summary_use_proj""".split()
        ),
    ),
    "llama": Family(
        fields={
            "vocab_size": "vocab_size",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "num_key_value_heads": "n_kv_head",
            "hidden_size": "n_embd",
            "head_dim": "head_dim",
            "intermediate_size": "intermediate_size",
            "max_position_embeddings": "max_seq_len",
            "hidden_act": "activation",
            "rms_norm_eps": "norm_eps",
            "rope_theta": "rope_theta",
            "tie_word_embeddings": "tie_embeddings",
            "attention_bias": "qkv_bias",
            "mlp_bias": "mlp_bias",
        },
        fixed={"norm": "rmsnorm", "positions": "rope", "gated_mlp": True, "family": "llama"},
        required={"rope_scaling": (None,), "pretraining_tp": (1,)},
    ),
}
# What config.json leaves out means the family's default in transformers, not ours.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": True, "activation_function": "gelu_new"},
    "llama": {"tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
              "rms_norm_eps": 1e-6},
}  # fmt: skip


def config_from_dict(raw: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from the contents of a config.json; refuses what it does not understand."""
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    values = dict(family.fixed)
    for name, value in {**_DEFAULTS[str(model_type)], **raw}.items():
        if name in family.fields:
            if value is not None:
                values[family.fields[name]] = value
        elif name == "rope_parameters" and "rope_scaling" in family.required:
            theta = _default_rope(value, raw.get("rope_theta"))
            if theta is not None:
                values["rope_theta"] = theta
        elif name in family.required:
            if value not in family.required[name]:
                raise CheckpointError(
                    f"config.json: {name}: {value!r} is not supported, only {family.required[name][0]!r}"
                )
        elif name not in family.harmless and name not in _BOOKKEEPING:
            raise CheckpointError(
                f"config.json: field {name!r} is not understood for model_type {model_type!r}"
            )
    activation = values.get("activation")
    if activation is not None:
        if not isinstance(activation, str) or activation not in _ACTIVATION_NAMES:
            raise CheckpointError(
                f"config.json: activation {shown(activation)} is not supported, only {', '.join(_ACTIVATION_NAMES)}"
            )
        values["activation"] = _ACTIVATION_NAMES[activation]
    if model_type == "llama":
        values["out_bias"] = values["qkv_bias"]
    values["eos_token_ids"] = _eos_ids(raw.get("eos_token_id"), values.get("vocab_size"))
    missing = [name for name in ("vocab_size", "n_layer", "n_head", "n_embd") if name not in values]
    if missing:
        names = [theirs for theirs, ours in family.fields.items() if ours in missing]
        raise CheckpointError(f"config.json: missing {', '.join(names)}")
    try:
        return ModelConfig(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: {error}") from error


def _eos_ids(eos: object, vocab_size: object) -> tuple[int, ...]:
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    try:
        ids = [whole_number("eos_token_id", token, 0) for token in listed]
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error
    # A stock config names an id outside a shrunken vocabulary (gpt2: 50256); it can never be sampled.
    return tuple(token for token in ids if isinstance(vocab_size, int) and token < vocab_size)


def _default_rope(parameters: object, theta: object) -> object:
    """rope_theta out of transformers 5's `rope_parameters`; any scaling is refused."""
    if parameters is None:
        return theta
    if not isinstance(parameters, dict) or parameters.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"config.json: rope_parameters: {shown(parameters)} is not supported, only rope_type 'default'"
        )
    unknown = set(parameters) - {"rope_type", "rope_theta"}
    if unknown:
        raise CheckpointError(f"config.json: rope_parameters: field {min(unknown)!r} is not understood")
    value = parameters.get("rope_theta", theta)
    if theta is not None and value != theta:
        raise CheckpointError(
            f"config.json: rope_theta is {shown(theta)}, rope_parameters.rope_theta {shown(value)}: which one?"
        )
    return value
