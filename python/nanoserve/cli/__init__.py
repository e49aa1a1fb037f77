"""The `nanoserve` command: one file per subcommand, and what they share.

    app.py          the program: subcommands, --version, how errors become exit codes
    generate.py     chat.py  bench.py  plan.py  doctor.py  explain.py
    options.py      sampling and engine options, from one table each
    opening.py      a checkpoint opened as a command wants it, with loading bars on a terminal
    terminal.py     model text on a terminal: shown, never obeyed

Importing this package imports typer and numpy, but no engine, no native module and no compiler: those wait until a command
runs that needs them, so that --help answers at once.
"""

from nanoserve.cli.app import main

__all__ = ["main"]
