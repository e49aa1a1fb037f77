"""What `run` has found, as tables for README.md: targets beside what was reached, then the numbers behind them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

NOTHING = "Nothing of this has run on a GPU yet: kernels and launcher are tested in the emulator, which tells no speed.\n"
MODEL = "Llama-3.2-1B"  # of the targets
# Keys and values that attention reads at least where it is judged by the bandwidth: below, two kernels' launches decide.
JUDGED_BYTES = 128 * 2**20
Results = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reached:
    """A target and what came of it.

    Attributes:
        wanted: as a person reads it. value: the worst of what was measured; None: nothing was, and `why` says so.
    """

    what: str
    wanted: str
    value: float | None
    is_met: bool
    shown: str
    why: str = ""


def table(results: Results | None) -> str:
    """Markdown; one sentence where there are no results, or none of a GPU."""
    if results is None or results["fake"]:
        return NOTHING
    lines = ["| target | wanted | reached | met |", "|---|---|---|---|"]
    for one in targets(results):
        reached = one.why if one.value is None else one.shown
        lines.append(f"| {one.what} | {one.wanted} | {reached} | {'yes' if one.is_met else 'no'} |")
    for more in (
        _decode_table(results),
        _mixed_table(results),
        _products_table(results),
        _attention_table(results),
    ):
        if more:
            lines += ["", *more]
    lines += ["", _where(results)]
    return "\n".join(lines) + "\n"


def rows(results: Results, part: str, name: str) -> list[dict[str, Any]]:
    """Of a part's table; none where it did not run."""
    found: list[dict[str, Any]] = results["parts"].get(part, {}).get("tables", {}).get(name, [])
    return found


def targets(results: Results) -> list[Reached]:
    decodes = [row for row in rows(results, "engine_speed", "decode") if row["model"] == MODEL]
    few = [row for row in decodes if row["sequences"] <= 32]
    prompts = [row for row in rows(results, "engine_speed", "prefill") if row["model"] == MODEL]
    attention = judged_attention(results)
    made = [
        _at_least(f"a decode step of {MODEL}, 1 to 32 sequences, against reading its weights and keys", 0.7, few, "of_roofline"),
        _at_least(f"a prompt of 2,048 tokens of {MODEL}, of the measured rate of products", 0.6, prompts, "of_products"),
        _at_least(f"attention of decoding, {JUDGED_BYTES >> 20} MiB of keys and values and more, of the measured bandwidth", 0.8, attention, "of_bandwidth"),
    ]  # fmt: skip
    for peer, least in (("transformers", 2.0), ("vLLM", 1.0), ("nano-vllm", 1.0)):
        made.append(_against(results, peer, least))
    made.append(_hidden(decodes))
    return made


def judged_attention(results: Results) -> list[dict[str, Any]]:
    return [row for row in rows(results, "kernel_speed", "decode attention") if row["bytes"] >= JUDGED_BYTES]


def _hidden(decodes: Sequence[dict[str, Any]]) -> Reached:
    """Python is hidden where the host, in all steps, ends up waiting for the device."""
    what = f"a decode step of {MODEL}: Python's time, outside of the native step"
    if not decodes:
        return Reached(what, "hidden, or less than 5%", None, False, "", "not measured")
    outside = max(row["outside_native"] for row in decodes)
    waits = min(row["native_ms"].get("finish", 0.0) / row["step_ms"] for row in decodes)
    ahead = min(row["ahead"] for row in decodes)
    shown = f"{outside:.1%} at most, waiting for the device {waits:.0%} at least, {ahead:.0%} of the steps started ahead"
    # Where steps are started ahead and the host still ends up waiting, the device never waits for Python.
    is_hidden = ahead > 0.9 and waits > 0.02
    return Reached(what, "hidden, or less than 5%", outside, is_hidden or outside < 0.05, shown)


def _at_least(what: str, least: float, found: Sequence[dict[str, Any]], key: str) -> Reached:
    values = [row[key] for row in found if key in row]
    if not values:
        return Reached(what, f"at least {least:.0%}", None, False, "", "not measured")
    worst, middle = min(values), statistics.median(values)
    shown = f"{worst:.0%}" if len(values) == 1 else f"{worst:.0%} at least, median {middle:.0%}"
    return Reached(what, f"at least {least:.0%}", worst, worst >= least, shown)


def mixed_rows(results: Results) -> list[dict[str, Any]]:
    """Ours and others'."""
    return [*rows(results, "engine_speed", "mixed"), *rows(results, "peers", "mixed")]


def _against(results: Results, peer: str, least: float) -> Reached:
    found = {row["by"]: row for row in mixed_rows(results) if row["model"] == "Qwen3-0.6B"}
    what, wanted = f"256 requests of Qwen3-0.6B against {peer}", f"at least {least:.0f}x"
    theirs = [row["tokens_per_s"] for by, row in found.items() if by.split(",")[0] == peer]
    if "nanoserve" in found and theirs:
        ratio = found["nanoserve"]["tokens_per_s"] / max(theirs)
        return Reached(what, wanted, ratio, ratio >= least, f"{ratio:.2f}x")
    skips = results["parts"].get("peers", {}).get("skips", [])
    reasons = [skip["reason"] for skip in skips if skip["name"] == peer]
    return Reached(
        what, wanted, None, False, "", f"not measured: {reasons[0]}" if reasons else "not measured"
    )


def _decode_table(results: Results) -> list[str]:
    found = rows(results, "engine_speed", "decode")
    if not found:
        return []
    counts = list(dict.fromkeys(row["sequences"] for row in found))
    lines = [
        "| a step of decoding, 512 tokens of context; ms (of the bandwidth) | "
        + " | ".join(f"{count} at once" for count in counts)
        + " | a prompt of 2,048 tokens; ms (of the products' rate) |",
        "|---|" + "---|" * (len(counts) + 1),
    ]
    for model in dict.fromkeys(row["model"] for row in found):
        by_count = {row["sequences"]: row for row in found if row["model"] == model}
        cells = [_cell(by_count.get(count), "step_ms", "of_roofline") for count in counts]
        prompt = next(
            (row for row in rows(results, "engine_speed", "prefill") if row["model"] == model), None
        )
        lines.append(f"| {model} | {' | '.join(cells)} | {_cell(prompt, 'ms', 'of_products')} |")
    return lines


def _cell(row: dict[str, Any] | None, time: str, share: str) -> str:
    if row is None:
        return "-"
    return f"{row[time]:.2f}" + (f" ({row[share]:.0%})" if share in row else "")


def _mixed_table(results: Results) -> list[str]:
    found = mixed_rows(results)
    if not found:
        return []
    lines = ["| 256 requests, 100 to 1,024 tokens in and out | tokens/s | whole |", "|---|---|---|"]
    for row in found:
        whole = "yes" if row["whole"] else f"its first {row['seconds']:.0f} s"
        lines.append(f"| {row['model']}, {row['by']}{how(row)} | {row['tokens_per_s']:,.0f} | {whole} |")
    return lines


def how(row: dict[str, Any]) -> str:
    """What another engine's attention was, and whether it had graphs; nothing of one that does not say."""
    if "attention" not in row:
        return ""
    return f" ({row['attention']}, graphs {row['use_cuda_graph']})"


def product_limits(results: Results) -> dict[tuple[str, str], dict[int, float]]:
    """By (model, arithmetic) and rows: the median over a model's products of what they reach of the nearer ceiling."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows(results, "kernel_speed", "products"):
        if "of_bandwidth" in row:
            limit = max(row["of_bandwidth"], row["of_products"])
            found.setdefault((row["model"], row["by"]), {}).setdefault(row["m"], []).append(limit)
    return {key: {m: statistics.median(each) for m, each in by_m.items()} for key, by_m in found.items()}


def _products_table(results: Results) -> list[str]:
    found = product_limits(results)
    if not found:
        return []
    counts = sorted({m for by_m in found.values() for m in by_m})
    lines = [
        "| products, of the nearer ceiling; rows of x | " + " | ".join(map(str, counts)) + " |",
        "|---|" + "---|" * len(counts),
    ]
    for (model, by), by_m in found.items():
        cells = [f"{by_m[m]:.0%}" if m in by_m else "-" for m in counts]
        lines.append(f"| {model}, {by} | {' | '.join(cells)} |")
    return lines


def attention_cell(row: dict[str, Any]) -> str:
    """The share of the bandwidth where it is judged; where it is not, the time."""
    if row["bytes"] >= JUDGED_BYTES and "of_bandwidth" in row:
        return f"{row['of_bandwidth']:.0%}"
    return f"{row['us']:.0f} us"


def _attention_table(results: Results) -> list[str]:
    found = rows(results, "kernel_speed", "decode attention")
    if not found:
        return []
    cases = list(dict.fromkeys((row["batch"], row["context"]) for row in found))
    lines = [
        "| attention of decoding, of the bandwidth; of few bytes, us | " + " | ".join(f"{b} x {c // 1024}k" for b, c in cases) + " |",
        "|---|" + "---|" * len(cases),
    ]  # fmt: skip
    for model in dict.fromkeys(row["model"] for row in found):
        mine = {(row["batch"], row["context"]): attention_cell(row) for row in found if row["model"] == model}
        lines.append(f"| {model} | " + " | ".join(mine.get(case, "-") for case in cases) + " |")
    judged = dict.fromkeys(
        f"{row['model']} {row['batch']} x {row['context']}" for row in judged_attention(results)
    )
    lines += [
        "",
        f"Judged are the rows that read at least {JUDGED_BYTES >> 20} MiB of keys and values: {', '.join(judged) or 'none'}.",
    ]
    return lines


def _where(results: Results) -> str:
    facts = results["parts"].get("environment", {}).get("facts", {})
    parts: Iterable[tuple[str, Any]] = results["parts"].items()
    checks = [check for _, part in parts for check in part.get("checks", [])]
    passed = sum(check["passed"] for check in checks)
    not_passed = [f"{name} {part['status']}" for name, part in parts if part["status"] != "passed"]
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    told = f"{facts.get('device', 'an unknown device')}; {versions}; {passed} of {len(checks)} checks passed"
    if not_passed:
        told += f"; parts that did not pass: {', '.join(not_passed)}"
    return f"{told}; `{results['command']}`."
