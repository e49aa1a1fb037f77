"""A directory of files that only its user may write: what the caches on disk have in common.

Files arrive by rename, whole and on disk, so that a reader sees one whole or not at all, whichever process writes. A lock is
taken to write or remove, never to read. What a writer that died left behind, `trim` removes: a file still being written is
locked by its writer.

The directory belongs to the user alone (0700). One that somebody else owns or may write is refused, and so are symbolic links
in place of files: what is in it is executed, or computed with, as if this process had made it itself.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = ".new-"
_USED_AGAIN_S = 3600  # a file's time of use is noted at most this often


class CacheRefused(RuntimeError):
    """The cache directory, or something in it, is not safe to use."""


def default_directory() -> Path:
    """$NANOSERVE_CACHE_DIR, else $XDG_CACHE_HOME/nanoserve, else ~/.cache/nanoserve."""
    chosen = os.environ.get("NANOSERVE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: relative paths are invalid and to be ignored.
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "nanoserve"


class CacheDirectory:
    """Made if need be.

    Args:
        what: "kernel cache", for messages. content: "code", likewise.

    Raises:
        CacheRefused: the directory is somebody else's, writable by others, or not a directory.
        OSError: it cannot be made or read.
    """

    def __init__(self, directory: str | Path, what: str, content: str = "code") -> None:
        self.path = Path(directory).absolute()
        self.what = what
        # mkdir's own `parents` would be as the umask says: another cache, inside which this one lies, must be safe, too.
        for path in (*reversed(self.path.parents), self.path):
            if not path.exists():
                path.mkdir(mode=0o700, exist_ok=True)
        info = os.lstat(self.path)
        if not stat.S_ISDIR(info.st_mode):
            raise CacheRefused(f"{what} {self.path}: a link or a file, not a directory")
        if info.st_uid != os.geteuid():
            raise CacheRefused(
                f"{what} {self.path}: owned by user {info.st_uid}, not by user {os.geteuid()} who would run "
                f"the {content} in it; set NANOSERVE_CACHE_DIR to a directory of your own"
            )
        if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CacheRefused(
                f"{what} {self.path}: mode {stat.S_IMODE(info.st_mode):04o} lets other users write {content} that "
                "this process would run; chmod 700 it, or set NANOSERVE_CACHE_DIR to a directory of your own"
            )

    def open(self, name: str) -> BinaryIO:
        """A file that only this user could have written.

        Raises:
            FileNotFoundError: there is none. CacheRefused: a link, or a file of another user, sits in its place.
        """
        path = self.path / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CacheRefused(f"{self.what}: {path} is a symbolic link, an entry never is") from error
            raise
        file = os.fdopen(fd, "rb")
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
            file.close()
            raise CacheRefused(f"{self.what}: {path} is not a file that only user {os.geteuid()} can write")
        return file

    @contextmanager
    def new_file(self, name: str, mode: int = 0o600) -> Iterator[BinaryIO]:
        """The whole file or none of it: what is written here gets its name at the end, once it is on disk."""
        fd, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=self.path)
        try:
            with os.fdopen(fd, "wb") as file:
                fcntl.flock(fd, fcntl.LOCK_EX)  # tells trim that somebody is at it
                yield file
                file.flush()
                os.fchmod(fd, mode)
                os.fsync(fd)
                os.replace(temporary, self.path / name)
        except BaseException:
            os.unlink(temporary)
            raise

    def sync(self) -> None:
        """Names that were given are on disk, too."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by one process at a time."""
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)  # releases the lock

    def used(self, name: str) -> None:
        """Note that a file was of use just now; a directory that cannot be written keeps no such notes."""
        path = self.path / name
        try:
            if time.time() - path.stat().st_mtime > _USED_AGAIN_S:
                os.utime(path)
        except OSError:
            pass

    def files(self, suffix: str) -> list[tuple[str, os.stat_result]]:
        """(name, status) of the files of a kind, those first that were not used for longest."""
        found = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.endswith(suffix) and not entry.name.startswith("."):
                    try:
                        found.append((entry.name, entry.stat(follow_symlinks=False)))
                    except FileNotFoundError:
                        continue  # another process removed it
        return sorted(found, key=lambda item: item[1].st_mtime_ns)

    def remove_abandoned(self) -> None:
        """Under the lock: what writers left behind that died, or that lost power."""
        for path in self.path.glob(f"{_TEMPORARY}*"):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A file this young may not have been locked yet by who made it.
                if time.time() - os.fstat(fd).st_mtime > 60:
                    path.unlink(missing_ok=True)
            except OSError:
                pass
            finally:
                os.close(fd)
