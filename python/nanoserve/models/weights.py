"""From a checkpoint's tensors to the weights the decoder names.

`bind_weights(config, tensors)` maps names through weight_names.py, joins what the kernels want joined (q|k|v, gate|up), and
checks that every weight is there with its shape and that nothing is left over. Nothing is read yet: a BoundWeight reads
rows when they are packed, so that no second copy of a weight ever exists, and where packed weights are cached none is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from nanoserve.checks import few
from nanoserve.errors import CheckpointError
from nanoserve.kernels.gemm import WEIGHT_BYTES
from nanoserve.kernels.panels import Rows
from nanoserve.models.config import ModelConfig
from nanoserve.models.decoder import gemm_weights, weight_shapes
from nanoserve.models.stored_tensor import SourceFile, StoredTensor
from nanoserve.models.weight_names import WEIGHT_NAMES
from nanoserve.precision import Precision

Float32Array = NDArray[np.float32]
Tensors = Mapping[str, Any]  # StoredTensor or NumPy arrays, by checkpoint name
# Buffers older checkpoints carry; they are constants of the architecture, not weights.
_NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
_NARROW = {"bfloat16": "bf16", "float16": "f16"}
_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(slots=True)
class BoundWeight:
    """A decoder weight: rows of checkpoint tensors laid end to end, read as float32 when asked for.

    Attributes:
        dtype: "bf16" or "f16" for a matrix whose kernel may read it as it is stored, else "f32".
        offset: added to every element.
        twin: a second copy of it in the checkpoint, which must be equal: the head that is tied to an embedding.
    """

    shape: tuple[int, ...]
    parts: list[Rows]
    transposed: bool = False
    offset: float = 0.0
    dtype: str = "f32"
    twin: Rows | None = None

    def __getitem__(self, rows: slice) -> Float32Array:
        """float32 rows [start, stop): a view of the file where that is possible, else a copy of those rows."""
        begin, end, _ = rows.indices(self.shape[0])
        if self.transposed:
            (part,) = self.parts
            stored = (
                part.columns(begin, end) if isinstance(part, StoredTensor) else np.asarray(part)[:, begin:end]
            )
            pieces = [stored.T.astype(np.float32, copy=False)]
        else:
            pieces = [
                np.asarray(part[low:high], dtype=np.float32) for part, low, high in self._cut(begin, end)
            ]
        result = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return result if self.offset == 0 else result + np.float32(self.offset)

    def stored(self, begin: int, end: int) -> NDArray[np.uint16]:
        """Rows [begin, end) of a weight that is not "f32": the 16 bits of each element."""
        if self.transposed:
            (part,) = self.parts
            return cast(StoredTensor, part).stored(0, part.shape[0])[:, begin:end].T
        pieces = [cast(StoredTensor, part).stored(low, high) for part, low, high in self._cut(begin, end)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _cut(self, begin: int, end: int) -> Iterator[tuple[Rows, int, int]]:
        """The parts that rows [begin, end) lie in, each with its own first and last."""
        first = 0
        for part in self.parts:
            low, high = max(begin - first, 0), min(end - first, part.shape[0])
            if low < high:
                yield part, low, high
            first += part.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of `dtype`."""
        return WEIGHT_BYTES[self.dtype] * int(np.prod(self.shape, dtype=np.int64))

    def forget(self) -> None:
        """The file's pages behind it are not needed any more."""
        for part in self._stored():
            part.forget()

    @property
    def origin(self) -> tuple[object, ...] | None:
        """What its values follow from, without reading them: equal for equal values. None where that is not known."""
        parts = [*self.parts, *([] if self.twin is None else [self.twin])]
        places = [part.place for part in self._stored()]
        if len(places) < len(parts) or None in places:
            return None
        return (self.shape, self.transposed, self.offset, self.dtype, self.twin is not None, *places)

    def sources(self) -> set[SourceFile]:
        """The files it is read from, as they were when they were opened."""
        return {part.source for part in self._stored() if part.source is not None}

    def _stored(self) -> list[StoredTensor]:
        parts = [*self.parts, *([] if self.twin is None else [self.twin])]
        return [part for part in parts if isinstance(part, StoredTensor)]

    def check_twin(self) -> None:
        """Raises CheckpointError where it differs from its twin. Reads both."""
        if self.twin is not None and not _equal(self.twin, self):
            raise CheckpointError("weights: the head differs from the embedding, but the config ties them")


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a decoder weight comes from: checkpoint tensors without the family's prefix."""

    names: tuple[str, ...]
    transposed: bool
    offset: float


def _source(config: ModelConfig, name: str) -> _Source:
    layout = WEIGHT_NAMES[config.family]
    owner, _, kind = name.rpartition(".")
    if owner.startswith("layers."):
        _, layer, part = owner.split(".")
        bases = tuple(layout.layer.format(i=layer) + base for base in layout.parts[part])
    else:
        bases = (layout.top[owner],)
    is_norm = "norm" in owner
    is_matrix = kind == "weight" and not is_norm and owner.startswith("layers.")
    return _Source(
        tuple(f"{base}.{kind}" for base in bases),
        layout.transposed and is_matrix,
        layout.norm_offset if is_norm and kind == "weight" else 0.0,
    )


def loaded_bytes(
    config: ModelConfig, weights: Mapping[str, BoundWeight], precision: Precision | None = None
) -> int:
    """What bound weights will take in memory; nothing is read."""
    stored = {name: weight.dtype for name, weight in weights.items()}
    return weights_in_memory(config, stored, precision or Precision())


def expected_bytes(config: ModelConfig, stored: str, precision: Precision | None = None) -> int:
    """The same for files that are not here, whose matrices are stored as f32, bf16 or f16."""
    return weights_in_memory(config, expected_dtypes(config, stored), precision or Precision())


def expected_dtypes(config: ModelConfig, stored: str) -> dict[str, str]:
    """BoundWeight.dtype of every weight in files that are not here, whose matrices are stored as f32, bf16 or f16."""
    return {
        name: stored if _is_matrix(name, shape) else "f32" for name, shape in weight_shapes(config).items()
    }


def weights_in_memory(config: ModelConfig, stored: Mapping[str, str], precision: Precision) -> int:
    """The same by BoundWeight.dtype of each."""
    multiplied, total = gemm_weights(config), 0
    for name, shape in weight_shapes(config).items():
        dtype = precision.gemm_weight(stored[name]) if name in multiplied else stored[name]
        total += WEIGHT_BYTES[dtype] * int(np.prod(shape, dtype=np.int64))
        total += 8 * shape[0] if dtype == "i8" else 0  # a scale and a sum per output
    return total


def stored_dtype(weights: Mapping[str, BoundWeight]) -> str:
    """How most bytes of bound weights are stored: f32, bf16 or f16."""
    sizes = dict.fromkeys(WEIGHT_BYTES, 0)
    for weight in weights.values():
        sizes[weight.dtype] += weight.num_bytes
    return max(sizes, key=sizes.__getitem__)


def bind_weights(config: ModelConfig, tensors: Tensors) -> dict[str, BoundWeight]:
    """The decoder's weights by its own names, shapes checked against `config`. Nothing is read.

    A head that is stored beside the embedding it is tied to becomes the embedding's twin: `check_twin` compares them.

    Raises:
        CheckpointError: missing, unexpected, or wrongly shaped tensors, or tensors that are not floating point.
    """
    given = _without_prefix(WEIGHT_NAMES[config.family].prefix, tensors)
    bound: dict[str, BoundWeight] = {}
    used: set[str] = set()
    missing: list[str] = []
    for name, shape in weight_shapes(config).items():
        source = _source(config, name)
        absent = [part for part in source.names if part not in given]
        missing += absent
        used.update(source.names)
        if not absent:
            bound[name] = _join(name, shape, source, given, config)
    if missing:
        raise CheckpointError(f"weights: {len(missing)} tensors are missing: {few(missing)}")
    tied = {_source(config, "head.weight").names[0]} if config.tie_embeddings else set()
    extra = set(given) - used - tied
    if extra:
        raise CheckpointError(f"weights: {len(extra)} tensors are unexpected: {few(sorted(extra))}")
    for name in tied & given.keys():
        bound["embed.weight"].twin = given[name]
    return bound


def checkpoint_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint of this config, as transformers saves it."""
    prefix, head = WEIGHT_NAMES[config.family].prefix, WEIGHT_NAMES[config.family].top["head"]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in weight_shapes(config).items():
        source = _source(config, name)
        bounds = _split_rows(name, config) if len(source.names) > 1 else [0, shape[0]]
        for part, begin, end in zip(source.names, bounds[:-1], bounds[1:], strict=True):
            stored = (end - begin, *shape[1:])
            full = part if part.startswith(head) else prefix + part
            shapes[full] = stored[::-1] if source.transposed else stored
    return shapes


def _without_prefix(prefix: str, tensors: Tensors) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(prefix)
        if bare in given:
            raise CheckpointError(f"weights: tensor {bare!r} is there with and without the prefix {prefix!r}")
        if not bare.endswith(_NOT_WEIGHTS):
            given[bare] = tensor
    return given


def _join(
    name: str, shape: tuple[int, ...], source: _Source, given: Mapping[str, Any], config: ModelConfig
) -> BoundWeight:
    parts = []
    rows = _split_rows(name, config) if len(source.names) > 1 else [0, shape[0]]
    for part_name, begin, end in zip(source.names, rows[:-1], rows[1:], strict=True):
        part = given[part_name]
        if str(part.dtype) not in _FLOATS:
            raise CheckpointError(
                f"weights: tensor {part_name!r} has dtype {part.dtype}, must be one of {', '.join(_FLOATS)}"
            )
        wanted = (end - begin, *shape[1:])
        if name == "pos_embed.weight" and len(part.shape) == 2 and part.shape[0] > end:
            part = part[:end]  # a shorter context than the model was trained for
        found = part.shape[::-1] if source.transposed else part.shape
        if found != wanted:
            needed = wanted[::-1] if source.transposed else wanted
            raise CheckpointError(f"weights: {part_name!r} has shape {part.shape}, the config needs {needed}")
        parts.append(part)
    return BoundWeight(shape, parts, source.transposed, source.offset, _kernel_dtype(name, parts))


def _kernel_dtype(name: str, parts: list[Any]) -> str:
    """What a kernel may read a weight as without losing a bit; vectors and positions are few, and stay float32."""
    kinds = {part.dtype if isinstance(part, StoredTensor) else "float32" for part in parts}
    is_uniform = _is_matrix(name, parts[0].shape) and len(kinds) == 1
    return _NARROW.get(kinds.pop(), "f32") if is_uniform else "f32"


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name != "pos_embed.weight"


def _equal(head: Rows, embedding: BoundWeight, step: int = 4096) -> bool:
    """Whether two matrices hold the same values, read a few rows at a time."""
    if tuple(head.shape) != embedding.shape:
        return False
    return all(
        np.array_equal(np.asarray(head[at : at + step], dtype=np.float32), embedding[at : at + step])
        for at in range(0, embedding.shape[0], step)
    )


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Float32Array]:
    """Weights of the right shapes under the checkpoint's names, for tests and benchmarks: normal, sigma 0.02, norms at 1."""
    generator = np.random.default_rng(seed)
    tensors: dict[str, Float32Array] = {}
    for name, shape in weight_shapes(config).items():
        source = _source(config, name)
        array = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        if "norm.weight" in name:
            array += np.float32(1 - source.offset)
        if len(source.names) == 1:
            tensors[source.names[0]] = array.T if source.transposed else array
            continue
        bounds = _split_rows(name, config)
        for part_name, begin, end in zip(source.names, bounds[:-1], bounds[1:], strict=True):
            tensors[part_name] = array[begin:end]
    return tensors


def _split_rows(name: str, config: ModelConfig) -> list[int]:
    if "qkv" in name:
        heads, kv = config.n_head * config.dim_per_head, config.kv_heads * config.dim_per_head
        return [0, heads, heads + kv, heads + 2 * kv]
    return [0, config.mlp_width, 2 * config.mlp_width]
