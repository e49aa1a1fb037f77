"""The tokenizer of models with a vocabulary of 256 and no tokenizer files: a token is a byte of UTF-8."""

from __future__ import annotations

from collections.abc import Iterable

from nanoserve.text.byte_level import BYTE_TO_CHAR, bytes_of_token
from nanoserve.text.decoder import Decoder
from nanoserve.text.detokenizer import IncrementalDetokenizer
from nanoserve.text.input_text import utf8_of


class ByteTokenizer:
    """Bytes as tokens; no special tokens. The interface is Tokenizer's."""

    vocab_size = 256
    is_byte_level = True
    special_ids: frozenset[int] = frozenset()
    bos_token: str | None = None
    eos_token: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __init__(self) -> None:
        self.decoder = Decoder({"type": "ByteLevel"})
        self.special_tokens: dict[str, str] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's UTF-8; there are no special tokens to add."""
        return list(utf8_of("text", text))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        stream = IncrementalDetokenizer(self, skip_special_tokens)
        return "".join(map(stream.push, ids)) + stream.finish()

    def token_string(self, token: int) -> str | None:
        return BYTE_TO_CHAR[token]

    def token_bytes(self, token: int) -> bytes:
        return bytes_of_token(BYTE_TO_CHAR[token])

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", "replace")
