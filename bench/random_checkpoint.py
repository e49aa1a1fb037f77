"""Checkpoints of any size with random weights, in seconds and little memory.

Drawing a billion normals takes longer than everything tested with them, so one block is drawn and every tensor is written
from it, beginning somewhere else each time. The block's length is a prime: rows of a matrix never fall in step with it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanoserve.kernels.panels import to_bfloat16

BLOCK = 1_048_573  # elements, prime: at most 4 MiB
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
Shapes = Mapping[str, tuple[int, ...]]


def write_random_checkpoint(
    directory: Path,
    config_json: Mapping[str, Any],
    tensors: Shapes,
    dtype: str = "bfloat16",
    shard_bytes: int | None = None,
    seed: int = 0,
) -> Path:
    """Write config.json and safetensors: normal weights of sigma 0.02, vectors of norms around 1.

    Args:
        config_json: what config.json holds.
        tensors: shape by checkpoint name, written in this order.
        dtype: "bfloat16", "float16" or "float32".
        shard_bytes: data bytes a shard may hold (a larger tensor gets its own); None writes one file.

    Returns:
        `directory`, made if need be.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config_json), indent=1))
    weights = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02)
    blocks = _stored(weights, dtype), _stored(weights + 1, dtype)
    shards = _shards(tensors, blocks[0].itemsize, shard_bytes)
    starts = np.random.default_rng(seed + 1)
    if len(shards) == 1:
        _write(directory / "model.safetensors", shards[0], dtype, blocks, starts)
        return directory
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write(directory / name, shard, dtype, blocks, starts)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(math.prod(shape) for shape in tensors.values()) * blocks[0].itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    return to_bfloat16(values) if dtype == "bfloat16" else values.astype(dtype)


def _shards(tensors: Shapes, itemsize: int, shard_bytes: int | None) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * itemsize
        if shard_bytes is not None and shards[-1] and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tuple(shape)
        held += size
    return shards


def _write(
    path: Path, shapes: Shapes, dtype: str, blocks: tuple[np.ndarray, np.ndarray], starts: np.random.Generator
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * blocks[0].itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # the format wants the data aligned
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        for name, shape in shapes.items():
            is_norm = len(shape) == 1 and ("norm" in name or ".ln_" in name) and not name.endswith("bias")
            for piece in _pieces(blocks[is_norm], math.prod(shape), int(starts.integers(BLOCK))):
                stream.write(memoryview(piece))


def _pieces(block: np.ndarray, count: int, start: int) -> Iterator[np.ndarray]:
    while count > 0:
        piece = block[start : start + count]
        yield piece
        count -= len(piece)
        start = 0
