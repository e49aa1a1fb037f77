"""Special tokens as tokenizer_config.json, special_tokens_map.json and added_tokens.json declare them.

The order of precedence is transformers 5's: with `added_tokens_decoder` in tokenizer_config.json that file alone counts; without,
the other two files complete and override it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from nanoserve.checkpoint_json import is_text, read_object
from nanoserve.checks import shown
from nanoserve.errors import CheckpointError

CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
MAX_CONFIG_BYTES = 16 * 2**20
MAX_ADDED_TOKENS = 65536
MAX_TOKEN_CHARS = 4096

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(slots=True)
class SpecialTokens:
    """Declared tokens, not yet matched with a vocabulary.

    Attributes:
        config: tokenizer_config.json, empty when missing.
        added: `added_tokens_decoder` in the order of ids.
        named: bos_token and the like, model-specific ones (image_token) included.
        extra: additional special tokens without a name.
    """

    config: dict[str, Any]
    added: list[AddedToken] = field(default_factory=list)
    named: dict[str, AddedToken] = field(default_factory=dict)
    extra: list[AddedToken] = field(default_factory=list)

    @classmethod
    def load(cls, directory: Path) -> SpecialTokens:
        """Reads the files that are there.

        Raises:
            CheckpointError: naming file and field.
        """
        config = read_object(directory / CONFIG_FILE, MAX_CONFIG_BYTES, optional=True)
        tokens = cls(config)
        tokens._take(CONFIG_FILE, config)
        if config.get("added_tokens_decoder") is not None:
            tokens._take_decoder(config["added_tokens_decoder"])
        else:
            tokens._take(MAP_FILE, read_object(directory / MAP_FILE, MAX_CONFIG_BYTES, optional=True))
            tokens._take_added_file(read_object(directory / ADDED_FILE, MAX_CONFIG_BYTES, optional=True))
        if len(tokens.added) + len(tokens.named) + len(tokens.extra) > MAX_ADDED_TOKENS:
            raise CheckpointError(f"{CONFIG_FILE}: more than {MAX_ADDED_TOKENS} special tokens")
        return tokens

    def flag(self, name: str) -> bool:
        """A true/false field of tokenizer_config.json; false when missing or null."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{CONFIG_FILE}: {name}: {shown(value)} must be true or false")
        return bool(value)

    def missing_from(self, known: set[str]) -> Iterator[AddedToken]:
        """Declared tokens the vocabulary's own added tokens lack, each once, in the order that gives them their ids."""
        seen = set(known)
        for token in [*self.added, *self.named.values(), *self.extra]:
            if token.content not in seen:
                seen.add(token.content)
                yield token

    def _take(self, file: str, fields: dict[str, Any]) -> None:
        declared = {token.content: token for token in self.added}
        for name, value in fields.items():
            is_token = isinstance(value, str) or (isinstance(value, dict) and "content" in value)
            if name in NAMES or (name.endswith("_token") and is_token):
                if value is None:
                    self.named.pop(name, None)
                    continue
                token = _token(file, name, value)
                self.named[name] = declared.get(token.content, token)
        for name in ("extra_special_tokens", "additional_special_tokens"):
            value = fields.get(name)
            if isinstance(value, dict):
                for key, item in value.items():
                    self.named[key] = _token(file, f"{name}[{shown(key)}]", item)
            elif isinstance(value, list):
                self.extra = [_token(file, f"{name}[{i}]", item) for i, item in enumerate(value)]
            elif value is not None:
                raise CheckpointError(f"{file}: {name}: {shown(value)} must be a list or an object")
            if value:
                break  # the older name is read only when the newer one is absent or empty

    def _take_decoder(self, value: object) -> None:
        name = "added_tokens_decoder"
        if not isinstance(value, dict):
            raise CheckpointError(f"{CONFIG_FILE}: {name}: {shown(value)} must be an object of id: token")
        by_id: dict[int, AddedToken] = {}
        for key, item in value.items():
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise CheckpointError(f"{CONFIG_FILE}: {name}: key {shown(key)} must be a token id")
            if not isinstance(item, dict):
                raise CheckpointError(f"{CONFIG_FILE}: {name}[{key}]: {shown(item)} must be an object")
            by_id[int(key)] = _token(CONFIG_FILE, f"{name}[{key}]", item)
        self.added = [by_id[token_id] for token_id in sorted(by_id)]
        declared = {token.content: token for token in self.added}
        self.named = {key: declared.get(token.content, token) for key, token in self.named.items()}

    def _take_added_file(self, fields: dict[str, Any]) -> None:
        special = {token.content for token in [*self.named.values(), *self.extra]}
        for content, token_id in fields.items():
            if not is_text(content) or isinstance(token_id, bool) or not isinstance(token_id, int):
                raise CheckpointError(f"{ADDED_FILE}: {shown(content)}: {shown(token_id)} must be a token id")
        for content in sorted(fields, key=fields.__getitem__):
            is_special = content in special
            self.added.append(
                _checked(ADDED_FILE, shown(content), content, special=is_special, normalized=not is_special)
            )


def _token(file: str, name: str, value: object) -> AddedToken:
    """A token from its string form, which is special, or its object form, which says so (in special_tokens_map.json all are)."""
    if isinstance(value, str):
        return _checked(file, name, value, special=True)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {name}: {shown(value)} must be a string or an object with content")
    flags: dict[str, bool] = {"special": file == MAP_FILE}
    for flag in _FLAGS:
        if flag in value:
            if not isinstance(value[flag], bool):
                raise CheckpointError(f"{file}: {name}.{flag}: {shown(value[flag])} must be true or false")
            flags[flag] = value[flag]
    return _checked(file, f"{name}.content", value.get("content"), **flags)


def _checked(file: str, name: str, content: object, **flags: bool) -> AddedToken:
    if not isinstance(content, str) or not is_text(content) or not 0 < len(content) <= MAX_TOKEN_CHARS:
        raise CheckpointError(
            f"{file}: {name}: {shown(content)} must be text of 1 to {MAX_TOKEN_CHARS} characters"
        )
    return AddedToken(content, **flags)
