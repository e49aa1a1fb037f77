"""bfloat16 and int8 against float32, for every family: close, and not the same by accident of not being used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nanoserve import LLM, ModelConfig, NanoServingEngine, load_weights, random_weights
from nanoserve.compiler.target import AVX2, Target, host
from nanoserve.models.weights import bind_weights, expected_bytes, loaded_bytes, stored_dtype
from nanoserve.precision import Precision, choose_precision
from support.families import CASES
from support.oracle import make_checkpoint
from support.recording import greedy, record

# Mean error of the logits over their standard deviation. Random models of width 40 to 100 are the hard case: few products
# to average over, and no outlier is the exception.
LIMITS = {"bfloat16": 0.03, "int8": 0.12}
DOT = Target("dot", 16, 32, "x", bf16_dot=True)


@pytest.mark.parametrize("arithmetic", LIMITS)
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_family_stays_close_to_float32(tmp_path: Path, name: str, arithmetic: str) -> None:
    path = make_checkpoint(name, tmp_path)
    config, weights = ModelConfig.from_pretrained(path), load_weights(path)
    prompt = np.random.default_rng(1).integers(0, config.vocab_size, 60).tolist()
    rows = []
    for precision in (
        Precision(),
        Precision(arithmetic, "float32" if config.dim_per_head % 2 else "bfloat16"),
    ):
        engine = NanoServingEngine(config, weights, precision=precision)
        recorder = record(engine)
        (request,) = engine.generate([prompt], greedy(1, prompt_logprobs=0, ignore_eos=True))
        assert request.error is None
        rows.append(np.stack([row for _, row in sorted(recorder.rows[request.req_id].items())]))
    wide, narrow = rows
    error = np.abs(narrow - wide)
    assert 0 < error.mean() < LIMITS[arithmetic] * wide.std(axis=1).mean()


@pytest.mark.parametrize(
    ("dtype", "quantization", "kv", "stored", "target", "expected"),
    [
        ("auto", None, "auto", "bf16", DOT, ("bfloat16", "bfloat16")),
        ("auto", None, "auto", "bf16", AVX2, ("float32", "float32")),
        ("auto", None, "auto", "f16", DOT, ("float32", "float32")),
        ("auto", None, "auto", "f32", DOT, ("float32", "float32")),
        ("auto", None, "bfloat16", "f32", DOT, ("float32", "bfloat16")),
        ("bfloat16", None, "auto", "f32", AVX2, ("bfloat16", "bfloat16")),
        ("bfloat16", None, "float32", "f32", AVX2, ("bfloat16", "float32")),
        ("float32", None, "auto", "bf16", DOT, ("float32", "float32")),
        ("float32", "int8", "auto", "bf16", DOT, ("int8", "bfloat16")),
    ],
)
def test_what_a_choice_comes_to(
    dtype: str, quantization: str | None, kv: str, stored: str, target: Target, expected: tuple[str, str]
) -> None:
    chosen = choose_precision(dtype, quantization, kv, stored, 64, target)
    assert (chosen.arithmetic, chosen.kv_cache) == expected


def test_an_odd_head_size_keeps_float32_keys() -> None:
    assert choose_precision("bfloat16", None, "auto", "f32", 33, DOT).kv_cache == "float32"
    with pytest.raises(ValueError, match="even head size, the model's is 33"):
        choose_precision("bfloat16", None, "bfloat16", "f32", 33, DOT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float16"}, "dtype: 'float16' must be one of auto, float32, bfloat16"),
        ({"dtype": None}, "dtype: None must be one of"),
        ({"dtype": ["bfloat16"]}, "dtype: "),
        ({"quantization": "int4"}, "quantization: 'int4' must be one of None, int8"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: 'fp8' must be one of auto, float32, bfloat16"),
    ],
)
def test_other_formats_are_refused_before_anything_is_read(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LLM("/nowhere", **options)  # type: ignore[arg-type]


def test_the_default_follows_the_checkpoint(tmp_path: Path) -> None:
    import torch

    path = make_checkpoint("qwen3", tmp_path, dtype=torch.bfloat16)
    config, tensors = ModelConfig.from_pretrained(path), load_weights(path)
    assert stored_dtype(bind_weights(config, tensors)) == "bf16"
    llm = LLM(path)
    assert llm.precision.arithmetic == ("bfloat16" if host().bf16_dot else "float32")
    assert llm.engine.kv_pool.element == llm.precision.kv_element
    assert LLM(path, dtype="float32").precision == Precision()


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma2"])
def test_memory_is_what_was_foreseen(tmp_path: Path, name: str, arithmetic: str) -> None:
    """Nearly: panels are filled up, and every array begins on a page."""
    path = make_checkpoint(name, tmp_path)
    config, tensors = ModelConfig.from_pretrained(path), load_weights(path)
    precision = Precision(arithmetic)
    bound = bind_weights(config, tensors)
    foreseen = loaded_bytes(config, bound, precision)
    assert foreseen == expected_bytes(config, "f32", precision)
    engine = NanoServingEngine(config, random_weights(config), precision=precision)
    assert foreseen <= engine.executor.weight_bytes <= 1.6 * foreseen + 4096 * 20 * config.n_layer
    if arithmetic != "float32":
        assert foreseen < {"bfloat16": 0.65, "int8": 0.45}[arithmetic] * loaded_bytes(config, bound)
