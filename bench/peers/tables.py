"""peers.json as Markdown and as a figure."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from bench.peers.installation import OURS
from nanoserve.workloads import workload_names

_COLOURS = (
    "#2f6f9f",
    "#8a8a8a",
    "#b0a080",
    "#7f9f7f",
    "#b08f9f",
    "#a0a0c0",
    "#c0c0c0",
)  # ours, then the peers
_UNITS = {
    "prefill_tokens_per_s": "prompt tokens/s",
    "decode_tokens_per_s": "decoded tokens/s",
    "output_tokens_per_s": "output tokens/s",
}


# Ours over the best peer's of the same width: what was aimed for.
AIMS = {"prefill": 1.2, "decode-1": 1.3, "decode-4": 1.6, "shared-prefix": 1.8}
_OTHER_AIM = 2.2


def peers_overview(results: dict[str, Any]) -> str:
    """One table: for each workload, model and width ours over the best peer's, and our share of the roofline."""
    groups = _groups(results)
    lines = [
        "| workload | " + " | ".join(f"{model}, {width}" for model, width in groups) + " |",
        "|---|" + "---|" * len(groups),
    ]
    for workload in dict.fromkeys(
        name for name in _order() for found in groups.values() for row in found if row["workload"] == name
    ):
        cells = [
            next((_overview_cell(row) for row in found if row["workload"] == workload), "")
            for found in groups.values()
        ]
        lines.append(f"| {workload} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _overview_cell(row: dict[str, Any]) -> str:
    share = row["engines"][OURS]["roofline"]
    ratio = "" if row["ratio"] is None else f"{row['ratio']['median']:.2f}x"
    return ratio + ("" if share is None else f" ({100 * share:.0f}%)")


def _aim(row: dict[str, Any]) -> float:
    if (row["model"], row["workload"]) == ("small", "decode-1"):
        return 1.5
    return AIMS.get(row["workload"], AIMS.get(row["workload"].partition("-")[0], _OTHER_AIM))


def peers_table(results: dict[str, Any]) -> str:
    """A table per model and width: median tokens per second (share of the roofline), and ours over the best peer's.

    Args:
        results: what bench/results/peers.json holds.
    """
    parts = []
    for (model, width), found in _groups(results).items():
        names = _names(found)
        lines = [
            f"**{model}, {width}**",
            "",
            "| workload | counted | " + " | ".join(names) + " | ours / best peer | aim |",
            "|---|---|" + "---|" * (len(names) + 2),
        ]
        lines += [
            f"| {row['workload']}{_scale(row)} | {_UNITS[row['metric']]} | "
            + " | ".join(_cell(row, name) for name in names)
            + f" | {_ratio(row)} | {_aim(row)}x |"
            for row in found
        ]
        parts.append("\n".join(lines) + "\n")
    versions = [
        f"{name} {next(iter(widths.values())).get('version', '')}".strip()
        for name, widths in results["engines"].items()
    ]
    where = results["machine"]
    last = (
        f"Medians of interleaved rounds, in parentheses the share of what memory bandwidth and arithmetic allowed at that "
        f"moment. {where['cores']} cores of {where['cpu']}; {', '.join(versions)}."
    )
    return "\n".join([*parts, last]) + "\n"


def peers_figure(results: dict[str, Any]) -> str:
    """Bars per workload, each engine's rate over the best peer's, SVG."""
    parts: list[str] = []
    everyone = _names(list(results["rows"].values()))
    colours = {name: _COLOURS[at % len(_COLOURS)] for at, name in enumerate(everyone)}
    y = 20
    for (model, width), found in _groups(results).items():
        names = _names(found)
        parts.append(
            f'<text x="10" y="{y + 6}" font-weight="bold">{escape(f"{model}, {width}")}: rate over the best peer</text>'
        )
        x = 370
        for name in names:
            parts.append(f'<rect x="{x}" y="{y - 5}" width="11" height="11" fill="{colours[name]}"/>')
            parts.append(f'<text x="{x + 15}" y="{y + 5}" font-size="11">{escape(name)}</text>')
            x += 30 + 7 * len(name)
        y += 18
        scale = max([1.0, *(value for row in found for value in _relative(row).values())])
        for row in found:
            relative = _relative(row)
            parts.append(f'<text x="10" y="{y + 7 + 5 * len(relative)}">{escape(row["workload"])}</text>')
            for name in names:
                if name not in relative:
                    continue
                bar = max(2.0, 400 * relative[name] / scale)
                parts.append(f'<rect x="130" y="{y}" width="{bar:.1f}" height="10" fill="{colours[name]}"/>')
                label = f"{relative[name]:.2f}x  {row['engines'][name]['median']:,.0f}/s"
                parts.append(f'<text x="{136 + bar:.1f}" y="{y + 9}" font-size="10">{label}</text>')
                y += 11
            y += 8
        y += 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {y}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, f'<rect width="720" height="{y}" fill="white"/>', *parts, "</svg>"]) + "\n"


def _groups(results: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows with values by model and width; the workloads that come with nanoserve in their order, own ones after."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"].values():
        if row["engines"]:
            found.setdefault((row["model"], row["width"]), []).append(row)
    order = {name: at for at, name in enumerate(_order())}
    for held in found.values():
        held.sort(key=lambda row: (order.get(row["workload"], len(order)), row["workload"]))
    return found


def _order() -> list[str]:
    """prefill, decode, and what mixes them; numbers in a name by size."""

    def key(name: str) -> tuple[int, str, int]:
        kind, _, size = name.rpartition("-")
        first = ("prefill", "decode").index(kind) if kind in ("prefill", "decode") else 2
        return first, kind if size.isdigit() else name, int(size) if size.isdigit() else 0

    return sorted(workload_names(), key=key)


def _names(found: list[dict[str, Any]]) -> list[str]:
    """Engines of some rows: ours, then the peers by name."""
    names = {name for row in found for name in (*row["engines"], *row["failed"])}
    return sorted(names, key=lambda name: (name != OURS, name))


def _scale(row: dict[str, Any]) -> str:
    return "" if row["scale"] == 1 else f" (scale {row['scale']:g})"


def _cell(row: dict[str, Any], name: str) -> str:
    held = row["engines"].get(name)
    if held is None:
        return "failed" if name in row["failed"] else ""
    share = "" if held["roofline"] is None else f" ({100 * held['roofline']:.0f}%)"
    return f"{_rate(held['median'])}{share}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(row: dict[str, Any]) -> str:
    ratio = row["ratio"]
    if ratio is None:
        return ""
    span = "" if ratio["min"] == ratio["max"] else f" ({ratio['min']:.2f}-{ratio['max']:.2f})"
    return f"{ratio['median']:.2f}x {row['best_peer']}{span}"


def _relative(row: dict[str, Any]) -> dict[str, float]:
    """Medians over the best peer's, or over our own where there is no peer."""
    best = row["engines"].get(row["best_peer"]) or next(iter(row["engines"].values()))
    return {name: held["median"] / best["median"] for name, held in row["engines"].items()}
