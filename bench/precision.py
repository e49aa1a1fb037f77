"""Measures what narrower number formats cost in accuracy and writes bench/results/precision.json.

    python -m bench.precision

Every format runs the same texts as float32 does, token by token given (nothing is sampled), and is compared position by
position: the difference of the logits, whether the likeliest token is the same, and what the text's perplexity becomes. The
trained model reads prose it never saw (CONTRIBUTING.md and SECURITY.md); the other has a published shape and random weights, so its
perplexity means nothing and its logits, all close together, are the hardest case for agreement.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.random_checkpoint import write_random_checkpoint
from bench.run import RESULTS, ROOT, commit, machine
from bench.shapes import SHAPES
from nanoserve import LLM, ModelConfig, SamplingParams
from nanoserve.batch import Batch
from nanoserve.logits import Logits
from nanoserve.models.weights import checkpoint_shapes

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float32, bfloat16 KV": {"dtype": "float32", "kv_cache_dtype": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
}
WINDOW = 256  # tokens of a text that go in one request
RANDOM_TOKENS = 192


class Keeper:
    """An executor that keeps the logits it gives."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.kept: list[NDArray[np.float32]] = []

    def forward(self, batch: Batch) -> Logits:
        logits: Logits = self._inner.forward(batch)
        self.kept.append(logits.values.copy())
        return logits


def logits_of(llm: LLM, tokens: list[int]) -> NDArray[np.float32]:
    """float32[tokens, V]: what the model says after each of them."""
    keeper = Keeper(llm.engine.executor)
    llm.engine.batcher.executor = keeper
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    (request,) = llm.engine.generate([tokens], params)
    if request.error is not None:
        raise RuntimeError(request.error)
    return np.concatenate(keeper.kept)[: len(tokens)]


def surprise(logits: NDArray[np.float32], tokens: list[int]) -> NDArray[np.float64]:
    """Minus the log-probability of every token but the first."""
    wide = logits[:-1].astype(np.float64)
    top = wide.max(axis=1)
    log_total = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    own = wide[np.arange(len(wide)), tokens[1:]]
    surprises: NDArray[np.float64] = log_total - own
    return surprises


def compare(directory: str, texts: list[list[int]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    reference: list[NDArray[np.float32]] = []
    for name, options in FORMATS.items():
        llm = LLM(directory, weight_cache=False, enable_prefix_cache=False, max_num_seqs=1, **options)
        logits = [logits_of(llm, tokens) for tokens in texts]
        reference = reference or logits
        pairs = list(zip(logits, reference, strict=True))
        errors = [np.abs(own - other) for own, other in pairs]
        rows[name] = {
            "weight_bytes": llm.engine.executor.weight_bytes,
            "max_logit_error": max(float(error.max()) for error in errors),
            "mean_logit_error": float(np.mean([error.mean() for error in errors])),
            "greedy_agreement": float(
                np.mean([own.argmax(axis=1) == other.argmax(axis=1) for own, other in pairs])
            ),
            "perplexity": math.exp(float(np.concatenate(list(map(surprise, logits, texts))).mean())),
        }
    spread = float(np.mean([part.std(axis=1).mean() for part in reference]))
    return {"positions": sum(map(len, texts)), "logit_deviation": spread, "formats": rows}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    prose = b"".join((ROOT / name).read_bytes() for name in ("CONTRIBUTING.md", "SECURITY.md"))
    text = list(prose[: len(prose) // WINDOW * WINDOW])
    windows = [text[at : at + WINDOW] for at in range(0, len(text), WINDOW)]
    results = {"trained model, models/tiny-gpt": compare(str(ROOT / "models" / "tiny-gpt"), windows)}
    name = "Qwen3-0.6B"
    with tempfile.TemporaryDirectory(prefix="nanoserve-bench-") as directory:
        path = Path(directory)
        (path / "config.json").write_text(json.dumps(SHAPES[name]))
        config = ModelConfig.from_pretrained(path)
        write_random_checkpoint(path, SHAPES[name], checkpoint_shapes(config), dtype="bfloat16")
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, RANDOM_TOKENS).tolist()
        results[f"random weights, {name}"] = compare(directory, [tokens])
    out = {
        "command": "python -m bench.precision",
        "commit": commit(),
        "machine": machine(),
        "models": results,
    }
    (RESULTS / "precision.json").write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
