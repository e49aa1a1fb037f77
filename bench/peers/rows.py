"""Rows of the results: what a comparison's runs come to, per model, width and workload.

Medians over rounds with their range, the ratio to the best peer of the same width, and the fraction of the roofline, whose
limits were measured beside each run.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bench.peers.comparison import Comparison, Run
from bench.peers.installation import OURS
from nanoserve.workloads.timeline import median_and_range


def rows(comparison: Comparison, about: dict[str, Any]) -> dict[str, Any]:
    """A row per workload, by "model/width/workload".

    Args:
        about: what else each row is to say: commit, date.
    """
    made = {}
    for workload in comparison.workloads:
        runs = {
            engine.name: found
            for engine in comparison.engines
            if (found := comparison.runs.get((workload.name, engine.name)))
        }
        failed = {
            name: comparison.failed[key]
            for name in runs
            if (key := (workload.name, name)) in comparison.failed
        }
        measured = {name: held for name, found in runs.items() if (held := _engine(workload.metric, found))}
        row: dict[str, Any] = {
            **about,
            "model": comparison.model, "width": comparison.width, "workload": workload.name, "metric": workload.metric,
            "scale": workload.scale, "threads": comparison.settings.threads, "engines": measured, "failed": failed,
            **against_best_peer({name: [_value(workload.metric, run) for run in found] for name, found in runs.items()}),
        }  # fmt: skip
        _add_agreement(row, runs)
        made[f"{comparison.model}/{comparison.width}/{workload.name}"] = row
    return made


def _value(metric: str, run: Run | None) -> float | None:
    return None if run is None else run.metrics[metric]


def _engine(metric: str, runs: Sequence[Run | None]) -> dict[str, Any] | None:
    """An engine's part of a row; None if it has no values."""
    done = [run for run in runs if run is not None and run.metrics[metric] is not None]
    if not done:
        return None
    shares = [
        value / ideal
        for run in done
        if (value := run.metrics[metric]) is not None
        and run.ideal is not None
        and (ideal := run.ideal[metric])
    ]
    read = [run.limits["read_gb_per_s"] for run in done if run.limits is not None]
    return {
        "values": [run.metrics[metric] for run in done],
        **median_and_range([value for run in done if (value := run.metrics[metric]) is not None]),
        "roofline": statistics.median(shares) if shares else None,
        "read_gb_per_s": read,
        "others_cores": [run.others_cores for run in done],
        **{name: _median(run.metrics[name] for run in done)
           for name in ("wall_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")},
    }  # fmt: skip


def _median(values: Iterable[float | None]) -> float | None:
    held = [value for value in values if value is not None]
    return statistics.median(held) if held else None


def against_best_peer(values: dict[str, Sequence[float | None]]) -> dict[str, Any]:
    """Our rate over the best peer's: the peer with the highest median, and the ratios round by round.

    Args:
        values: rates by engine, in the order of the rounds; None where an engine failed.
    """
    medians = {
        name: median
        for name, held in values.items()
        if name != OURS and (median := _median(held)) is not None
    }
    if OURS not in values or not medians:
        return {"best_peer": None, "ratio": None}
    best = max(medians, key=lambda name: medians[name])
    ratios = [
        ours / theirs for ours, theirs in zip(values[OURS], values[best], strict=True) if ours and theirs
    ]
    return {"best_peer": best, "ratio": median_and_range(ratios) if ratios else None}


def _add_agreement(row: dict[str, Any], runs: dict[str, list[Run | None]]) -> None:
    """How many of the first tokens are ours: whether all engines ran the same model on the same prompts.

    Near ties fall differently in another arithmetic, so a few may differ; nearly all differ if the models do.
    """
    ours = runs.get(OURS)
    for name, found in runs.items():
        if ours is None or name not in row["engines"]:
            continue
        equal = [
            a == b
            for mine, theirs in zip(ours, found, strict=True)
            if mine is not None and theirs is not None
            for a, b in zip(mine.first_tokens, theirs.first_tokens, strict=True)
            if b >= 0  # some servers do not tell every id
        ]
        row["engines"][name]["same_first_token"] = sum(equal) / len(equal) if equal else None
