"""A field of config.json that would change the result is never ignored: for every family, every field is changed.

Whatever a changed config.json says, loading it either fails with a message that names the field, or gives the logits
transformers gives for that very file. No field is listed by hand as harmless: the comparison decides. Lists are only needed
where transformers itself refuses a value: `FREE` fields, that our logits must then not depend on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nanoserve import CheckpointError, ModelConfig, NanoServingEngine, load_weights
from support.families import CASES, FAMILIES
from support.hub_configs import HUB, older
from support.oracle import forward, make_checkpoint, random_model
from support.recording import greedy, record

PROMPT = 120
TOLERANCE = 1e-4
# The case of each family that has most of its options set.
RICH = {"gpt2": "gpt2-odd", "llama": "llama-odd", "mistral": "mistral-window", "qwen2": "qwen2-window",
        "qwen3": "qwen3-window", "smollm3": "smollm3-window", "phi3": "phi3-longrope", "olmo2": "olmo2-linear",
        "granite": "granite", "gemma2": "gemma2", "gemma3_text": "gemma3"}  # fmt: skip
# What transformers checks but no forward pass reads (a shorter n_positions is a shorter context, with the same logits).
FREE = frozenset(
    """attention_dropout attn_pdrop dtype embd_pdrop initializer_range n_positions pad_token_id resid_pdrop return_dict
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj torch_dtype use_cache""".split()
)
INTERNAL = frozenset({"_attn_implementation_internal"})
# A value that contradicts another field's may be refused under either name.
CONTRADICTS = {
    "num_attention_heads": ("num_key_value_heads", "hidden_size", "rotary dimensions", "short_factor"),
    "hidden_size": ("head_dim", "short_factor"), "head_dim": ("rotary dimensions", "short_factor"),
    "num_hidden_layers": ("layer_types", "no_rope_layers"), "partial_rotary_factor": ("rotary dimensions",),
    "_sliding_window_pattern": ("sliding_window_pattern",),
}  # fmt: skip
# Fields of config.json outside the config classes' own: older spellings, leftovers, and what other software writes.
EXTRA: dict[str, list[Any]] = {
    "rope_theta": [777.0], "rope_scaling": [{"type": "linear", "factor": 3.0}, {"rope_type": "dynamic", "factor": 2.0}],
    "partial_rotary_factor": [0.5], "rotary_pct": [0.5], "head_dim": [4, 16, 32], "num_heads": [2], "n_ctx": [7], "n_inner": [64],
    "original_max_position_embeddings": [32], "sliding_window": [9], "sliding_window_pattern": [1, 3], "layer_types": [
        ["full_attention"], ["sliding_attention"], ["full_attention"] * 3, ["sliding_attention"] * 3, ["chunked_attention"] * 3],
    "use_sliding_window": [True, False], "max_window_layers": [0, 9], "sliding_window_size": [9], "attention_window_size": [9],
    "rope_local_base_freq": [55.0], "rope_interleaved": [True], "no_rope_layers": [[0], [1, 1, 1], [0, 0, 0]],
    "no_rope_layer_interval": [1, 2], "attention_bias": [True, False], "mlp_bias": [True], "qkv_bias": [True],
    "use_qk_norm": [True, False], "clip_qkv": [0.1], "logit_scale": [0.5], "logits_scaling": [3.0], "logit_softcap": [1.0],
    "final_logit_softcapping": [0.5, 0, None], "attn_logit_softcapping": [0.5, 0, None], "query_pre_attn_scalar": [3],
    "embedding_multiplier": [2.0], "residual_multiplier": [2.0], "attention_multiplier": [2.0], "hidden_act": ["gelu", "relu"],
    "hidden_activation": ["gelu", "silu", None], "activation_function": ["relu", "gelu_new"], "pretraining_tp": [2],
    "use_bidirectional_attention": [True], "is_causal": [False], "is_decoder": [False], "cross_attention_hidden_size": [5],
    "num_experts": [4], "num_local_experts": [4], "quantization_config": [{"quant_method": "fp8"}], "use_parallel_residual": [True],
    "attention_chunk_size": [8], "attention_sink": [4], "layer_norm_eps": [0.5], "rms_norm_eps": [0.5], "norm_epsilon": [0.5],
    "scale_embeddings": [True], "normalize_embedding": [True], "lm_head_bias": [True], "some_new_option": [True, 0, None, "x"],
    "use_mrope": [True], "full_attn_mod": [2], "interpolate_factor": [2], "cache_implementation": ["static"], "tie_weights": [False],
    "model_type": ["mixtral", "gemma", "qwen2_moe", "gemma3", None, 7], "per_layer_config": [{"0": {"sliding_window": 3}}],
}  # fmt: skip


def changed(value: Any) -> Iterator[Any]:
    """Other values of a field, by what it holds."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value * 2, max(1, value // 2), 3, 0, -1)
    elif isinstance(value, float):
        yield from (value * 1.7 + 0.01, value / 3, 1.0, 0.0)
    elif isinstance(value, str):
        yield from ("gelu", "relu", "bfloat16", "tanh", "")
    elif isinstance(value, list):
        yield from (value[::-1], value[:-1], value + value[:1], [])
    if value is None:
        yield from (1, 5, 0.5, True, "gelu", [1])
    else:
        yield None


def variants(
    saved: dict[str, Any], extra: Mapping[str, list[Any]] = EXTRA
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(field, config.json with that field changed, added or left out)"""
    for name, value in saved.items():
        yield name, {key: other for key, other in saved.items() if key != name}
        if isinstance(value, dict):
            for inner, part in variants(value):
                yield inner if name == "rope_parameters" else f"{name}.{inner}", {**saved, name: part}
        for other in changed(value):
            yield name, {**saved, name: other}
    if "model_type" in saved:
        for name, values in extra.items():
            for other in values:
                yield name, {**saved, name: other}
    elif "rope_theta" in saved:
        for name, other in (("factor", 3.0), ("attention_factor", 0.5), ("rope_type", "dynamic"), ("truncate", False),
                            ("partial_rotary_factor", 0.5), ("unheard_of", 1.0), ("mscale", 2.0), ("type", "yarn")):  # fmt: skip
            if name not in saved:
                yield name, {**saved, name: other}


def our_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """Logits after the prompt and after some of its beginnings."""
    engine = NanoServingEngine(
        ModelConfig.from_pretrained(path),
        load_weights(path),
        eos_token_id=(),
        num_threads=1,
        kv_cache_pages=64,
    )
    recorder = record(engine)
    ends = [end for end in (1, 2, 7, 40, PROMPT) if end + 1 <= engine.config.max_seq_len]
    finished = engine.generate([tokens[:end] for end in ends], greedy(1, ignore_eos=True))
    return np.stack([recorder.rows[r.req_id][end - 1] for end, r in zip(ends, finished, strict=True)])


def their_logits(path: Path, tokens: list[int], rows: int) -> np.ndarray:
    """The same of transformers, which must take every weight of the file and need no other."""
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    state = load_file(path / "model.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not set(missing) - tied, missing
    assert not unexpected, unexpected
    model.tie_weights()
    return np.stack([forward(model, tokens[:end])[-1] for end in (1, 2, 7, 40, PROMPT)[:rows]])


def judge(
    path: Path, saved: dict[str, Any], changes: Iterable[tuple[str, dict[str, Any]]]
) -> tuple[set[str], set[str]]:
    """Fail with a list of everything wrong; return (fields that changed the logits, fields that were refused)."""
    tokens = np.random.default_rng(5).integers(0, saved["vocab_size"], PROMPT).tolist()
    (path / "config.json").write_text(json.dumps(saved))
    base = our_logits(path, tokens)
    assert np.abs(base - their_logits(path, tokens, len(base))).max() < TOLERANCE
    wrong: list[str] = []
    honoured, refused = set(), set()
    for name, config in changes:
        told = f"{name} in {_changes(config, saved)}"
        (path / "config.json").write_text(json.dumps(config))
        try:
            ours = our_logits(path, tokens)
        except CheckpointError as error:
            refused.add(name)
            if not _names(str(error), name):
                wrong.append(f"{told}: refused, but the message is {error}")
            continue
        except Exception as error:  # anything else is a crash, and the point of this test
            wrong.append(f"{told}: {type(error).__name__}: {error}")
            continue
        theirs, refusal = None, None
        for spelling in (config, plainer(config, saved)):
            (path / "config.json").write_text(json.dumps(spelling))
            try:
                theirs = their_logits(path, tokens, len(ours))
                break
            except Exception as error:  # transformers raises what it likes
                refusal = refusal or error
        if theirs is None:
            if name not in FREE or not np.array_equal(ours, base[: len(ours)]):
                wrong.append(
                    f"{told}: accepted, transformers: {type(refusal).__name__}: {str(refusal)[:200]}"
                )
        elif np.abs(ours - theirs).max() >= TOLERANCE:
            wrong.append(
                f"{told}: accepted, logits differ by {np.abs(ours - theirs).max():.3g} from transformers"
            )
        elif np.abs(theirs - base[: len(theirs)]).max() > 10 * TOLERANCE:
            honoured.add(name)
    assert not wrong, f"{len(wrong)} of the changes:\n" + "\n".join(wrong)
    return honoured, refused


@pytest.mark.parametrize("family", FAMILIES)
def test_every_config_field_is_honoured_or_refused_by_name(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(RICH[family], tmp_path)
    saved = json.loads((path / "config.json").read_text())
    everything = {**json.loads(AutoConfig.from_pretrained(path).to_json_string(use_diff=False)), **saved}
    assert (
        set(everything) >= {field.name for field in fields(type(AutoConfig.from_pretrained(path)))} - INTERNAL
    )
    honoured, refused = judge(path, everything, variants(everything))
    assert len(refused) > 20
    assert len(honoured) >= 2, honoured


@pytest.mark.parametrize("name", sorted(HUB))
def test_every_older_field_is_honoured_or_refused_by_name(tmp_path: Path, name: str) -> None:
    """The fields published configs have and transformers 5 does not write any more."""
    path, saved = tmp_path / name, HUB[name]
    path.mkdir()
    (path / "config.json").write_text(json.dumps(saved))
    config = AutoConfig.from_pretrained(path)
    random_model(config, name).save_pretrained(path)
    older_fields = set(saved) - set(config.to_diff_dict()) | {"head_dim", "sliding_window", "layer_types"}
    judge(
        path,
        saved,
        [change for change in variants(saved, extra={}) if change[0].split(".")[0] in older_fields],
    )


def plainer(config: dict[str, Any], saved: Any) -> dict[str, Any]:
    """Without what transformers is stricter about than we are: null for "left out", and whole numbers for real ones."""
    saved = saved if isinstance(saved, dict) else {}
    result: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            result[name] = plainer(value, saved.get(name))
            if value.get("type", value.get("rope_type")) == "yarn":
                result[name].setdefault(
                    "factor", None
                )  # then both derive it, transformers only when it is spelled out
        elif value is not None or saved.get(name, value) is None:
            softcap = "softcap" in name and isinstance(value, int) and not isinstance(value, bool)
            result[name] = float(value) if softcap else value
    return result


def _changes(config: dict[str, Any], saved: dict[str, Any]) -> str:
    changes = {key: value for key, value in config.items() if key not in saved or saved[key] != value}
    return json.dumps(changes)[:200] if changes else "what is left out"


def _names(message: str, field: str) -> bool:
    """A refusal names the field, or the tensor whose shape or presence contradicts it."""
    field = field.split(".")[-1]
    return any(name in message for name in (field, *CONTRADICTS.get(field, ()))) or message.startswith(
        "weights:"
    )


@pytest.mark.parametrize(
    "model_type", ["mixtral", "gemma", "gemma3", "qwen2_moe", "mamba", "", None, 3, ["llama"], {}]
)
def test_unsupported_architectures_are_told_what_is_supported(tmp_path: Path, model_type: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**HUB["Llama-2-7b-hf"], "model_type": model_type}))
    with pytest.raises(CheckpointError, match=r"model_type .* not supported") as caught:
        ModelConfig.from_pretrained(tmp_path)
    assert all(family in str(caught.value) for family in FAMILIES)
    without = {name: value for name, value in HUB["Llama-2-7b-hf"].items() if name != "model_type"}
    (tmp_path / "config.json").write_text(json.dumps(without))
    with pytest.raises(CheckpointError, match="model_type"):
        ModelConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", sorted(CASES))
def test_both_spellings_give_the_same_model(tmp_path: Path, name: str) -> None:
    """transformers 5 writes rope_parameters, checkpoints from before have rope_theta, rope_scaling and no layer_types."""
    config = CASES[name].config(dtype="float32", architectures=["X"])
    saved = config.to_dict()
    spellings = [saved, older(saved)]
    for spelling, written in zip(("new", "older"), spellings, strict=True):
        (tmp_path / spelling).mkdir()
        (tmp_path / spelling / "config.json").write_text(json.dumps(written))
    theirs = [AutoConfig.from_pretrained(tmp_path / spelling).to_dict() for spelling in ("new", "older")]
    for read in theirs:
        for name in ("_name_or_path", "_sliding_window_pattern", "partial_rotary_factor"):
            read.pop(name, None)
        ropes = read.get("rope_parameters", {})
        for rope in (ropes, *(ropes.get(kind, {}) for kind in ("full_attention", "sliding_attention"))):
            rope.pop("type", None)
    assert theirs[0] == theirs[1]
    assert ModelConfig.from_pretrained(tmp_path / "older") == ModelConfig.from_pretrained(tmp_path / "new")


@pytest.mark.parametrize("name", sorted(HUB))
def test_a_published_config_says_the_same_after_transformers_saved_it_again(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB[name]))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    first, again = (ModelConfig.from_pretrained(path) for path in (tmp_path, tmp_path / "again"))
    assert replace(first, head_dim=first.dim_per_head) == replace(again, head_dim=again.dim_per_head)


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("gpt2", {"h.{}.attn.bias": torch.ones(1, 1, 8, 8), "h.{}.attn.masked_bias": torch.tensor(-1e4)}),
        ("llama", {"model.layers.{}.self_attn.rotary_emb.inv_freq": torch.ones(10)}),
    ],
)
def test_buffers_that_older_checkpoints_hold_are_no_weights(
    tmp_path: Path, family: str, buffers: dict[str, torch.Tensor]
) -> None:
    """GPT-2's causal masks and Llama's angles were saved beside the weights; GPT-2's names came without a prefix."""
    name = {"gpt2": "gpt2", "llama": "llama-odd"}[family]
    path = make_checkpoint(name, tmp_path)
    tokens = np.random.default_rng(5).integers(0, 97, PROMPT).tolist()
    expected = our_logits(path, tokens)
    state = load_file(path / "model.safetensors")
    if family == "gpt2":
        state = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    for layer in range(2):
        state.update({key.format(layer): tensor.clone() for key, tensor in buffers.items()})
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    assert np.array_equal(our_logits(path, tokens), expected)


def test_a_changed_config_is_noticed_by_the_comparison(tmp_path: Path) -> None:
    """The comparison of the first test fails when the two sides read different values."""
    path = make_checkpoint("granite", tmp_path)
    saved = json.loads((path / "config.json").read_text())
    tokens = np.random.default_rng(5).integers(0, saved["vocab_size"], PROMPT).tolist()
    ours = our_logits(path, tokens)
    (path / "config.json").write_text(json.dumps({**saved, "residual_multiplier": 0.61}))
    assert np.abs(ours - their_logits(path, tokens, len(ours))).max() > TOLERANCE
    assert random_model(CASES["granite"].config(), "granite").config.residual_multiplier == 0.6
