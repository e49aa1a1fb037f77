"""A model's weights in the form its kernels read, all in one block of memory, each array known to the native step by a number.

First everything is asked for and its size known, then `load` takes the memory and fills it: from the cache of an earlier start
where there is one, else by packing the checkpoint. A matrix that is stored as bfloat16 or float16 stays that, and its kernels
widen it: the same bits as a float32 copy, from half the memory. Weights are packed one at a time, straight to where they stay,
and the file's pages let go before the next one's turn, so that no second copy of the model ever exists. A tied embedding and
head are one matrix. What int8 cost is measured meanwhile and lies behind the weights, so that a cached copy tells it too.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoserve import packed_form, quantization_error
from nanoserve.compiler.target import host
from nanoserve.kernels import gemm, panels
from nanoserve.machine_memory import available_memory
from nanoserve.models import safetensors_file, stored_tensor, weights
from nanoserve.models.rope import Rope
from nanoserve.models.weights import BoundWeight
from nanoserve.native import StepExecutor, ThreadPool, WeightArena
from nanoserve.packed_form import ArraySpec, PackedForm
from nanoserve.quantization_error import QuantizationError, QuantizationReport
from nanoserve.weight_cache import WeightCache

Arg = tuple[str, int] | tuple[str]  # where a kernel finds an argument (plan.md, "Kernel ABI")
OnProgress = Callable[[int, int, str], None]

# Less than this is packed as fast as it is read, and would only litter the cache.
WORTH_CACHING_BYTES = 32 * 2**20
_ALIGNMENT = 4096  # of an array in the arena: no two share a page
_ERROR_BYTES = 3 * 8  # of a QuantizationError
# What decides the packed bytes beside the module of a form.
_SOURCES = (__file__, packed_form.__file__, gemm.__file__, panels.__file__, quantization_error.__file__, weights.__file__,
            stored_tensor.__file__, safetensors_file.__file__)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Packed:
    """A weight in a form: its arrays, where each begins in the arena, and the ids they have."""

    name: str
    form: PackedForm
    arrays: tuple[ArraySpec, ...]
    offsets: tuple[int, ...]
    args: tuple[Arg, ...]


class PackedWeights:
    """Arguments for the kernels of one model: ask for all of them, then `load`.

    Args:
        native: whose weights they become.
        weights: by the decoder's names.
        max_model_len: rows of a rotary table.
        switch_len: sequences longer than this use a second half of it.

    Attributes:
        num_bytes: of everything asked for so far, as it lies in memory.
        was_cached: after `load`, whether it came from the cache.
        quantization_report: after `load`, what int8 cost; None where nothing is int8.
    """

    def __init__(
        self, native: StepExecutor, weights: Mapping[str, BoundWeight], max_model_len: int, switch_len: int
    ) -> None:
        self._native = native
        self._weights = weights
        self._max_model_len = max_model_len
        self._has_halves = switch_len < max_model_len
        self._packed: dict[tuple[str, str], _Packed] = {}
        self._ropes: dict[Rope, tuple[Arg, NDArray[np.float32]]] = {}
        self._num_ids = 0
        self.num_bytes = 0
        self.was_cached = False
        self.quantization_report: QuantizationReport | None = None

    def dtype(self, name: str) -> str:
        """How a matrix or table is stored: "f32", or "bf16" and "f16" where that loses nothing."""
        return self._weights[name].dtype

    def rows(self, name: str) -> Arg:
        """A weight the kernels read as it is, in its dtype: of norms, and tables of embeddings and positions."""
        return self.packed(name, packed_form.rows(self.dtype(name)))[0]

    def matrix(self, name: str, dtype: str, *, gated: bool = False) -> tuple[Arg, ...]:
        """A GEMM's weight, packed, of that dtype; with "i8" its scales and sums follow."""
        return self.packed(name, packed_form.panels(dtype, gated=gated))

    def bias(self, name: str, *, gated: bool = False) -> Arg:
        """A GEMM's bias."""
        return self.packed(name, packed_form.bias(gated=gated))[0]

    def packed(self, name: str, form: PackedForm) -> tuple[Arg, ...]:
        """A weight's arrays in a form; one copy, however often it is asked for."""
        found = self._packed.get((name, form.name))
        if found is None:
            arrays = tuple(form.arrays(self._weights[name].shape))
            offsets = []
            for array in arrays:
                offsets.append(self.num_bytes)
                self.num_bytes += _round_up(_num_bytes(array), _ALIGNMENT)
            found = _Packed(name, form, arrays, tuple(offsets), tuple(self._next_arg() for _ in arrays))
            self._packed[name, form.name] = found
        return found.args

    def rope(self, rope: Rope) -> Arg:
        """A rotary table; layers that turn alike share it. All have two halves where some layer's has."""
        if rope not in self._ropes:
            table = rope.table(self._max_model_len)
            if rope.switch_len is None and self._has_halves:
                table = np.concatenate([table, table])
            self._ropes[rope] = (self._next_arg(), table)
        return self._ropes[rope][0]

    def load(
        self, threads: ThreadPool, cache: WeightCache | None = None, on_load: OnProgress | None = None
    ) -> threading.Thread | None:
        """Fill the memory of everything asked for, and hand it to the native step.

        Args:
            cache: None packs in any case.
            on_load: called as (bytes done, bytes in total, weight name).

        Returns:
            A thread that would write what was packed to the cache; the caller starts it, or does not.

        Raises:
            CheckpointError: the weights are not what they must be. MemoryError: they do not fit, with the numbers.
        """
        available = available_memory()
        if self.num_bytes > available:
            raise MemoryError(
                f"weights: packed they take {self.num_bytes} bytes, this machine has {available} available"
            )
        measured = [each.name for each in self._packed.values() if each.form.is_measured]
        # Behind the weights, so that an entry of the cache holds them under the same checksum.
        size = len(measured) * _ERROR_BYTES
        arena = WeightArena(self.num_bytes + _round_up(size, _ALIGNMENT))
        errors = arena.view(self.num_bytes, size).view(np.float64).reshape(len(measured), 3)
        key = None if cache is None or self.num_bytes < WORTH_CACHING_BYTES else self.cache_key()
        writer = None
        if cache is not None and key is not None:
            self.was_cached = cache.read(key, arena, threads, on_load) and _are_plausible(errors)
        if not self.was_cached:
            self._pack(arena, errors, on_load)
            if cache is not None and key is not None and self._sources_are_current():
                writer = threading.Thread(
                    target=cache.store, args=(key, arena), name="nanoserve-weight-cache"
                )
        if measured:
            each = (QuantizationError(*row) for row in errors.tolist())
            self.quantization_report = QuantizationReport(dict(zip(measured, each, strict=True)))
        self._hand_over(arena)
        return writer

    def cache_key(self) -> str | None:
        """A digest of all that decides the packed bytes; None where a weight is not from a file."""
        origins = {name: self._weights[name].origin for name in sorted({name for name, _ in self._packed})}
        if None in origins.values():
            return None
        packed = [(each.name, each.form.name, each.arrays, each.offsets) for each in self._packed.values()]
        forms = {inspect.getfile(each.form.fill) for each in self._packed.values()}
        code = [_digest(path) for path in (*_SOURCES, *sorted(forms))]
        return hashlib.sha256(repr((packed, origins, code, host())).encode()).hexdigest()

    def _sources_are_current(self) -> bool:
        """Whether what was packed is what the key says: a file that changed meanwhile is another one."""
        return all(source.is_current() for weight in self._weights.values() for source in weight.sources())

    def _pack(self, arena: WeightArena, errors: NDArray[np.float64], on_load: OnProgress | None) -> None:
        total = sum(self._weights[each.name].num_bytes for each in self._packed.values())
        done = 0
        for weight in self._weights.values():
            weight.check_twin()
        rows = iter(errors)
        for each in self._packed.values():
            weight = self._weights[each.name]
            error = each.form.fill(weight, self._arrays(arena, each))
            if error is not None:
                next(rows)[:] = astuple(error)
            weight.forget()
            done += weight.num_bytes
            if on_load is not None:
                on_load(done, total, each.name)

    def _arrays(self, arena: WeightArena, packed: _Packed) -> Sequence[NDArray[Any]]:
        return [
            arena.view(offset, _num_bytes(array)).view(array[1]).reshape(array[0])
            for array, offset in zip(packed.arrays, packed.offsets, strict=True)
        ]

    def _hand_over(self, arena: WeightArena) -> None:
        """Every array to the native step, in the order of the numbers that were given out for them."""
        arrays: dict[Arg, NDArray[Any]] = dict(self._ropes.values())
        for each in self._packed.values():
            arrays.update(zip(each.args, self._arrays(arena, each), strict=True))
        for number in range(self._num_ids):
            given = self._native.weight(arrays["weight", number])
            if given != number:
                raise RuntimeError(
                    f"weights: number {number} is {given} in the native step: it had weights already"
                )

    def _next_arg(self) -> Arg:
        self._num_ids += 1
        return ("weight", self._num_ids - 1)


def _are_plausible(errors: NDArray[np.float64]) -> bool:
    """Whether what a file holds can be what was measured; it is only shown, but then it should be so."""
    return all(QuantizationError(*each).is_plausible for each in errors.tolist())


def _num_bytes(array: ArraySpec) -> int:
    shape, element = array
    return math.prod(shape) * np.dtype(element).itemsize


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to


@cache
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
