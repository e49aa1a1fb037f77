"""Seeded mutations of bytes and of JSON, for fuzzing what reads them."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# Spelled into the JSON text after encoding: what no Python value encodes to.
_RAW = {
    "@nan@": "NaN", "@inf@": "-Infinity", "@huge@": "9" * 100_000, "@digits@": "1" + "0" * 4_000, "@exp@": "1e999999",
    "@tiny@": "-0.0", "@half@": '"\\ud800"', "@deep@": "[" * 100_000 + "]" * 100_000, "@open@": "{\"a\":" * 50_000,
    "@null@": '"\\u0000"', "@bad@": "tru", "@empty@": "",
}  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 0.5, 1e-300, 1e308, -1.5, "", "F32",
    "BF16", "F8_E4M3", "x" * 5000, "model.safetensors", "../config.json", [], {}, [[]], [0], [2, 2], [1] * 9, [2**40, 2**40],
    [0, 8], [8, 0], [-1, 1], [0.0, 1.0], [None], "@nested@", {"a": 1}, {"rope_type": "yarn"}, *_RAW,
]  # fmt: skip


def mutated_bytes(rng: random.Random, data: bytes, window: int | None = None) -> bytes:
    """One to four edits: bits flipped, bytes changed, cut, repeated or inserted; mostly in the first `window` bytes."""
    raw = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = (
            rng.randrange(min(window or len(raw), len(raw)) if rng.random() < 0.9 else len(raw)) if raw else 0
        )
        span = rng.choice([1, 1, 2, 8, 40])
        match rng.randrange(6):
            case 0 if raw:
                raw[at] ^= 1 << rng.randrange(8)
            case 1 if raw:
                raw[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, *b'"{}[]:,-.e019 \\'])
            case 2:
                del raw[at : at + span]
            case 3:
                raw[at:at] = raw[at : at + span]
            case 4:
                raw[at:at] = rng.randbytes(span)
            case _:
                del raw[rng.randrange(len(raw) + 1) :]
    return bytes(raw)


def mutated_json(rng: random.Random, value: Any, edits: int = 2) -> bytes:
    """JSON text of `value` after edits of its values and names; sometimes no JSON any more."""
    tree = [copy.deepcopy(value)]
    for _ in range(rng.randint(min(1, edits), edits)):
        holder, key = rng.choice(_places(tree))
        match rng.randrange(5):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice([str(key) + "x", "", "@half@", "__metadata__", "weight_map"])] = holder.pop(
                    key
                )
            case 2 if isinstance(holder, dict):
                holder[rng.choice(["extra", "sliding_window", "rope_scaling", "layer_types"])] = rng.choice(
                    _VALUES
                )
            case 3 if isinstance(holder[key], int):
                holder[key] = holder[key] + rng.choice([-1, 1, 8, 2**32, -holder[key]])
            case 4 if rng.random() < 0.2:
                other_holder, other_key = rng.choice(_places(tree[0]) or [(holder, key)])
                holder[key] = copy.deepcopy(other_holder[other_key])
            case _:
                holder[key] = copy.deepcopy(rng.choice(_VALUES))
    text = json.dumps(tree[0])
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    depth = rng.choice([3, 100, rng.randrange(900, 1010)])  # around Python's own limit
    text = text.replace('"@nested@"', "[" * depth + "]" * depth)
    return text.encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        found += _places(inner)
    return found
