"""Compiled kernels on disk: shared objects that are code this process will run, so nothing is loaded unverified.

    <directory>/<key>.json      manifest: symbol, toolchain, the object's size and sha256
    <directory>/<sha256>.so     the object, named by its content
    <directory>/toolchain       what compiled last; names the keys where no compiler is installed
    <directory>/lock            taken to write or remove an entry, never to read one

The invariant: a manifest names an object that was complete before the manifest appeared. Objects are named by content and
both files arrive by rename, so a reader sees an entry whole or not at all, whichever process writes it, and two processes
that compile the same kernel at once leave one good entry. A damaged entry is removed and compiled again.

The directory belongs to the user alone (0700). One that somebody else owns or may write is refused, because its contents
would be executed; so are symbolic links in place of entries. Refusal is an error, never a silent start without a cache.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_log = logging.getLogger("nanoserve.compiler")
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


class ObjectCache:
    """Shared objects by key.

    Raises:
        CacheRefused: the directory is somebody else's, writable by others, or not a directory.
        OSError: it cannot be made or read.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = (default_directory() if directory is None else Path(directory)).absolute()
        self.damaged = 0  # entries removed because they did not verify
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = os.lstat(self.directory)
        if not stat.S_ISDIR(info.st_mode):
            raise CacheRefused(f"kernel cache {self.directory}: a link or a file, not a directory")
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
            return self._verified(key)
        except _Damaged:
            return self._recheck(key)

    def discard(self, key: str) -> None:
        """Remove an entry, if there is one."""
        with self._lock():
            self._remove(key)

    def store(self, key: str, symbol: str, toolchain: str, obj: bytes) -> Path:
        """Write an entry; the path of its object."""
        digest = hashlib.sha256(obj).hexdigest()
        path = self.directory / f"{digest}.so"
        manifest = {"symbol": symbol, "toolchain": toolchain, "size": len(obj), "sha256": digest}
        with self._lock():
            self._write(path, obj, 0o700)
            self._write(self._manifest(key), (json.dumps(manifest, indent=1) + "\n").encode(), 0o600)
            if self.last_toolchain() != toolchain:
                self._write(self.directory / "toolchain", toolchain.encode(), 0o600)
            _sync_directory(self.directory)
        return path

    def last_toolchain(self) -> str | None:
        """The compiler that filled the cache last: what keys are made with where no compiler is installed."""
        try:
            return self._read(self.directory / "toolchain", _MAX_MANIFEST_BYTES).decode("utf-8", "replace")
        except (FileNotFoundError, _Damaged):
            return None

    def _manifest(self, key: str) -> Path:
        return self.directory / f"{key}.json"

    def _recheck(self, key: str) -> Path | None:
        """Look again under the lock, for a writer may have just replaced what was damaged; else remove it."""
        with self._lock():
            try:
                return self._verified(key)
            except _Damaged as damage:
                _log.warning("kernel cache: entry %s: %s; compiling it again", key, damage)
                self._remove(key)
                self.damaged += 1
                return None

    def _verified(self, key: str) -> Path | None:
        try:
            text = self._read(self._manifest(key), _MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            return None
        digest, size = _object_of(text)
        path = self.directory / f"{digest}.so"
        try:
            data = self._read(path, size)
        except FileNotFoundError as error:
            raise _Damaged("its object is gone") from error
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise _Damaged("its object is not the one that was written")
        return path

    def _read(self, path: Path, limit: int) -> bytes:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CacheRefused(f"kernel cache: {path} is a symbolic link, an entry never is") from error
            raise
        with os.fdopen(fd, "rb") as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
                raise CacheRefused(
                    f"kernel cache: {path} is not a file that only user {os.geteuid()} can write"
                )
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
            digest, _ = _object_of(self._read(manifest, _MAX_MANIFEST_BYTES))
        except (FileNotFoundError, _Damaged):
            pass  # the manifest does not say which object was its; it goes alone
        else:
            (self.directory / f"{digest}.so").unlink(missing_ok=True)
        manifest.unlink(missing_ok=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)  # releases the lock


def _object_of(manifest: bytes) -> tuple[str, int]:
    """sha256 and size of an entry's object. The digest is its name: a path is never taken from the file."""
    try:
        fields: Any = json.loads(manifest)
        digest, size = fields["sha256"], fields["size"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _Damaged("its manifest is not what was written") from error
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise _Damaged("its manifest names no object")
    if not isinstance(size, int) or not 0 < size <= _MAX_OBJECT_BYTES:
        raise _Damaged(f"its manifest gives an impossible size, {size!r}")
    return digest, size


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
