"""The cache directory: whole entries or none, damaged ones removed, unsafe ones refused, races harmless."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import nanoserve
from nanoserve.compiler.cache_directory import CacheDirectory
from nanoserve.compiler.object_cache import CacheRefused, ObjectCache, default_directory

KEY = "a" * 64
PYTHON_PATH = str(Path(nanoserve.__file__).parent.parent)


@pytest.fixture
def cache(tmp_path: Path) -> ObjectCache:
    return ObjectCache(tmp_path / "cache")


def entry_files(cache: ObjectCache) -> set[str]:
    return {path.suffix for path in cache.directory.iterdir() if path.suffix in (".json", ".so")}


def test_what_is_stored_is_found(cache: ObjectCache) -> None:
    assert cache.find(KEY) is None
    path = cache.store(KEY, "f", "compiler 1", b"code")
    assert cache.find(KEY) == path
    assert path.read_bytes() == b"code"
    assert ObjectCache(cache.directory).find(KEY) == path
    assert cache.find("b" * 64) is None
    assert cache.last_toolchain() == "compiler 1"
    assert cache.directory.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o077 for p in cache.directory.iterdir()} == {0}
    assert json.loads((cache.directory / f"{KEY}.json").read_text())["size"] == 4
    cache.discard(KEY)
    assert cache.find(KEY) is None
    assert entry_files(cache) == set()
    assert cache.damaged == 0


def test_storing_again_replaces(cache: ObjectCache) -> None:
    cache.store(KEY, "f", "compiler 1", b"code")
    cache.store(KEY, "f", "compiler 2", b"other code")
    path = cache.find(KEY)
    assert path is not None
    assert path.read_bytes() == b"other code"
    assert cache.last_toolchain() == "compiler 2"


def flip_a_bit(manifest: Path, obj: Path) -> None:
    obj.write_bytes(bytes([obj.read_bytes()[0] ^ 1]) + obj.read_bytes()[1:])


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "bit": flip_a_bit,
    "object truncated": lambda manifest, obj: os.truncate(obj, 2),
    "object longer": lambda manifest, obj: obj.write_bytes(obj.read_bytes() + b"x"),
    "object empty": lambda manifest, obj: obj.write_bytes(b""),
    "object gone": lambda manifest, obj: obj.unlink(),
    "manifest truncated": lambda manifest, obj: os.truncate(manifest, 20),
    "manifest empty": lambda manifest, obj: manifest.write_bytes(b""),
    "manifest binary": lambda manifest, obj: manifest.write_bytes(b"\xff\x00" * 50),
    "manifest huge": lambda manifest, obj: manifest.write_bytes(b" " * 100_000),
    "manifest nested": lambda manifest, obj: manifest.write_bytes(b"[" * 60_000),
    "manifest list": lambda manifest, obj: manifest.write_text("[]"),
    "manifest elsewhere": lambda manifest, obj: manifest.write_text('{"sha256": "../../../x", "size": 4}'),
    "manifest wrong size": lambda manifest, obj: manifest.write_text(
        manifest.read_text().replace('"size": 4', '"size": 5')
    ),
    "manifest no size": lambda manifest, obj: manifest.write_text(
        manifest.read_text().replace('"size": 4', '"size": -1')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_removed_and_can_be_stored_again(cache: ObjectCache, damage: str) -> None:
    path = cache.store(KEY, "f", "compiler 1", b"code")
    DAMAGE[damage](cache.directory / f"{KEY}.json", path)
    assert cache.find(KEY) is None
    assert cache.damaged == 1
    assert not (cache.directory / f"{KEY}.json").exists()
    assert cache.store(KEY, "f", "compiler 1", b"code") == path
    assert cache.find(KEY) == path
    assert cache.damaged == 1


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o720])
def test_a_directory_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(CacheRefused, match=f"mode {mode:04o} lets other users write"):
        ObjectCache(tmp_path / "cache")


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ObjectCache(tmp_path / "cache")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CacheRefused, match="not by user 12345 who would run"):
        ObjectCache(tmp_path / "cache")


def test_a_file_or_a_link_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((CacheRefused, FileExistsError)):
        ObjectCache(tmp_path / "file")
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(CacheRefused, match="a link or a file, not a directory"):
        ObjectCache(tmp_path / "link")


@pytest.mark.parametrize("which", ["manifest", "object"])
def test_links_in_place_of_entries_are_refused(cache: ObjectCache, tmp_path: Path, which: str) -> None:
    obj = cache.store(KEY, "f", "compiler 1", b"code")
    victim = obj if which == "object" else cache.directory / f"{KEY}.json"
    moved = tmp_path / "elsewhere"
    victim.rename(moved)
    victim.symlink_to(moved)
    with pytest.raises(CacheRefused, match="is a symbolic link"):
        cache.find(KEY)
    assert moved.exists()


def test_a_linked_lock_is_not_followed(cache: ObjectCache, tmp_path: Path) -> None:
    (cache.directory / "lock").symlink_to(tmp_path / "made-by-the-lock")
    with pytest.raises(OSError, match="symbolic link"):
        cache.store(KEY, "f", "compiler 1", b"code")
    assert not (tmp_path / "made-by-the-lock").exists()


def test_an_object_others_may_write_is_refused(cache: ObjectCache) -> None:
    cache.store(KEY, "f", "compiler 1", b"code").chmod(0o722)
    with pytest.raises(CacheRefused, match="is not a file that only user"):
        cache.find(KEY)


def test_a_pipe_in_place_of_an_entry_does_not_hang(cache: ObjectCache) -> None:
    os.mkfifo(cache.directory / f"{KEY}.json", 0o600)
    with pytest.raises(CacheRefused, match="is not a file"):
        cache.find(KEY)


def test_a_failed_write_leaves_nothing(cache: ObjectCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cache.store(KEY, "f", "compiler 1", b"code")
    assert {path.name for path in cache.directory.iterdir()} == {"lock"}


def test_a_writer_that_dies_halfway_leaves_no_entry(
    cache: ObjectCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object comes first: what is left behind is a miss, not damage."""
    replace, calls = os.replace, []

    def once(source: str, target: Path) -> None:
        calls.append(target)
        if len(calls) > 1:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        cache.store(KEY, "f", "compiler 1", b"code")
    monkeypatch.undo()
    assert cache.find(KEY) is None
    assert cache.damaged == 0
    assert not list(cache.directory.glob(".new-*"))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOSERVE_CACHE_DIR", "/a/b")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_directory() == Path("/a/b")
    monkeypatch.delenv("NANOSERVE_CACHE_DIR")
    assert default_directory() == Path("/x/nanoserve")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_directory() == tmp_path / ".cache" / "nanoserve"


# A writer stores the same key over and over with different contents, as compilers that are not deterministic
# would, and now and then discards it; a reader must never see half an entry.
WRITER = """
import sys, time
from nanoserve.compiler.object_cache import ObjectCache
cache, seed, stop = ObjectCache(sys.argv[1]), int(sys.argv[2]), time.monotonic() + 1.5
enough = cache.directory / "enough"
n = 0
while time.monotonic() < stop or (time.monotonic() < stop + 60 and (n < 20 or not enough.exists())):
    cache.store("a" * 64, "f", "compiler", f"{seed} {n}".encode() * (1000 + 500 * (n % 5)))
    n += 1
    if n % 5 == 0:
        cache.discard("a" * 64)
print(n)
"""


def test_readers_see_whole_entries_while_writers_race(cache: ObjectCache) -> None:
    env = {**os.environ, "PYTHONPATH": PYTHON_PATH}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(cache.directory), str(seed)], env=env, stdout=subprocess.PIPE
        )
        for seed in (1, 2)
    ]
    found = 0
    while any(writer.poll() is None for writer in writers):
        found += cache.find(KEY) is not None
        if found == 11:
            (cache.directory / "enough").touch()
        time.sleep(0)
    for writer in writers:
        assert writer.wait() == 0
        assert writer.stdout is not None
        assert int(writer.stdout.read()) >= 20
    assert found > 10
    assert cache.damaged == 0
    assert not list(cache.directory.glob(".new-*"))


def age(cache: ObjectCache, key: str, seconds: int) -> None:
    """An entry that was used that long ago."""
    path = cache.directory / f"{key}.json"
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_trimming_keeps_what_was_used_last(cache: ObjectCache) -> None:
    keys = [letter * 64 for letter in "abcd"]
    for at, key in enumerate(keys):
        cache.store(key, "f", "compiler 1", bytes([at]) * 100)
        age(cache, key, 100_000 - at)
    assert cache.find(keys[0]) is not None  # of use today
    assert cache.trim(400) == 0
    assert cache.trim(250) == 2
    assert [cache.find(key) is not None for key in keys] == [True, False, False, True]
    assert cache.damaged == 0
    assert len(list(cache.directory.glob("*.so"))) == 2


def test_trimming_spares_an_object_that_another_entry_uses(cache: ObjectCache) -> None:
    """And removes one that none does."""
    for at, key in enumerate("abc"):
        cache.store(key * 64, "f", "compiler 1", b"same" * 25 if at != 1 else b"else" * 25)
        age(cache, key * 64, 100_000 - at)
    (cache.directory / f"{'0' * 64}.so").write_bytes(b"orphan" * 100)
    assert cache.trim(150) == 1
    assert [cache.find(key * 64) is not None for key in "abc"] == [True, False, True]
    assert cache.damaged == 0
    assert [path.read_bytes() for path in cache.directory.glob("*.so")] == [b"same" * 25]


def test_trimming_removes_damaged_manifests(cache: ObjectCache) -> None:
    cache.store(KEY, "f", "compiler 1", b"code" * 100)
    (cache.directory / f"{KEY}.json").write_text("[]")
    cache.trim(100)
    assert entry_files(cache) == set()


def test_an_entry_trimmed_before_it_is_mapped_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another process's trimming does between `find` and dlopen."""
    from nanoserve.compiler import bindings, jit
    from nanoserve.compiler.target import host
    from nanoserve.kernels import library, norm

    monkeypatch.setenv("NANOSERVE_CACHE_DIR", str(tmp_path))
    spec = norm.norm_spec("rmsnorm", 12, 12, 12, 1e-5)
    toolchain = bindings.toolchain() or ""
    engine = jit.compile_kernel(lambda: spec.build(host()), host())
    cache = ObjectCache()
    cache.store(spec.key(host(), toolchain), spec.symbol, toolchain, jit.shared_object(engine, spec.symbol))
    find = ObjectCache.find

    def trimmed(self: ObjectCache, key: str) -> Path | None:
        path = find(self, key)
        assert path is not None
        path.unlink()
        return path

    monkeypatch.setattr(ObjectCache, "find", trimmed)
    compiled = library.stats().compiled
    assert library.load_kernels([spec])[spec] > 0
    assert library.stats().compiled == compiled + 1


def test_a_cache_inside_another_leaves_that_safe(tmp_path: Path) -> None:
    """Whichever is made first, and whatever the umask lets others do."""
    before = os.umask(0)
    try:
        CacheDirectory(tmp_path / "nanoserve" / "weights", "weight cache", "weights")
        CacheDirectory(tmp_path / "nanoserve", "kernel cache")
    finally:
        os.umask(before)
    assert (tmp_path / "nanoserve").stat().st_mode & 0o777 == 0o700
