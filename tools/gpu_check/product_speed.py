"""One product of a model's: whether it is right, by PyTorch in float32, and how long it takes by one arithmetic."""

from __future__ import annotations

from typing import Any

from tools.gpu_check.ceilings import Ceilings
from tools.gpu_check.device_rows import Rows, apart, copies, random_rows, synchronize, tensor_of
from tools.gpu_check.engines import Arithmetic, arithmetics
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.record import Record
from tools.gpu_check.shapes import Product

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.kernels.cuda.gemm import GemmPlan, gemm_plan

ROWS = (1, 8, 24, 32, 48, 64, 96, 128, 192, 256, 512, 2048)
TORCH = "torch, no epilogue"
_MOST_HEAD_ROWS = 256  # a step has few rows of logits
_NEAR = 2e-2  # bfloat16 results, with room; one wrong element of a row is further off


def plan_of(made: Product, chip: Chip, one: Arithmetic) -> GemmPlan:
    """The kernels that an executor takes."""
    op = made.op
    return gemm_plan(
        op.n_in, op.n_out, made.ldx, made.ldy, chip, x="bf16", dtype="bf16", y=made.y, bias=op.bias is not None,
        activation=op.activation, residual=op.residual, scale=op.scale, softcap=op.softcap, gated=op.gated, **(one.plan or {}),
    )  # fmt: skip


def _specs_of(made: Product, chip: Chip, by: str, rows: list[int]) -> dict[int, GpuKernelSpec]:
    """Kernels by number of rows, of wgmma those that are not mma's; none by PyTorch."""
    if by == TORCH:
        return {}
    plan = plan_of(made, chip, arithmetics(chip)[by])
    found = {m: plan.spec_for(m) for m in rows}
    return {m: spec for m, spec in found.items() if by != "wgmma" or spec.kind == "gemm_tma"}


def rows_of(made: Product, tiny: bool) -> list[int]:
    return [m for m in ((1, 17, 70) if tiny else ROWS) if made.name != "head" or m <= _MOST_HEAD_ROWS]


class ProductOperands:
    """What a product multiplies, on the device: x, as many copies of the weight as no cache holds, y."""

    def __init__(self, gpu: Gpu, made: Product) -> None:
        self.gpu, self.made, op = gpu, made, made.op
        self.count = copies(made.weight_bytes, gpu.tiny)
        self.rows = rows_of(made, gpu.tiny)
        width = -(-op.n_in // 8) * 8
        self.w = random_rows(gpu, self.count, made.rows, width, scale=0.02)
        size = 2 * made.rows * width
        self.each = [Rows(self.w.address + size * i, size, self.w.held) for i in range(self.count)]
        self.x = random_rows(gpu, self.rows[-1], made.ldx)
        self.y = random_rows(gpu, self.rows[-1], made.ldy, dtype=made.y)
        self.bias = [random_rows(gpu, made.rows, dtype="f32")] if op.bias else []
        self.launches = max(self.count, 2 if gpu.tiny else 4)

    def put(self, spec: GpuKernelSpec, m: int, i: int = 0) -> None:
        self.gpu.put(spec, [self.x, self.each[i % self.count], *self.bias, self.y, m])

    def error(self, spec: GpuKernelSpec, m: int) -> float:
        """Of what is launched, against PyTorch's."""
        before = tensor_of(self.gpu, self.y)[:m, : self.made.op.n_out].float().clone()
        synchronize(self.gpu)
        self.put(spec, m)
        found = tensor_of(self.gpu, self.y)[:m, : self.made.op.n_out]
        return apart(found, self._expected(m, before))

    def _expected(self, m: int, y: Any) -> Any:
        import torch

        op = self.made.op
        x, w = tensor_of(self.gpu, self.x), tensor_of(self.gpu, self.w)
        sums = x[:m, : op.n_in].float() @ w[0, :, : op.n_in].float().T
        for bias in self.bias:
            sums = sums + tensor_of(self.gpu, bias)
        functions = torch.nn.functional
        act = {
            None: lambda v: v,
            "silu": functions.silu,
            "gelu_tanh": lambda v: functions.gelu(v, approximate="tanh"),
            "gelu_erf": functions.gelu,
        }[op.activation]
        if op.gated:
            return act(sums[:, : op.n_out]) * sums[:, op.n_out :]
        value = act(sums) * op.scale
        if op.softcap:
            value = torch.tanh(value / op.softcap) * op.softcap
        return value + y if op.residual else value

    def seconds(self, spec: GpuKernelSpec, m: int) -> float:
        return self.gpu.seconds(lambda i: self.put(spec, m, i), self.launches)

    def torch_seconds(self, m: int) -> float:
        linear, left = self.gpu.torch.nn.functional.linear, self.x.held[:m, : self.made.op.n_in]
        return self.gpu.torch_seconds(
            lambda i: linear(left, self.w.held[i % self.count, :, : self.made.op.n_in]), self.launches
        )


def measure(gpu: Gpu, record: Record, model: str, made: Product, by: str, ceilings: Ceilings | None) -> None:
    """By one of our own arithmetics, or by TORCH."""
    operands = ProductOperands(gpu, made)
    specs = _specs_of(made, gpu.chip, by, operands.rows)
    if by != TORCH and not specs:
        return
    ends: dict[int, GpuKernelSpec] = {}  # each kernel with the fewest and the most rows it is for
    for spec in dict.fromkeys(specs.values()):
        mine = [m for m, one in specs.items() if one == spec]
        ends |= {mine[0]: spec, mine[-1]: spec}
    errors = {m: operands.error(spec, m) for m, spec in sorted(ends.items())}
    if errors:
        worst = max(errors, key=errors.__getitem__)
        record.check(
            f"{made.name} of {model} by {by}: PyTorch's, nearly", errors[worst] < _NEAR,
            f"error {errors[worst]:.1e} with {worst} rows, at most {_NEAR:.0e}",
        )  # fmt: skip
    for m in specs or operands.rows:
        if not record.has_time(f"{made.name} of {model} by {by} from {m} rows on", 0.5):
            return
        seconds = operands.seconds(specs[m], m) if specs else operands.torch_seconds(m)
        # A library's product writes bfloat16 and reads nothing of y.
        size = made.bytes(m) if specs else made.weight_bytes + 2 * m * (made.op.n_in + made.rows)
        row: dict[str, Any] = {"us": seconds * 1e6}
        if ceilings is not None:
            row["of_bandwidth"] = size / seconds / ceilings.bandwidth
            row["of_products"] = made.flops(m) / seconds / ceilings.products
        record.row("products", model=model, product=made.name, k=made.op.n_in, n=made.rows, m=m, by=by, **row)
