"""Checkpoint files come from strangers: whatever is wrong with them gets a named error, never a crash or a wrong model."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoserve import CheckpointError, ModelConfig, load_weights, random_weights
from nanoserve.models.safetensors_file import read_safetensors
from nanoserve.models.weights import bind_weights

CONFIG = ModelConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=8, max_seq_len=16)


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_round_trip_of_every_float_type(tmp_path: Path) -> None:
    """F32, F16 and BF16 files give the values that were written; F32 and F16 stay memory-mapped."""
    torch = pytest.importorskip("torch", reason="writes the reference files")
    from safetensors.torch import save_file

    values = torch.randn(3, 5)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        save_file({"a": values.to(dtype), "b": torch.arange(4, dtype=dtype)}, tmp_path / "m.safetensors")
        tensors = read_safetensors(tmp_path / "m.safetensors")
        np.testing.assert_array_equal(tensors["a"].astype(np.float32), values.to(dtype).float().numpy())
        assert tensors["b"].shape == (4,)
        if dtype is not torch.bfloat16:
            assert isinstance(tensors["a"].base, np.memmap) or isinstance(tensors["a"], np.memmap)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (
            {"a": entry(offsets=(0, 16))},
            bytes(8),
            "data_offsets [0, 16] must lie in order within the 8 data bytes",
        ),
        ({"a": entry(offsets=(8, 0))}, bytes(8), "must lie in order"),
        ({"a": entry(offsets=(-8, 0))}, bytes(8), "must be two counts"),
        ({"a": entry(shape=(3,))}, bytes(8), "8 bytes, F32 [3] takes 12"),
        ({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, b"", "has too many elements"),
        ({"a": entry(shape=(2**40, 2**40))}, bytes(8), "takes"),
        ({"a": entry(shape=(-2,))}, bytes(8), "must be at most 8 counts"),
        ({"a": entry(shape=(2.0,))}, bytes(8), "must be at most 8 counts"),
        ({"a": entry(shape=(True, 2))}, bytes(8), "must be at most 8 counts"),
        ({"a": entry(dtype="F31")}, bytes(8), "dtype 'F31' must be one of"),
        (
            {"a": entry(), "b": entry(offsets=(4, 12))},
            bytes(12),
            "'b' begins at 4, inside 'a' that ends at 8",
        ),
        (
            {"a": entry(), "b": entry(offsets=(12, 20))},
            bytes(20),
            "bytes [8, 12) before tensor 'b' belong to no tensor",
        ),
        ({"a": entry()}, bytes(12), "header describes 8 data bytes, the file holds 12"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "must have exactly dtype, shape and data_offsets"),
        ({"a": 7}, bytes(8), "must have exactly"),
        ([1, 2], b"", "header must be an object"),
        (b"{broken", b"", "not valid JSON"),
        (b"\xff\xfe{}", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a":{},"a":{}}', b"", "names 'a' twice"),
    ],
)
def test_damaged_headers_are_named(tmp_path: Path, header: Any, data: bytes, words: str) -> None:
    """Each way a header can lie is told by tensor, value and limit."""
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(write(tmp_path / "m.safetensors", header, data))
    assert words in str(caught.value)


def test_truncated_and_absurd_lengths(tmp_path: Path) -> None:
    """A header length beyond the file (or beyond 100 MB) is refused before anything is allocated."""
    (tmp_path / "short.safetensors").write_bytes(b"1234")
    for path in (
        tmp_path / "short.safetensors",
        tmp_path / "absent.safetensors",
        write(tmp_path / "long.safetensors", {}, length=2**63),
        write(tmp_path / "long2.safetensors", {}, length=3),
    ):
        with pytest.raises(CheckpointError):
            read_safetensors(path)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_files_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    """Random byte edits, cuts and insertions: the reader returns tensors or a CheckpointError, nothing else."""
    good = write(
        tmp_path / "good.safetensors", {"a": entry(), "b": entry("F16", (2, 2), (8, 16))}, bytes(16)
    ).read_bytes()
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        match data.draw(st.sampled_from(["edit", "cut", "insert"])):
            case "edit" if raw:
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[at : at + data.draw(st.integers(1, 20))]
            case _:
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    (tmp_path / "bad.safetensors").write_bytes(bytes(raw))
    try:
        tensors = read_safetensors(tmp_path / "bad.safetensors")
    except CheckpointError:
        return
    assert sum(array.nbytes for array in tensors.values()) <= len(raw) * 2


def test_missing_and_unexpected_tensors_are_listed() -> None:
    """Both directions of a mismatch name the tensors, shortened when there are many."""
    tensors = random_weights(CONFIG)
    without = {name: array for name, array in tensors.items() if "ln_f" not in name}
    with pytest.raises(CheckpointError, match=r"2 tensors are missing: ln_f\.weight, ln_f\.bias"):
        bind_weights(CONFIG, without)
    with pytest.raises(CheckpointError, match=r"1 tensors are unexpected: extra\.weight"):
        bind_weights(CONFIG, {**tensors, "extra.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"16 tensors are missing: .* and 11 more"):
        bind_weights(CONFIG, {})


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("wte.weight", np.zeros((11, 9), np.float32), r"shape \(11, 9\), the config needs \(11, 8\)"),
        (
            "h.0.attn.c_attn.weight",
            np.zeros((24, 8), np.float32),
            r"shape \(24, 8\), the config needs \(8, 24\)",
        ),
        ("h.0.mlp.c_fc.bias", np.zeros((32, 1), np.float32), r"shape \(32, 1\), the config needs \(32,\)"),
        ("wpe.weight", np.zeros((8, 8), np.float32), r"shape \(8, 8\), the config needs \(16, 8\)"),
        ("ln_f.weight", np.zeros(8, np.int64), "dtype int64, must be floating point"),
    ],
)
def test_wrong_shapes_and_types_are_named(name: str, array: np.ndarray, words: str) -> None:
    """The message has the checkpoint's own name, what was found and what the config needs, in the file's orientation."""
    with pytest.raises(CheckpointError, match=words):
        bind_weights(CONFIG, {**random_weights(CONFIG), name: array})


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"self_attn.q_proj": (8, 16), "self_attn.k_proj": (16, 16)}, r"q_proj.weight' has shape \(8, 16\)"),
        ({"mlp.gate_proj": (30, 16), "mlp.up_proj": (10, 16)}, r"gate_proj.weight' has shape \(30, 16\)"),
        ({"self_attn.v_proj": (8, 8)}, r"v_proj.weight' has shape \(8, 8\), the config needs \(8, 16\)"),
    ],
)
def test_each_part_of_a_joined_weight_has_its_own_shape(
    shapes: dict[str, tuple[int, ...]], words: str
) -> None:
    """q|k|v and gate|up are joined: wrong parts whose sum is right would give wrong answers in silence."""
    config = ModelConfig(
        vocab_size=11, n_layer=1, n_head=4, n_kv_head=2, n_embd=16, intermediate_size=20, norm="rmsnorm",
        positions="rope", gated_mlp=True, activation="silu", qkv_bias=False, out_bias=False, mlp_bias=False, family="llama",
    )  # fmt: skip
    tensors = random_weights(config)
    bind_weights(config, tensors)
    wrong = {f"model.layers.0.{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(CheckpointError, match=words):
        bind_weights(config, {**tensors, **wrong})


def test_tied_head_must_equal_the_embedding() -> None:
    """A separate lm_head that contradicts tie_word_embeddings would silently be dropped; it is refused instead."""
    tensors = random_weights(CONFIG)
    assert "head.weight" not in bind_weights(CONFIG, {**tensors, "lm_head.weight": tensors["wte.weight"]})
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        bind_weights(CONFIG, {**tensors, "lm_head.weight": tensors["wte.weight"] + 1})


def test_prefix_twice_is_refused() -> None:
    """With and without `transformer.` the same tensor would win by chance."""
    tensors = random_weights(CONFIG)
    with pytest.raises(CheckpointError, match="with and without the prefix"):
        bind_weights(CONFIG, {**tensors, "transformer.ln_f.bias": tensors["ln_f.bias"]})


def shard(directory: Path) -> Path:
    directory.mkdir()
    write(directory / "one.safetensors", {"a": entry()}, bytes(8))
    write(directory / "two.safetensors", {"b": entry()}, bytes(8))
    return directory


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (
            {"weight_map": {"a": "one.safetensors", "b": "../two.safetensors"}},
            "must be a file name beside the index",
        ),
        ({"weight_map": {"a": "one.safetensors", "b": "gone.safetensors"}}, "no such file"),
        ({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}, "tensors are in no shard"),
        ({"weight_map": {"b": "one.safetensors"}}, "is not what"),
        ({"weight_map": [1]}, "must hold an object with a weight_map"),
        ({}, "must hold an object with a weight_map"),
        ({"weight_map": {"a": {}}}, "must hold an object with a weight_map"),
    ],
)
def test_sharded_index(tmp_path: Path, index: Any, words: str) -> None:
    """A good index joins its shards; a bad one is refused, and cannot reach outside its directory."""
    directory = shard(tmp_path / "model")
    good = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(good))
    assert sorted(load_weights(directory)) == ["a", "b"]
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        load_weights(directory)


def test_directories_without_safetensors(tmp_path: Path) -> None:
    """A directory that only has .bin files is refused with the way out."""
    with pytest.raises(CheckpointError, match="holds neither"):
        load_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="convert them once with transformers"):
        load_weights(tmp_path)


def test_pt_files_are_read_without_unpickling_code(tmp_path: Path) -> None:
    """A plain state dict loads; a file that would run code when unpickled is refused and runs nothing."""
    torch = pytest.importorskip("torch", reason="writes the .pt files")
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pt")
    np.testing.assert_array_equal(load_weights(tmp_path / "good.pt")["a"], np.ones(2, np.float32))
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "noise.pt").write_bytes(b"not a zip file")
    for name in ("evil.pt", "list.pt", "noise.pt", "absent.pt"):
        with pytest.raises(CheckpointError):
            load_weights(tmp_path / name)
    assert not marker.exists()


GOOD = {"model_type": "gpt2", "vocab_size": 11, "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: gpt2, llama"),
        ({"model_type": None}, "is not supported"),
        ({"sliding_window": 128}, "field 'sliding_window' is not understood"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True is not supported"),
        ({"activation_function": "relu"}, "activation 'relu' is not supported"),
        ({"n_head": 3}, "n_embd: 8 must be a multiple of n_head=3"),
        ({"n_layer": 0}, r"n_layer: 0 must be in \[1,"),
        ({"n_layer": 1e3}, "n_layer: 1000.0 must be a whole number"),
        ({"n_layer": True}, "n_layer: True must be a whole number"),
        ({"vocab_size": 2**40}, "vocab_size: 1099511627776 must be"),
        ({"layer_norm_epsilon": -1}, r"norm_eps: -1 must be a number in \(0,"),
        ({"layer_norm_epsilon": "x"}, "norm_eps: 'x' must be"),
        ({"layer_norm_epsilon": True}, "norm_eps: True must be"),
        ({"layer_norm_epsilon": 10**400}, "norm_eps: an integer of 1329 bits must be"),
        ({"tie_word_embeddings": "no"}, "tie_embeddings: 'no' must be True or False"),
        ({"activation_function": []}, r"activation \[\] is not supported"),
        ({"eos_token_id": "2"}, "eos_token_id: '2' must be"),
        ({"eos_token_id": [1, -1]}, "eos_token_id: -1 must be"),
        ({"eos_token_id": True}, "eos_token_id: True must be"),
    ],
)
def test_config_fields_are_understood_or_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """A config field that would change the result is never ignored; sizes are range-checked."""
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert ModelConfig.from_pretrained(tmp_path).n_embd == 8
    (tmp_path / "config.json").write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(CheckpointError, match=words):
        ModelConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling: .* is not supported"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_parameters: .* only rope_type 'default'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 2}},
            "field 'factor' is not understood",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7}},
            "rope_theta is 500000.0, rope_parameters.rope_theta 7",
        ),
        ({"num_key_value_heads": 3}, "n_kv_head: 3 must divide n_head=4"),
        ({"pretraining_tp": 2}, "pretraining_tp: 2 is not supported"),
        ({"hidden_size": None}, "missing hidden_size"),
    ],
)
def test_llama_config_fields(change: dict[str, Any], words: str) -> None:
    """The same for llama, whose rope settings come in two spellings."""
    from nanoserve.models.config import config_from_dict

    good = {"model_type": "llama", "vocab_size": 11, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 16,
            "num_key_value_heads": 2, "intermediate_size": 20, "rope_theta": 5e5}  # fmt: skip
    config = config_from_dict(good)
    assert (config.rope_theta, config.kv_heads, config.gated_mlp, config.tie_embeddings) == (
        5e5,
        2,
        True,
        False,
    )
    with pytest.raises(CheckpointError, match=words):
        config_from_dict({**good, **change})


def test_config_json_that_is_not_json(tmp_path: Path) -> None:
    for content in ("", "[1]", "{", "[" * 100_000, '"text"'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError):
            ModelConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        ModelConfig.from_pretrained(tmp_path / "nowhere")
