"""Puts the numbers of bench/results/*.json into README.md and bench/peers/README.md and draws engine.svg and peers.svg.

    python -m bench.report [--check]

The text between `<!-- numbers -->` and `<!-- /numbers -->` belongs to this script, and so does every other block that DOCUMENTS
names; `--check` only compares.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from tools.gpu_check import report as gpu_check

from bench.peers.tables import peers_figure, peers_overview, peers_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
PEERS = ROOT / "bench" / "peers" / "README.md"


def gigabytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def megabytes(count: float) -> str:
    return f"{count / 2**20:.1f} MB"


def table(results: dict[str, Any]) -> str:
    """The measured table, Markdown."""
    t, shapes, cache = results["throughput"], results["other_shapes"], results["prefix_cache"]
    memory, start = results["kv_memory"], results["start_up"]
    rows = [
        ("output tokens/s, 32 running requests", f"{t['output_tokens_per_s']:,.0f}", t["model"]),
        ("against one request at a time with KV cache", f"{t['speedup_over_one_at_a_time']:.1f}x", "same prompts, same tokens out"),
        ("against recomputing the whole sequence per token", f"{t['speedup_over_recompute']:.1f}x", "same kernels, same tokens out"),
        *(
            (f"the two ratios with {one['prompt_tokens']} prompt tokens", f"{one['speedup_over_one_at_a_time']:.1f}x, {one['speedup_over_recompute']:.1f}x", one["model"])
            for one in shapes.values()
        ),
        ("scheduler, per running request per step", f"{t['scheduler_us_per_request_step']:.1f} us", f"scheduling and commit; the sampler takes {t['sampler_us_per_request_step']:.1f} us more"),
        ("prefix cache, prompt tokens found", f"{100 * cache['cache_hit_rate']:.1f}%", f"{cache['requests']} requests of {cache['workload']}"),
        ("prefix cache, time to serve them all", f"{cache['speedup']:.2f}x faster", "identical answers"),
        ("KV memory at the peak", megabytes(memory["peak_kv_bytes"]), f"{memory['peak_running']} running requests"),
        ("contiguous maximum-length caches would take", megabytes(memory["contiguous_bytes"]), f"{memory['ratio']:.1f}x as much"),
        ("start of the demo's model, cold", f"{start['cold_start_s']:.2f} s", f"{start['kernels_compiled_cold']} kernels compiled"),
        ("start of the demo's model, warm", f"{start['warm_start_s']:.2f} s", "nothing compiled; after imports"),
    ]  # fmt: skip
    lines = ["| measured | result | with |", "|---|---|---|"]
    lines += [f"| {name} | {value} | {note} |" for name, value, note in rows]
    where = results["machine"]
    isa = ", ".join(where["isa"])
    lines.append("")
    lines.append(
        f"{where['cores']} cores of {where['cpu']} ({isa}), Python {where['python']}; `make bench` measures it anew."
    )
    return "\n".join(lines) + "\n"


def loading_table(results: dict[str, Any]) -> str:
    """What loading a checkpoint of a real shape costs, Markdown."""
    lines = ["| shape, bfloat16 file | packed weights | peak memory over weights and KV pool | first start | warm start | reading its bytes from the page cache | in float32 greedy tokens are transformers' | largest difference of a log-probability |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, one in results["shapes"].items():
        lines.append(
            f"| {name} | {gigabytes(one['weight_bytes'])} | {one['peak_over_needed']:.2f}x | {one['cold_load_s']:.1f} s "
            f"| {one['load_s']:.2f} s | {one['read_s']:.2f} s "
            f"| {'yes' if one['greedy_tokens_equal_transformers'] else 'NO'} | {one['largest_logprob_difference']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def sampler_table(results: dict[str, Any]) -> str:
    """Microseconds per row for each way of sampling, Markdown."""
    times = results["us_per_row_per_step"]
    lines = ["| us per sampled row | " + " | ".join(f"vocabulary {int(vocab):,}" for vocab in times) + " |",
             "|---|" + "---|" * len(times)]  # fmt: skip
    for way in next(iter(times.values())):
        cells = " | ".join(f"{one[way]:.0f}" for one in times.values())
        lines.append(f"| {way.replace('_', ' ')} | {cells} |")
    return "\n".join(lines) + "\n"


def precision_table(results: dict[str, Any]) -> str:
    lines = [
        "| number format | weights | largest logit error | mean | the likeliest token is the same | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for model, measured in results["models"].items():
        lines.append(
            f"| **{model}**, {measured['positions']:,} positions, logits deviate by {measured['logit_deviation']:.2f} | | | | | |"
        )
        lines += [
            f"| {name} | {megabytes(row['weight_bytes'])} | {row['max_logit_error']:.3f} | {row['mean_logit_error']:.4f} | "
            f"{row['greedy_agreement']:.2%} | {row['perplexity']:,.3f} |"
            for name, row in measured["formats"].items()
        ]
    return "\n".join(lines) + "\n"


def profile_table(results: dict[str, Any]) -> str:
    """Where a step's time goes, Markdown."""
    kinds = list(next(iter(next(iter(results["shapes"].values())).values()))["decode-1"]["shares"])
    kinds = ["GEMM", "head", "attention", *sorted(set(kinds) - {"GEMM", "head", "attention"})]
    lines = [f"| shape, width | step | ms | {' | '.join(kinds)} |", "|---|---|---|" + "---|" * len(kinds)]
    for shape, widths in results["shapes"].items():
        for width, cases in widths.items():
            lines += [
                f"| {shape}, {width} | {case} | {one['step_ms']:.1f} | "
                + " | ".join(f"{100 * one['shares'].get(kind, 0):.0f}%" for kind in kinds)
                + " |"
                for case, one in cases.items()
            ]
    return "\n".join(lines) + "\n"


def kernels_table(results: dict[str, Any]) -> str:
    """How close GEMMs come to the machine's limits, Markdown."""
    threads = max(row["threads"] for row in results["products"])
    found: dict[str, dict[int, list[float]]] = {}
    for row in results["products"]:
        if row["threads"] == threads:
            found.setdefault(row["arithmetic"], {}).setdefault(row["rows"], []).append(row["limit"])
    counts = list(next(iter(found.values())))
    lines = ["| rows of x | " + " | ".join(map(str, counts)) + " |", "|---|" + "---|" * len(counts)]
    for arithmetic, by_rows in found.items():
        cells = " | ".join(f"{100 * statistics.median(by_rows[count]):.0f}%" for count in counts)
        lines.append(f"| {arithmetic} | {cells} |")
    return "\n".join(lines) + "\n"


def serving_table(results: dict[str, Any]) -> str:
    """What HTTP costs, Markdown."""
    lines = [
        "| model | clients, tokens in and out | tokens/s over HTTP | of the engine's own | first event, p50 and p99 | between events, p50 and p99 | event loop per token |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in results["models"].items():
        lines.append(
            f"| {name} | {one['clients']}, {one['prompt_tokens']}, {one['output_tokens']} | {one['http_tokens_per_s']:,.0f} "
            f"| {one['ratio']:.2f} | {one['ttft_p50_ms']:.0f}, {one['ttft_p99_ms']:.0f} ms "
            f"| {one['between_events_p50_ms']:.1f}, {one['between_events_p99_ms']:.1f} ms | {one['event_loop_us_per_token']:.0f} us |"
        )
    return "\n".join(lines) + "\n"


def overload_table(results: dict[str, Any]) -> str:
    """A server that is asked for more than it can do, Markdown."""
    lines = [
        f"| {results['model']}, {results['capacity_per_s']:.0f} requests/s at most | arrivals/s | for | answered 200 | 429 | otherwise | p50, p99 of those answered 200 | /health not 200 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, phase in (
        ("half of that", "half"),
        (f"{results['times']:g} times that", "overload"),
        ("half again", "half_again"),
    ):
        one = results[phase]
        counts = one["statuses"]
        other = sum(count for status, count in counts.items() if status not in ("200", "429"))
        lines.append(
            f"| {name} | {one['per_s']:.0f} | {one['seconds']:.0f} s | {counts.get('200', 0):,} | {counts.get('429', 0):,} | {other:,} "
            f"| {one['p50_s']:.2f}, {one['p99_s']:.2f} s | {one['unhealthy_probes']} |"
        )
    before, after = results["resident_before_bytes"], results["resident_after_bytes"]
    return (
        "\n".join(lines)
        + f"\n\nMemory of the server before and after the overload: {megabytes(before)}, {megabytes(after)}.\n"
    )


def partition_table(results: dict[str, Any]) -> str:
    """How busy threads are that share a step, Markdown."""
    models = results["models"]
    threads = next(iter(next(iter(next(iter(models.values())).values())).values()))["busy"]
    lines = ["| threads | " + " | ".join(threads) + " |", "|---|" + "---|" * len(threads)]
    for model, steps in models.items():
        for step, rules in steps.items():
            for rule, row in rules.items():
                name = f"{model}, {step}" + ("" if rule == "as it is" else f"; *if {rule}*")
                lines.append(
                    f"| {name} | " + " | ".join(f"{busy:.0%}" for busy in row["busy"].values()) + " |"
                )
    return "\n".join(lines) + "\n"


BLOCKS = {
    "numbers": ("engine.json", table),
    "loading": ("loading.json", loading_table),
    "sampler": ("sampler.json", sampler_table),
    "peers": ("peers.json", peers_overview),
    "precision": ("precision.json", precision_table),
    "partition": ("partition.json", partition_table),
    "serving": ("serving.json", serving_table),
    "overload": ("overload.json", overload_table),
    "gpu": ("gpu.json", gpu_check.table),
}


DOCUMENTS = {
    README: BLOCKS,
    PEERS: {
        "peers": ("peers.json", peers_table),
        "profile": ("profile.json", profile_table),
        "kernels": ("kernels.json", kernels_table),
    },
}


def read(file: str) -> Any:
    """A results file; None where there is none yet."""
    path = RESULTS / file
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def updated(document: Path) -> str:
    """Its text with every block made anew from its results file."""
    text = document.read_text(encoding="utf-8")
    for name, (file, make) in DOCUMENTS[document].items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not block.search(text):
            sys.exit(f"{document} has no block <!-- {name} -->")
        made = make(read(file))
        text = block.sub(lambda match, made=made: match.group(1) + made + match.group(2), text)  # type: ignore[misc]
    return text


def figure(results: dict[str, Any]) -> str:
    """Bars of tokens per second for the three ways of decoding, SVG."""
    t = results["throughput"]
    bars = [
        ("32 requests together", t["output_tokens_per_s"]),
        ("one at a time, KV cache", t["one_at_a_time_tokens_per_s"]),
        ("one at a time, recomputing", t["recompute_tokens_per_s"]),
    ]
    top = max(value for _, value in bars)
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 150" font-family="sans-serif" font-size="14">',
        '<rect width="640" height="150" fill="white"/>',
        f'<text x="10" y="22" font-weight="bold">Output tokens per second: {t["model"]}</text>',
    ]
    for i, (label, value) in enumerate(bars):
        y, width = 40 + 36 * i, max(2.0, 340 * value / top)
        parts.append(f'<text x="10" y="{y + 17}">{label}</text>')
        parts.append(f'<rect x="210" y="{y}" width="{width:.1f}" height="24" fill="#2f6f9f"/>')
        parts.append(f'<text x="{218 + width:.1f}" y="{y + 17}">{value:,.0f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="fail when a document differs from the results files"
    )
    check = parser.parse_args().check
    for document in DOCUMENTS:
        wanted = updated(document)
        if not check:
            document.write_text(wanted, encoding="utf-8")
        elif wanted != document.read_text(encoding="utf-8"):
            sys.exit(f"{document.name} does not show bench/results: run python -m bench.report")
    if check:
        return
    for name, draw in (("engine", figure), ("peers", peers_figure)):
        results = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        (RESULTS / f"{name}.svg").write_text(draw(results), encoding="utf-8")


if __name__ == "__main__":
    main()
