"""Packed weights on disk: a warm start has the cold one's bits, and nothing that differs in any byte is ever used."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.random_checkpoint import write_random_checkpoint

import nanoserve
from nanoserve import LLM, CheckpointError, ModelConfig, SamplingParams
from nanoserve import packed_weights as packed_module
from nanoserve import weight_cache as cache_module
from nanoserve.compiler.cache_directory import CacheRefused
from nanoserve.models.checkpoint import load_weights
from nanoserve.models.weights import bind_weights, checkpoint_shapes
from nanoserve.native import KVCachePool, StepExecutor, ThreadPool, WeightArena, checksum
from nanoserve.packed_weights import PackedWeights
from nanoserve.weight_cache import LIMIT_VARIABLE, WeightCache

KEY, OTHER, THIRD = "a" * 64, "b" * 64, "c" * 64
THREADS = ThreadPool(2)
SHAPE = {
    "model_type": "qwen3", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_is_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of some kilobytes are cached here, in a directory of this test."""
    monkeypatch.setattr(packed_module, "WORTH_CACHING_BYTES", 0)
    monkeypatch.setattr(
        WeightCache, "open", classmethod(lambda cls: WeightCache(tmp_path / "cache" / "weights"))
    )
    (tmp_path / "cache").mkdir(mode=0o700)


@pytest.fixture
def cache(tmp_path: Path) -> WeightCache:
    return WeightCache(tmp_path / "cache" / "weights")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def make_checkpoint(path: Path, seed: int = 0, dtype: str = "bfloat16", **changes: Any) -> Path:
    shape = {**SHAPE, **changes}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(shape))
    shapes = checkpoint_shapes(ModelConfig.from_pretrained(path))
    return write_random_checkpoint(path, shape, shapes, dtype=dtype, seed=seed)


def arena_of(num_bytes: int, seed: int = 0) -> WeightArena:
    arena = WeightArena(num_bytes)
    arena.view(0, num_bytes)[:] = np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)
    return arena


def content(arena: WeightArena) -> np.ndarray:
    return arena.view(0, arena.num_bytes)


def opened(path: Path, **options: Any) -> LLM:
    """An LLM, with what it writes to the cache written."""
    llm = LLM(path, kv_cache_bytes=2**20, **options)
    if llm.engine.executor.weight_writer is not None:
        llm.engine.executor.weight_writer.join()
    return llm


def was_cached(llm: LLM) -> bool:
    return llm.engine.executor.weights_were_cached


def answer(llm: LLM) -> tuple[list[int], list[float]]:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1)
    (output,) = llm.generate([[1, 2, 3, 4, 5]], params)
    return output.token_ids, [entry.logprob for entry in output.logprobs or []]


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "weights").glob("*.bin"))


# ---- a file


@pytest.mark.parametrize("num_bytes", [4096, 3 * 2**20 + 8192, 5 * 2**20])
def test_what_is_stored_is_read(cache: WeightCache, num_bytes: int) -> None:
    arena, again = arena_of(num_bytes), WeightArena(num_bytes)
    assert not cache.read(KEY, again, THREADS)
    assert cache.store(KEY, arena)
    assert cache.read(KEY, again, ThreadPool(1))
    assert np.array_equal(content(arena), content(again))
    assert not cache.read(OTHER, again, THREADS)
    assert {path.stat().st_mode & 0o077 for path in cache.directory.iterdir()} == {0}
    assert not list(cache.directory.glob(".new-*"))


def test_progress_is_told_per_chunk(cache: WeightCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_CHUNK_BYTES", 8192)
    arena, steps = arena_of(5 * 4096), []
    cache.store(KEY, arena)
    assert cache.read(KEY, arena, THREADS, lambda *step: steps.append(step))
    assert steps == [(done, 20480, "packed weights") for done in (8192, 16384, 20480)]


@pytest.mark.parametrize("begin", range(0, 3 * 4096, 128))
def test_no_flipped_byte_goes_unnoticed(
    cache: WeightCache, begin: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Header, padding and data alike; every byte of a region, and a random bit of each."""
    arena = arena_of(2 * 4096)
    path = cache.directory / f"{KEY}.bin"
    cache.store(KEY, arena)
    good = path.read_bytes()
    assert len(good) == 3 * 4096
    bits = np.random.default_rng(begin).integers(0, 8, 128)
    with caplog.at_level(logging.CRITICAL, logger="nanoserve"):
        for offset, bit in zip(range(begin, begin + 128), bits, strict=True):
            path.write_bytes(good[:offset] + bytes([good[offset] ^ 1 << int(bit)]) + good[offset + 1 :])
            path.chmod(0o600)
            assert not cache.read(KEY, WeightArena(2 * 4096), THREADS), offset
            assert not path.exists()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path, 4096 + 100), "has 4196 bytes, not 12288"),
    "empty": (lambda path: os.truncate(path, 0), "has 0 bytes"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "has 12289 bytes"),
    "of another key": (lambda path: path.write_bytes(path.read_bytes().replace(b"a" * 64, b"b" * 64)), "a header"),
    "blocks swapped": (
        lambda path: path.write_bytes(b"".join(path.read_bytes()[i * 4096 :][:4096] for i in (0, 2, 1))),
        "holds data that is not what was written",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_removed_and_said(
    cache: WeightCache, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    arena = arena_of(8192)
    cache.store(KEY, arena)
    change, words = DAMAGE[damage]
    change(cache.directory / f"{KEY}.bin")
    assert not cache.read(KEY, WeightArena(8192), THREADS)
    assert words in caplog.text
    assert "packing the checkpoint again" in caplog.text
    assert not (cache.directory / f"{KEY}.bin").exists()
    assert cache.store(KEY, arena)
    assert cache.read(KEY, WeightArena(8192), THREADS)


def test_a_file_that_shrinks_while_it_is_read(cache: WeightCache, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = arena_of(8192)
    cache.store(KEY, arena)
    with (cache.directory / f"{KEY}.bin").open("rb") as file:
        os.truncate(file.name, 4096 + 10)
        with pytest.raises(RuntimeError, match=r"the file ends at byte 4106, 8182 bytes early"):
            WeightArena(8192).read(file.fileno(), 4096, 0, 8192, THREADS)


def test_links_and_files_others_may_write_are_refused(cache: WeightCache, tmp_path: Path) -> None:
    arena, path = arena_of(4096), cache.directory / f"{KEY}.bin"
    cache.store(KEY, arena)
    path.chmod(0o622)
    with pytest.raises(CacheRefused, match="is not a file that only user"):
        cache.read(KEY, arena, THREADS)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheRefused, match="is a symbolic link"):
        cache.read(KEY, arena, THREADS)
    cache.directory.chmod(0o777)
    with pytest.raises(CacheRefused, match="lets other users write weights"):
        WeightCache(cache.directory)


# ---- its limits


def test_the_limit_removes_what_was_not_used_for_longest(
    cache: WeightCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, str(2 * 8192 + 100))
    cache = WeightCache(cache.directory)
    arena = arena_of(4096)
    for age, key in ((9000, KEY), (8000, OTHER)):
        cache.store(key, arena)
        os.utime(cache.directory / f"{key}.bin", (0, os.path.getmtime(cache.directory) - age))
    assert cache.read(KEY, arena, THREADS)  # now OTHER was not used for longest
    cache.store(THIRD, arena)
    assert {path.stem for path in cache.directory.glob("*.bin")} == {KEY, THIRD}


@pytest.mark.parametrize(("limit", "words"), [("8191", "the limit is 8191"), ("0", "the limit is 0")])
def test_what_is_larger_than_the_limit_is_not_stored(
    cache: WeightCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, limit: str, words: str
) -> None:  # fmt: skip
    monkeypatch.setenv(LIMIT_VARIABLE, limit)
    assert not WeightCache(cache.directory).store(KEY, arena_of(4096))
    assert words in caplog.text
    assert not list(cache.directory.glob("*.bin"))


@pytest.mark.parametrize("value", ["-1", "5GB", "1e9", "\u0661"])
def test_a_limit_that_is_no_number_is_named(
    cache: WeightCache, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, value)
    with pytest.raises(ValueError, match=f"{LIMIT_VARIABLE}: .* must be a number of bytes"):
        WeightCache(cache.directory)


def test_by_default_half_of_the_disk_stays_free(cache: WeightCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
    cache.store(KEY, arena_of(4096))
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    assert cache._limit_bytes() == (10_000 + 8192) // 2


def test_a_full_disk_is_said_once_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    opened(checkpoint, weight_cache=False)  # its kernels
    monkeypatch.setattr(os, "fsync", full)
    llm = opened(checkpoint)
    assert len(answer(llm)[0]) == 8
    assert caplog.text.count("weights are not cached") == 1
    assert "No space left" in caplog.text
    assert [path.name for path in (tmp_path / "cache" / "weights").iterdir()] == ["lock"]


def test_a_directory_that_cannot_be_made_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOSERVE_CACHE_DIR", str(tmp_path / "file"))
    assert WeightCache.open() is None
    assert "weights are not cached" in caplog.text


def test_what_a_dead_writer_left_is_removed(cache: WeightCache) -> None:
    """A file still being written stays, and so does one too young for its writer to have locked it."""
    with cache._files.new_file("x.bin") as file:
        (alive,) = cache.directory.glob(".new-*")
        (cache.directory / ".new-dead").write_bytes(b"x")
        (cache.directory / ".new-young").write_bytes(b"x")
        for path in (alive, cache.directory / ".new-dead"):
            os.utime(path, (0, 0))
        cache.store(KEY, arena_of(4096))
        assert {path.name for path in cache.directory.glob(".new-*")} == {alive.name, ".new-young"}
        file.write(b"y")
    assert (cache.directory / "x.bin").read_bytes() == b"y"


WRITER = """
import sys
from nanoserve.native import WeightArena
from nanoserve.weight_cache import WeightCache
cache, arena = WeightCache(sys.argv[1]), WeightArena(2**20)
arena.view(0, 2**20)[:] = 7
for _ in range(30):
    assert cache.store("a" * 64, arena)
"""


def test_readers_see_whole_files_while_processes_fill_the_same_entry(cache: WeightCache) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(nanoserve.__file__).parent.parent)}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(cache.directory)], env=env) for _ in range(2)
    ]
    found, arena = 0, WeightArena(2**20)
    is_last = False
    while not is_last:
        is_last = all(writer.poll() is not None for writer in writers)  # then once more
        if cache.read(KEY, arena, THREADS):
            found += 1
            assert (content(arena) == 7).all()
        else:
            assert found == 0, "an entry went away"
    assert [writer.wait() for writer in writers] == [0, 0]
    assert found > 0
    assert len(list(cache.directory.glob("*.bin"))) == 1
    assert not list(cache.directory.glob(".new-*"))


# ---- a model


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_warm_start_reads_no_weight_and_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, tied: bool
) -> None:
    path = make_checkpoint(tmp_path / "model", dtype=dtype, tie_word_embeddings=tied)
    cold = opened(path)
    assert not was_cached(cold)
    assert len(entries(tmp_path)) == 1

    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    for name in ("__getitem__", "stored"):
        monkeypatch.setattr(nanoserve.models.weights.BoundWeight, name, read)
    warm = opened(path)
    assert was_cached(warm)
    assert warm.engine.executor.weight_writer is None
    assert answer(warm) == answer(cold)


def test_opting_out_neither_writes_nor_reads(checkpoint: Path, tmp_path: Path) -> None:
    first = opened(checkpoint, weight_cache=False)
    assert not was_cached(first)
    assert entries(tmp_path) == []
    opened(checkpoint)
    assert not was_cached(opened(checkpoint, weight_cache=False))
    assert was_cached(opened(checkpoint))
    with pytest.raises(ValueError, match="weight_cache"):
        LLM(checkpoint, weight_cache="maybe")


def test_small_models_do_not_litter_the_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_module, "WORTH_CACHING_BYTES", 32 * 2**20)
    opened(checkpoint)
    assert entries(tmp_path) == []


def test_arrays_in_memory_are_never_cached(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=8, max_seq_len=16)
    engine = nanoserve.NanoServingEngine(config, nanoserve.random_weights(config), kv_cache_pages=4)
    assert engine.executor.weight_writer is None
    assert entries(tmp_path) == []


def rewritten_in_place(path: Path) -> None:
    """Other values of the same size, and the old time of change put back, as rsync -t and the like do."""
    file = path / "model.safetensors"
    info = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(b"\0\0")
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "other weights": lambda path: make_checkpoint(path, seed=1),
    "in place, time restored": rewritten_in_place,
    "touched": lambda path: os.utime(path / "model.safetensors", (1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_checkpoint_is_packed_again(checkpoint: Path, tmp_path: Path, change: str) -> None:
    before = answer(opened(checkpoint))
    CHANGES[change](checkpoint)
    again = opened(checkpoint)
    assert not was_cached(again)
    assert len(entries(tmp_path)) == 2
    assert was_cached(opened(checkpoint))
    assert (answer(again) == before) is (change == "touched")
    assert answer(again) == answer(opened(checkpoint, weight_cache=False))


def test_a_moved_checkpoint_is_the_same(tmp_path: Path) -> None:
    opened(make_checkpoint(tmp_path / "model"))
    (tmp_path / "model").rename(tmp_path / "moved")
    assert was_cached(opened(tmp_path / "moved"))


def test_a_checkpoint_that_changes_while_it_is_packed_is_not_stored(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = PackedWeights._pack

    def change_meanwhile(self: PackedWeights, *args: Any) -> None:
        pack(self, *args)
        os.utime(checkpoint / "model.safetensors", (1, 1))

    monkeypatch.setattr(PackedWeights, "_pack", change_meanwhile)
    assert opened(checkpoint).engine.executor.weight_writer is None
    assert entries(tmp_path) == []


def test_a_damaged_entry_is_packed_again(checkpoint: Path, tmp_path: Path) -> None:
    before = answer(opened(checkpoint))
    (path,) = entries(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    again = opened(checkpoint)
    assert not was_cached(again)
    assert answer(again) == before
    assert was_cached(opened(checkpoint))


def test_a_tied_head_that_differs_is_refused_warm_or_cold(tmp_path: Path) -> None:
    """It is compared when the weights are packed; a checkpoint that failed leaves nothing that could be read later."""
    path = make_checkpoint(tmp_path / "model")  # its own head beside the embedding
    config = {**SHAPE, "tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="differs from the embedding"):
            opened(path)
    assert entries(tmp_path) == []


# ---- its key


def packed_of(path: Path) -> PackedWeights:
    config = ModelConfig.from_pretrained(path)
    pool = KVCachePool(2, 16, config.n_layer, config.kv_heads, config.dim_per_head)
    packed = PackedWeights(
        StepExecutor(pool, THREADS, 16, 16), bind_weights(config, load_weights(path)), 16, 16
    )
    packed.matrix("layers.0.qkv.weight", "f32")
    packed.rows("final_norm.weight")
    return packed


def test_a_key_covers_what_the_bytes_depend_on(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = packed_of(checkpoint).cache_key()
    assert key == packed_of(checkpoint).cache_key()
    more = packed_of(checkpoint)
    more.matrix("layers.1.qkv.weight", "f32")
    keys = {key, more.cache_key()}
    digest = packed_module._digest
    for source in packed_module._SOURCES:
        with monkeypatch.context() as patch:
            patch.setattr(packed_module, "_digest", lambda path, s=source: digest(path) + str(path == s))
            keys.add(packed_of(checkpoint).cache_key())
    with monkeypatch.context() as patch:
        patch.setattr(packed_module, "host", lambda: "another CPU")
        keys.add(packed_of(checkpoint).cache_key())
    assert len(keys) == 2 + len(packed_module._SOURCES) + 1
    assert None not in keys


def test_the_packing_code_is_in_the_key() -> None:
    names = {Path(path).name for path in packed_module._SOURCES}
    assert names >= {"packed_form.py", "packed_weights.py", "gemm.py", "weights.py", "stored_tensor.py"}


# ---- memory


def test_weights_that_do_not_fit_are_refused_with_the_numbers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_module, "available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"packed they take \d{6,} bytes, this machine has 1000 available"):
        opened(checkpoint)


def test_an_arena_checks_what_it_is_asked_for() -> None:
    arena = WeightArena(8192)
    assert content(arena).ctypes.data % 64 == 0
    assert WeightArena(4 * 2**20).view(0, 1).ctypes.data % 2**21 == 0
    assert not content(arena).any()
    for begin, count in ((-1, 1), (0, 8193), (8193, 0), (4096, 4097), (2**62, 2**62)):
        with pytest.raises(ValueError, match=r"must be in \[0"):
            arena.view(begin, count)
    for size in (0, -4096):
        with pytest.raises(ValueError, match="must be at least 1"):
            WeightArena(size)
    with pytest.raises(ValueError, match="must be a multiple of 4096"):
        WeightArena(4095)
    with pytest.raises(MemoryError, match="the system refused"):
        WeightArena(2**62)
    with pytest.raises(RuntimeError, match="reading weights: Bad file descriptor"):
        arena.read(-1, 0, 0, 4096, THREADS)
    with pytest.raises(ValueError, match="contiguous array of uint8"):
        checksum(content(arena)[::2], THREADS)
    kept = content(arena)
    del arena
    assert not kept.any()  # a view keeps the memory


def test_a_checksum_depends_on_every_word_its_place_and_on_no_split() -> None:
    data = content(arena_of(5 * 2**20))
    expected = checksum(data, ThreadPool(1))
    assert expected == checksum(data, ThreadPool(3))
    seen = {expected}
    generator = np.random.default_rng(3)
    for at in generator.integers(0, len(data), 200):
        before = data[at]
        data[at] ^= 1 << generator.integers(0, 8)
        seen.add(checksum(data, THREADS))
        data[at] = before
    assert len(seen) == 201
    swapped = data.copy()
    swapped[: 2**21], swapped[2**21 : 2**22] = data[2**21 : 2**22], data[: 2**21]
    assert checksum(swapped, THREADS) not in seen
    assert checksum(np.zeros(4096, np.uint8), THREADS) != checksum(np.zeros(8192, np.uint8), THREADS)


def test_a_process_that_ends_at_once_still_leaves_an_entry(checkpoint: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from nanoserve import packed_weights; packed_weights.WORTH_CACHING_BYTES = 0\n"
        "from nanoserve import LLM; llm = LLM(sys.argv[1], kv_cache_bytes=2**20)\n"
        "print(llm.engine.executor.weights_were_cached)"
    )
    said = []
    for _ in range(2):
        environment = {
            **os.environ, "NANOSERVE_CACHE_DIR": str(tmp_path / "cache"),
            "PYTHONPATH": str(Path(nanoserve.__file__).parent.parent),
        }  # fmt: skip
        said.append(
            subprocess.run([sys.executable, "-c", program, str(checkpoint)], env=environment, text=True, check=True,
                           capture_output=True).stdout.strip()
        )  # fmt: skip
    assert said == ["False", "True"]
    assert threading.active_count() < 50
