"""Compares nanoserve with the engines of a peers folder, and writes bench/results/peers.json and peers.svg.

    python -m bench.peers [--peers FOLDER] [--model NAME ...] [--width WIDTH ...] [--workload NAME ...] [--rounds N]

FOLDER (or the environment variable NANOSERVE_PEERS) is what README.md beside this file makes; an engine that is not in it is
left out. Rows that are measured replace their like in the results, all others stay.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from bench.peers.comparison import Comparison, Settings
from bench.peers.installation import OURS, WIDTHS, read_engines
from bench.peers.limits import LimitsProbe
from bench.peers.rows import rows
from bench.peers.tables import peers_figure, peers_table
from bench.run import RESULTS, commit, machine
from nanoserve.cli.byte_size import parse_size
from nanoserve.workloads import Workload, workload_names


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the engines, too
    engines = read_engines(args.peers)
    if unknown := sorted(set(args.engine or []) - engines.keys()):
        sys.exit(f"--engine: {unknown[0]!r} must be one of {', '.join(engines)}")
    chosen = [engine for name, engine in engines.items() if not args.engine or name in args.engine]
    workloads = [Workload.load(name) for name in args.workload]
    if args.scale is not None:
        workloads = [workload.scaled(args.scale) for workload in workloads]
    settings = Settings(args.rounds, args.threads, args.max_num_seqs, args.kv_cache, args.limit)
    results = read_results(args.output)
    about = {
        "command": command(args), "commit": commit(), "date": datetime.date.today().isoformat(), "note": args.note,
    }  # fmt: skip
    results |= {"command": "python -m bench.peers", "commit": commit(), "machine": machine()}
    try:
        probe = LimitsProbe(args.threads)
    except RuntimeError as error:
        print(f"no roofline: {error}", file=sys.stderr)
        probe = None
    for model in args.model:
        checkpoint = engines[OURS].checkpoint(model, "float32")
        for width in args.width:
            comparison = Comparison(chosen, model, checkpoint, width, workloads, settings, probe)
            comparison.run()
            results["rows"] |= rows(comparison, about)
            for name, facts in comparison.facts.items():
                results["engines"].setdefault(name, {})[width] = facts
            results["left_out"] |= {
                f"{model}/{width}/{name}": why for name, why in comparison.left_out.items()
            }
            args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            args.output.with_suffix(".svg").write_text(peers_figure(results), encoding="utf-8")
    print(peers_table(results))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    folder = os.environ.get("NANOSERVE_PEERS")
    parser.add_argument(
        "--peers", type=Path, default=folder, required=folder is None, help="default: $NANOSERVE_PEERS"
    )
    parser.add_argument("--engine", action="append", help="default: all of engines.json; may be repeated")
    parser.add_argument("--model", action="append", help="a name below FOLDER/models; default: small")
    parser.add_argument("--width", action="append", choices=WIDTHS, help="default: all three")
    parser.add_argument(
        "--workload", action="append", help=f"a file, or of {', '.join(workload_names())}; default: all"
    )
    parser.add_argument(
        "--scale", type=float, help="in place of the files' own: 0.25 leaves a quarter of the requests"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument(
        "--kv-cache", type=lambda text: parse_size("--kv-cache", text), metavar="SIZE",
        help="of each engine; default: what the largest workload has in flight, from 1 to 4 GiB",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=float, default=600, metavar="SECONDS", help="of one run, then its engine failed"
    )
    parser.add_argument("--note", help="kept with the rows, e.g. what else the machine was doing")
    parser.add_argument("--output", type=Path, default=RESULTS / "peers.json")
    args = parser.parse_args(argv)
    args.model = args.model or ["small"]
    args.width = args.width or list(WIDTHS)
    args.workload = args.workload or workload_names()
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds} must be at least 1")
    if args.threads < 1:
        parser.error(f"--threads: {args.threads} must be at least 1")
    return args


def command(args: argparse.Namespace) -> str:
    """What measures the same rows, without the places of this machine's folders."""
    words = ["python", "-m", "bench.peers", "--rounds", str(args.rounds), "--threads", str(args.threads)]
    for name in ("engine", "model", "width", "workload"):
        for value in getattr(args, name) or []:
            words += [f"--{name}", Path(value).name]
    return shlex.join(words)


def read_results(file: Path) -> dict[str, Any]:
    """What was measured before; empty results if there is no such file."""
    if not file.exists():
        return {"rows": {}, "engines": {}, "left_out": {}}
    held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return held


if __name__ == "__main__":
    main()
