"""A checkpoint's tokenizer: text to token ids and back.

tokenizer.json is the truth: the `tokenizers` library runs it as it stands, and its post-processor alone says which special
tokens an encoding begins and ends with (transformers 5 ignores add_bos_token and add_eos_token where a tokenizer.json exists;
so does this). tokenizer_config.json and special_tokens_map.json name the special tokens. The ids equal those of transformers'
AutoTokenizer, with a limit: for tokenizer_class LlamaTokenizer, GPT2Tokenizer, GemmaTokenizer or Qwen2Tokenizer it keeps the
vocabulary only and builds the rest from code. Published checkpoints agree with that code, save Llama-2's kind: there, text that
begins with a space or follows a special token is split as by the original SentencePiece model here, and differently there.

Not done: `clean_up_tokenization_spaces` (transformers ignores it for BPE too), truncation and padding of tokenizer.json.

Nothing in the files is trusted: sizes and shapes are checked before the library reads them, and its failures, Rust panics
included, become CheckpointError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from nanoserve.checkpoint_json import parse_object, read_limited
from nanoserve.checks import shown
from nanoserve.errors import CheckpointError
from nanoserve.text.byte_tokenizer import ByteTokenizer
from nanoserve.text.decoder import Decoder
from nanoserve.text.detokenizer import IncrementalDetokenizer
from nanoserve.text.input_text import utf8_of
from nanoserve.text.special_tokens import CONFIG_FILE, SpecialTokens

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_TOKENS = 2**22
_OTHER_FORMATS = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json", "merges.txt", "vocab.txt")

T = TypeVar("T")


class Tokenizer:
    """Text to ids and ids to text, for a model with `vocab_size` token ids.

    Attributes:
        vocab_size: of the model; the tokenizer may know fewer or more tokens.
        bos_token, eos_token: their text, None when the checkpoint has none; bos_token_id, eos_token_id likewise.
        special_tokens: name -> text of every named special token, for chat templates.
        special_ids: tokens that `skip_special_tokens` skips.
        is_byte_level: tokens are bytes in disguise (GPT-2's kind).
        decoder: turns token strings into text.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, vocab_size: int, special_tokens: dict[str, str]
    ) -> None:
        self._backend = backend
        self.vocab_size = vocab_size
        self.special_tokens = special_tokens
        self.decoder = Decoder.of_library(backend.decoder)
        self.is_byte_level = self.decoder.is_byte_level
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.bos_token = special_tokens.get("bos_token")
        self.eos_token = special_tokens.get("eos_token")
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self._token_bytes: dict[int, bytes] = {}  # at most one entry per token of the vocabulary

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. A rendered chat template holds its special tokens already: encode it with add_special_tokens=False.

        Raises:
            ValueError: not a str, half of a surrogate pair, too long, or a token outside the model's vocabulary.
        """
        utf8_of("text", text)
        ids: list[int] = _guarded(
            lambda: self._backend.encode(text, add_special_tokens=add_special_tokens).ids,
            lambda why: ValueError(f"text: the tokenizer failed on it ({why})"),
        )
        if ids and max(ids) >= self.vocab_size:
            raise ValueError(
                f"text: contains token {max(ids)} ({shown(self.token_string(max(ids)))}), "
                f"the model's vocabulary ends at {self.vocab_size - 1}"
            )
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a token sequence: what an IncrementalDetokenizer gives for it, by construction."""
        stream = IncrementalDetokenizer(self, skip_special_tokens)
        return "".join(map(stream.push, ids)) + stream.finish()

    def token_string(self, token: int) -> str | None:
        """How the vocabulary spells a token; None for an id the tokenizer does not have."""
        return self._backend.id_to_token(token)

    def token_bytes(self, token: int) -> bytes:
        """What a single token contributes in the middle of a text, as UTF-8; exact where tokens are bytes.

        Raises:
            ValueError: the id is outside the model's vocabulary.
        """
        known = self._token_bytes.get(token)
        if known is None:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token: {shown(token)} must be in [0, {self.vocab_size - 1}]")
            string = self.token_string(token)
            known = b"" if string is None else self.decoder.token_bytes(string)
            self._token_bytes[token] = known
        return known

    def token_text(self, token: int) -> str:
        """The same as text: U+FFFD for bytes that are not UTF-8 by themselves."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        if text is None:
            return None
        token_id = self._backend.token_to_id(text)
        if token_id is None or token_id >= self.vocab_size:
            raise CheckpointError(
                f"{CONFIG_FILE}: {name}: {shown(text)} has id {token_id}, the model's vocabulary ends at {self.vocab_size - 1}"
            )
        return token_id


def load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer | ByteTokenizer | None:
    """The tokenizer of a checkpoint directory.

    Returns:
        None when there are no tokenizer files; a ByteTokenizer if the vocabulary then has exactly 256 tokens.

    Raises:
        CheckpointError: naming file and field, or the format and how to convert it.
    """
    directory = Path(directory)
    data = read_limited(directory / TOKENIZER_FILE, MAX_TOKENIZER_BYTES)
    if data is None:
        for name in _OTHER_FORMATS:
            if (directory / name).exists():
                raise CheckpointError(
                    f"{name}: this tokenizer format needs conversion to {TOKENIZER_FILE}: "
                    "transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
                )
        return ByteTokenizer() if vocab_size == 256 else None
    _check_shape(parse_object(TOKENIZER_FILE, data))
    backend: tokenizers.Tokenizer = _guarded(lambda: tokenizers.Tokenizer.from_buffer(data), _damaged)
    special = SpecialTokens.load(directory)
    _guarded(lambda: _prepare(backend, special), _damaged)
    names = {name: token.content for name, token in special.named.items()}
    try:
        tokenizer = _guarded(lambda: Tokenizer(backend, vocab_size, names), _damaged)
        tokenizer.encode("")  # the post-processor's own tokens
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{TOKENIZER_FILE}: post_processor: {error}") from error
    return tokenizer


def _check_shape(root: dict[str, Any]) -> None:
    model = root.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{TOKENIZER_FILE}: model: {shown(model)} must be an object")
    if model.get("dropout"):
        raise CheckpointError(
            f"{TOKENIZER_FILE}: model.dropout: {shown(model['dropout'])}, the same text must always give the same tokens"
        )
    _check_merges(model.get("merges"), model.get("continuing_subword_prefix"))
    vocab = model.get("vocab")
    if not isinstance(vocab, dict | list):
        raise CheckpointError(f"{TOKENIZER_FILE}: model.vocab: {shown(vocab)} must be an object or a list")
    added = root.get("added_tokens", [])
    if not isinstance(added, list):
        raise CheckpointError(f"{TOKENIZER_FILE}: added_tokens: {shown(added)} must be a list")
    if len(vocab) + len(added) > MAX_TOKENS:
        raise CheckpointError(
            f"{TOKENIZER_FILE}: {len(vocab) + len(added)} tokens, at most {MAX_TOKENS} are allowed"
        )


def _check_merges(merges: object, prefix: object) -> None:
    """The library cuts the prefix off each right half without looking: inside a character that aborts the process."""
    if not isinstance(prefix, str) or not prefix or not isinstance(merges, list):
        return
    for i, merge in enumerate(merges):
        right = (
            merge.partition(" ")[2]
            if isinstance(merge, str)
            else merge[-1]
            if isinstance(merge, list) and merge
            else None
        )
        if not isinstance(right, str) or not right.startswith(prefix):
            raise CheckpointError(
                f"{TOKENIZER_FILE}: model.merges[{i}]: {shown(merge)} must continue with "
                f"continuing_subword_prefix {shown(prefix)}"
            )


def _prepare(backend: tokenizers.Tokenizer, special: SpecialTokens) -> None:
    """What transformers does to the library's tokenizer after loading it."""
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = special.flag("split_special_tokens")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = {token.content for token in special.named.values()}
    missing = list(special.missing_from(known))
    for token in missing:
        token.special = token.special or token.content in named
    if missing:
        backend.add_tokens(missing)


def _damaged(why: str) -> CheckpointError:
    return CheckpointError(f"{TOKENIZER_FILE}: the tokenizers library refuses it: {why}")


def _guarded(call: Callable[[], T], error: Callable[[str], ValueError]) -> T:
    """The library raises plain Exception, and a Rust panic is a BaseException without a public type."""
    try:
        return call()
    except CheckpointError:
        raise
    except BaseException as failure:
        if not isinstance(failure, Exception) and type(failure).__name__ != "PanicException":
            raise  # KeyboardInterrupt, SystemExit
        raise error(shown(str(failure))) from failure
