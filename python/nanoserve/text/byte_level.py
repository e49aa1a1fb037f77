"""The byte <-> character table of byte-level BPE (GPT-2): every byte has a printable character that stands for it in a token.

Printable Latin-1 stands for itself; the other 68 bytes, in order, for the characters from U+0100 on.
"""

from __future__ import annotations

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]

BYTE_TO_CHAR: dict[int, str] = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + i) for i, byte in enumerate(_OTHERS)
}
_CHAR_TO_BYTE = {ord(char): byte for byte, char in BYTE_TO_CHAR.items()}


def bytes_of_token(token: str) -> bytes:
    """The bytes a token of a byte-level vocabulary stands for.

    An added token may hold characters outside of the table (a space, an emoji): it then stands for its own UTF-8, all of it.
    """
    try:
        return bytes([_CHAR_TO_BYTE[ord(char)] for char in token])
    except KeyError:
        return token.encode("utf-8")
