"""A results file in at most sixty lines: what failed, what was skipped, then the numbers."""

from __future__ import annotations

from typing import Any

from tools.gpu_check.report import Results, attention_cell, how, mixed_rows, product_limits, rows, targets

_MOST_LINES = 59
_WIDTH = 170


def shown(results: Results) -> str:
    lines = []
    for name, part in results["parts"].items():
        lines += _told(name, part)
    for made in (_device, _ceilings, _targets, _decode, _mixed, _products, _attention, _switches):
        lines += made(results)
    if len(lines) > _MOST_LINES - 1:
        left = len(lines) - (_MOST_LINES - 2)
        lines = [
            *lines[: _MOST_LINES - 2],
            f"... {left} lines more: python -m tools.gpu_check show FILE --all",
        ]
    return "\n".join([*(line[:_WIDTH] for line in lines), _verdict(results)])


def everything(results: Results) -> str:
    """Every row and fact."""
    lines = []
    for name, part in results["parts"].items():
        lines += _told(name, part, 1000)
        lines += [
            f"    {check['name']}: {check['detail']}" for check in part.get("checks", []) if check["passed"]
        ]
        lines += [f"    {key}: {value}" for key, value in part.get("facts", {}).items()]
        for table, found in part.get("tables", {}).items():
            lines += [
                f"    {table}: " + ", ".join(f"{k} {_number(v)}" for k, v in row.items()) for row in found
            ]
    return "\n".join([*lines, _verdict(results)])


def _verdict(results: Results) -> str:
    if results.get("passed"):
        return "every part ran and passed"
    not_passed = [
        f"{name} {part['status']}" for name, part in results["parts"].items() if part["status"] != "passed"
    ]
    return f"NOT every part ran and passed: {', '.join(not_passed) or 'it was stopped'}"


def _told(name: str, part: dict[str, Any], most: int = 6) -> list[str]:
    checks = part.get("checks", [])
    bad = [check for check in checks if not check["passed"]]
    told = f"{len(checks) - len(bad)} of {len(checks)} checks" if checks else ""
    lines = [f"{name:14} {part['status']:13} {part['seconds']:6.1f} s  {told}"]
    lines += [f"    FAILED {check['name']}: {check['detail']}" for check in bad[:most]]
    if len(bad) > most:
        lines.append(f"    and {len(bad) - most} more failed")
    lines += [f"    skipped: {skip['name']}: {skip['reason']}" for skip in part.get("skips", [])]
    if part.get("left_out"):
        lines.append(f"    no time for: {', '.join(part['left_out'])}")
    if part["status"] in ("died", "took too long") and part.get("at"):
        lines.append(f"    it was at: {part['at']}")
    if part.get("printed", "").strip():
        lines.append(f"    its last words: {part['printed'].strip().splitlines()[-1]}")
    return lines


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _facts(results: Results, part: str) -> dict[str, Any]:
    found: dict[str, Any] = results["parts"].get(part, {}).get("facts", {})
    return found


def _device(results: Results) -> list[str]:
    facts = _facts(results, "environment")
    if "kernels" not in facts:
        return []
    kernels = facts["kernels"]
    return [
        f"{facts['device']}, {facts['multiprocessors']} multiprocessors, driver {facts['driver']}; {kernels['count']} kernels, at most "
        f"{kernels['most_registers']} registers, {kernels['with_local_bytes']} with local memory"
    ]  # fmt: skip


def _ceilings(results: Results) -> list[str]:
    facts = _facts(results, "ceilings")
    if "launch_s" not in facts:
        return []
    read, products = facts.get("read_bytes_per_s"), facts.get("bf16_flops")
    return [
        f"ceilings: copy {facts['copy_bytes_per_s'] / 1e12:.2f} TB/s"
        + ("" if read is None else f", read {read / 1e12:.2f} TB/s")
        + ("" if products is None else f", bf16 products {products / 1e12:.0f} TFLOP/s")
        + f", a launch {facts['launch_s'] * 1e6:.1f} us, in a graph {facts.get('launch_in_graph_s', 0) * 1e6:.1f} us"
    ]


def _targets(results: Results) -> list[str]:
    return [
        f"target {'MET  ' if one.is_met else 'missed'} {one.what}: {one.shown} (wanted {one.wanted})"
        for one in targets(results)
        if one.value is not None
    ]


def _decode(results: Results) -> list[str]:
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows(results, "engine_speed", "decode")):
        cells = [
            f"{row['sequences']}: {row['step_ms']:.2f} ms{_share(row, 'of_roofline')}, outside {row['outside_native']:.0%}"
            for row in rows(results, "engine_speed", "decode")
            if row["model"] == model
        ]
        lines.append(f"decode {model}: {'; '.join(cells)}")
    for row in rows(results, "engine_speed", "prefill"):
        lines.append(
            f"prefill {row['model']}: {row['tokens']}: {row['ms']:.2f} ms{_share(row, 'of_products')}"
        )
    pieces = [
        f"{row['model']}: {row['tokens']} by {row['chunk']}: {row['ms']:.2f} ms"
        for row in rows(results, "engine_speed", "prefill in chunks")
    ]
    lines += [f"prefill in chunks {', '.join(pieces)}"] if pieces else []
    clocks = [row["sm_mhz"] for row in rows(results, "engine_speed", "decode") if row.get("sm_mhz")]
    lines += [f"the clock after decoding: {min(clocks)} to {max(clocks)} MHz"] if clocks else []
    return lines


def _share(row: dict[str, Any], key: str) -> str:
    return f" ({row[key]:.0%})" if key in row else ""


def _mixed(results: Results) -> list[str]:
    return [
        f"mixed {row['model']} by {row['by']}{how(row)}: {row['tokens_per_s']:,.0f} tokens/s{'' if row['whole'] else ', not to its end'}"
        for row in mixed_rows(results)
    ]


def _products(results: Results) -> list[str]:
    lines = []
    for (model, by), by_m in product_limits(results).items():
        cells = ", ".join(f"{m}: {share:.0%}" for m, share in sorted(by_m.items()))
        lines.append(f"products {model} {by}, of the nearer ceiling: {cells}")
    return lines


def _attention(results: Results) -> list[str]:
    lines = []
    found = rows(results, "kernel_speed", "decode attention")
    for model in dict.fromkeys(row["model"] for row in found):
        cells = [f"{row['batch']}x{row['context']}: {attention_cell(row)}" for row in found if row["model"] == model]  # fmt: skip
        lines += [
            f"decode attention {model} {', '.join(cells[at : at + 6])}" for at in range(0, len(cells), 6)
        ]
    for table, cell in (
        ("decode attention, mixed", "{lengths}"),
        ("chunk attention", "{rows} rows after {start}"),
    ):
        cells = [
            f"{row['model']} {cell.format(**row)}: {row['us']:.0f} us{_share(row, 'of_bandwidth')}"
            for row in rows(results, "kernel_speed", table)
        ]
        lines += [f"{table} {', '.join(cells)}"] if cells else []
    found = rows(results, "kernel_speed", "prefill attention")
    for model in dict.fromkeys(row["model"] for row in found):
        cells = [f"{row['tokens']} {row['by']}: {row['us']:.0f} us{_share(row, 'of_products')}" for row in found if row["model"] == model]  # fmt: skip
        lines.append(f"prefill attention {model} {', '.join(cells)}")
    return lines


def _switches(results: Results) -> list[str]:
    lines = []
    for table, key, time in (("decode", "sequences", "step_ms"), ("prefill", "tokens", "ms")):
        found = rows(results, "switches", table)
        for count in dict.fromkeys(row[key] for row in found):
            cells = [f"{row['products']} {row[time]:.2f} ms" for row in found if row[key] == count]
            lines.append(f"switches, {table} {count}: {', '.join(cells)}")
    return lines
