"""bfloat16 and int8 GEMMs: float64 within the error of their own sums, exact integers, the same bits for any m and split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.gemm_problem import NarrowProblem
from compiler.packed_call import call, elementwise, padded
from nanoserve.compiler import jit
from nanoserve.compiler.target import AVX2, Target, host
from nanoserve.compiler.vector_math import activate
from nanoserve.kernels import gemm, panels
from support.bfloat16 import from_bf16, to_bf16

SHAPES = [(1, 1), (2, 16), (3, 31), (33, 193), (64, 64), (70, 100), (128, 96)]
PLAIN = replace(host(), bf16_dot=False, int8_dot=False)  # this CPU as if it lacked the dot products
TARGETS = [host(), PLAIN, *([AVX2] if host().name in ("avx512", "avx2") else [])]
targets = pytest.mark.parametrize("target", TARGETS, ids=["host", "plain", "avx2"][: len(TARGETS)])
narrow = pytest.mark.parametrize("arithmetic", ["bf16", "int8"])


@targets
@narrow
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_a_sum_is_within_its_rounding_of_float64(arithmetic: str, k: int, n: int, target: Target) -> None:
    """A float32 chain of k products errs by at most k half-ulps of the sum of absolute values; int8 by its few scalings."""
    problem = NarrowProblem(arithmetic, 21, k, n, target=target, bias=True)
    exact, size = problem.sums()
    bound = (5 if arithmetic == "int8" else k + 2) * 2.0**-24 * 1.01 * size + 1e-37
    error = np.abs(problem.values(problem.run()) - exact)
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"


@targets
@pytest.mark.parametrize("k", [1, 4, 7, 130, 4096])
def test_int8_sums_are_the_integers(k: int, target: Target) -> None:
    """Scales of 1: y is the float32 of NumPy's int64 result, at the largest codes, too."""
    rng, m, n = np.random.default_rng(k), 11, 70
    codes = rng.integers(-127, 128, (n, k)).astype(np.float32)
    codes[:, 0] = 127  # a scale of exactly 1
    codes[3], codes[4] = 127, -127
    x = rng.integers(0, 256, (m, k)).astype(np.uint8)
    x[2], x[5] = 255, 0
    stored = np.zeros((m, padded(k)), np.uint8)
    stored[:, :k] = x
    weight = panels.pack_int8(codes, target)
    assert (weight.scale[:n] == 1).all()
    y = np.zeros((m, padded(n)), np.float32)
    spec = gemm.gemm_spec(k, n, padded(k), padded(n), x="u8", dtype="i8")
    units = -(-n // gemm.panel_width(n, target))
    call(
        spec, stored, np.ones(m, np.float32), weight.panels, weight.scale, weight.sums, y, m, 0, units,
        target=target,
    )  # fmt: skip
    exact = (x.astype(np.int64) - 128) @ codes.astype(np.int64).T
    assert y[:, :n].tobytes() == exact.astype(np.float32).tobytes()


@pytest.mark.parametrize("gated", [False, True])
def test_int8_has_the_same_bits_on_every_target(gated: bool) -> None:
    problems = [
        NarrowProblem("int8", 13, 70, 100, target=t, gated=gated, activation="silu", bias=True)
        for t in TARGETS
    ]
    results = [problem.run()[:, :100].tobytes() for problem in problems]
    assert results == results[:1] * len(results)


@pytest.mark.parametrize("arithmetic", ["f32", "bf16-weight", "bf16", "int8"])
@pytest.mark.parametrize("options", [{}, {"gated": True, "activation": "silu"}], ids=["plain", "gated"])
@pytest.mark.parametrize(("k", "n"), [(70, 100), (33, 64), (64, 512)])
def test_a_row_has_its_bits_whatever_m_and_its_place(
    arithmetic: str, options: dict[str, object], k: int, n: int
) -> None:
    whole = NarrowProblem(arithmetic, 135, k, n, bias=True, **options)  # type: ignore[arg-type]
    alone = np.concatenate([whole.run(m=1, first=row) for row in range(135)])[:, :n]
    for m in (*range(1, 71), 127, 128, 129, 135):
        first = 135 - m if m % 2 else 0
        assert whole.run(m=m, first=first)[:, :n].tobytes() == alone[first : first + m].tobytes(), m


@settings(max_examples=20)
@given(
    m=st.integers(1, 150), cuts=st.sets(st.integers(1, 12), max_size=5),
    arithmetic=st.sampled_from(["bf16", "int8"]), gated=st.booleans(),
)  # fmt: skip
def test_any_split_gives_the_same_bits(m: int, cuts: set[int], arithmetic: str, gated: bool) -> None:
    options = {"gated": True, "activation": "silu"} if gated else {}
    problem = NarrowProblem(arithmetic, m, 70, 193, **options)  # type: ignore[arg-type]
    edges = sorted({0, problem.units} | {cut for cut in cuts if cut < problem.units})
    assert problem.run(*edges).tobytes() == problem.run().tobytes()


@pytest.mark.parametrize("arithmetic", ["f32", "bf16-weight", "bf16", "int8"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu_erf"])
@pytest.mark.parametrize("bias", [False, True])
def test_gated_has_the_bits_of_its_two_halves(arithmetic: str, activation: str, bias: bool) -> None:
    """act(gate) * up of the unfused product, by the same vector function."""
    m, k, n = 19, 66, 96
    fused = NarrowProblem(arithmetic, m, k, n, gated=True, activation=activation, bias=bias)
    apart = NarrowProblem(arithmetic, m, k, 2 * n, bias=bias)
    both = apart.run()
    gate = elementwise(
        f"gate_{activation}", lambda x: activate(activation, x), both[:, :n].reshape(-1)
    ).reshape(m, n)
    assert fused.run()[:, :n].tobytes() == (gate * both[:, n : 2 * n]).tobytes()
    np.testing.assert_allclose(fused.values(fused.run()), fused.exact(), atol=1e-4, rtol=1e-4)


@targets
@narrow
def test_bf16_output_is_the_float32_one_rounded(arithmetic: str, target: Target) -> None:
    for options in ({}, {"gated": True, "activation": "silu"}):
        wide, small = (
            NarrowProblem(arithmetic, 9, 70, 100, target=target, y=y, **options)  # type: ignore[arg-type]
            for y in ("f32", "bf16")
        )
        assert small.run()[:, :100].tobytes() == to_bf16(wide.run()[:, :100]).tobytes()


def test_narrow_rounds_to_nearest_even_and_keeps_nan() -> None:
    """Ties both ways, subnormals, overflow to infinity, NaNs whose payload is all in the bits that go."""

    def rounded(v):  # type: ignore[no-untyped-def]
        from nanoserve.compiler.builder import narrow, widen

        return widen(narrow(v, "bf16"))

    bits = np.array(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x00008001, 0x80018000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800001, 0xFFFFFFFF,
         0x7F800000, 0xFF800000, 0, 0x80000000, 0x3F800000, 0x7F7F0000, 0x3F7FFFFF], np.uint32,
    )  # fmt: skip
    got = elementwise("rounded", rounded, bits.view(np.float32))
    finite = (bits & 0x7FFFFFFF) <= 0x7F800000
    assert np.isnan(got[~finite]).all()
    assert (
        got.view(np.uint32)[finite] == from_bf16(to_bf16(bits.view(np.float32)[finite])).view(np.uint32)
    ).all()


@narrow
def test_columns_of_x_beyond_k_do_not_matter(arithmetic: str) -> None:
    """NaN bits there, in a pair with the last k."""
    problem = NarrowProblem(arithmetic, 9, 33, 40)
    before = problem.run()
    assert np.isfinite(before[:, :40]).all()
    problem.operands[0][:, 33:] = 1
    assert problem.run().tobytes() == before.tobytes()


def test_a_nan_scale_stays_in_its_row() -> None:
    problem = NarrowProblem("int8", 9, 64, 40, activation="silu")
    problem.operands[1][4] = np.nan
    bad = np.isnan(problem.run()[:, :40])
    assert bad[4].all()
    assert not np.delete(bad, 4, axis=0).any()


def unpacked(panel: np.ndarray, n: int, k: int) -> np.ndarray:
    """[panels][depth][NR][group] -> [n][k]; the rest must be zero."""
    flat = panel.transpose(0, 2, 1, 3).reshape(panel.shape[0] * panel.shape[2], -1)
    assert not flat[n:].any()
    assert not flat[:, k:].any()
    return flat[:n, :k]


def test_int8_codes_are_the_nearest() -> None:
    rng, n, k = np.random.default_rng(0), 100, 37
    weight = rng.standard_normal((n, k)).astype(np.float32)
    packed = panels.pack_int8(weight)
    codes, scale = unpacked(packed.panels, n, k), packed.scale[:n]
    assert (scale == (np.abs(weight).max(axis=1) / np.float32(127))).all()
    assert not packed.scale[n:].any()
    assert (np.abs(codes).max(axis=1) == 127).all()
    assert (np.abs(codes * scale[:, None] - weight) <= scale[:, None] * 0.5001).all()
    assert (packed.sums[:n] == codes.sum(axis=1, dtype=np.int32)).all()
    assert packed.sums.dtype == np.int32
    assert packed.nbytes == packed.panels.size + 4 * (packed.scale.size + packed.sums.size)


def test_int8_codes_of_odd_channels() -> None:
    """All zero; too small for a scale; one NaN; one infinity. Neighbours are not touched."""
    weight = np.ones((8, 20), np.float32)
    weight[1] = 0
    weight[2] = 1e-38
    weight[3, 7] = np.nan
    weight[4, 7] = -np.inf
    packed = panels.pack_int8(weight)
    assert packed.scale[[1, 2]].tolist() == [0, 0]
    assert np.isnan(packed.scale[[3, 4]]).all()
    assert not unpacked(packed.panels, 8, 20)[1:3].any()
    assert (unpacked(packed.panels, 8, 20)[[0, 5, 6, 7]] == 127).all()
    assert packed.sums[:8].tolist()[5:] == [127 * 20] * 3


@pytest.mark.parametrize("n", [5, 64, 100, 1000])
def test_gated_panels_alternate(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "_BLOCK_BYTES", 300 * 7 * 4)
    weight = np.random.default_rng(0).standard_normal((2 * n, 7)).astype(np.float32)
    packed, (gate, up) = panels.pack(weight, gated=True), (panels.pack(weight[:n]), panels.pack(weight[n:]))
    assert packed[0::2].tobytes() == gate.tobytes()
    assert packed[1::2].tobytes() == up.tobytes()
    width, bias = gate.shape[2], panels.pack_bias(weight[:, 0], gated=True).reshape(-1, 2, gate.shape[2])
    for part, half in enumerate((weight[:n, 0], weight[n:, 0])):
        assert bias[:, part].tobytes() == panels.pack_bias(half).tobytes()
    assert bias.size == packed.shape[0] * width
    quantised = panels.pack_int8(weight, gated=True)
    assert quantised.panels[1::2].tobytes() == panels.pack_int8(weight[n:]).panels.tobytes()
    with pytest.raises(ValueError, match="7 rows"):
        panels.pack(weight[:7], gated=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"x": "f64"}, "x 'f64' must be one of f32, bf16, u8"),
        ({"x": "u8", "dtype": "bf16"}, "dtype 'bf16' with x 'u8' must be one of i8"),
        ({"x": "bf16", "dtype": "f32"}, "with x 'bf16'"),
        ({"dtype": "i8"}, "dtype 'i8' with x 'f32'"),
        ({"y": "f16"}, "y 'f16'"),
        ({"x": "bf16", "dtype": "bf16", "ldx": 81}, "rows of 81"),
        ({"x": "u8", "dtype": "i8", "ldx": 82}, "rows of 82"),
        ({"x": "u8", "dtype": "i8", "ldx": 1 << 17, "n_in": 66312}, "at most 66311"),
        ({"gated": True}, "gated needs an activation"),
        ({"gated": True, "activation": "silu", "residual": True}, "excludes residual"),
    ],
)
def test_refusals(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gemm.gemm_spec(**{"n_in": 70, "n_out": 100, "ldx": 80, "ldy": 144, **options})  # type: ignore[arg-type]


NEON = Target(name="neon", lanes=4, registers=32, digest="test")


@pytest.mark.parametrize("arithmetic", ["bf16", "int8"])
@pytest.mark.parametrize("target", [NEON, AVX2], ids=["neon", "avx2"])
def test_targets_without_dot_products_get_none(arithmetic: str, target: Target) -> None:
    """Down to LLVM's dialect: no intrinsic of x86 but where the CPU has it."""
    from nanoserve.compiler.lowering import lower

    spec = NarrowProblem(arithmetic, 1, 64, 96, y="bf16", gated=True, activation="silu").spec
    texts = []
    for cpu in (target, host()):
        module = jit.build_module(lambda cpu=cpu: spec.build(cpu))
        with jit.context():
            lower(module, cpu)
        texts.append(str(module))
    assert "llvm.x86" not in texts[0]
    assert ("llvm.x86" in texts[1]) == (host().bf16_dot if arithmetic == "bf16" else host().int8_dot)
