"""`nanoserve bench`: how fast this engine serves a checkpoint here, workload by workload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import nanoserve
from nanoserve.checks import number, whole_number
from nanoserve.cli.opening import open_model
from nanoserve.cli.options import with_engine
from nanoserve.cli.terminal import say, visible
from nanoserve.workloads import Workload, play, workload_names
from nanoserve.workloads.timeline import METRICS, PERCENTILES, median_and_range

if TYPE_CHECKING:
    from nanoserve.llm import LLM

DEFAULT = ("prefill-512", "decode-1", "decode-16", "chatbot")
MAX_ROUNDS = 1000


@with_engine
def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub name.", show_default=False)],
    workload: Annotated[
        list[str] | None,
        typer.Option("--workload", metavar="NAME", help=f"A .json file, or one of {', '.join(workload_names())}. May be given "
                     f"several times. [{', '.join(DEFAULT)}, as far as the model is long enough]", show_default=False),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="COUNT", help="Runs of each workload that count.")] = 3,
    scale: Annotated[
        float | None,
        typer.Option("--scale", metavar="SHARE", help="Of each workload's requests, in place of its own, e.g. 0.25.",
                     show_default=False),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write every round's numbers to this file.", show_default=False),
    ] = None,
    *,
    engine: dict[str, Any],
) -> None:  # fmt: skip
    """Measure a checkpoint on this machine: tokens per second, latencies, prefix cache hits.

    A workload is a file that fixes how many requests there are and every token of them; those that come with nanoserve are named
    below. Decoding is greedy, EOS is ignored, the prefix cache is on, and each round draws new tokens of the same lengths.
    Shown are medians over the rounds, with the range of the number that the workload is about. Weights may be random.

    Examples:
      nanoserve bench models/tiny-gpt
      nanoserve bench MODEL --workload mixed --workload shared-prefix --max-num-seqs 64
      nanoserve bench MODEL --workload my-traffic.json --rounds 5 --threads 1 --json out.json
    """
    whole_number("--rounds", rounds, 1, MAX_ROUNDS)
    if scale is not None:
        number("--scale", scale, 0, 1)
    if json_file is not None and not json_file.parent.is_dir():  # now, not after minutes of measuring
        raise ValueError(f"--json: there is no folder {json_file.parent}")
    chosen = [_load(name) for name in workload or DEFAULT]
    if twice := [
        one.name for at, one in enumerate(chosen) if one.name in {other.name for other in chosen[:at]}
    ]:
        raise ValueError(f"--workload: there are two by the name of {twice[0]}")
    if scale is not None:
        chosen = [one.scaled(scale) for one in chosen]
    llm = open_model(model, engine)
    longest = llm.engine.executor.max_model_len
    for one in [one for one in chosen if one.longest > longest]:
        reason = f"{one.name}: has sequences of {one.longest} tokens, this engine takes {longest}"
        if workload:
            raise ValueError(f"--workload: {reason}")
        say(f"note: left out {reason}", dim=True)
        chosen.remove(one)
    if not chosen:
        raise ValueError("--workload: none of the default ones is short enough for this model, name one")
    results = {one.name: _measure(llm, one, rounds) for one in chosen}
    about = {"model": model, "nanoserve": nanoserve.__version__, "threads": llm.engine.executor.num_threads,
             "device": llm.engine.device_name}  # fmt: skip
    if json_file is not None:
        json_file.write_text(json.dumps({**about, "workloads": results}, indent=1) + "\n", encoding="utf-8")
    console = Console(highlight=False)
    for table in (_rates(results), _latencies(results)):
        console.print(table)
    console.print(
        visible(f"{model}, {about['device']}, {about['threads']} threads, median of {rounds} rounds"),
        style="dim",
    )


def _load(name: str) -> Workload:
    try:
        return Workload.load(name)
    except ValueError as error:
        raise ValueError(f"--workload: {error}") from error


def _measure(llm: LLM, workload: Workload, rounds: int) -> dict[str, Any]:
    """The metrics of each round, and their medians."""
    from nanoserve.workloads.engine_server import EngineServer

    server = EngineServer(llm.engine)
    play(server, workload.warm_up(llm.config.vocab_size), workload.max_in_flight)
    found: list[dict[str, Any]] = []
    for round_number in range(1, rounds + 1):
        requests = workload.draw(llm.config.vocab_size, round_number)
        llm.engine.reset_stats()
        made: dict[str, Any] = dict(play(server, requests, workload.max_in_flight).metrics())
        stats = llm.engine.get_stats()
        scheduled = stats["steps"] * stats["avg_requests_per_step"] * stats["scheduler_us_per_request_step"]
        made["cache_hit_rate"] = stats["cache_hit_rate"]
        made["scheduler_share"] = 1e-6 * scheduled / made["wall_s"]
        made["preemptions"] = stats["preemptions"]
        found.append(made)
    spread = {
        name: median_and_range([one[name] for one in found])
        for name in found[0]
        if found[0][name] is not None
    }
    return {
        "metric": workload.metric, "scale": workload.scale, "requests": workload.num_requests,
        "max_in_flight": workload.max_in_flight, "rounds": found, "summary": spread,
    }  # fmt: skip


def _rates(results: dict[str, Any]) -> Table:
    table = _table("tokens/s", "in", "out", "prefill", "decode", "range", "cached", "scheduler")
    for name, result in results.items():
        summary = result["summary"]
        about = summary[result["metric"]]
        rates = [
            _median(summary, metric) for metric in ("input_tokens_per_s", "output_tokens_per_s", *METRICS[:2])
        ]
        table.add_row(
            visible(name), *rates, f"{about['min']:,.0f}-{about['max']:,.0f}",
            f"{100 * summary['cache_hit_rate']['median']:.0f}%", f"{100 * summary['scheduler_share']['median']:.1f}%",
        )  # fmt: skip
    return table


def _latencies(results: dict[str, Any]) -> Table:
    ranks = [f"{kind} p{rank}" for kind in ("first", "next") for rank in PERCENTILES]
    table = _table("ms to the token", *ranks)
    for name, result in results.items():
        cells = [
            _median(result["summary"], f"{kind}_p{rank}_ms")
            for kind in ("ttft", "itl")
            for rank in PERCENTILES
        ]
        table.add_row(visible(name), *cells)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _median(summary: dict[str, Any], name: str) -> str:
    if name not in summary:
        return "-"
    value = summary[name]["median"]
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
