"""A model's weights in device memory, in rows as a checkpoint has them: [out][in], each row begun on 16 bytes.

Some rows at a time are read, converted where that is asked for, and copied: the host never holds a weight twice, or whole.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from nanoserve.kernels.cuda.layout import ELEMENT_BYTES, weight_stride
from nanoserve.kernels.panels import STORED, RoundedRows
from nanoserve.models.rope import Rope
from nanoserve.models.weights import BoundWeight
from nanoserve.native import CudaStep
from nanoserve.packed_weights import Arg, OnProgress

_ROWS = 4096  # copied at once


def weight_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """What a weight takes: of a matrix, whole lines per row; a vector is float32 whatever it is stored as."""
    if len(shape) == 1:
        return 4 * shape[0]
    count, cols = shape
    return count * weight_stride(cols, dtype) * ELEMENT_BYTES[dtype]


def rope_bytes(rope: Rope, max_model_len: int, switch_len: int) -> int:
    """What a rotary table takes; arguments as DeviceWeights'."""
    longest = switch_len if rope.switch_len is None else rope.switch_len
    return 4 * rope.dims * max_model_len * (2 if longest < max_model_len else 1)


class DeviceWeights:
    """Arguments for the kernels of one model; asking for one copies it.

    Args:
        native: whose weights they become.
        weights: by the decoder's names.
        max_model_len: rows of a rotary table. switch_len: sequences longer than this use a second half of it.
        on_load: called as (bytes done, bytes in total, weight name).
    """

    def __init__(
        self,
        native: CudaStep,
        weights: Mapping[str, BoundWeight],
        max_model_len: int,
        switch_len: int,
        on_load: OnProgress | None = None,
    ) -> None:
        self._native, self._weights = native, weights
        self._max_model_len, self._has_halves = max_model_len, switch_len < max_model_len
        self._args: dict[tuple[str, str], Arg] = {}
        self._ropes: dict[Rope, Arg] = {}
        self._on_load = on_load
        self._total = sum(weight.num_bytes for weight in weights.values())
        self._done = 0

    def dtype(self, name: str) -> str:
        """How a matrix or table is stored: "f32", or "bf16" and "f16" where that loses nothing."""
        return self._weights[name].dtype

    def rows(self, name: str, dtype: str | None = None) -> Arg:
        """A weight in a dtype: its own (None), "f32" of what is stored so, or "bf16" of any, rounded."""
        dtype = self.dtype(name) if dtype is None else dtype
        if (name, dtype) not in self._args:
            self._args[name, dtype] = self._copied(name, dtype)
        return self._args[name, dtype]

    def rope(self, rope: Rope) -> Arg:
        """A rotary table; layers that turn alike share it. All have two halves where some layer's has."""
        if rope not in self._ropes:
            table = rope.table(self._max_model_len)
            if rope.switch_len is None and self._has_halves:
                table = np.concatenate([table, table])
            self._ropes[rope] = ("weight", self._native.weight(np.ascontiguousarray(table)))
        return self._ropes[rope]

    def _copied(self, name: str, dtype: str) -> Arg:
        weight = self._weights[name]
        weight.check_twin()
        if len(weight.shape) == 1:
            arg: Arg = ("weight", self._native.weight(np.ascontiguousarray(weight[:])))
        else:
            arg = self._copied_rows(weight, dtype)
        weight.forget()
        self._done += weight.num_bytes
        if self._on_load is not None:
            self._on_load(self._done, self._total, name)
        return arg

    def _copied_rows(self, weight: BoundWeight, dtype: str) -> Arg:
        count, cols = weight.shape
        element = np.dtype(STORED[dtype])
        stride = weight_stride(cols, dtype)
        number = self._native.reserve_weight(weight_bytes(weight.shape, dtype))
        source = weight if dtype in ("f32", weight.dtype) else RoundedRows(weight)
        for begin in range(0, count, _ROWS):
            end = min(begin + _ROWS, count)
            rows: NDArray[np.generic] = source[begin:end] if dtype == "f32" else source.stored(begin, end)
            block = np.zeros((end - begin, stride), element)
            block[:, :cols] = rows
            self._native.fill_weight(number, begin * stride * element.itemsize, block)
        return ("weight", number)
