"""Compiled kernels on disk: shared objects that are code this process will run, so nothing is loaded unverified.

    <directory>/<key>.json        manifest: symbol, toolchain, the object's name, size and sha256
    <directory>/<sha256>.so       the object, named by its content
    <directory>/lock              taken to write or remove an entry, never to read one

The invariant: a manifest names an object that was complete before the manifest appeared. Objects are named by content and
both files arrive by rename, so a reader sees an entry whole or not at all, whichever process writes it, and two processes
that compile the same kernel at once leave one good entry. A damaged entry is removed and compiled again.

The directory belongs to the user alone (0700). One that somebody else owns or may write is refused, because its contents
would be executed; so are symbolic links in place of entries. Refusal is an error, never a silent start without a cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_MANIFEST_BYTES = 64 * 1024
_MAX_OBJECT_BYTES = 64 * 1024 * 1024


class CacheRefused(RuntimeError):
    """The cache directory, or something in it, is not safe to execute code from."""


class _Damaged(Exception):
    """An entry that does not hold what its manifest says."""


def default_directory() -> Path:
    """$NANOSERVE_CACHE_DIR, else $XDG_CACHE_HOME/nanoserve, else ~/.cache/nanoserve."""
    chosen = os.environ.get("NANOSERVE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: relative paths are invalid and to be ignored.
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "nanoserve"


@dataclass(slots=True)
class Counters:
    """What happened since the cache was opened."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0  # entries removed because they did not verify; counted as misses too
    stored: int = 0


class ObjectCache:
    """Shared objects by key.

    Raises:
        CacheRefused: the directory is somebody else's, writable by others, or not a directory.
        OSError: it cannot be made or read.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = (default_directory() if directory is None else Path(directory)).absolute()
        self.counters = Counters()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = os.stat(self.directory)
        if not stat.S_ISDIR(info.st_mode):
            raise CacheRefused(f"kernel cache {self.directory}: not a directory")
        if info.st_uid != os.geteuid():
            raise CacheRefused(
                f"kernel cache {self.directory}: owned by user {info.st_uid}, not by user {os.geteuid()} who would run "
                "the code in it; set NANOSERVE_CACHE_DIR to a directory of your own"
            )
        if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CacheRefused(
                f"kernel cache {self.directory}: mode {stat.S_IMODE(info.st_mode):04o} lets other users write code that "
                "this process would run; chmod 700 it, or set NANOSERVE_CACHE_DIR to a directory of your own"
            )

    def find(self, key: str) -> Path | None:
        """The verified object of an entry, None when there is none (any more).

        Raises:
            CacheRefused: a symbolic link or a file of another user sits in the entry's place.
        """
        try:
            found = self._verified(key)
        except _Damaged:
            # Look again under the lock: a writer may have just replaced what was damaged.
            with self._lock():
                try:
                    found = self._verified(key)
                except _Damaged:
                    self._remove(key)
                    self.counters.damaged += 1
                    found = None
        if found is None:
            self.counters.misses += 1
        else:
            self.counters.hits += 1
        return found

    def store(self, key: str, symbol: str, toolchain: str, obj: bytes) -> Path:
        """Write an entry; the path of its object."""
        digest = hashlib.sha256(obj).hexdigest()
        path = self.directory / f"{digest}.so"
        manifest = {"symbol": symbol, "toolchain": toolchain, "object": path.name, "size": len(obj), "sha256": digest}
        with self._lock():
            self._write(path, obj, 0o700)
            self._write(self._manifest(key), (json.dumps(manifest, indent=1) + "\n").encode(), 0o600)
            self._write(self.directory / "toolchain", toolchain.encode(), 0o600)
            _sync_directory(self.directory)
        self.counters.stored += 1
        return path

    def last_toolchain(self) -> str | None:
        """The compiler that filled the cache last: what keys are made with where no compiler is installed."""
        try:
            return self._read(self.directory / "toolchain", _MAX_MANIFEST_BYTES).decode("utf-8", "replace")
        except (FileNotFoundError, _Damaged):
            return None

    def _manifest(self, key: str) -> Path:
        return self.directory / f"{key}.json"

    def _verified(self, key: str) -> Path | None:
        try:
            text = self._read(self._manifest(key), _MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            return None
        try:
            manifest: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _Damaged("manifest is not JSON") from error
        if not isinstance(manifest, dict):
            raise _Damaged("manifest is not an object")
        digest, size = manifest.get("sha256"), manifest.get("size")
        # The name is derived from the checked digest, never taken from the file: a manifest cannot point elsewhere.
        if not isinstance(digest, str) or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise _Damaged("manifest has no digest")
        path = self.directory / f"{digest}.so"
        try:
            data = self._read(path, _MAX_OBJECT_BYTES)
        except FileNotFoundError as error:
            raise _Damaged("object is gone") from error
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise _Damaged("object does not match its manifest")
        return path

    def _read(self, path: Path, limit: int) -> bytes:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise CacheRefused(f"kernel cache: {path} cannot be read without following a link ({error.strerror})") from error
        with os.fdopen(fd, "rb") as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
                raise CacheRefused(f"kernel cache: {path} is not a file that only user {os.geteuid()} can write")
            data = file.read(limit + 1)
        if len(data) > limit:
            raise _Damaged(f"{path.name} is larger than {limit} bytes")
        return data

    def _write(self, path: Path, data: bytes, mode: int) -> None:
        """The whole file or none of it, on disk before it gets its name."""
        fd, temporary = tempfile.mkstemp(prefix=".new-", dir=self.directory)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(fd, mode)
                os.fsync(fd)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def _remove(self, key: str) -> None:
        manifest = self._manifest(key)
        try:
            digest = json.loads(self._read(manifest, _MAX_MANIFEST_BYTES))["sha256"]
            if isinstance(digest, str) and digest.isalnum():
                (self.directory / f"{digest}.so").unlink(missing_ok=True)
        except (ValueError, LookupError, TypeError, FileNotFoundError, _Damaged):
            pass  # the manifest does not say which object was its; it goes alone
        manifest.unlink(missing_ok=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)  # releases the lock


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
