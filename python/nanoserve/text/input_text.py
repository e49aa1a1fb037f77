"""Text that comes from outside: a str, valid Unicode, within a limit."""

from __future__ import annotations

from nanoserve.checks import shown

MAX_TEXT_BYTES = 8 * 2**20  # of UTF-8; a rendered chat may be as long (chat_template.py)


def utf8_of(name: str, text: object) -> bytes:
    """The UTF-8 bytes of a text.

    Raises:
        ValueError: naming the field: not a str, a lone surrogate, or longer than MAX_TEXT_BYTES.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name}: {shown(text)} must be a string")
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(
            f"{name}: {len(text)} characters, at most {MAX_TEXT_BYTES} bytes of UTF-8 are allowed"
        )
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: character {error.start} is half of a surrogate pair, not Unicode text"
        ) from None
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"{name}: {len(data)} bytes of UTF-8, at most {MAX_TEXT_BYTES} are allowed")
    return data
