"""Specifications of attention over pages; the kernels are in paged_attention_triton.py.

Rows that attend come as spans of at most `chunk_rows` for `attend` (src/cuda_inputs.h's AttentionSpan). One row of a sequence may
come as pieces instead, one per SEGMENT keys, for `split` and `merge` (Piece, Decode). Whichever computes a row, its bits are the
same.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nanoserve.compiler.gpu.chip import WARP, Chip
from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, Extent, GpuKernelSpec, pointer
from nanoserve.compiler.gpu.triton_kernel import SCRATCH, TritonSource
from nanoserve.kernels.cuda.layout import check_stride, pages

TABLE_TOKENS = 64  # the flat block table is padded to a multiple
SEGMENT = 512  # keys whose results are merged; part of every row's bits
_LEAST_ROWS = 16  # of a tile: the height of a matrix instruction
DTYPES = ("f32", "bf16")


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """What the kernels of a layer depend on.

    Args:
        dtype: of keys and values. narrow: products of bfloat16, which needs keys and values of it; else of float32.
        out: "f32" or "bf16".
        ld_q, ld_out: strides of the rows of queries (float32) and of the result.

    Raises:
        ValueError: naming what does not fit.
    """

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    ld_q: int
    ld_out: int
    dtype: str = "f32"
    narrow: bool = False
    out: str = "f32"
    scale: float = 1.0
    softcap: float = 0.0
    window: int = 0

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"attention: heads={self.heads} must be a multiple of kv_heads={self.kv_heads}, head_dim={self.head_dim} positive"
            )
        if self.page_size < 1 or TABLE_TOKENS % self.page_size:
            raise ValueError(f"attention: page_size={self.page_size} must divide {TABLE_TOKENS}")
        for name, value, known in (("dtype", self.dtype, DTYPES), ("out", self.out, DTYPES)):
            if value not in known:
                raise ValueError(f"attention: {name} {value!r} must be one of {', '.join(known)}")
        if self.narrow and self.dtype != "bf16":
            raise ValueError("attention: narrow products need bf16 keys and values")
        if self.window < 0 or not 0 <= self.softcap < math.inf or not 0 < self.scale < math.inf:
            raise ValueError(
                f"attention: window={self.window}, softcap={self.softcap} and scale={self.scale} must be finite and not negative"
            )
        columns = self.heads * self.head_dim
        check_stride("attention", columns, ld_q=self.ld_q, ld_out=self.ld_out)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def chunk_rows(self) -> int:
        """Most rows of a span for `attend`."""
        return self._tile("attend") // self.group

    def _tile(self, part: str) -> int:
        """Rows of a tile: a row of the step is `group` of them."""
        times = 1
        if part == "attend" and self.narrow:
            # What registers hold. A tile no wider than high has its warps one below the other, so that none multiplies what
            # another one does, too.
            times = 4 if self.dim_pad <= 64 else {128: 8, 256: 2}.get(self.dim_pad, 1)
        return max(times * _LEAST_ROWS, 1 << (self.group - 1).bit_length())

    def _warps(self, part: str) -> int:
        """How many share a tile; wide heads need their registers."""
        if part == "merge":
            return 1
        if not self.narrow:
            return 8 if self.dim_pad >= 64 else 4
        if part == "attend":
            return 8 if self._tile(part) > 64 else 4
        return 4 if self.dim_pad > 64 else 2

    def stages(self, part: str) -> int:
        """For Triton, of the loop over blocks: page ids take some, keys and values what is left. Of 5, two blocks ahead of the products."""
        return 5 if self.narrow else 2

    def constants(self, part: str) -> dict[str, Any]:
        """Of the Triton function."""
        if part == "merge":
            return {
                "LD_OUT": self.ld_out, "HEADS": self.heads, "DIM": self.head_dim, "DIM_PAD": self.dim_pad, "WINDOW": self.window, "SEGMENT": SEGMENT,
            }  # fmt: skip
        strides = {"LD_Q": self.ld_q, **({"LD_OUT": self.ld_out} if part == "attend" else {})}
        return strides | {
            "SCALE": self.scale, "SOFTCAP": self.softcap, "WINDOW": self.window, "KV_HEADS": self.kv_heads, "GROUP": self.group,
            "DIM": self.head_dim, "DIM_PAD": self.dim_pad, "PAGE": self.page_size, "ROWS": self._tile(part), "BLOCK": self.block,
            "SEGMENT": SEGMENT, "NARROW": self.narrow,
        }  # fmt: skip

    @property
    def block(self) -> int:
        """Keys that are multiplied at once, part of every row's bits: as many as registers hold beside the sums."""
        if not self.narrow:
            return 16
        return max(16, min(64, 4096 // self.dim_pad))

    @property
    def dim_pad(self) -> int:
        return max(16, 1 << (self.head_dim - 1).bit_length())

    def _inputs(self) -> dict[str, str]:
        i32, kv = (
            pointer(UNBOUNDED, element="i32"),
            pages(self.kv_heads, self.page_size, self.head_dim, self.dtype),
        )
        return {"Q": pointer(UNBOUNDED, self.ld_q), "K": kv, "V": kv, "table": i32}

    def _spec(self, part: str, arguments: dict[str, str], grid: tuple[Extent, ...]) -> GpuKernelSpec:
        return GpuKernelSpec.make(
            "paged_attention",
            {**arguments, **SCRATCH},
            grid,
            self._warps(part) * WARP,
            part=part,
            **asdict(self),
        )

    def attend_spec(self) -> GpuKernelSpec:
        """Args: Q, K, V, table, spans, out, num_spans, and two null pointers."""
        out = pointer(UNBOUNDED, self.ld_out, element=self.out)
        arguments = {
            **self._inputs(),
            "spans": pointer(UNBOUNDED, element="i32"),
            "out": out,
            "num_spans": SCALAR,
        }
        return self._spec("attend", arguments, (Extent("num_spans"), Extent(times=self.kv_heads)))

    def split_spec(self) -> GpuKernelSpec:
        """Args: Q, K, V, table, pieces, parts, sums, num_pieces, and two null pointers.

        parts: float32 [pieces][heads][head_dim]; sums: [pieces][heads][2].
        """
        arguments = {
            **self._inputs(), "pieces": pointer(UNBOUNDED, element="i32"), "parts": pointer(UNBOUNDED), "sums": pointer(UNBOUNDED),
            "num_pieces": SCALAR,
        }  # fmt: skip
        return self._spec("split", arguments, (Extent("num_pieces"), Extent(times=self.kv_heads)))

    def merge_spec(self) -> GpuKernelSpec:
        """Args: parts, sums, decodes, out, num_decodes, and two null pointers."""
        arguments = {
            "parts": pointer(UNBOUNDED), "sums": pointer(UNBOUNDED), "decodes": pointer(UNBOUNDED, element="i32"),
            "out": pointer(UNBOUNDED, self.ld_out, element=self.out), "num_decodes": SCALAR,
        }  # fmt: skip
        return self._spec("merge", arguments, (Extent("num_decodes"), Extent(times=self.heads)))


def triton_source(spec: GpuKernelSpec, chip: Chip, *, part: str, **fields: Any) -> TritonSource:
    """What library.py compiles."""
    from nanoserve.kernels.cuda import paged_attention_triton as kernels

    form = AttentionForm(**fields)
    function = {"attend": kernels.attend, "split": kernels.split, "merge": kernels.merge}[part]
    return TritonSource(function, form.constants(part), form.stages(part))
