"""generation_config.json: the checkpoint's own idea of when to stop and how to sample.

Every key ends in exactly one of three places: honoured (`eos_token_ids`, `defaults`), known not to change what comes out of
this engine (listed below, with the reason), or `not_applied`, which a caller shows: nothing that changes results is dropped
silently, and that includes keys this version has never heard of.

do_sample true or missing: the sampling values that are given become defaults. do_sample false: temperature 0, and what only
shapes a random draw has no effect. (transformers fills in top_k=50 for a checkpoint that samples without naming top_k; no
other engine does, nor does this.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoserve.checkpoint_json import read_object
from nanoserve.checks import shown
from nanoserve.errors import CheckpointError

FILE = "generation_config.json"
MAX_BYTES = 2**20
MAX_EOS_IDS = 256

# Sampling values that become defaults: name -> (low, high, is low itself allowed, whole numbers only)
_VALUES: dict[str, tuple[float, float, bool, bool]] = {
    "temperature": (0.0, 100.0, True, False),
    "top_k": (-1, 2**31 - 1, True, True),
    "top_p": (0.0, 1.0, False, False),
    "min_p": (0.0, 1.0, True, False),
    "repetition_penalty": (0.01, 100.0, True, False),
}
_OF_THE_DRAW = ("top_k", "top_p", "min_p")

_NO_EFFECT = frozenset(
    # The caller's max_tokens says how long an output may be; a checkpoint's length is a demo script's habit.
    "max_length max_new_tokens max_time "
    # Prompts come complete, and nothing is padded.
    "bos_token_id pad_token_id decoder_start_token_id "
    # How transformers computes or reports, not what.
    "_from_model_config transformers_version use_cache cache_implementation cache_config max_cache_len low_memory "
    "return_dict_in_generate output_attentions output_hidden_states output_scores output_logits return_legacy_cache "
    "compile_config disable_compile continuous_batching_config prefill_chunk_size "
    # Speculative decoding keeps the distribution.
    "assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind is_assistant "
    "num_assistant_tokens num_assistant_tokens_schedule target_lookbehind prompt_lookup_num_tokens "
    "max_matching_ngram_size speculation_type use_mtp "
    # Logits that are not finite fail the request here, and scaling all of them alike changes no draw.
    "remove_invalid_values renormalize_logits "
    # Of beam search, which num_beams switches on.
    "length_penalty early_stopping diversity_penalty".split()
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "min_length": (0,),
}


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """What a checkpoint asks for.

    Attributes:
        eos_token_ids: end-of-sequence tokens of the file; empty when it names none.
        defaults: values for SamplingParams fields of the same names.
        not_applied: "key=value" of everything that would change results in transformers and does not here.
    """

    eos_token_ids: tuple[int, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    not_applied: tuple[str, ...] = ()

    @classmethod
    def load(cls, directory: Path, vocab_size: int) -> GenerationConfig:
        """Reads the file of a checkpoint directory; an empty config when there is none.

        Raises:
            CheckpointError: naming field, value and limit.
        """
        values = {
            k: v
            for k, v in read_object(Path(directory) / FILE, MAX_BYTES, optional=True).items()
            if v is not None
        }
        not_applied: list[str] = []
        eos = _eos_ids(values.pop("eos_token_id", []), vocab_size, not_applied)
        defaults = _defaults(values)
        for key, value in values.items():
            if key in _NO_EFFECT or value is False or value in ([], {}) or value in _NEUTRAL.get(key, ()):
                continue
            not_applied.append(f"{shown(key)[1:-1]}={shown(value)}")
        return cls(eos, defaults, tuple(not_applied))


def _eos_ids(value: object, vocab_size: int, not_applied: list[str]) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if len(ids) > MAX_EOS_IDS:
        raise CheckpointError(f"{FILE}: eos_token_id: {len(ids)} ids, at most {MAX_EOS_IDS} are allowed")
    known = []
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise CheckpointError(f"{FILE}: eos_token_id: {shown(token)} must be a token id >= 0")
        if token < vocab_size:
            known.append(token)
        else:  # it can never be sampled: small test models keep their family's id
            not_applied.append(f"eos_token_id={shown(token)}")
    return tuple(dict.fromkeys(known))


def _defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Takes the honoured keys out of `values`."""
    do_sample = values.pop("do_sample", None)
    if do_sample is not None and not isinstance(do_sample, bool):
        raise CheckpointError(f"{FILE}: do_sample: {shown(do_sample)} must be true or false")
    defaults: dict[str, Any] = {}
    for name, (low, high, low_allowed, whole) in _VALUES.items():
        value = values.pop(name, None)
        if value is not None:
            defaults[name] = _number(name, value, low, high, low_allowed, whole)
    min_new_tokens = values.pop("min_new_tokens", None)
    if min_new_tokens is not None:
        defaults["min_tokens"] = _number("min_new_tokens", min_new_tokens, 0, 2**31 - 1, True, True)
    if do_sample is False:
        defaults = {name: value for name, value in defaults.items() if name not in _OF_THE_DRAW}
        defaults["temperature"] = 0.0
    return defaults


def _number(name: str, value: Any, low: float, high: float, low_allowed: bool, whole: bool) -> float | int:
    kinds = int if whole else (int, float)
    limits = f"{'a whole number' if whole else 'a number'} in {'[' if low_allowed else '('}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise CheckpointError(f"{FILE}: {name}: {shown(value)} must be {limits}")
    if not (low <= value <= high) or (value == low and not low_allowed) or not math.isfinite(value):
        raise CheckpointError(f"{FILE}: {name}: {shown(value)} must be {limits}")
    return int(value) if whole else float(value)
