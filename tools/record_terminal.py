"""Draw a terminal program's session as SVG: it really runs, on a pseudo-terminal, and is typed to.

    python tools/record_terminal.py docs/chat.svg --type "The function returns " --type " and" -- \
        python -m nanoserve chat models/tiny-gpt --plain --max-tokens 60 --temperature 0

Each --type is a line sent when the program has been silent for a moment; then end-of-file.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import select
import subprocess
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, SILENCE_S, LIMIT_S = 100, 2.0, 120.0


def record(command: list[str], lines: list[str]) -> str:
    """Everything the program wrote to its terminal."""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    program = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        close_fds=True,
        start_new_session=True,
        env=environment,
    )
    os.close(slave)
    seen, pending = b"", [*(line + "\n" for line in lines), "\x04"]
    try:
        while True:
            ready, _, _ = select.select([master], [], [], SILENCE_S)
            if ready:
                try:
                    chunk = os.read(master, 65536)
                except OSError:  # the program closed its side
                    break
                if not chunk:
                    break
                seen += chunk
            elif pending:
                os.write(master, pending.pop(0).encode())
            else:
                break
        program.wait(LIMIT_S)
    finally:
        program.kill()
        os.close(master)
    return seen.decode("utf-8", "replace").replace("\r\n", "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path)
    parser.add_argument("--type", action="append", default=[], metavar="LINE")
    parser.add_argument("--title", default="nanoserve")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    console = Console(width=COLUMNS, record=True, file=io.StringIO(), force_terminal=True)
    shown = " ".join(options.command).removeprefix("python -m ")
    console.print(Text(f"$ {shown}", style="bold"))
    console.print(Text.from_ansi(record(options.command, options.type)))
    svg = console.export_svg(title=options.title)
    options.picture.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
