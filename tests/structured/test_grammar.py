"""Masks against brute force: a token is allowed exactly if the text with it begins some text of the grammar."""

from __future__ import annotations

import json
import random
import re
import threading
from typing import Any

import numpy as np
import pytest

from nanoserve.structured import StructuredOutputs
from nanoserve.text.byte_tokenizer import ByteTokenizer
from nanoserve.text.grammar import GrammarCompiler, Matcher
from nanoserve.text.tokenizer import Tokenizer, load_tokenizer
from support.tokenizers_small import KINDS, make_tokenizer

VOCAB = 410  # more than any of the tokenizers has

# Every text of these languages is known.
WORDS = [
    "yes",
    "yes please",
    "no",
    "né",
    "n\u0301",
    "你好",
    "你们",
    "👋🌍",
    "👋",
    'a "b"',
    "{}",
    "x/y\\z",
    "\n\t",
]
LANGUAGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "choice": ({"choice": WORDS}, set(WORDS)),
    "regex": (
        {"regex": r"(ab|a)(c|é){0,2}(x|你)?"},
        {a + b + c for a in ("ab", "a") for b in ("", "c", "é", "cc", "cé", "éc", "éé") for c in ("", "x", "你")},
    ),
    "repeats": ({"regex": "(the ){1,3}end"}, {"the " * n + "end" for n in (1, 2, 3)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer | ByteTokenizer]:
    made: dict[str, Tokenizer | ByteTokenizer] = {"bytes": ByteTokenizer()}
    for kind in KINDS:
        directory = tmp_path_factory.mktemp(kind)
        make_tokenizer(kind, directory)
        loaded = load_tokenizer(directory, VOCAB)
        assert loaded is not None
        made[kind] = loaded
    return made


def compiler(tokenizer: Tokenizer | ByteTokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size)


def bits(mask: np.ndarray, vocab: int) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab]).tolist())


def is_beginning(text: bytes, texts: set[bytes]) -> bool:
    return any(whole.startswith(text) for whole in texts)


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
@pytest.mark.parametrize("language", LANGUAGES)
def test_masks_are_exact(tokenizers: dict[str, Tokenizer | ByteTokenizer], kind: str, language: str) -> None:
    """Along random walks, over every token of the vocabulary: also those that are a part of a character, or twins."""
    tokenizer = tokenizers[kind]
    spec, texts = LANGUAGES[language]
    grammar = compiler(tokenizer).compile(StructuredOutputs(**spec))
    drops = compiler_drops_a_space(tokenizer)
    wholes = {(b" " if drops else b"") + text.encode() for text in texts}
    spelled = {
        token: b"" if token in tokenizer.special_ids else tokenizer.token_bytes(token)
        for token in range(tokenizer.vocab_size)
    }
    rng = random.Random(3)
    for _ in range(12):
        matcher, text, tokens = grammar.matcher(), b"", []
        while not matcher.must_end():
            expected = {t for t, piece in spelled.items() if piece and is_beginning(text + piece, wholes)}
            if (
                drops and not tokens
            ):  # and nothing but that space, which a byte's token or two blanks would not
                expected = {t for t in expected if tokenizer.decode([t]).encode() == spelled[t][1:]}
            if not expected:  # the vocabulary cannot spell the rest
                with pytest.raises(ValueError, match="no token of the vocabulary leads"):
                    matcher.allowed()
                break
            assert bits(matcher.allowed(), tokenizer.vocab_size) == expected, text
            assert matcher.may_end() == (text in wholes)
            token = rng.choice(sorted(expected))
            matcher.accept(token)
            tokens.append(token)
            text += spelled[token]
            assert matcher.must_end() == (
                text in wholes and not any(w != text and w.startswith(text) for w in wholes)
            )
        else:
            assert tokenizer.decode(tokens) in texts


def compiler_drops_a_space(tokenizer: Tokenizer | ByteTokenizer) -> bool:
    made = compiler(tokenizer)
    made._prepared()
    return made._first is not None


def test_kinds_differ_in_what_they_do_to_a_leading_space(
    tokenizers: dict[str, Tokenizer | ByteTokenizer],
) -> None:
    """So that both ways are tested above."""
    dropping = {kind for kind, tokenizer in tokenizers.items() if compiler_drops_a_space(tokenizer)}
    assert "llama2" in dropping
    assert not dropping & {"bytes", "gpt2", "qwen2", "llama3", "gemma"}


SCHEMAS = [
    {"type": "object"},
    {
        "type": "object",
        "properties": {"é": {"type": "string", "maxLength": 3}, "n": {"type": "number"}},
        "required": ["é"],
    },
    {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"$ref": "#"}]}},
    {"enum": ["a", "ab", 1, 12, None, [1, {"k": "ü"}]]},
]


@pytest.mark.parametrize("kind", ["llama3", "llama2", "gemma"])
@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_a_token_is_its_bytes_one_by_one(
    tokenizers: dict[str, Tokenizer | ByteTokenizer], kind: str, schema: dict[str, Any]
) -> None:
    """Infinite languages: against a second matcher that knows single bytes only."""
    tokenizer, spec = tokenizers[kind], StructuredOutputs(json=schema)
    drops = compiler_drops_a_space(tokenizer)
    by_token, by_byte = compiler(tokenizer).compile(spec), GrammarCompiler(ByteTokenizer(), 256).compile(spec)
    rng = random.Random(0)
    for _ in range(2):
        matcher, text = by_token.matcher(), b""
        for _ in range(20):
            if matcher.must_end():
                break
            allowed = bits(matcher.allowed(), tokenizer.vocab_size)
            for token in range(tokenizer.vocab_size):
                piece = b"" if token in tokenizer.special_ids else tokenizer.token_bytes(token)
                assert (token in allowed) == (bool(piece) and goes_on(by_byte, text + piece, drops)), (
                    text,
                    piece,
                )
            token = rng.choice(sorted(allowed))
            matcher.accept(token)
            text += tokenizer.token_bytes(token)


def goes_on(grammar: Any, text: bytes, drops_a_space: bool) -> bool:
    if drops_a_space:
        if text[:1] != b" ":
            return False
        text = text[1:]
    matcher: Matcher = grammar.matcher()
    for byte in text:
        if matcher.must_end() or byte not in bits(matcher.allowed(), 256):
            return False
        matcher.accept(byte)
    return True


def accepts(spec: StructuredOutputs, text: str | bytes) -> bool:
    grammar = GrammarCompiler(ByteTokenizer(), 256).compile(spec)
    matcher = grammar.matcher()
    for byte in text.encode() if isinstance(text, str) else text:
        if matcher.must_end() or byte not in bits(matcher.allowed(), 256):
            return False
        matcher.accept(byte)
    return matcher.may_end()


@pytest.mark.parametrize(
    ("regex", "good", "bad"),
    [
        (r"a/b\nc d", ["a/b\nc d"], ["a\\/b\nc d"]),
        ("/+", ["/", "//"], [""]),
        (r"\/\\", ["/\\"], ["\\/"]),
        ("a\nb\tc", ["a\nb\tc"], ["a b c"]),
        ('"#//x"', ['"#//x"'], ["#"]),
        ("^a|b$", ["a", "b"], ["ab"]),
        (r".*?a", ["a", "xa", "aa"], ["x", "\na"]),
        (r"\d{2}", ["12", "٣٤"], ["1", "123"]),
        (r"(?i)straße", ["STRAße", "straße"], ["strasse"]),
        (r"[^a]", ["é", "\n"], ["a", b"\xc3", b"\xff"]),
    ],
)  # fmt: skip
def test_a_regex_means_the_whole_text(regex: str, good: list[str], bad: list[str | bytes]) -> None:
    spec = StructuredOutputs(regex=regex)
    assert [text for text in good if not accepts(spec, text)] == []
    assert [text for text in bad if accepts(spec, text)] == []


def test_json_allows_blanks_but_not_without_end() -> None:
    spec = StructuredOutputs(
        json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    )
    assert accepts(spec, '{"a":1}')
    assert accepts(spec, '{\n  "a" : 1\n}')
    assert accepts(spec, "{\r\n" + " " * 32 + '"a":  1}')
    for blanks in ("   ", "\n" + " " * 33, "\n\n", " \n", "\t"):
        assert not accepts(spec, "{" + blanks + '"a":1}')
    assert not accepts(spec, ' {"a":1}')
    assert not accepts(spec, '{"a":1,"a":2}')
    assert not accepts(spec, b'{"a":1,"b":"\xed\xa0\x80"}'), "half of a surrogate pair"


def test_text_in_a_schema_is_only_text() -> None:
    """What means something in the compiler's own language means nothing in a name or a value."""
    nasty = ["// x", "# y", '"', "\\", "%json {}", "\n", "start: /a/", "<|im_end|>", "\u2028", "}"]
    schema = {"description": "// # %llguidance {}", "type": "object", "properties": {n: {"const": n} for n in nasty},
              "required": nasty, "additionalProperties": False}  # fmt: skip
    text = json.dumps({name: name for name in nasty}, ensure_ascii=False)
    assert accepts(StructuredOutputs(json=schema), text)
    for word in nasty:
        assert accepts(StructuredOutputs(choice=["x", word]), word)
        assert accepts(StructuredOutputs(regex=re.escape(word)), word)


def test_special_and_ending_tokens_are_never_text(tokenizers: dict[str, Tokenizer | ByteTokenizer]) -> None:
    tokenizer = tokenizers["llama3"]
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    made = GrammarCompiler(tokenizer, tokenizer.vocab_size, textless=[newline])
    allowed = bits(
        made.compile(StructuredOutputs(regex=r"(.|\n)*")).matcher().allowed(), tokenizer.vocab_size
    )
    assert tokenizer.special_ids
    assert not allowed & {*tokenizer.special_ids, newline}
    assert len(allowed) > 250


def test_a_tokenizer_whose_text_is_not_its_tokens_is_refused() -> None:
    """CLIP's kind, which takes the last word's space away again, and one that strips the end of a text."""
    import tokenizers as library

    def of(suffix: str, decoder: Any) -> GrammarCompiler:
        pieces = [chr(code) + end for end in dict.fromkeys(["", suffix]) for code in range(33, 127)]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        backend = library.Tokenizer(
            library.models.BPE(vocab, [], **({"end_of_word_suffix": suffix} if suffix else {}))
        )
        backend.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
        backend.decoder = decoder
        return GrammarCompiler(Tokenizer(backend, len(vocab), {}), len(vocab))

    decoders = library.decoders
    for made in (
        of("</w>", decoders.BPEDecoder("</w>")),
        of("", decoders.Sequence([decoders.Fuse(), decoders.Strip("z", 0, 1)])),
    ):
        with pytest.raises(ValueError, match="decodes a token differently beside others"):
            made.compile(StructuredOutputs(choice=["a"]))
    of("", decoders.Fuse()).compile(StructuredOutputs(choice=["a"]))


def test_several_threads_may_compile_at_once() -> None:
    made = GrammarCompiler(ByteTokenizer(), 256)
    texts = [f"text {i}" for i in range(10)]
    found: dict[str, set[int]] = {}

    def work(text: str) -> None:
        matcher = made.compile(StructuredOutputs(choice=[text, "common"])).matcher()
        for byte in text.encode()[:5]:
            matcher.accept(byte)
        found[text] = bits(matcher.allowed(), 256)

    threads = [threading.Thread(target=work, args=(text,)) for text in texts * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {text: {ord(text[5])} for text in texts}


def test_a_matcher_says_what_it_was_not_told_to_take() -> None:
    matcher = GrammarCompiler(ByteTokenizer(), 256).compile(StructuredOutputs(regex="ab")).matcher()
    with pytest.raises(ValueError, match="structured_outputs: "):
        matcher.accept(ord("b"))
    with pytest.raises(ValueError, match="structured_outputs: "):
        matcher.allowed()
