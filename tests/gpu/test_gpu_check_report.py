"""What the check says of its results: tables, targets, and the end of its output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tools.gpu_check import report, show


def invented() -> dict[str, Any]:
    """Results of a GPU, as if."""
    decode = [
        {
            "model": "Llama-3.2-1B",
            "sequences": count,
            "step_ms": 1.5,
            "outside_native": 0.04,
            "native_ms": {"start": 0.1, "finish": 1.2},
            "ahead": 1.0,
            "of_roofline": share,
            "sm_mhz": 1980,
        }
        for count, share in ((1, 0.71), (8, 0.75), (32, 0.7), (256, 0.4))
    ]
    prefill = [{"model": "Llama-3.2-1B", "tokens": 2048, "ms": 12.25, "of_products": 0.55}]
    mixed = {"model": "Qwen3-0.6B", "seconds": 20.0, "whole": True}
    attention = [
        {"model": "Llama-3.2-1B", "batch": batch, "context": 4096, "us": 20.0, "of_bandwidth": share, "bytes": batch << 23}
        for batch, share in ((1, 0.1), (4, 0.5), (16, 0.85), (64, 0.9))
    ]  # fmt: skip
    products = [
        {"model": "Llama-3.2-1B", "product": name, "m": 1, "by": "mma", "us": 9.0, "of_bandwidth": share, "of_products": 0.01}
        for name, share in (("qkv", 0.6), ("out", 0.7), ("down", 0.9))
    ]  # fmt: skip

    def part(status: str = "passed", **found: Any) -> dict[str, Any]:
        return {
            "status": status,
            "seconds": 3.0,
            "checks": [],
            "skips": [],
            "left_out": [],
            "facts": {},
            "tables": {},
            **found,
        }

    passing = {"name": "a", "passed": True, "detail": ""}
    return {
        "command": "python -m tools.gpu_check run", "commit": "abc", "machine": {}, "fake": False, "tiny": False, "passed": False,
        "parts": {
            "environment": part(
                checks=[passing],
                facts={"device": "A GPU", "versions": {"torch": "2.11"}, "multiprocessors": 132, "driver": "1",
                       "kernels": {"count": 3, "most_registers": 128, "with_local_bytes": 0}},
            ),
            "numerics": part("failed", checks=[passing, {"name": "norm", "passed": False, "detail": "error 1"}]),
            "ceilings": part(facts={"copy_bytes_per_s": 3e12, "bf16_flops": 7e14, "launch_s": 2e-6}),
            "engine_speed": part(tables={"decode": decode, "prefill": prefill,
                                         "mixed": [{**mixed, "by": "nanoserve", "tokens_per_s": 9000.0}]}),
            "kernel_speed": part(tables={"decode attention": attention, "products": products}),
            "peers": part(tables={"mixed": [{**mixed, "by": "transformers", "tokens_per_s": 2900.0, "whole": False,
                                          "attention": "sdpa", "use_cuda_graph": [False, False]},
                                         {**mixed, "by": "transformers, graphs asked for", "tokens_per_s": 3000.0}]},
                          skips=[{"name": "vLLM", "reason": "it is not installed"}]),
        },
    }  # fmt: skip


def test_a_report_says_what_was_reached_and_what_was_not() -> None:
    text = report.table(invented())
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]
    reached = {row[0]: row[1:] for row in rows if len(row) == 4}
    assert reached["a decode step of Llama-3.2-1B, 1 to 32 sequences, against reading its weights and keys"] == [
        "at least 70%", "70% at least, median 71%", "yes",
    ]  # fmt: skip
    assert reached["a prompt of 2,048 tokens of Llama-3.2-1B, of the measured rate of products"] == [
        "at least 60%",
        "55%",
        "no",
    ]
    large = "attention of decoding, 128 MiB of keys and values and more, of the measured bandwidth"
    assert reached[large][1:] == ["85% at least, median 88%", "yes"]
    assert "| Llama-3.2-1B | 20 us | 20 us | 85% | 90% |" in text
    assert "at least 128 MiB of keys and values: Llama-3.2-1B 16 x 4096, Llama-3.2-1B 64 x 4096." in text
    assert reached["256 requests of Qwen3-0.6B against transformers"] == ["at least 2x", "3.00x", "yes"]
    assert reached["256 requests of Qwen3-0.6B against vLLM"][1:] == [
        "not measured: it is not installed",
        "no",
    ]
    assert reached["256 requests of Qwen3-0.6B against nano-vllm"][1:] == ["not measured", "no"]
    assert reached["a decode step of Llama-3.2-1B: Python's time, outside of the native step"][1:] == [
        "4.0% at most, waiting for the device 80% at least, 100% of the steps started ahead",
        "yes",
    ]
    assert "| Llama-3.2-1B | 1.50 (71%) | 1.50 (75%) | 1.50 (70%) | 1.50 (40%) | 12.25 (55%) |" in text
    assert "| Qwen3-0.6B, transformers (sdpa, graphs [False, False]) | 2,900 | its first 20 s |" in text
    assert "| Llama-3.2-1B, mma | 70% |" in text
    assert "A GPU; torch 2.11; 2 of 3 checks passed; parts that did not pass: numerics failed" in text


def test_a_report_of_nothing_says_so() -> None:
    assert report.table(None) == report.NOTHING
    bare = {**invented(), "parts": {}}
    assert "not measured" in report.table(bare)
    assert show.shown(bare).splitlines() == ["NOT every part ran and passed: it was stopped"]


def test_the_end_of_the_output_tells_the_story() -> None:
    lines = show.shown(invented()).splitlines()
    assert "    FAILED norm: error 1" in lines
    assert "    skipped: vLLM: it is not installed" in lines
    assert any(line.startswith("target missed a prompt of 2,048 tokens") for line in lines)
    assert "the clock after decoding: 1980 to 1980 MHz" in lines
    assert lines[-1] == "NOT every part ran and passed: numerics failed"
    crowded = invented()
    crowded["parts"]["numerics"]["skips"] = [{"name": str(i), "reason": "?"} for i in range(100)]
    lines = show.shown(crowded).splitlines()
    assert len(lines) == 59
    assert lines[-1] == "NOT every part ran and passed: numerics failed"


def test_the_readme_gets_it_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import report as bench_report

    document = tmp_path / "README.md"
    document.write_text("before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n")
    monkeypatch.setattr(bench_report, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_report, "DOCUMENTS", {document: {"gpu": bench_report.BLOCKS["gpu"]}})
    assert bench_report.updated(document) == f"before\n<!-- gpu -->\n{report.NOTHING}<!-- /gpu -->\nafter\n"
    (tmp_path / "gpu.json").write_text(json.dumps(invented()))
    assert report.table(invented()) in bench_report.updated(document)


def test_where_a_part_died_is_told() -> None:
    """What it was at is in its file before it is done; a part that ended says no such thing."""
    results = invented()
    results["parts"]["numerics"] |= {"status": "died", "at": "gemm_tma, gated", "printed": "a\nCUDA error"}
    results["parts"]["ceilings"] |= {"at": "copies"}
    lines = show.shown(results).splitlines()
    assert [line.strip() for line in lines if "it was at" in line] == ["it was at: gemm_tma, gated"]
    results["parts"]["numerics"]["status"] = "took too long"
    assert "    it was at: gemm_tma, gated" in show.shown(results).splitlines()
