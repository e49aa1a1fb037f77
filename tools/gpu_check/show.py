"""A results file in at most sixty lines."""

from __future__ import annotations

from typing import Any

_MOST_LINES = 58


def shown(results: dict[str, Any]) -> str:
    """What failed first, what was skipped, then numbers."""
    lines, details = [], []
    for name, part in results["parts"].items():
        checks = part.get("checks", [])
        bad = [check for check in checks if not check["passed"]]
        told = f"{len(checks) - len(bad)} of {len(checks)} checks" if checks else ""
        lines.append(f"{name:14} {part['status']:13} {part['seconds']:6.1f} s  {told}")
        lines += [f"    FAILED {check['name']}: {check['detail']}"[:160] for check in bad[:8]]
        if len(bad) > 8:
            lines.append(f"    and {len(bad) - 8} more")
        lines += [f"    skipped: {skip['name']}: {skip['reason']}"[:160] for skip in part.get("skips", [])]
        if part.get("left_out"):
            lines.append(f"    no time for: {', '.join(part['left_out'])}"[:160])
        if part.get("printed"):
            lines.append(
                f"    it said: {part['printed'].strip().splitlines()[-1] if part['printed'].strip() else ''}"[
                    :160
                ]
            )
        details += _numbers(name, part)
    room = _MOST_LINES - len(lines)
    lines += details[: max(room, 0)]
    if len(details) > room:
        lines.append(f"... and {len(details) - max(room, 0)} lines more in the file")
    passed = results.get("passed")
    lines.append("every part ran and passed" if passed else "NOT every part ran and passed")
    return "\n".join(lines)


def _numbers(name: str, part: dict[str, Any]) -> list[str]:
    facts = part.get("facts", {})
    lines = []
    if name == "environment" and "device" in facts:
        kernels = facts.get("kernels", {})
        lines.append(
            f"{facts['device']}, {facts['multiprocessors']} multiprocessors, driver {facts['driver']}, {kernels}"
        )
    if name == "ceilings" and "copy_bytes_per_s" in facts:
        lines.append(
            f"copy {facts['copy_bytes_per_s'] / 1e12:.2f} TB/s, read {facts.get('read_bytes_per_s', 0) / 1e12:.2f} TB/s, "
            f"bf16 {facts.get('bf16_flops', 0) / 1e12:.0f} TFLOP/s, launch {facts['launch_s'] * 1e6:.1f} us, "
            f"in a graph {facts['launch_in_graph_s'] * 1e6:.1f} us"
        )
    if name == "numerics":
        lines += [f"{key} {value}" for key, value in facts.items()]
    for table, rows in part.get("tables", {}).items():
        lines += [_line(table, row) for row in rows]
    return lines


def _line(table: str, row: dict[str, Any]) -> str:
    cells = []
    for key, value in row.items():
        cells.append(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}")
    return f"{table}: {', '.join(cells)}"[:170]
