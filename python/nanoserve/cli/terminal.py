"""Model text on its way to the user.

On a terminal every control character but newline and tab is shown as an escape (`\x1b`), so that no model, and no file of a
checkpoint that ends up in a message, can move the cursor, set the title or answer the terminal's own queries. Into a file or
a pipe text goes as it is. Nothing here goes through rich, which would read "[bold]" in it as markup.
"""

from __future__ import annotations

import sys
from typing import TextIO

# C0 without \t and \n, DEL, and C1, whose U+009B starts a sequence by itself.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def visible(text: str) -> str:
    """The text with control characters shown instead of sent."""
    return text.translate(_ESCAPES)


def write(text: str, stream: TextIO | None = None) -> None:
    """To stdout (or `stream`) at once, visible if that is a terminal."""
    out = sys.stdout if stream is None else stream
    out.write(visible(text) if out.isatty() else text)
    out.flush()


def say(text: str, *, dim: bool = False) -> None:
    """One line of the program's own to stderr."""
    is_terminal = sys.stderr.isatty()
    line = visible(text) if is_terminal else text
    print(f"\x1b[2m{line}\x1b[0m" if dim and is_terminal else line, file=sys.stderr, flush=True)


def tolerate_encodings() -> None:
    """A character that stdout's encoding lacks becomes a "?" instead of an error in the middle of an answer."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
