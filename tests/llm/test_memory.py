"""A checkpoint is packed without a second copy: the peak of a process that loads one, against what has to be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.random_checkpoint import write_random_checkpoint

from nanoserve import ModelConfig
from nanoserve.models.weights import checkpoint_shapes

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "model_type": "qwen3", "vocab_size": 60_000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 3,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_is_weights_and_pool_and_five_percent(tmp_path: Path, dtype: str) -> None:
    """430 MB of float32, or half of that; packed, the file's mapped pages count too if they are not given back."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    shapes = checkpoint_shapes(ModelConfig.from_pretrained(tmp_path))
    write_random_checkpoint(tmp_path, SHAPE, shapes, dtype=dtype, shard_bytes=200_000_000)
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)

    def measured(inside: str) -> dict[str, Any]:
        output = subprocess.run(
            [sys.executable, "-m", "bench.loading", "--inside", inside, str(tmp_path)], cwd=ROOT, check=True, text=True,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                 "NANOSERVE_CACHE_DIR": str(cache)},
        )  # fmt: skip
        told: dict[str, Any] = json.loads(output.stdout)
        return told

    measured("cold")  # compiles kernels, and the compiler takes memory of its own
    packing, warm = measured("packing"), measured("warm")
    assert not packing["weights_were_cached"]
    assert warm["weights_were_cached"]
    for told in (packing, warm):
        assert told["weight_bytes"] > (400e6 if dtype == "float32" else 200e6)
        grown = told["peak_bytes"] - told["before_loading_bytes"]
        # The pool is taken at once, because its size was given; libraries and activations are allowed for.
        assert grown < 1.05 * told["weight_bytes"] + told["kv_bytes"] + 64 * 2**20, told
        assert grown > 0.9 * told["weight_bytes"], "the measure itself is broken"
