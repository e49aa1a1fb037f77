"""The commands: prepare, run, show, and `part`, which `run` calls."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from tools.gpu_check.places import FOLDER, find_imports


def main() -> int:
    find_imports()
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description="The check on a GPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("prepare", help="compile the kernels that the check needs")
    add.add_argument("--chip", action="append", help="default: sm_90a")
    add.add_argument("--tiny", action="store_true", help="for the emulator")
    add.add_argument("--only", default="", help="parts, with commas between")
    add.add_argument("--jobs", type=int, default=os.cpu_count())
    add.add_argument("--folder", type=Path, default=FOLDER)
    add = commands.add_parser("run", help="run the check")
    add.add_argument(
        "--out", type=Path, required=True, help="the results, JSON; added to, if they are of the same kernels"
    )
    add.add_argument("--minutes", type=float, default=9.0)
    add.add_argument("--only", default="", help="parts, with commas between")
    add.add_argument("--fake", action="store_true", help="on the emulator, tiny")
    add.add_argument("--tiny", action="store_true", help="small problems")
    add.add_argument("--folder", type=Path, default=FOLDER)
    add = commands.add_parser("show", help="print a results file")
    add.add_argument("results", type=Path)
    add.add_argument("--all", action="store_true", help="every check and number")
    add = commands.add_parser("part")
    add.add_argument("name")
    add.add_argument("--folder", type=Path, required=True)
    add.add_argument("--out", type=Path, required=True)
    add.add_argument("--seconds", type=float, required=True)
    add.add_argument("--results", type=Path)
    add.add_argument("--fake", action="store_true")
    add.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    return {"prepare": prepare, "run": run, "show": show, "part": part}[given.command](given)


def names_of(text: str) -> list[str]:
    """Parts by name, in the check's order.

    Raises:
        SystemExit: there is none of a name.
    """
    from tools.gpu_check.parts import PARTS

    asked = [name for name in text.split(",") if name]
    known = [part.name for part in PARTS]
    strange = [name for name in asked if name not in known]
    if strange:
        raise SystemExit(f"--only: {', '.join(strange)} must be of {', '.join(known)}")
    return [name for name in known if name in asked]


def prepare(given: argparse.Namespace) -> int:
    from tools.gpu_check.prepare import folder_bytes, prepare

    begin = time.monotonic()
    counts = prepare(
        given.folder, given.chip or ["sm_90a"], parts=names_of(given.only), tiny=given.tiny, jobs=given.jobs
    )
    told = ", ".join(f"{count} kernels for {chip}" for chip, count in counts.items())
    print(
        f"{told}: {folder_bytes(given.folder) / 2**20:.1f} MiB in {given.folder}, {time.monotonic() - begin:.0f} s"
    )
    return 0


def run(given: argparse.Namespace) -> int:
    from tools.gpu_check import manifest

    begin = time.monotonic()
    parts = names_of(given.only)
    prepared = manifest.read(given.folder)
    about = {"command": "python -m tools.gpu_check " + " ".join(sys.argv[1:])}
    if not given.fake and not os.environ.get("NANOSERVE_NATIVE"):
        from tools.gpu_check.build import build_native

        os.environ["NANOSERVE_NATIVE"] = str(build_native(given.folder / "native"))
        print(f"native module built in {time.monotonic() - begin:.0f} s", flush=True)
    from bench.run import commit, machine
    from tools.gpu_check.run import Runner
    from tools.gpu_check.show import shown

    about |= {"commit": commit(), "machine": machine(), "kernels": manifest.kernels_digest(prepared)}
    if about["commit"] == "unknown":  # a copy of the tree without its history
        about["commit"] = prepared["commit"]
    seconds = given.minutes * 60 - (time.monotonic() - begin)
    runner = Runner(given.folder, given.out, seconds, fake=given.fake, tiny=given.tiny, about=about)
    passed = runner.run(parts)
    print(shown(runner.results))
    return 0 if passed else 1


def show(given: argparse.Namespace) -> int:
    from tools.gpu_check.show import everything, shown

    results = json.loads(given.results.read_text(encoding="utf-8"))
    print(everything(results) if given.all else shown(results))
    return 0


def part(given: argparse.Namespace) -> int:
    from tools.gpu_check.gpu import Gpu
    from tools.gpu_check.parts import BY_NAME
    from tools.gpu_check.record import Record

    record = Record(given.out, given.seconds)
    gpu = Gpu(given.folder, fake=given.fake, tiny=given.tiny)
    if given.results is not None and given.results.exists():
        gpu.results = json.loads(given.results.read_text(encoding="utf-8"))["parts"]
    BY_NAME[given.name].module.run(gpu, record)
    record.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
