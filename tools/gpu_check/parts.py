"""The parts of the check, in order of importance, with the seconds each may take of a run of nine minutes.

Together they are more than that: most need less, and what there is no time for is left out by name.

A part is a module beside this file with

    run(gpu, record)               checks and measures
    specs(chip, tiny, folder)      kernels it launches, to be prepared; where it has any of its own
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Part:
    """A part by the name of its module."""

    name: str
    seconds: float
    what: str

    @property
    def module(self) -> Any:
        return importlib.import_module(f"tools.gpu_check.{self.name}")


PARTS = (
    Part("environment", 45, "the device, and every kernel loads"),
    Part("numerics", 90, "every kind of kernel against a reference, and a row's bits"),
    Part("end_to_end", 90, "whole models: tokens, and the same bits whatever else runs"),
    Part("ceilings", 30, "what the device can do: memory, products, launches"),
    Part("engine_speed", 150, "decode and prefill of real shapes, a mixed workload"),
    Part("kernel_speed", 100, "products and attention against the ceilings and PyTorch"),
    Part("peers", 80, "the mixed workload by other engines"),
    Part("switches", 45, "one arithmetic of the products against another"),
    Part("sanitizer", 60, "memory, races and barriers under compute-sanitizer"),
)
BY_NAME = {part.name: part for part in PARTS}
