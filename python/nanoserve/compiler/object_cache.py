"""Compiled kernels on disk: shared objects that are code this process will run, so nothing is loaded unverified.

    <directory>/<key>.json      manifest: symbol, toolchain, the object's size and sha256
    <directory>/<sha256>.so     the object, named by its content
    <directory>/toolchain       what compiled last; names the keys where no compiler is installed
    <directory>/lock            taken to write or remove an entry, never to read one

The invariant: a manifest names an object that was complete before the manifest appeared. Objects are named by content and
both files arrive by rename, so a reader sees an entry whole or not at all, whichever process writes it, and two processes
that compile the same kernel at once leave one good entry. A damaged entry is removed and compiled again.

The directory is one that only its user may write, because its contents are executed (cache_directory.py); one that is not is an
error, never a silent start without a cache. It is bounded: `trim` removes what was not used for longest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from nanoserve.compiler.cache_directory import CacheDirectory, CacheRefused, default_directory

__all__ = ["CacheRefused", "ObjectCache", "default_directory"]

_log = logging.getLogger("nanoserve.compiler")
_MAX_MANIFEST_BYTES = 64 * 1024
_MAX_OBJECT_BYTES = 64 * 1024 * 1024
MAX_CACHE_BYTES = 256 * 1024 * 1024  # some ten thousand kernels


class _Damaged(Exception):
    """An entry that does not hold what its manifest says."""


class ObjectCache:
    """Shared objects by key.

    Raises:
        CacheRefused: the directory is somebody else's, writable by others, or not a directory.
        OSError: it cannot be made or read.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._files = CacheDirectory(default_directory() if directory is None else directory, "kernel cache")
        self.directory = self._files.path
        self.damaged = 0  # entries removed because they did not verify

    def find(self, key: str) -> Path | None:
        """The verified object of an entry, None when there is none (any more).

        Raises:
            CacheRefused: a symbolic link or a file of another user sits in the entry's place.
        """
        try:
            path = self._verified(key)
        except _Damaged:
            path = self._recheck(key)
        if path is not None:
            self._files.used(f"{key}.json")
        return path

    def discard(self, key: str) -> None:
        """Remove an entry, if there is one."""
        with self._files.lock():
            self._remove(key)

    def store(self, key: str, symbol: str, toolchain: str, obj: bytes) -> Path:
        """Write an entry; the path of its object."""
        digest = hashlib.sha256(obj).hexdigest()
        path = self.directory / f"{digest}.so"
        manifest = {"symbol": symbol, "toolchain": toolchain, "size": len(obj), "sha256": digest}
        with self._files.lock():
            self._write(path.name, obj, 0o700)
            self._write(f"{key}.json", (json.dumps(manifest, indent=1) + "\n").encode(), 0o600)
            if self.last_toolchain() != toolchain:
                self._write("toolchain", toolchain.encode(), 0o600)
            self._files.sync()
        return path

    def trim(self, max_bytes: int = MAX_CACHE_BYTES) -> int:
        """Remove entries, those first that were not used for longest, until the rest is no larger; how many went.

        A process that just found such an entry and has not mapped it yet finds it gone, and compiles the kernel again.
        """
        objects = {name: info.st_size for name, info in self._files.files(".so")}
        if sum(objects.values()) <= max_bytes:
            return 0
        with (
            self._files.lock()
        ):  # who writes an object and its manifest holds it, so an object without one is nobody's
            self._files.remove_abandoned()
            objects = {name: info.st_size for name, info in self._files.files(".so")}
            kept: set[str] = set()
            total = removed = 0
            for name, _ in reversed(self._files.files(".json")):
                held = self._object_name(name)
                size = 0 if held in kept else objects.get(held or "", 0)
                if held is not None and total + size <= max_bytes:
                    kept.add(held)
                    total += size
                else:
                    (self.directory / name).unlink(missing_ok=True)
                    removed += 1
            for held in objects.keys() - kept:
                (self.directory / held).unlink(missing_ok=True)
            return removed

    def last_toolchain(self) -> str | None:
        """The compiler that filled the cache last: what keys are made with where no compiler is installed."""
        try:
            return self._read("toolchain", _MAX_MANIFEST_BYTES).decode("utf-8", "replace")
        except (FileNotFoundError, _Damaged):
            return None

    def _recheck(self, key: str) -> Path | None:
        """Look again under the lock, for a writer may have just replaced what was damaged; else remove it."""
        with self._files.lock():
            try:
                return self._verified(key)
            except _Damaged as damage:
                _log.warning("kernel cache: entry %s: %s; compiling it again", key, damage)
                self._remove(key)
                self.damaged += 1
                return None

    def _verified(self, key: str) -> Path | None:
        try:
            text = self._read(f"{key}.json", _MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            return None
        digest, size = _object_of(text)
        path = self.directory / f"{digest}.so"
        try:
            data = self._read(path.name, size)
        except FileNotFoundError as error:
            raise _Damaged("its object is gone") from error
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise _Damaged("its object is not the one that was written")
        return path

    def _read(self, name: str, limit: int) -> bytes:
        with self._files.open(name) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise _Damaged(f"{name} is larger than {limit} bytes")
        return data

    def _write(self, name: str, data: bytes, mode: int) -> None:
        with self._files.new_file(name, mode) as file:
            file.write(data)

    def _remove(self, key: str) -> None:
        held = self._object_name(f"{key}.json")
        if held is not None:
            (self.directory / held).unlink(missing_ok=True)
        (self.directory / f"{key}.json").unlink(missing_ok=True)

    def _object_name(self, manifest: str) -> str | None:
        """Of the object of an entry; None where the manifest does not say, and goes alone."""
        try:
            return f"{_object_of(self._read(manifest, _MAX_MANIFEST_BYTES))[0]}.so"
        except (FileNotFoundError, _Damaged):
            return None


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
