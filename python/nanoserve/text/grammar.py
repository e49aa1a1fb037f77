"""Structured outputs compiled for one vocabulary: which tokens keep a text on its way to the form that was asked for.

The library llguidance does the work: it turns a JSON schema or a regular expression into an Earley parser over bytes
and walks a trie of the vocabulary's bytes for the mask of the next token. A token is allowed exactly if the text with
it can still become one that the grammar accepts; how the tokenizer itself would have split that text does not matter.

Bounds. What a spec may say is limited before it comes here (structured.py). Compiling runs on a thread of its own
with a stack for the deepest spec that its size allows, because the library recurses; states, items and steps of
parser and lexer are limited, so is the memory of a step, and a grammar that exceeds them fails with a ValueError:
when it is compiled (the first mask included), else in the request that got there. Compiled grammars are kept, the
latest ones.

Between the parts of a JSON text there may be a space or two, or a new line and its indentation, and no more: a model
that likes blanks would never come to an end.

A decoder that drops the space a text begins with (Llama 2's) is given one to drop: the grammar asks for it, and only
tokens that lose this space and nothing else may come first.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nanoserve.structured import StructuredOutputs
from nanoserve.text.byte_tokenizer import ByteTokenizer
from nanoserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_KEPT = 64  # compiled grammars
MAX_KEPT_BYTES = 2**20  # of their specs
MAX_TOKEN_BYTES = 255  # longer tokens are never allowed: the library's trie has none
# Reserved, not used: 64 KiB of schema nested or referring on and on take some 40 MiB.
_STACK_BYTES = 256 * 2**20
_LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
_BLANKS = r"( {1,2}|\r?\n( {0,32}|\t{0,8}))"
# The library would else look for the tokenizer's own split of texts without a choice, and allow only that.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
_PROBES = ('{"a": [1, -2.5e3], "b": null}', "x y  z", "é 你好")

T = TypeVar("T")


class Grammar:
    """One spec, compiled. Read-only: any number of matchers come from it."""

    def __init__(self, prototype: LLMatcher, vocab_size: int, first: NDArray[np.uint32] | None) -> None:
        self._prototype = prototype
        self._vocab_size = vocab_size
        self._first = first

    def matcher(self) -> Matcher:
        """For one sequence, at its beginning."""
        return Matcher(self._prototype.deep_copy(), self._vocab_size, self._first)


class Matcher:
    """Follows one sequence through a grammar; what the engine calls a Constraint.

    Args:
        first: of all tokens, those that may come first; None for all.

    Raises:
        ValueError: the grammar went beyond a limit, or was given a token it does not allow.
    """

    __slots__ = ("_address", "_first", "_mask", "_matcher", "_view")

    def __init__(self, matcher: LLMatcher, vocab_size: int, first: NDArray[np.uint32] | None = None) -> None:
        self._matcher = matcher
        self._first = first
        # One token more than the vocabulary: the library's own end.
        self._mask = np.zeros(vocab_size // 32 + 1, np.uint32)
        self._address = self._mask.ctypes.data
        self._view = self._mask[: -(-vocab_size // 32)]

    def allowed(self) -> NDArray[np.uint32]:
        """uint32[ceil(V / 32)], valid until the next call."""
        self._matcher.unsafe_compute_mask_ptr(self._address, self._mask.nbytes)
        self._check()
        if self._first is not None:
            np.bitwise_and(self._view, self._first, out=self._view)
        return self._view

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            self._check()
            raise ValueError(f"structured_outputs: token {token} is not allowed here")
        self._first = None

    def may_end(self) -> bool:
        return bool(self._matcher.is_accepting())

    def must_end(self) -> bool:
        return bool(self._matcher.is_stopped()) and self.may_end()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"structured_outputs: {_reason(self._matcher.get_error())}")


class GrammarCompiler:
    """Compiles for one tokenizer and keeps the latest results. Any thread may call it.

    Args:
        tokenizer: whose tokens are to be allowed; the library's copy of it is made when it is first needed.
        vocab_size: of the model.
        textless: tokens that stand for no text, beside the tokenizer's special ones, as EOS; never allowed.
    """

    def __init__(
        self, tokenizer: Tokenizer | ByteTokenizer, vocab_size: int, textless: Collection[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._textless = frozenset(textless) | tokenizer.special_ids
        self._library: LLTokenizer | None = None
        self._first: NDArray[np.uint32] | None = None
        self._kept: OrderedDict[StructuredOutputs, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, spec: StructuredOutputs) -> Grammar:
        """The grammar of a spec.

        Raises:
            ValueError: naming the field and why it cannot be compiled.
        """
        with self._lock:
            known = self._kept.get(spec)
            if known is not None:
                self._kept.move_to_end(spec)
                return known
            library = self._prepared()
        try:
            prototype = _on_deep_stack(lambda: self._prototype(library, spec))
        except ValueError as error:
            raise ValueError(f"structured_outputs.{spec.form}: {error}") from error
        grammar = Grammar(prototype, self._vocab_size, self._first)
        with self._lock:
            self._kept[spec] = grammar
            while len(self._kept) > MAX_KEPT or sum(one.num_bytes for one in self._kept) > MAX_KEPT_BYTES:
                self._kept.popitem(last=False)
        return grammar

    def _prepared(self) -> LLTokenizer:
        if self._library is None:
            drops_a_space = _drops_a_space(self._tokenizer)
            _check_joins(self._tokenizer, drops_a_space)
            if drops_a_space:
                self._first = _losing_a_space(self._tokenizer, self._vocab_size, self._textless)
            self._library = _library_tokenizer(self._tokenizer, self._vocab_size, self._textless)
        return self._library

    def _prototype(self, library: LLTokenizer, spec: StructuredOutputs) -> LLMatcher:
        from llguidance import LLMatcher

        space = "" if self._first is None else '" " '
        text = f"{_OPTIONS}start: {space}body\nbody: {_body(spec)}\n"
        matcher = LLMatcher(library, LLMatcher.grammar_from_lark(text), log_level=0, limits=_limits())
        # The first mask is computed here, not in a step; copies begin with what it has learnt.
        first = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(_reason(matcher.get_error()))
        if not np.unpackbits(np.frombuffer(first, np.uint8), bitorder="little")[: self._vocab_size].any():
            raise ValueError("only the empty text has this form")
        return matcher


def _body(spec: StructuredOutputs) -> str:
    """A spec in the library's dialect of Lark."""
    if spec.choice is not None:
        texts = sorted(set(spec.choice))
        return f"/{'|'.join(''.join(map(_literal, text)) for text in texts)}/"
    if spec.regex is not None:
        from llguidance import regex_to_lark

        return f"/{regex_to_lark(spec.regex)}/"
    if spec.tagged is not None:
        begin, end = (f"{json.dumps(text)} " if text else "" for text in (spec.tagged.begin, spec.tagged.end))
        more = ' ("\\n" one)*' if spec.tagged.several else ""
        return f"one{more}\none: {begin}value {end}\nvalue: {_json(spec.tagged.json)}"
    return _json(spec.json if spec.json is not None else '{"type": "object"}')


def _json(schema_text: str | Mapping[str, Any]) -> str:
    """The values of a schema, which a spec holds as text."""
    assert isinstance(schema_text, str)
    schema = json.loads(schema_text)
    schema["x-guidance"] = {"whitespace_pattern": _BLANKS, "lenient": False}
    return f"%json {json.dumps(schema, separators=(',', ':'))}"


def _literal(char: str) -> str:
    """A character in a regular expression."""
    return char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}"


def _library_tokenizer(
    tokenizer: Tokenizer | ByteTokenizer, vocab_size: int, textless: Collection[int]
) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    class Vocabulary:
        """Only its tokens are asked for."""

        def __init__(self) -> None:
            self.eos_token_id = vocab_size  # the library needs one; the engine knows its own
            self.bos_token_id = None
            self.special_token_ids: list[int] = []
            self.tokens = [_token_bytes(tokenizer, token, textless) for token in range(vocab_size)] + [b""]

        def __call__(self, text: Any) -> list[int]:
            return []

    return LLTokenizer(TokenizerWrapper(Vocabulary()))


def _token_bytes(tokenizer: Tokenizer | ByteTokenizer, token: int, textless: Collection[int]) -> bytes:
    text = b"" if token in textless else tokenizer.token_bytes(token)
    return text if len(text) <= MAX_TOKEN_BYTES else b""


def _drops_a_space(tokenizer: Tokenizer | ByteTokenizer) -> bool:
    """The text of a token that begins with a space begins without it if the token is the first."""
    if tokenizer.is_byte_level:
        return False
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token)
        if text[:1] == b" " and text.strip() and token not in tokenizer.special_ids:
            return tokenizer.decode([token]).encode() == text[1:]
    return False


def _losing_a_space(
    tokenizer: Tokenizer | ByteTokenizer, vocab_size: int, textless: Collection[int]
) -> NDArray[np.uint32]:
    """Bits of the tokens that, coming first, say what they say elsewhere without its first space.

    A byte's token may keep it, one of several blanks may lose them all.
    """
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    for token in range(vocab_size):
        text = b"" if token in textless else tokenizer.token_bytes(token)
        bits[token] = text[:1] == b" " and tokenizer.decode([token]).encode() == text[1:]
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _check_joins(tokenizer: Tokenizer | ByteTokenizer, drops_a_space: bool) -> None:
    """A text is what its tokens say one by one; else no mask over tokens could be right."""
    for probe in _PROBES:
        tokens = tokenizer.encode(probe, add_special_tokens=False)
        tokens = [token for token in tokens if token not in tokenizer.special_ids]
        joined = b"".join(map(tokenizer.token_bytes, tokens))
        text = tokenizer.decode(tokens).encode()
        if text != (joined[1:] if drops_a_space and joined[:1] == b" " else joined):
            raise ValueError(
                "structured_outputs: this checkpoint's tokenizer decodes a token differently beside others"
            )


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(**_LIMITS)  # type: ignore[arg-type]


def _reason(message: str) -> str:
    """The library's message without the grammar it quotes, which nobody here has written."""
    lines = [line.strip() for line in message.strip().splitlines()] or [""]
    reason = re.sub(
        r"^at \d+\(\d+\): |failed to compile JSON schema: |<(state|non-verbose)/?>.*", "", lines[0]
    ).strip()
    reason = reason.replace("NoExtensionBias", "no token of the vocabulary leads to a text of this form")
    reason = reason if len(reason) <= 240 else reason[:237] + "..."
    why = next((line for line in lines if line.startswith("error: ")), "")  # of a regular expression
    return f"{reason.rstrip(':')}: {why[7:107]}" if why else reason


_stack_lock = threading.Lock()


def _on_deep_stack(work: Callable[[], T]) -> T:
    """The result of `work`, or what it raises, from a thread with a large stack."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    with _stack_lock:
        usual = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
