"""`nanoserve doctor`: can this machine serve, and if not, what to do about it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanoserve.cli.terminal import visible

if TYPE_CHECKING:
    from nanoserve.cli.health import Finding

_STYLES = {"ok": "green", "note": "yellow", "bad": "bold red"}


def doctor(
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Compile and run a tiny model, some seconds' work.", show_default=True)
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="The findings as one JSON object.")] = False,
) -> None:  # fmt: skip
    """Check what serving needs on this machine: module, compiler, CPU, memory, kernel cache, packages.

    Every line says what was found, and what it means; a line that is not ok says how to mend it. "note" is something optional
    or slower, "bad" keeps this machine from serving. The exit code is 0 if it can serve, 1 otherwise. Nothing is changed.

    Examples:
      nanoserve doctor
      nanoserve doctor --no-run --json
    """
    from nanoserve.cli import health

    found = []
    console = Console(highlight=False)
    for finding in health.findings(run):
        found.append(finding)
        if not as_json:
            console.print(_rows(finding))
    can_serve = all(finding.status != health.BAD for finding in found)
    if as_json:
        print(json.dumps({"can_serve": can_serve, "findings": [asdict(finding) for finding in found]}))
    else:
        console.print(
            "This machine can serve." if can_serve else "This machine cannot serve: see what is bad above."
        )
    if not can_serve:
        raise typer.Exit(1)


def _rows(finding: Finding) -> Table:
    """A finding as a grid, so that long values wrap in their own column."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=4, no_wrap=True)
    grid.add_column(width=17, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(
        Text(finding.status, _STYLES[finding.status]),
        Text(finding.name, "bold"),
        Text(visible(finding.value)),
    )
    grid.add_row("", "", Text(finding.meaning, "dim"))
    if finding.fix:
        grid.add_row("", "", Text(f"to do: {visible(finding.fix)}"))
    return grid
