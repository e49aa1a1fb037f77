"""What a GPU has, as far as generated code depends on it.

A chip is named as NVIDIA's tools name it, "sm_80" (A100) or "sm_90" (H100, H200). The "a" of "sm_90a" stands for
instructions of that chip alone: such code runs on compute capability 9.0 and no other; without it, it runs on later
ones of the same major version too.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32  # threads that run in step


@dataclass(frozen=True, slots=True)
class Chip:
    """A GPU to generate code for.

    Args:
        name: of the architecture, for LLVM and ptxas.
        capability: compute capability, major * 10 + minor.
        shared_bytes: of shared memory that one block may have, the opt-in limit.
        wgmma: warpgroup matrix instructions.
    """

    name: str
    capability: int
    shared_bytes: int
    wgmma: bool = False

    @property
    def starts_early(self) -> bool:
        """Whether a kernel can begin before the one in front of it ends (early_start.py)."""
        return self.capability >= 90

    def runs_on(self, capability: int) -> bool:
        """Whether its code runs on a GPU of this compute capability."""
        if self.name.endswith("a"):
            return capability == self.capability
        return capability // 10 == self.capability // 10 and capability >= self.capability


_KIB = 1024
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", 80, 163 * _KIB),
        Chip("sm_86", 86, 99 * _KIB),
        Chip("sm_89", 89, 99 * _KIB),
        Chip("sm_90", 90, 227 * _KIB),
        Chip("sm_90a", 90, 227 * _KIB, wgmma=True),
    )
}
# What every chip above has, at most: registers of a thread, threads of a block, and bytes of shared memory that is
# static, or dynamic and was not asked for.
MAX_REGISTERS, MAX_THREADS, DEFAULT_SHARED_BYTES = 255, 1024, 48 * _KIB


def parse_chip(name: str) -> Chip:
    """The chip of that name.

    Raises:
        ValueError: it is not known.
    """
    if name not in CHIPS:
        raise ValueError(f"chip: {name!r} must be one of {', '.join(CHIPS)}")
    return CHIPS[name]
