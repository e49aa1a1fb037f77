"""A model's weights in the form its kernels read, each packed once and then known to the native step by a number.

A matrix that is stored as bfloat16 or float16 stays that, and its kernels widen it: the same bits as a float32 copy, from half
the memory. One at a time: a weight is read from its file, packed, and the file's pages let go before the next one's turn, so that no
second copy of the model ever exists. A tied embedding and head are one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoserve.kernels import panels
from nanoserve.models.rope import Rope
from nanoserve.models.weights import BoundWeight
from nanoserve.native import StepExecutor

Arg = tuple[str, int] | tuple[str]  # where a kernel finds an argument (plan.md, "Kernel ABI")
OnProgress = Callable[[int, int, str], None]


class PackedWeights:
    """Arguments for the kernels of one model.

    Args:
        native: whose weights they become.
        weights: by the decoder's names.
        max_model_len: rows of a rotary table.
        switch_len: sequences longer than this use a second half of it.
        on_load: called as (bytes done, bytes in total, weight name).

    Attributes:
        num_bytes: of everything packed so far.
    """

    def __init__(
        self,
        native: StepExecutor,
        weights: Mapping[str, BoundWeight],
        max_model_len: int,
        switch_len: int,
        on_load: OnProgress | None = None,
    ) -> None:
        self._native = native
        self._weights = weights
        self._max_model_len = max_model_len
        self._has_halves = switch_len < max_model_len
        self._on_load = on_load
        self._loaded, self._total = 0, sum(weight.num_bytes for weight in weights.values())
        self._packed: dict[str, list[Arg]] = {}
        self._ropes: dict[Rope, Arg] = {}
        self.num_bytes = 0

    def dtype(self, name: str) -> str:
        """How a matrix or table is stored: "f32", or "bf16" and "f16" where that loses nothing."""
        return self._weights[name].dtype

    def rows(self, name: str) -> Arg:
        """A weight the kernels read as it is, in its dtype: of norms, and tables of embeddings and positions."""
        return self._once(name, lambda weight: (_copied(weight),))[0]

    def matrix(self, name: str, dtype: str, *, gated: bool = False) -> list[Arg]:
        """A GEMM's weight, packed, in that dtype."""
        if dtype == "i8":
            def pack8(weight):
                w = panels.pack_int8(weight, gated=gated)
                return (w.panels, w.scale, w.sums)
            return self._once(name, pack8)
        if dtype == "bf16" and self.dtype(name) != "bf16":
            return self._once(name, lambda weight: (panels.pack(_Rounded(weight), dtype=dtype, gated=gated),))
        return self._once(name, lambda weight: (panels.pack(weight, dtype=dtype, gated=gated),))

    def bias(self, name: str, *, gated: bool = False) -> Arg:
        """A GEMM's bias."""
        return self._once(name, lambda weight: (panels.pack_bias(weight[:], gated=gated),))[0]

    def rope(self, rope: Rope) -> Arg:
        """A rotary table; layers that turn alike share it. All have two halves where some layer's has."""
        if rope not in self._ropes:
            table = rope.table(self._max_model_len)
            if rope.switch_len is None and self._has_halves:
                table = np.concatenate([table, table])
            self._ropes[rope] = ("weight", self._native.weight(table))
        return self._ropes[rope]

    def _once(self, name: str, pack: Callable[[BoundWeight], tuple[NDArray[Any], ...]]) -> list[Arg]:
        if name not in self._packed:
            weight = self._weights[name]
            packed = pack(weight)
            self._packed[name] = [("weight", self._native.weight(array)) for array in packed]
            weight.forget()
            self.num_bytes += sum(array.nbytes for array in packed)
            self._loaded += weight.num_bytes
            if self._on_load is not None:
                self._on_load(self._loaded, self._total, name)
        return self._packed[name]


class _Rounded:
    def __init__(self, weight): self.weight, self.shape = weight, weight.shape
    def __getitem__(self, rows): return self.weight[rows]
    def stored(self, begin, end):
        bits = np.ascontiguousarray(self.weight[begin:end]).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _copied(weight: BoundWeight, step: int = 4096) -> NDArray[Any]:
    """The weight in memory of its own, some rows at a time: converting all of it at once would take it twice."""
    is_wide, count = weight.dtype == "f32", weight.shape[0]
    copy = np.empty(weight.shape, np.float32 if is_wide else np.uint16)
    for at in range(0, count, step):
        end = min(at + step, count)
        copy[at:end] = weight[at:end] if is_wide else weight.stored(at, end)
    return copy
