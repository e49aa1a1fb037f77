"""How evenly threads share a step: the engine's own shares, and the arithmetic on them by hand."""

from __future__ import annotations

import pytest
from bench.partition import RULES, STEPS, Rule, Step, Work, bound_ops, busy_of, by_kind, config_of, works
from bench.peers.checkpoints import SMALL
from bench.report import partition_table
from hypothesis import given
from hypothesis import strategies as st

from nanoserve.kernels.gemm import ROW_BLOCK, panel_width
from nanoserve.native import StepExecutor

ONE = 10**9  # a cost that is worth any number of threads


@given(units=st.integers(1, 5000), cost=st.sampled_from([0, 1, 30_000, ONE]), threads=st.integers(1, 64))
def test_shares_are_runs_that_differ_by_one(units: int, cost: int, threads: int) -> None:
    shares = StepExecutor.shares(units, cost, threads)
    assert [begin for begin, _ in shares] == [0, *(end for _, end in shares[:-1])]
    assert shares[-1][1] == units
    sizes = [end - begin for begin, end in shares]
    assert max(sizes) - min(sizes) <= 1
    most = max(1, units * cost // 100_000) if cost else threads
    assert len(shares) == min(threads, units, most)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((1, 0, 0), "num_threads is 0"), ((-1, 0, 1), "num_units is -1"), ((1, -1, 1), "cost_per_unit is -1")],
)
def test_shares_of_nonsense_are_refused(arguments: tuple[int, int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StepExecutor.shares(*arguments)


def test_busy_by_hand() -> None:
    even, odd = Work("a", 64, ONE, 300), Work("b", 33, ONE, 100)
    assert [even.busy(threads) for threads in (1, 8, 64)] == [1, 1, 1]
    assert odd.shares(32) == [1] * 31 + [2]
    assert [odd.busy(1), odd.busy(32), odd.busy(64)] == [1, 33 / 64, 33 / 64]
    assert busy_of([even, odd], 64) == pytest.approx(400 / (300 + 100 * 64 / 33))
    few = Work("c", 32, 98_304, 1)  # worth 31 threads: one of them has two units, as if there were 16
    assert len(few.shares(64)) == 31
    assert few.busy(64) == 32 / (64 * 2)
    kinds = by_kind([Work("layers.0.a", 64, ONE, 150), Work("layers.1.a", 64, ONE, 150), odd], 64)
    assert {kind: (row["busy"], row["of_work"], row["threads"]) for kind, row in kinds.items()} == {
        "a": (1, 0.75, 64), "b": (0.5156, 0.25, 33),
    }  # fmt: skip


def test_the_works_of_a_small_model() -> None:
    operations = bound_ops(config_of(SMALL))
    width = panel_width(512)

    def made(step: Step, rule: Rule = RULES["as it is"]) -> dict[str, Work]:
        return {work.name: work for work in works(operations, step, rule)}

    decode, chunk = made(STEPS["32 sequences decode"]), made(STEPS["a chunk of 2,048 tokens"])
    assert (
        len(decode) == 1 + 8 * 7 + 3
    )  # embedding, of each layer 2 norms, 4 products and the KV write; norm, head, maxima
    down, head = decode["layers.3.down.weight"], decode["head.weight"]
    assert down == Work("layers.3.down.weight", 512 // width, 1536 * width, 2 * 512 * 1536)
    assert (head.units, head.amount) == (8192 // width, 2 * 512 * 8192)
    assert decode["layers.0.gate_up.weight"].amount == 2 * 2 * 1536 * 512
    assert chunk["layers.3.down.weight"].units == 512 // width * 2048 // ROW_BLOCK
    assert chunk["layers.3.down.weight"].amount == 512 * 1536 * 2048
    assert (chunk["head.weight"].units, chunk["head.weight"].amount) == (8192 // width, 512 * 8192)
    assert (decode["final_norm.weight"].units, chunk["final_norm.weight"].units) == (32, 1)
    assert (decode["layers.0.kv_write"].units, chunk["layers.0.kv_write"].units) == (32, 2048)
    cut = made(STEPS["32 sequences decode"], Rule(row_block=16, per_row=True))
    assert cut["layers.3.down.weight"] == Work(
        "layers.3.down.weight", 2 * 512 // width, 16 * 1536 * width, down.amount
    )
    assert cut["layers.0.kv_write"] == decode["layers.0.kv_write"]
    whole = made(STEPS["32 sequences decode"], Rule(per_row=True))["layers.3.down.weight"]
    assert (whole.units, whole.cost_per_unit) == (down.units, 32 * down.cost_per_unit)
    free = made(STEPS["32 sequences decode"], Rule(least_work=False))
    assert {work.cost_per_unit for work in free.values()} == {0}
    assert {name: work.amount for name, work in free.items()} == {
        name: work.amount for name, work in decode.items()
    }


def test_the_table_shows_every_row() -> None:
    busy = {"1": 1.0, "64": 0.5}
    results = {
        "models": {
            "m": {
                "s": {"as it is": {"busy": busy}, "rule": {"busy": {"1": 1.0, "64": 0.25}}},
                "t": {"as it is": {"busy": busy}},
            }
        }
    }
    assert partition_table(results).splitlines() == [
        "| threads | 1 | 64 |",
        "|---|---|---|",
        "| m, s | 100% | 50% |",
        "| m, s; *if rule* | 100% | 25% |",
        "| m, t | 100% | 50% |",
    ]
