"""Packed weights on disk, as they lie in memory: a later start reads them instead of packing the checkpoint again.

    <cache directory>/weights/<key>.bin    a header of one page, then the arena's bytes

The key is a digest of all that decides those bytes (PackedWeights.cache_key), and no number in the file is used for anything
but to be compared: the header must be, byte for byte, what this process would write for that key, size and checksum, and the
checksum must be that of every byte that follows. It costs little, being taken while a block that was just read is still in the
core's cache. A file that differs anywhere is removed, and the checkpoint packed again.

A full disk, a directory that cannot be written and the like are said once, as a warning, and cost the cache and nothing else.
The files of all models together stay below a limit; those go first that were not used for longest.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from nanoserve.compiler.cache_directory import CacheDirectory, default_directory
from nanoserve.native import ThreadPool, WeightArena, checksum

OnProgress = Callable[[int, int, str], None]
_log = logging.getLogger("nanoserve.weights")

MAGIC = b"nanoserve weights 1\n"
LIMIT_VARIABLE = "NANOSERVE_WEIGHT_CACHE_BYTES"
DEFAULT_LIMIT_BYTES = 50_000_000_000
_HEADER_BYTES = 4096
_CHUNK_BYTES = 256 * 2**20  # between reports of progress; of the format, because a checksum covers a chunk
_WRITE_BYTES = 8 * 2**20
_DIGEST_BYTES = 32


class WeightCache:
    """Arenas of weights by key.

    Args:
        directory: None takes weights/ in the cache directory.

    Raises:
        CacheRefused: the directory is somebody else's, or writable by others. OSError: it cannot be made or read.
        ValueError: NANOSERVE_WEIGHT_CACHE_BYTES is not a number of bytes.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._files = CacheDirectory(
            default_directory() / "weights" if directory is None else directory, "weight cache", "weights"
        )
        self.directory = self._files.path
        self._limit = _limit_from_environment()

    @classmethod
    def open(cls) -> WeightCache | None:
        """The default one; None, and a warning, where there can be none."""
        try:
            return cls()
        except OSError as error:
            _log.warning("weights are not cached: %s", error)
            return None

    def read(
        self, key: str, arena: WeightArena, threads: ThreadPool, on_load: OnProgress | None = None
    ) -> bool:
        """Fill an arena; False when there is no such entry (any more), and the arena's content is then undefined.

        Args:
            on_load: called as (bytes done, bytes in total, "packed weights").

        Raises:
            CacheRefused: a symbolic link or a file of another user sits in the entry's place.
        """
        name = f"{key}.bin"
        try:
            with self._files.open(name) as file:
                damage = _read_verified(file, key, arena, threads, on_load)
        except FileNotFoundError:
            return False
        except OSError as error:
            _log.warning("weight cache: %s cannot be read (%s); packing the checkpoint", name, error)
            return False
        if damage:
            _log.warning("weight cache: %s %s; packing the checkpoint again", name, damage)
            (self.directory / name).unlink(missing_ok=True)
            return False
        self._files.used(name)
        return True

    def store(self, key: str, arena: WeightArena) -> bool:
        """Write an entry, whole or not at all, and remove others beyond the limit. False, and a warning, when it cannot be."""
        try:
            return self._store(f"{key}.bin", key, arena)
        except OSError as error:
            _log.warning("weights are not cached: %s", error)
            return False

    def _store(self, name: str, key: str, arena: WeightArena) -> bool:
        size = _HEADER_BYTES + arena.num_bytes
        with self._files.lock():
            self._files.remove_abandoned()
        limit, free = self._limit_bytes(), shutil.disk_usage(self.directory).free
        if size > min(limit, free):
            _log.warning(
                "weights are not cached: they take %d bytes, %d are free in %s, the limit is %d (%s sets it)",
                size, free, self.directory, limit, LIMIT_VARIABLE,
            )  # fmt: skip
            return False
        with self._files.new_file(name) as file:
            file.write(_header(key, arena.num_bytes, _digest(_checksums(arena))))
            for begin, count in _pieces(arena.num_bytes, _WRITE_BYTES):
                file.write(arena.view(begin, count).data)
        self._files.sync()
        with self._files.lock():
            self._trim(limit, name)
        return True

    def _trim(self, limit: int, newest: str) -> None:
        files = self._files.files(".bin")
        total = sum(info.st_size for _, info in files)
        for name, info in files:
            if total > limit and name != newest:
                (self.directory / name).unlink(missing_ok=True)
                total -= info.st_size

    def _limit_bytes(self) -> int:
        """Of all entries: what was asked for, else 50 GB or half of what the disk could give, if that is less."""
        if self._limit is not None:
            return self._limit
        held = sum(info.st_size for _, info in self._files.files(".bin"))
        return min(DEFAULT_LIMIT_BYTES, (shutil.disk_usage(self.directory).free + held) // 2)


def _read_verified(
    file: BinaryIO, key: str, arena: WeightArena, threads: ThreadPool, on_load: OnProgress | None
) -> str:
    """Fill the arena; what is wrong with the file, "" when nothing is."""
    size = os.fstat(file.fileno()).st_size
    if size != _HEADER_BYTES + arena.num_bytes:
        return f"has {size} bytes, not {_HEADER_BYTES + arena.num_bytes}"
    header = file.read(_HEADER_BYTES)
    digest = header[len(MAGIC) : len(MAGIC) + _DIGEST_BYTES]
    if header != _header(key, arena.num_bytes, digest):
        return "has a header that is not what was written"
    sums = []
    for begin, count in _pieces(arena.num_bytes, _CHUNK_BYTES):
        try:
            sums.append(arena.read(file.fileno(), _HEADER_BYTES + begin, begin, count, threads))
        except RuntimeError as error:
            return f"cannot be read: {error}"
        if on_load is not None:
            on_load(begin + count, arena.num_bytes, "packed weights")
    return "" if _digest(sums) == digest else "holds data that is not what was written"


def _checksums(arena: WeightArena) -> list[int]:
    threads = ThreadPool(1)  # not the engine's: requests need those by now
    return [checksum(arena.view(*piece), threads) for piece in _pieces(arena.num_bytes, _CHUNK_BYTES)]


def _digest(sums: list[int]) -> bytes:
    return hashlib.sha256(struct.pack(f"<{len(sums)}Q", *sums)).digest()


def _header(key: str, num_bytes: int, digest: bytes) -> bytes:
    return (MAGIC + digest + struct.pack("<Q", num_bytes) + key.encode()).ljust(_HEADER_BYTES, b"\0")


def _pieces(num_bytes: int, each: int) -> Iterator[tuple[int, int]]:
    """(begin, count) of consecutive pieces."""
    for begin in range(0, num_bytes, each):
        yield begin, min(each, num_bytes - begin)


def _limit_from_environment() -> int | None:
    text = os.environ.get(LIMIT_VARIABLE, "")
    if not text:
        return None
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{LIMIT_VARIABLE}: {text!r} must be a number of bytes, 0 or more")
    return int(text)
