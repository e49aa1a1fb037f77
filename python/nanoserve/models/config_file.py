"""config.json -> ModelConfig, by the family's row in families.py.

Nothing is guessed: every field is read, known not to matter, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoserve.checkpoint_json import read_object
from nanoserve.checks import number, shown, whole_number
from nanoserve.errors import CheckpointError
from nanoserve.models.config import MAX_NUMBER, ModelConfig
from nanoserve.models.families import (
    ACTIVATION_NAMES,
    BOOKKEEPING,
    FAMILIES,
    LAYER_FIELDS,
    REQUIRED,
    ROPE_FIELDS,
    Family,
    Values,
    words,
)
from nanoserve.models.layer_kinds import layer_kinds
from nanoserve.models.rope import Rope, parse_rope, theta_in

MAX_CONFIG_BYTES = 16 * 2**20


def read_config(path: Path) -> ModelConfig:
    """The ModelConfig of a checkpoint directory or config.json; CheckpointError as ModelConfig.from_pretrained."""
    file = path / "config.json" if path.is_dir() else path
    raw = read_object(file, MAX_CONFIG_BYTES)
    try:
        return config_from_dict(raw)
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file.name}: {error}") from error


def config_from_dict(raw: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from the contents of a config.json.

    Raises:
        CheckpointError: an unsupported architecture. ValueError: a field that is not understood, missing or out of range.
    """
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(
            f"config.json: model_type {shown(model_type)} is not supported; supported: {', '.join(FAMILIES)}"
            + _stranger(raw)
        )
    _refuse_unknown(raw, family, str(model_type))
    given = {**family.defaults, **{name: value for name, value in raw.items() if _is_set(name, value)}}
    values: Values = {**family.fixed, "family": family.names}
    values.update({ours: given[theirs] for theirs, ours in family.fields.items() if theirs in given})
    missing = [theirs for theirs in family.fields if theirs in _NEEDED and theirs not in given]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    _finish(values, given, family)
    nested = raw.get("rope_parameters")
    if raw.get("rope_theta") is not None and isinstance(nested, dict):
        inner = nested.get("rope_theta", raw["rope_theta"])
        if inner != raw["rope_theta"]:
            raise ValueError(
                f"rope_theta is {shown(raw['rope_theta'])}, rope_parameters.rope_theta {shown(inner)}: which one?"
            )
    values["eos_token_ids"] = _eos_ids(raw.get("eos_token_id"), values["vocab_size"])
    try:
        return ModelConfig(**values)
    except ValueError as error:  # it speaks our names, the file's reader needs the file's
        message = str(error)
        for theirs, ours in family.fields.items():
            if message.startswith(f"{ours}:"):
                raise ValueError(theirs + message.removeprefix(ours)) from error
        raise


# What no default stands for.
_NEEDED = words(
    "vocab_size n_layer n_head n_embd num_hidden_layers num_attention_heads hidden_size intermediate_size"
)
# Where null is a value of its own, not "as the family's default".
_NULL_MEANS_OFF = words("sliding_window final_logit_softcapping attn_logit_softcapping num_key_value_heads")


def _is_set(name: str, value: object) -> bool:
    return value is not None or name in _NULL_MEANS_OFF


def _known_fields(family: Family) -> set[str]:
    """What a config.json of the family may have, but for the fields that must hold one value."""
    rope = ROPE_FIELDS if family.fixed.get("positions") == "rope" else frozenset()
    return {*family.fields, *family.harmless, *BOOKKEEPING, *LAYER_FIELDS[family.sliding], *rope}


def _stranger(raw: Mapping[str, Any]) -> str:
    """The first field no family here has: often what makes the architecture another one."""
    known = {*REQUIRED}.union(
        *map(_known_fields, FAMILIES.values()), *(f.required for f in FAMILIES.values())
    )
    first = next((name for name in raw if name not in known), None)
    return "" if first is None else f"; the first of its fields that none of them has: {shown(first)}"


def _refuse_unknown(raw: Mapping[str, Any], family: Family, model_type: str) -> None:
    known = _known_fields(family)
    required = {**REQUIRED, **family.required}
    for name, value in raw.items():
        if name in required:
            if not any(value is allowed or (value == allowed and type(value) is type(allowed))
                       for allowed in required[name]):  # fmt: skip
                raise ValueError(f"{name}: {shown(value)} is not supported, only {required[name][0]!r}")
        elif name not in known:
            raise ValueError(f"field {shown(name)} is not understood for model_type {model_type!r}")


def _finish(values: Values, given: Values, family: Family) -> None:
    """What needs more than copying: activation, layers, rotary positions, multipliers, biases."""
    (activation,) = (theirs for theirs, ours in family.fields.items() if ours == "activation")
    if given[activation] not in list(ACTIVATION_NAMES):
        known = ", ".join(ACTIVATION_NAMES)
        raise ValueError(f"{activation}: {shown(given[activation])} is not supported, only {known}")
    values["activation"] = ACTIVATION_NAMES[given[activation]]
    if "attention_bias" in family.fields:
        values["out_bias"] = values["qkv_bias"]
    for theirs, ours in family.fields.items():
        if ours in ("attention_softcap", "logits_softcap"):
            cap = given.get(theirs)
            values[ours] = 0.0 if cap is None else _positive(theirs, cap)
    if "query_pre_attn_scalar" in given:
        values["attention_scale"] = _positive("query_pre_attn_scalar", given["query_pre_attn_scalar"]) ** -0.5
    if family.names == "gemma":
        values["embedding_scale"] = _positive("hidden_size", values["n_embd"]) ** 0.5
    if "logits_scaling" in given:
        values["logits_scale"] = 1.0 / _positive("logits_scaling", given["logits_scaling"])
    if family.sliding is not None:
        values.update(layer_kinds(family.sliding, given, _count("num_hidden_layers", values["n_layer"])))
    if values.get("positions") == "rope":
        _rope(values, given, family)


def _rope(values: Values, given: Values, family: Family) -> None:
    """Rotary positions, from rope_parameters or the older rope_theta and rope_scaling, and the context they allow."""
    head_dim = values.get("head_dim")
    if head_dim is None:
        head_dim = _count("hidden_size", values["n_embd"]) // _count("num_attention_heads", values["n_head"])
    head_dim = _count("head_dim", head_dim)
    positions = _count("max_position_embeddings", values["max_seq_len"])
    parameters, local = _rope_parameters(given)
    rope = _parse_rope(parameters, given, family, head_dim, positions)
    values |= {"rope": rope, "rope_theta": rope.theta}
    if local is not None:
        values["local_rope"] = _parse_rope(local, given, family, head_dim, positions)
    values["max_seq_len"] = _context(rope, positions, scaled=local is not None)


def _rope_parameters(given: Values) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Those of the layers that see everything, and of the sliding ones where they have their own."""
    scaling, parameters = given.get("rope_scaling"), given.get("rope_parameters")
    if scaling is not None and parameters is not None:
        raise ValueError("rope_scaling and rope_parameters: which one? Only one of them may be there")
    everywhere = _object("rope_parameters" if scaling is None else "rope_scaling", parameters or scaling)
    theta_in("rope_theta", given["rope_theta"])
    if "rope_local_base_freq" not in given:
        return everywhere, None
    local = {"rope_theta": theta_in("rope_local_base_freq", given["rope_local_base_freq"])}
    if parameters is None:
        return everywhere, local
    if set(everywhere) - {"full_attention", "sliding_attention"}:
        raise ValueError("rope_parameters: must have full_attention and sliding_attention only")
    own = _object("rope_parameters.sliding_attention", everywhere.get("sliding_attention"))
    return _object("rope_parameters.full_attention", everywhere.get("full_attention")), {
        **local,
        **{name: value for name, value in own.items() if value is not None},
    }


def _parse_rope(
    parameters: Mapping[str, Any], given: Values, family: Family, head_dim: int, positions: int
) -> Rope:
    own = dict(parameters)
    fraction = own.pop("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    number("partial_rotary_factor", fraction, 0, 1)
    if "longrope" in family.rope_kinds:
        for name in ("rope_type", "type"):
            if own.get(name) in ("su", "yarn"):  # what longrope was called first
                own[name] = "longrope"
        if own.get("rope_type", own.get("type")) == "longrope":
            own["original_max_position_embeddings"] = given["original_max_position_embeddings"]
    elif fraction != 1:
        raise ValueError(f"partial_rotary_factor: {fraction} is not supported for this model_type, only 1")
    try:
        rope = parse_rope(
            own, dims=int(head_dim * fraction), theta=given["rope_theta"], max_positions=positions
        )
    except ValueError as error:
        raise ValueError(f"rope_parameters.{error}") from error
    if rope.kind not in family.rope_kinds:
        raise ValueError(f"rope_parameters.rope_type: {rope.kind!r} is not supported for this model_type")
    return rope


def _context(rope: Rope, positions: int, *, scaled: bool) -> int:
    """Positions the model is good for: linear, dynamic and yarn stretch what max_position_embeddings says.

    Where the config has `scaled` it itself (as Gemma 3 has), or the kind says so, max_position_embeddings is all there is.
    """
    if not scaled and rope.kind in ("linear", "dynamic"):
        return min(2**31 - 1, max(positions, int(positions * rope.factor)))
    if rope.kind == "yarn":
        return min(2**31 - 1, max(positions, int(rope.original_len * rope.factor)))
    return positions


def _object(name: str, value: object) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {shown(value)} must be an object")
    return value


def _count(name: str, value: object) -> int:
    return whole_number(name, value, 1, 2**31 - 1)


def _positive(name: str, value: object) -> float:
    return number(name, value, 0, MAX_NUMBER)


def _eos_ids(eos: object, vocab_size: object) -> tuple[int, ...]:
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    ids = [whole_number("eos_token_id", token, 0) for token in listed]
    # A stock config names an id outside a shrunken vocabulary (gpt2: 50256); it can never be sampled.
    return tuple(token for token in ids if isinstance(vocab_size, int) and token < vocab_size)
