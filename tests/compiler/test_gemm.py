"""GEMM against float64 over odd shapes; the same bits for any m, split and instruction set; no row beyond m touched."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.packed_call import act64, call, call_address, padded
from nanoserve.compiler.target import AVX2, Target, host
from nanoserve.kernels import gemm, panels
from nanoserve.kernels.library import load_kernels

SHAPES = [(1, 1), (3, 31), (70, 100), (64, 64), (128, 384), (96, 48), (33, 193), (20, 16), (60, 33)]


class Problem:
    """y = act(x w^T + b) (+ y) with its operands in the kernel's layout."""

    def __init__(
        self, m: int, k: int, n: int, seed: int = 0, target: Target | None = None, **options: object
    ) -> None:
        rng = np.random.default_rng(seed)
        self.m, self.k, self.n, self.options, self.target = m, k, n, options, target
        self.weight = (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
        self.bias = rng.standard_normal(n).astype(np.float32)
        self.x = np.full((m, padded(k)), np.nan, dtype=np.float32)  # padding columns must not be read
        self.x[:, :k] = rng.standard_normal((m, k))  # after the weight: the same rows whatever m is
        self.y0 = rng.standard_normal((m + 2, padded(n))).astype(np.float32)
        self.width = gemm.panel_width(n, target)
        self.blocks = -(-m // gemm.ROW_BLOCK)
        self.units = -(-n // self.width) * self.blocks

    def run(self, *edges: int) -> np.ndarray:
        """y after the units between successive edges; all of them by default."""
        spec = gemm.gemm_spec(self.k, self.n, padded(self.k), padded(self.n), **self.options)  # type: ignore[arg-type]
        address = load_kernels([spec], target=self.target)[spec]
        y = self.y0.copy()
        args = [self.x, panels.pack(self.weight, self.target)]
        if self.options.get("bias"):
            args.append(panels.pack_bias(self.bias, self.target))
        bounds = edges or (0, self.units)
        for begin, end in pairwise(bounds):
            call_address(address, *args, y, self.m, begin, end)
        return y

    def exact(self) -> np.ndarray:
        y = self.x[:, : self.k].astype(np.float64) @ self.weight.T.astype(np.float64)
        if self.options.get("bias"):
            y += self.bias
        y = act64(self.options.get("activation"), y) * self.options.get("scale", 1.0)  # type: ignore[arg-type]
        if cap := self.options.get("softcap"):
            y = cap * np.tanh(y / cap)
        return y + self.y0[: self.m, : self.n] if self.options.get("residual") else y

    def check(self, y: np.ndarray) -> None:
        np.testing.assert_allclose(y[: self.m, : self.n], self.exact(), atol=2e-5, rtol=2e-5)
        assert y[self.m :].tobytes() == self.y0[self.m :].tobytes(), "a row beyond m was written"
        room = -(-self.n // self.width) * self.width
        assert y[:, room:].tobytes() == self.y0[:, room:].tobytes(), "a column beyond the padding was written"


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_every_m_matches_float64_and_its_own_row_alone(k: int, n: int) -> None:
    """m from 1 to beyond two row blocks; each row has the bits it has with m = 1."""
    whole = Problem(140, k, n)
    alone = np.empty((140, n), dtype=np.float32)
    for row in range(140):
        one = Problem(1, k, n)
        one.x = whole.x[row : row + 1].copy()
        alone[row] = one.run()[0, :n]
    for m in (*range(1, 20), 31, 63, 64, 65, 66, 71, 100, 128, 129, 135, 140):
        problem = Problem(m, k, n)
        problem.x = whole.x[:m].copy()
        y = problem.run()
        problem.check(y)
        assert y[:m, :n].tobytes() == alone[:m].tobytes(), f"m={m}"


@pytest.mark.parametrize("activation", gemm.ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_epilogues(activation: str | None, bias: bool, residual: bool) -> None:
    problem = Problem(13, 40, 70, activation=activation, bias=bias, residual=residual)
    problem.check(problem.run())


@pytest.mark.parametrize("scale", [1.0, -0.3, 12.0])
@pytest.mark.parametrize("softcap", [0.0, 2.5])
@pytest.mark.parametrize("residual", [False, True])
def test_scaled_and_capped_epilogues(scale: float, softcap: float, residual: bool) -> None:
    """In this order: activation, scale, cap, residual."""
    options = {"scale": scale, "softcap": softcap, "residual": residual, "activation": "silu", "bias": True}
    problem = Problem(13, 40, 70, **options)
    problem.check(problem.run())
    assert problem.run(0, 1, problem.units).tobytes() == problem.run().tobytes()


def test_logits_beyond_the_cap_stay_below_it() -> None:
    problem = Problem(5, 40, 70, softcap=30.0)
    problem.x[:, :40] *= 1e4
    y = problem.run()[:5, :70]
    assert np.abs(y).max() <= 30
    assert (np.abs(y) > 29.9).mean() > 0.9
    problem.x[2, 3] = np.nan
    assert np.isnan(problem.run()[2, :70]).all()


@settings(max_examples=30)
@given(m=st.integers(1, 150), cuts=st.sets(st.integers(1, 40), max_size=5), residual=st.booleans())
def test_any_split_gives_the_same_bits(m: int, cuts: set[int], residual: bool) -> None:
    problem = Problem(m, 70, 193, residual=residual, bias=True, activation="gelu_tanh")
    edges = sorted({0, problem.units} | {cut for cut in cuts if cut < problem.units})
    assert problem.run(*edges).tobytes() == problem.run().tobytes()


def test_pieces_of_k_give_the_bits_of_one_chain() -> None:
    """Tiles that share a panel take it in pieces; the accumulators are carried, so the chain is the same."""
    m, k, n = 20, 900, 40
    assert 2 * gemm._PIECE_BYTES // (4 * gemm.panel_width(n)) < k
    problem = Problem(m, k, n)
    y = problem.run()
    problem.check(y)
    chain = np.zeros((m, n), dtype=np.float32)
    x, w = problem.x[:m].astype(np.float64), problem.weight.astype(np.float64)
    for kk in range(
        k
    ):  # float64 holds the product exactly; the sum is rounded twice, which is once but for rare ties
        chain = (x[:, kk : kk + 1] * w[:, kk] + chain).astype(np.float32)
    assert (chain == y[:m, :n]).mean() > 0.999


@pytest.mark.skipif(
    host().name not in ("avx512", "avx2"), reason="the second x86 target needs an x86 CPU with AVX2"
)
@pytest.mark.parametrize(("k", "n"), [(70, 100), (96, 48), (9000, 20)])
def test_the_smaller_instruction_set_gives_the_same_bits(k: int, n: int) -> None:
    for m in (1, 2, 3, 4, 5, 6, 7, 13, 61, 62, 63, 64, 67):
        options = {"bias": True, "activation": "gelu_erf"}
        wide, narrow = Problem(m, k, n, **options), Problem(m, k, n, target=AVX2, **options)  # type: ignore[arg-type]
        assert narrow.width == 16
        y = narrow.run()
        narrow.check(y)
        assert y[:m, :n].tobytes() == wide.run()[:m, :n].tobytes(), f"m={m}"


@given(st.integers(1, 200_000))
def test_panels_fit_their_rows_and_share_the_work(n: int) -> None:
    for target in (AVX2, Target("avx512", 16, 32, "")):
        width = gemm.panel_width(n, target)
        assert -(-n // width) * width <= -(-n // 64) * 64
        assert n < 32 or -(-n // width) >= 2
        tiles = gemm.row_tiles(width, target)
        assert (max(*tiles.single, tiles.large) + 1) * (width // 16) + 1 <= target.budget
        assert tiles.single[0] >= tiles.large > tiles.small >= tiles.single[-1] == 1


def test_pack_puts_every_weight_where_the_kernel_looks() -> None:
    weight = np.arange(100 * 7, dtype=np.float32).reshape(100, 7) + 1
    packed, width = panels.pack(weight), gemm.panel_width(100)
    for n in range(100):
        assert (packed[n // width, :, n % width] == weight[n]).all()
    assert np.count_nonzero(packed) == weight.size
    assert panels.pack_bias(weight[:, 0]).shape == (packed.shape[0] * width,)


class Stored:
    """A weight that is read from elsewhere: a shape, and rows by slice."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.shape = rows, rows.shape
        self.reads: list[tuple[int, int]] = []

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.reads.append((rows.start, rows.stop))
        return self.rows[rows]


@pytest.mark.parametrize("n", [5, 96, 97, 1000, 1001])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_pack_reads_blocks_of_whole_panels(n: int, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row once, a block at a time, and nothing uninitialised behind the last row."""
    monkeypatch.setattr(panels, "_BLOCK_BYTES", 300 * 7 * 4)
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full(shape, np.nan, dtype))
    weight = Stored(np.random.default_rng(1).standard_normal((n, 7)).astype(dtype))
    packed, width = panels.pack(weight), gemm.panel_width(n)
    assert packed.dtype == np.float32
    flat = packed.transpose(0, 2, 1).reshape(-1, 7)
    assert flat[:n].tobytes() == weight.rows.astype(np.float32).tobytes()
    assert not flat[n:].any()
    reads = sorted(weight.reads)
    assert [begin for begin, _ in reads] == [0, *(end for _, end in reads[:-1])]
    assert reads[-1][1] == n
    assert all(end - begin <= 300 and begin % width == 0 for begin, end in reads)


def test_pack_passes_a_reading_error_on() -> None:
    class Broken(Stored):
        def __getitem__(self, rows: slice) -> np.ndarray:
            raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        panels.pack(Broken(np.ones((20, 3))))
    with pytest.raises(ValueError, match=r"shape \(3,\) must have 2 dimensions"):
        panels.pack(np.ones(3))


def test_nan_stays_in_its_row() -> None:
    problem = Problem(10, 40, 70, activation="gelu_tanh", bias=True)
    problem.x[3, 7] = np.nan
    bad = ~np.isfinite(problem.run()[:10, :70])
    assert bad[3].all()
    assert not np.delete(bad, 3, axis=0).any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ldx": 69}, "rows of 69"),
        ({"ldy": 99}, "rows of 99"),
        ({"n_in": 0}, "n_in=0"),
        ({"activation": "relu"}, "relu"),
        ({"scale": float("inf")}, "scale=inf"),
        ({"softcap": -1.0}, "softcap=-1.0"),
    ],
)
def test_refusals(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gemm.gemm_spec(**{"n_in": 70, "n_out": 100, "ldx": 80, "ldy": 144, **options})  # type: ignore[arg-type]


def test_units_beyond_the_range_are_left_alone() -> None:
    problem = Problem(70, 20, 100)
    y = problem.run(1, 2)
    assert y[:64].tobytes() == problem.y0[:64].tobytes()
    assert y[64:70, : problem.width].tobytes() != problem.y0[64:70, : problem.width].tobytes()
    spec = gemm.gemm_spec(20, 100, padded(20), padded(100))
    before = y.copy()
    call(spec, problem.x, panels.pack(problem.weight), y, 70, 2, 2)
    assert y.tobytes() == before.tobytes()
