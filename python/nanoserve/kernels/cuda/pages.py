"""Copies whole pages of keys and values in every layer: what copy-on-write does. Page targets[i] = page sources[i].

The pool's keys and values are one array of 16-byte lines: layer l's page p begins at line l * layer_lines + p *
page_lines. A block takes a page of a layer.
"""

from __future__ import annotations

from typing import Any

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, Extent, GpuKernelSpec, pointer

LINE_BYTES = 16
_THREADS = 256


def copy_pages_spec(page_bytes: int) -> GpuKernelSpec:
    """Args: pool, sources[count], targets[count] of i32, count, layers, layer_lines. No target is a source.

    `page_bytes`: of a layer's page, keys or values or both if they lie together.
    """
    if page_bytes < LINE_BYTES or page_bytes % LINE_BYTES:
        raise ValueError(f"pages: page_bytes={page_bytes} must be a positive multiple of {LINE_BYTES}")
    arguments = {
        "pool": pointer(UNBOUNDED, 4, element="i32"), "sources": pointer(UNBOUNDED, element="i32"),
        "targets": pointer(UNBOUNDED, element="i32"), "count": SCALAR, "layers": SCALAR, "layer_lines": SCALAR,
    }  # fmt: skip
    grid = (Extent("count"), Extent("layers"))
    return GpuKernelSpec.make("pages", arguments, grid, _THREADS, lines=page_bytes // LINE_BYTES)


def build(spec: GpuKernelSpec, chip: Chip, *, lines: int) -> None:
    from nanoserve.compiler.builder import index
    from nanoserve.compiler.control import loop
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.threads import block_id, thread_id

    @device_kernel(spec)
    def _(pool: Any, sources: Any, targets: Any, count: Any, layers: Any, layer_lines: Any) -> None:
        entry, layer = block_id("x"), block_id("y") * layer_lines
        source = index(sources[entry]) * lines + layer
        target = index(targets[entry]) * lines + layer

        @loop(thread_id(), lines, _THREADS)
        def _(line: Any) -> None:
            pool.store(pool.load(source + line, 0, width=4), target + line, 0)
