"""StoredTensor: one tensor of a checkpoint, still in its file. Rows become float32 when they are asked for.

A checkpoint larger than the memory left beside its packed copy must load: so nothing is read at open, `tensor[begin:end]`
costs those rows and no more, and `forget()` hands the file's pages back to the operating system.
The price: the bytes are the file's, at the time of each read. A file that another process overwrites while it is being
loaded gives mixed weights, and one that it truncates ends this process with SIGBUS; neither can be caught here. Replace
a checkpoint by renaming a new file over it, never in place.
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoserve.errors import CheckpointError

Float32Array = NDArray[np.float32]
# How each readable type lies in the file (little-endian). bfloat16 has no NumPy type: its bits are read as uint16.
_IN_FILE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float64": np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when its header was read: what is written over it later, or renamed to it, is another one.

    Attributes:
        header: digest of the header's bytes.
    """

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    header: str

    @classmethod
    def of(cls, path: str, info: os.stat_result, header: str) -> SourceFile:
        return cls(path, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino, header)

    @property
    def identity(self) -> tuple[int | str, ...]:
        """All but the path: a checkpoint may be moved."""
        return self.size, self.mtime_ns, self.ctime_ns, self.inode, self.header

    def is_current(self) -> bool:
        """Whether nobody has written to it since."""
        try:
            return SourceFile.of(self.path, os.stat(self.path), self.header) == self
        except OSError:
            return False


class StoredTensor:
    """One tensor of a memory-mapped file (or of a buffer in memory).

    Attributes:
        file: name of the file, for messages.
        name: name in the checkpoint.
        dtype: "float32", "float16", "bfloat16", "float64", or one that cannot be read: "int64", "float8_e4m3fn", ...
        shape: as in the file; () for a single number.
        nbytes: bytes in the file.
        source: the file; None for a buffer.
    """

    __slots__ = ("_begin", "_buffer", "dtype", "file", "name", "nbytes", "shape", "source")

    def __init__(
        self,
        file: str,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        nbytes: int,
        buffer: mmap.mmap | NDArray[np.uint8],
        begin: int = 0,
        source: SourceFile | None = None,
    ) -> None:
        """The caller has checked that `shape` takes `nbytes` bytes of `dtype` and that `buffer[begin:]` holds them."""
        self.file, self.name, self.dtype, self.shape, self.nbytes = file, name, dtype, shape, nbytes
        self._buffer, self._begin, self.source = buffer, begin, source

    @property
    def place(self) -> tuple[object, ...] | None:
        """What its values follow from: the file, and where and how they lie in it. None for a buffer."""
        return None if self.source is None else (self.source.identity, self._begin, self.dtype, self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"{self.file}: tensor {self.name!r} is a single number, it has no rows")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"StoredTensor({self.file}: {self.name!r}, {self.dtype}, {self.shape})"

    def __getitem__(self, rows: slice) -> Float32Array:
        """float32[rows, ...], C-contiguous: a read-only view of the file where it holds aligned float32, else a copy.

        Raises:
            CheckpointError: the type cannot be read, or a float64 is beyond float32.
            IndexError: a single number has no rows (`tensor[:]` is it), or a step other than 1.
        """
        if not isinstance(rows, slice):
            raise TypeError(f"tensor {self.name!r}: rows are taken by slice, not by {type(rows).__name__}")
        if rows == slice(None):
            return self._read(0, math.prod(self.shape)).reshape(self.shape)
        if not self.shape:
            raise IndexError(f"tensor {self.name!r} is a single number, it has no rows")
        begin, end, step = rows.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"tensor {self.name!r}: rows are taken with step 1, not {step}")
        end = max(begin, end)
        row = math.prod(self.shape[1:])
        return self._read(begin * row, end * row).reshape(end - begin, *self.shape[1:])

    def stored(self, begin: int, end: int) -> NDArray[Any]:
        """Rows [begin, end) as they lie in the file, read-only; bfloat16 and float16 as uint16, their bits."""
        row = math.prod(self.shape[1:])
        raw = self._raw(begin * row, end * row).reshape(end - begin, *self.shape[1:])
        return raw.view(np.uint16) if raw.dtype.itemsize == 2 else raw

    def columns(self, begin: int, end: int) -> Float32Array:
        """float32[rows, end - begin] of a matrix: those columns of every row, and memory for no others.

        Raises:
            CheckpointError: as indexing.
        """
        rows, width = self.shape
        return self._widened(self._raw(0, rows * width).reshape(rows, width)[:, begin:end])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The whole tensor as float32 (or cast from there), for np.asarray."""
        return np.array(self[:], dtype=dtype, copy=copy)

    def forget(self) -> None:
        """The file's pages read so far are not needed any more; reading them again is correct, only slower."""
        if not isinstance(self._buffer, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED") or not self.nbytes:
            return
        # Whole pages around the tensor: a neighbour's bytes in them come back from the file when it is read.
        begin = self._begin - self._begin % mmap.PAGESIZE
        self._buffer.madvise(mmap.MADV_DONTNEED, begin, self._begin + self.nbytes - begin)

    def _read(self, begin: int, end: int) -> Float32Array:
        """Elements [begin, end) as flat float32."""
        return self._widened(self._raw(begin, end))

    def _raw(self, begin: int, end: int) -> NDArray[Any]:
        """Elements [begin, end) as they lie in the file."""
        stored = _IN_FILE.get(self.dtype)
        if stored is None:
            raise CheckpointError(f"{self.file}: dtype {self.dtype} of tensor {self.name!r} is not supported")
        return np.frombuffer(self._buffer, stored, end - begin, self._begin + begin * stored.itemsize)

    def _widened(self, raw: NDArray[Any]) -> Float32Array:
        """As float32: read-only and the file's own where it holds aligned float32, else a copy."""
        if self.dtype == "bfloat16":
            bits = np.empty(raw.shape, np.uint32)  # one pass; astype and a shift in place would be two
            np.left_shift(raw, 16, out=bits, dtype=np.uint32, casting="unsafe")
            return bits.view(np.float32)
        if self.dtype == "float32" and raw.flags.aligned:
            raw.flags.writeable = False
            return raw.astype(np.float32, copy=False)
        try:
            with np.errstate(over="raise"):
                return raw.astype(np.float32)
        except FloatingPointError as error:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} holds a float64 that is beyond float32"
            ) from error
