"""Checkpoint files come from strangers: whatever is wrong with them gets a named error, never a crash or a wrong tensor."""

from __future__ import annotations

import gc
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.random_checkpoint import write_random_checkpoint

from nanoserve import CheckpointError
from nanoserve.models import checkpoint
from nanoserve.models.checkpoint import load_weights
from nanoserve.models.safetensors_file import read_safetensors
from support.safetensors_bytes import entry, write

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_every_float_type_reads_as_float32(tmp_path: Path, name: str) -> None:
    """Whole, by rows and through NumPy: the values that torch wrote, widened exactly; shapes () and (0, 3) too."""
    torch = pytest.importorskip("torch", reason="writes the reference files")
    from safetensors.torch import save_file

    dtype = getattr(torch, name)
    values = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    extremes = torch.tensor([0.0, -0.0, 1e-40, 65504.0, float("inf"), -float("inf"), float("nan")]).to(dtype)
    given = {
        "a": values,
        "one": values[0, 0, 0].clone(),
        "none": torch.zeros(0, 3, dtype=dtype),
        "e": extremes,
    }
    save_file(given, tmp_path / "m.safetensors")
    tensors = read_safetensors(tmp_path / "m.safetensors")
    for key, tensor in tensors.items():
        expected = given[key].float().numpy()
        assert (tensor.dtype, tensor.shape, tensor.ndim) == (name, expected.shape, expected.ndim)
        assert tensor.nbytes == given[key].numel() * given[key].element_size()
        for array in (tensor[:], np.asarray(tensor)):
            assert array.dtype == np.float32
            assert array.shape == expected.shape
            np.testing.assert_array_equal(array, expected)
            np.testing.assert_array_equal(np.signbit(array), np.signbit(expected))
    for rows in (slice(2, 5), slice(0, 0), slice(5, 99), slice(-2, None), slice(6, 2)):
        part = tensors["a"][rows]
        np.testing.assert_array_equal(part, values.float().numpy()[rows])
        assert part.flags.c_contiguous
    assert tensors["none"][0:5].shape == (0, 3)
    assert np.asarray(tensors["a"], dtype=np.float64).dtype == np.float64


def test_aligned_float32_is_a_read_only_view(tmp_path: Path) -> None:
    """F32 costs no copy and cannot be written through; a tensor at an odd offset is copied and equal."""
    values = np.arange(6, dtype=np.float32)
    for pad in (0, 1):
        header = {"a": entry("U8", (pad,), (0, pad)), "b": entry("F32", (3, 2), (pad, pad + 24))}
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        tensor = read_safetensors(write(tmp_path / f"{pad}.safetensors", raw, bytes(pad) + values.tobytes()))[
            "b"
        ]
        np.testing.assert_array_equal(tensor[:], values.reshape(3, 2))
        assert tensor[:].flags.aligned
        assert np.shares_memory(tensor[1:2], tensor[:]) == (pad == 0)
        if pad == 0:
            with pytest.raises(ValueError, match="read-only"):
                tensor[:][0, 0] = 1


def test_what_a_tensor_refuses(tmp_path: Path) -> None:
    """Types without a float32 value, a float64 out of range, and rows that are not rows, by name."""
    data = np.array([1e300], "<f8").tobytes()
    header = {"big": entry("F64", (1,), (0, 8)), "eight": entry("F8_E4M3", (2,), (8, 10)), "n": entry("F32", (), (10, 14)),
              "four": entry("F4", (4,), (14, 16)), "flag": entry("BOOL", (1,), (16, 17))}  # fmt: skip
    tensors = read_safetensors(write(tmp_path / "m.safetensors", header, data + bytes(9)))
    with pytest.raises(
        CheckpointError, match=r"m\.safetensors: dtype float8_e4m3fn of tensor 'eight' is not supported"
    ):
        tensors["eight"][:]
    with pytest.raises(CheckpointError, match="'flag' is not supported"):
        np.asarray(tensors["flag"])
    with pytest.raises(CheckpointError, match="tensor 'big' holds a float64 that is beyond float32"):
        tensors["big"][:]
    with pytest.raises(IndexError, match="'n' is a single number"):
        tensors["n"][0:1]
    with pytest.raises(IndexError, match="step 1, not 2"):
        tensors["big"][0:1:2]
    with pytest.raises(TypeError, match="by slice, not by int"):
        tensors["big"][0]  # type: ignore[index]
    with pytest.raises(TypeError, match="has no rows"):
        len(tensors["n"])


def test_views_keep_the_mapping_alive(tmp_path: Path) -> None:
    """The file may be unlinked and the tensors dropped: what was read stays readable."""
    path = write_random_checkpoint(tmp_path, {}, {"w": (512, 1024)}, "float32") / "model.safetensors"
    view = read_safetensors(path)["w"][:]
    expected = np.array(view)
    path.unlink()
    gc.collect()
    np.testing.assert_array_equal(view, expected)


def _resident_file_kib() -> int:
    return int(re.findall(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts resident pages the Linux way")
def test_reading_costs_the_rows_and_forget_gives_them_back(tmp_path: Path) -> None:
    """Opening maps; a slice brings in its own pages; forget() drops them, and reading again gives the same."""
    path = write_random_checkpoint(tmp_path, {}, {"a": (3,), "w": (64, 1 << 18)}, "float16")
    start = _resident_file_kib()
    tensor = load_weights(path)["w"]
    assert tensor.nbytes == 32 << 20
    assert _resident_file_kib() - start < 1024
    first = np.array(tensor[0:8])
    assert 4 << 10 <= _resident_file_kib() - start < 10 << 10  # 4 MiB, and what the kernel maps around them
    tensor[:]
    assert _resident_file_kib() - start >= 32 << 10
    tensor.forget()
    assert _resident_file_kib() - start < 1024
    np.testing.assert_array_equal(tensor[0:8], first)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry(offsets=(0, 16))}, bytes(8), "data_offsets [0, 16] must lie in order within the 8 data bytes"),
        ({"a": entry(offsets=(8, 0))}, bytes(8), "must lie in order"),
        ({"a": entry(offsets=(-8, 0))}, bytes(8), "must be two counts"),
        ({"a": entry(offsets=(0, 8, 8))}, bytes(8), "must be two counts"),
        ({"a": entry(offsets=(0, 10**4000))}, bytes(8), "must be two counts"),
        ({"a": entry(shape=(3,))}, bytes(8), "8 bytes, F32 [3] takes 12"),
        ({"a": entry("F4", (3,), (0, 2))}, bytes(2), "2 bytes, F4 [3] takes 1"),
        ({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, b"", "has too many elements"),
        ({"a": entry(shape=(2**40, 2**40))}, bytes(8), "takes"),
        ({"a": entry(shape=(-2,))}, bytes(8), "must be at most 8 counts"),
        ({"a": entry(shape=(2.0,))}, bytes(8), "must be at most 8 counts"),
        ({"a": entry(shape=(True, 2))}, bytes(8), "must be at most 8 counts"),
        ({"a": entry(shape=(1,) * 9, offsets=(0, 4))}, bytes(4), "must be at most 8 counts"),
        ({"a": {**entry(), "shape": 2}}, bytes(8), "shape 2 must be at most 8 counts"),
        ({"a": entry(dtype="F31")}, bytes(8), "dtype 'F31' must be one of"),
        ({"a": {**entry(), "dtype": ["F32"]}}, bytes(8), "dtype ['F32'] must be one of"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "'b' begins at 4, inside 'a' that ends at 8"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "bytes [8, 12) before tensor 'b' belong to no tensor"),
        ({"a": entry()}, bytes(12), "header describes 8 data bytes, the file holds 12"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "must have exactly dtype, shape and data_offsets"),
        ({"a": {**entry(), "more": 1}}, bytes(8), "must have exactly"),
        ({"a": 7}, bytes(8), "must have exactly"),
        ([1, 2], b"", "header: must hold an object, is list"),
        (b"{broken", b"", "not valid JSON"),
        (b"\xff\xfe{}", b"", "not valid JSON (UnicodeDecodeError)"),
        (b"[" * 100_000, b"", "not valid JSON (RecursionError)"),
        (b'{"a":{"b":' * 50_000, b"", "not valid JSON (RecursionError)"),
        (b'{"a":' + b"9" * 100_000 + b"}", b"", "not valid JSON"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, b"", "nested deeper than 32 levels"),
        (b'{"a":NaN}', b"", "not valid JSON (NaN is no JSON number)"),
        (b'{"a":{},"a":{}}', b"", "names 'a' twice"),
        (b'{"a":{"dtype":"F32","dtype":"F16"}}', b"", "names 'dtype' twice"),
    ],
)  # fmt: skip
def test_damaged_headers_are_named(tmp_path: Path, header: Any, data: bytes, words: str) -> None:
    """Each way a header can lie is told by file, tensor, value and limit."""
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(write(tmp_path / "m.safetensors", header, data))
    assert words in str(caught.value)
    assert str(caught.value).startswith("m.safetensors: ")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"1234", "4 bytes, a safetensors file has at least 8"),
        (b"", "0 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", r"header length 9223372036854775808 must be in \[2, 2\]"),
        ((3).to_bytes(8, "little") + b"{}", r"header length 3 must be in \[2, 2\]"),
        ((0).to_bytes(8, "little") + b"{}", "header length 0"),
        (None, "no such file"),
    ],
)
def test_truncated_files_and_absurd_lengths(tmp_path: Path, content: bytes | None, words: str) -> None:
    """A header length beyond the file is refused before anything is allocated."""
    if content is not None:
        (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_safetensors(tmp_path / "m.safetensors")


def test_a_header_larger_than_the_limit(tmp_path: Path) -> None:
    """The limit holds whatever the file's size (a sparse file costs nothing)."""
    path = tmp_path / "m.safetensors"
    with path.open("wb") as stream:
        stream.write((33 << 20).to_bytes(8, "little"))
        stream.truncate(64 << 20)
    with pytest.raises(CheckpointError, match=r"header length 34603008 must be in \[2, 33554432\]"):
        read_safetensors(path)


def test_empty_and_metadata_only_files(tmp_path: Path) -> None:
    assert read_safetensors(write(tmp_path / "m.safetensors", {})) == {}
    assert read_safetensors(write(tmp_path / "m.safetensors", {"__metadata__": {"format": "pt"}})) == {}


def test_thousands_of_tensors_open_at_once(tmp_path: Path) -> None:
    """20,000 tensors open in far less than a second (the limit is for a busy machine): nothing in the checks is quadratic."""
    shapes = {f"model.layers.{i}.weight": (4,) for i in range(20_000)}
    path = write_random_checkpoint(tmp_path, {}, shapes)
    start = time.process_time()
    tensors = load_weights(path)
    assert len(tensors) == 20_000
    assert time.process_time() - start < 3


def test_symlinks_are_followed(tmp_path: Path) -> None:
    """The hub's cache is made of them: snapshots/<commit>/model.safetensors -> ../../blobs/<hash>."""
    blob = write_random_checkpoint(tmp_path / "blobs", {}, {"w": (4, 2)}) / "model.safetensors"
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(os.path.relpath(blob, tmp_path / "snapshot"))
    assert load_weights(tmp_path / "snapshot")["w"].shape == (4, 2)


def two_shards(directory: Path) -> Path:
    directory.mkdir()
    write(directory / "one.safetensors", {"a": entry()}, bytes(8))
    write(directory / "two.safetensors", {"b": entry()}, bytes(8))
    return directory


@pytest.mark.parametrize(
    ("index", "words"),
    [
        *[
            ({"weight_map": {"a": "one.safetensors", "b": name}}, "must be a file name beside the index")
            for name in ("../two.safetensors", "/two.safetensors", "x/two.safetensors", "x\\two.safetensors", "C:two.safetensors",
                         "two.bin", "..", "", ".safetensors", "two\0.safetensors", "tw\u2024.safetensors", "a" * 300 + ".safetensors")
        ],
        ({"weight_map": {"a": "g1.safetensors", "b": "g2.safetensors"}}, "2 of 2 shards are missing: g1.safetensors, g2.safetensors"),
        ({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}, "1 tensors are in no shard, first 'b', which one.safetensors should hold"),
        ({"weight_map": {"b": "one.safetensors"}}, "one.safetensors: tensor 'a' is not what"),
        ({"weight_map": {"b": "two.safetensors", "a": "two.safetensors"}}, "1 tensors are in no shard, first 'a'"),
        ({"weight_map": [1]}, "must hold an object with a weight_map"),
        ({"weight_map": {}}, "must hold an object with a weight_map"),
        ({}, "must hold an object with a weight_map"),
        ({"weight_map": {"a": {}}}, "tensor 'a': shard {} must be a file name"),
        ({"weight_map": {str(i): f"{i}.safetensors" for i in range(10_001)}}, "10001 shards, the limit is 10000"),
        ([], "must hold an object, is list"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "names 'a' twice"),
    ],
)  # fmt: skip
def test_sharded_index(tmp_path: Path, index: Any, words: str) -> None:
    """A good index joins its shards; a bad one is refused, and cannot reach outside its directory."""
    directory = two_shards(tmp_path / "model")
    good = {"metadata": {"total_size": 1}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (directory / INDEX).write_text(json.dumps(good))
    assert sorted(load_weights(directory)) == ["a", "b"]
    (directory / INDEX).write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load_weights(directory)


def test_an_index_larger_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_INDEX_BYTES", 100)
    directory = two_shards(tmp_path / "model")
    (directory / INDEX).write_text(" " * 101)
    with pytest.raises(CheckpointError, match=r"index\.json: larger than the limit of 100 bytes"):
        load_weights(directory)


def test_sharded_checkpoints_equal_single_ones(tmp_path: Path) -> None:
    """The same tensors in one file and in shards (one tensor larger than a shard) read the same."""
    shapes = {"a": (10, 3), "big": (100, 50), "c": (7,), "norm.weight": (5,)}
    single = load_weights(write_random_checkpoint(tmp_path / "single", {}, shapes))
    directory = write_random_checkpoint(tmp_path / "sharded", {}, shapes, shard_bytes=100)
    assert len(list(directory.glob("model-*-of-00003.safetensors"))) == 3
    sharded = load_weights(directory)
    assert sharded.keys() == single.keys()
    for name in shapes:
        np.testing.assert_array_equal(sharded[name][:], single[name][:])
    assert 0.5 < float(single["norm.weight"][:].min()) < 1.5


def test_which_file_of_a_directory_is_read(tmp_path: Path) -> None:
    """model.safetensors, else the index, else the only safetensors file; several without an index are a question."""
    write(tmp_path / "weights.safetensors", {"only": entry()}, bytes(8))
    assert list(load_weights(tmp_path)) == ["only"]
    write(tmp_path / "more.safetensors", {"x": entry()}, bytes(8))
    with pytest.raises(
        CheckpointError, match=r"several files that could be meant: more\.safetensors, weights\.safetensors"
    ):
        load_weights(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "more.safetensors"}}))
    assert list(load_weights(tmp_path)) == ["x"]
    write(tmp_path / "model.safetensors", {"single": entry()}, bytes(8))
    assert list(load_weights(tmp_path)) == ["single"]


def test_other_formats_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """Only .bin, .pth or .gguf: the sentence has the conversion; an empty directory is called empty."""
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor .*; it is empty$"):
        load_weights(tmp_path)
    for name, call in (("a.gguf", "dir, gguf_file=name"), ("pytorch_model.bin", "dir"), ("x.pth", "dir")):
        (tmp_path / name).write_bytes(b"")
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(
                CheckpointError, match=re.escape(f"AutoModelForCausalLM.from_pretrained({call})")
            ):
                load_weights(path)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    """A directory where a file is expected, and an error of the operating system, are CheckpointErrors too."""
    (tmp_path / INDEX).mkdir()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError):
        load_weights(tmp_path)
