"""Computes how evenly threads share the operations of a step, and writes bench/results/partition.json.

    python -m bench.partition

Nothing is timed. The operations, their units and what each thread takes of them are the engine's own (bound_op.py,
StepExecutor.shares), for more threads than this machine may have. All threads wait for the one with the largest share, so

    busy of an operation = units / (threads * units of the largest share)
    busy of a step       = sum of work / sum of (work / busy)

Work is bytes of weights in a step of few rows, which waits for memory, and multiply-adds in one of many; of small operations it
is what the executor takes them to cost. Not in it: attention, whose items threads take one by one (src/attention_work.h evens
them out by a rule of its own), barriers, and that fewer threads than all may be enough for the memory's bandwidth.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.checkpoints import CHECKPOINTS
from bench.run import RESULTS, commit, machine
from nanoserve.bound_op import BoundOp, OpBinder
from nanoserve.kernels.gemm import WEIGHT_BYTES
from nanoserve.models.config import ModelConfig
from nanoserve.models.decoder import Attention, Gemm, Op, forward_ops
from nanoserve.models.weights import bind_weights, checkpoint_shapes
from nanoserve.native import KVCachePool, StepExecutor, ThreadPool
from nanoserve.packed_weights import PackedWeights
from nanoserve.precision import Precision

THREADS = (1, 2, 8, 16, 64)
PRECISION = Precision("bfloat16", "bfloat16")
FEW_ROWS = 64  # up to here a step reads weights for longer than it multiplies


@dataclass(frozen=True, slots=True)
class Step:
    rows: int
    samples: int


@dataclass(frozen=True, slots=True)
class Rule:
    """How an operation is cut; what is None is as the engine has it.

    Attributes:
        row_block: of a matrix product.
        per_row: what a unit of it costs counts its rows; the engine takes any for one row's.
        least_work: whether a thread takes part only where it has enough to do.
    """

    row_block: int | None = None
    per_row: bool = False
    least_work: bool = True


@dataclass(frozen=True, slots=True)
class Work:
    """An operation of a step: its units, their cost as the executor has it, and how much it is."""

    name: str
    units: int
    cost_per_unit: int
    amount: int

    def shares(self, threads: int) -> list[int]:
        """Units of each thread that takes part."""
        return [end - begin for begin, end in StepExecutor.shares(self.units, self.cost_per_unit, threads)]

    def busy(self, threads: int) -> float:
        return self.units / (threads * max(self.shares(threads)))


STEPS = {
    "1 sequence decodes": Step(1, 1),
    "8 sequences decode": Step(8, 8),
    "32 sequences decode": Step(32, 32),
    "a chunk of 2,048 tokens": Step(2048, 1),
}
RULES = {
    "as it is": Rule(),
    "row blocks of 16": Rule(row_block=16),
    "cost counts rows": Rule(per_row=True),
    "cost counts rows, row blocks of 16": Rule(row_block=16, per_row=True),
    "any work is worth a thread": Rule(least_work=False),
}
# Which of them a step is computed by: with one row, rows make no difference.
RULES_OF = {step: ["as it is"] for step in STEPS}
RULES_OF["1 sequence decodes"].append("any work is worth a thread")
RULES_OF["32 sequences decode"] = list(RULES)


def config_of(shape: dict[str, Any]) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps({"max_position_embeddings": 8192, **shape}), encoding="utf-8")
        return ModelConfig.from_pretrained(folder)


def bound_ops(config: ModelConfig) -> list[tuple[Op, BoundOp]]:
    """The operations of a step but attention, bound as the engine binds them, to weights without memory."""
    tensors = {
        name: np.broadcast_to(np.float32(0), shape) for name, shape in checkpoint_shapes(config).items()
    }
    pool = KVCachePool(1, 16, config.n_layer, config.kv_heads, config.dim_per_head, PRECISION.kv_element)
    native = StepExecutor(pool, ThreadPool(1), 1, 16)
    packed = PackedWeights(native, bind_weights(config, tensors), 16, 16)
    binder = OpBinder(config, PRECISION, native, 16, packed)
    operations = forward_ops(config, PRECISION.gemm_input)
    return [(op, binder.bind(op)) for op in operations if not isinstance(op, Attention)]


def works(operations: Iterable[tuple[Op, BoundOp]], step: Step, rule: Rule) -> list[Work]:
    """What a step has to do."""
    made = []
    for op, bound in operations:
        rows = step.samples if "samples" in (bound.domain, bound.options.get("over")) else step.rows
        units, cost = rows, bound.options["cost_per_unit"]
        if bound.domain == "tiles":
            row_block, panels = bound.options["row_block"], bound.options["panels"]
            if isinstance(op, Gemm):
                row_block = rule.row_block or row_block
                cost *= min(rows, row_block) if rule.per_row else 1
            units = panels * -(-rows // row_block)
        if isinstance(op, Gemm):
            weights = op.n_in * op.n_out * (2 if op.gated else 1)
            few = step.rows <= FEW_ROWS
            amount = weights * (WEIGHT_BYTES[PRECISION.gemm_weight("bf16")] if few else rows)
        else:
            amount = cost * units
        made.append(Work(bound.name, units, cost if rule.least_work else 0, amount))
    return made


def busy_of(step: Iterable[Work], threads: int) -> float:
    """Of all its operations, one after another."""
    step = list(step)
    return sum(work.amount for work in step) / sum(work.amount / work.busy(threads) for work in step)


def by_kind(step: Iterable[Work], threads: int) -> dict[str, Any]:
    """Its operations, layers together."""
    step, kinds = list(step), {}
    total = sum(work.amount for work in step)
    for work in step:
        kind = re.sub(r"^layers\.\d+\.", "", work.name)
        shares = work.shares(threads)
        row = kinds.setdefault(
            kind,
            {"units": work.units, "threads": len(shares), "largest": max(shares), "busy": work.busy(threads), "of_work": 0.0},
        )  # fmt: skip
        row["of_work"] += work.amount / total
    return {
        kind: {**row, "busy": round(row["busy"], 4), "of_work": round(row["of_work"], 5)}
        for kind, row in kinds.items()
    }


def computed(shape: dict[str, Any]) -> dict[str, Any]:
    """The results of one model, by step, rule and threads."""
    operations = bound_ops(config_of(shape))
    results: dict[str, Any] = {}
    for name, step in STEPS.items():
        results[name] = {}
        for rule in RULES_OF[name]:
            found = works(operations, step, RULES[rule])
            results[name][rule] = {
                "busy": {str(threads): round(busy_of(found, threads), 4) for threads in THREADS},
                "operations": by_kind(found, THREADS[-1]),
            }
    return results


def main() -> None:
    results = {
        "command": "python -m bench.partition",
        "commit": commit(),
        "machine": machine(),
        "precision": PRECISION.arithmetic,
        "models": {name: computed(shape) for name, shape in CHECKPOINTS.items()},
    }
    (RESULTS / "partition.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for model, steps in results["models"].items():
        for step, rules in steps.items():
            for rule, row in rules.items():
                print(model, "|", step, "|", rule, row["busy"])


if __name__ == "__main__":
    main()
