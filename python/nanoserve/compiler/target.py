"""What the CPU offers, as far as generated code depends on it.

Kernels are written in vectors of 16 floats everywhere; LLVM splits them where registers are narrower. A target chooses how
many such vectors a register tile may use, and results do not depend on that: same order, same fused operations. It also says
which dot products of narrow types are one instruction; that of bfloat16 pairs rounds in its own way (vector_math.py).
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Target:
    """A CPU to generate code for.

    Args:
        name: readable, for logs.
        lanes: floats in a vector register.
        registers: vector registers.
        digest: identifies everything LLVM may use; part of cache keys.
        cpu: LLVM's name of the CPU, None for "this one, with all it has".
        bf16_dot: AVX512-BF16's vdpbf16ps.
        int8_dot: AVX512-VNNI's vpdpbusd.
    """

    name: str
    lanes: int
    registers: int
    digest: str
    cpu: str | None = None
    bf16_dot: bool = False
    int8_dot: bool = False

    @property
    def budget(self) -> int:
        """How many vectors of 16 floats fit in the registers at once."""
        return self.registers * self.lanes // 16


# The baseline of the last decade's x86: a second target on any x86 host, so that its code paths can be tested there.
AVX2 = Target(name="avx2", lanes=8, registers=16, digest="x86-64-v3", cpu="x86-64-v3")


def _cpu_description() -> tuple[str, frozenset[str]]:
    """(model, features) from the operating system; empty where it tells nothing."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields: dict[str, str] = {}
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if not line.strip():
                break  # the first core speaks for all
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
        # LLVM picks its scheduling model by family and model number, the name string is cosmetic.
        model = "/".join(fields.get(key, "") for key in ("vendor_id", "cpu family", "model", "CPU part"))
        return model, frozenset((fields.get("flags") or fields.get("Features") or "").split())
    try:
        names = ("machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features")
        answer = [
            subprocess.run(
                ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5
            ).stdout.strip()
            for name in names
        ]
    except (OSError, subprocess.SubprocessError):
        return platform.processor(), frozenset()
    return answer[0], frozenset(f"{answer[1]} {answer[2]}".lower().split())


@cache
def host() -> Target:
    """The CPU this process runs on, or what NANOSERVE_TARGET says it is: "avx2" leaves everything newer unused.

    Raises:
        ValueError: a target that is not known.
    """
    named = os.environ.get("NANOSERVE_TARGET")
    if named is not None:
        if named != AVX2.name:
            raise ValueError(f"NANOSERVE_TARGET: {named!r} must be {AVX2.name}, or not be set")
        return AVX2
    model, features = _cpu_description()
    if "avx512f" in features:
        name, lanes, registers = "avx512", 16, 32
    elif "avx2" in features and "fma" in features:
        name, lanes, registers = "avx2", 8, 16
    elif platform.machine() in ("arm64", "aarch64"):
        name, lanes, registers = "neon", 4, 32
    else:
        name, lanes, registers = "generic", 4, 16
    described = "\n".join([platform.machine(), model, *sorted(features)])
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    wide = name == "avx512"
    return Target(
        name=name, lanes=lanes, registers=registers, digest=digest,
        bf16_dot=wide and "avx512_bf16" in features, int8_dot=wide and "avx512_vnni" in features,
    )  # fmt: skip
