"""A checkpoint's tokenizer files: every form of special tokens, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer

from nanoserve.errors import CheckpointError
from nanoserve.text import ByteTokenizer, load_tokenizer
from nanoserve.text import tokenizer as tokenizer_module
from support.tokenizers_small import make_tokenizer

VOCAB = 400


def edit(directory: Path, file: str, change: Any) -> None:
    path = directory / file
    value = json.loads(path.read_text()) if path.exists() else {}
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    make_tokenizer("gpt2", tmp_path, VOCAB)
    return tmp_path


def test_no_files(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path, 300) is None
    assert isinstance(load_tokenizer(tmp_path, 256), ByteTokenizer)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"])
def test_other_formats_say_how_to_convert(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(CheckpointError, match=rf"{name}.*save_pretrained"):
        load_tokenizer(tmp_path, 256)


def test_without_config_there_are_no_named_tokens(gpt2: Path) -> None:
    (gpt2 / "tokenizer_config.json").unlink()
    ours = load_tokenizer(gpt2, VOCAB)
    assert ours is not None
    assert ours.eos_token is None
    assert ours.eos_token_id is None
    assert ours.special_ids == {VOCAB - 1}


@pytest.mark.parametrize("form", ["string", "object", "map file", "map file object", "decoder"])
def test_forms_of_special_tokens(gpt2: Path, form: str) -> None:
    """Every way a file may name EOS, and a second special token that tokenizer.json does not have yet."""
    token: dict[str, Any] = {
        "content": "<|endoftext|>",
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    new = {**token, "content": "<|new|>"}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    special_map: dict[str, Any] | None = None
    if form == "string":
        config |= {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|new|>"]}
    elif form == "object":
        as_object = {"__type": "AddedToken"}
        config |= {
            "eos_token": token | as_object,
            "extra_special_tokens": [new | as_object | {"special": True}],
        }
    elif form == "map file":
        config |= {"eos_token": "<wrong>"}
        special_map = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|new|>"]}
    elif form == "map file object":
        special_map = {"eos_token": token, "pad_token": new}
    else:
        config |= {
            "eos_token": "<|endoftext|>",
            "added_tokens_decoder": {
                str(VOCAB): new | {"special": True},
                str(VOCAB - 1): token | {"special": True},
            },
        }
    (gpt2 / "tokenizer_config.json").write_text(json.dumps(config))
    if special_map is not None:
        (gpt2 / "special_tokens_map.json").write_text(json.dumps(special_map))
    ours = load_tokenizer(gpt2, VOCAB + 1)
    assert ours is not None
    assert ours.eos_token == "<|endoftext|>"
    assert ours.eos_token_id == VOCAB - 1
    assert ours.special_ids == {VOCAB - 1, VOCAB}
    theirs = AutoTokenizer.from_pretrained(gpt2)
    for text in ("a<|new|>b<|endoftext|>", " <|new|> x"):
        ids = ours.encode(text)
        assert VOCAB in ids
        assert ids == theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["gpt2", "wordpiece"])
def test_added_tokens_file(tmp_path: Path, kind: str) -> None:
    """A special token is matched as it stands, another one in the normalised text (lower case for WordPiece)."""
    make_tokenizer(kind, tmp_path, VOCAB)
    size = len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]) + (kind == "gpt2")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "ZZSPECIAL"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"zzPlain": size, "ZZSPECIAL": size + 1}))
    ours, theirs = load_tokenizer(tmp_path, size + 2), AutoTokenizer.from_pretrained(tmp_path)
    assert ours is not None
    for text in ("a zzPlain b", "a zzplain b", "a ZZSPECIAL b", "a zzspecial b"):
        assert ours.encode(text) == theirs(text).input_ids
    assert size in ours.encode("zzPlain")
    assert size + 1 in ours.encode("ZZSPECIAL")
    assert ours.special_ids & {size, size + 1} == {size + 1}


@pytest.mark.parametrize("flags", [{"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
def test_add_bos_token_of_the_config_is_not_read(gpt2: Path, flags: dict[str, bool]) -> None:
    """As in transformers 5: where there is a tokenizer.json, its post-processor decides."""
    edit(gpt2, "tokenizer_config.json", lambda config: config.update(flags))
    ours = load_tokenizer(gpt2, VOCAB)
    assert ours is not None
    assert ours.encode("hello") == AutoTokenizer.from_pretrained(gpt2)("hello").input_ids
    assert ours.eos_token_id not in ours.encode("hello")


def test_split_special_tokens(gpt2: Path) -> None:
    edit(gpt2, "tokenizer_config.json", lambda config: config.update(split_special_tokens=True))
    ours = load_tokenizer(gpt2, VOCAB)
    assert ours is not None
    ids = ours.encode("a<|endoftext|>")
    assert ids == AutoTokenizer.from_pretrained(gpt2)("a<|endoftext|>").input_ids
    assert VOCAB - 1 not in ids


def test_truncation_and_padding_of_the_file_are_off(gpt2: Path) -> None:
    expected = load_tokenizer(gpt2, VOCAB).encode("one two three")  # type: ignore[union-attr]

    def change(root: dict[str, Any]) -> None:
        root["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        root["padding"] = {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                           "pad_type_id": 0, "pad_token": "x"}  # fmt: skip

    edit(gpt2, "tokenizer.json", change)
    assert load_tokenizer(gpt2, VOCAB).encode("one two three") == expected  # type: ignore[union-attr]


def test_llama_class_differs_only_where_the_docstring_says(tmp_path: Path) -> None:
    """transformers rebuilds a LlamaTokenizer from code; tokenizer.json is the truth here."""
    make_tokenizer("llama2", tmp_path, VOCAB)
    edit(
        tmp_path, "tokenizer_config.json", lambda c: c.update(tokenizer_class="LlamaTokenizer", legacy=False)
    )
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path, VOCAB)
    assert type(theirs) is LlamaTokenizer
    assert ours is not None
    for text in ("The quick brown fox", "你好 👋", "don't\n\n  stop"):
        assert ours.encode(text) == theirs(text).input_ids
    assert ours.encode(" x") != theirs(" x").input_ids
    assert ours.encode("<s>x") != theirs("<s>x").input_ids


BAD_FILES: list[tuple[str, Any, str]] = [
    ("tokenizer.json", b"", r"tokenizer\.json: not valid JSON"),
    ("tokenizer.json", b"\xff\xfe", r"tokenizer\.json: not valid JSON"),
    ("tokenizer.json", b"[]", "must hold an object"),
    ("tokenizer.json", b"{}", "model"),
    ("tokenizer.json", b"[" * 100000, "not valid JSON"),
    ("tokenizer.json", b'{"a":' * 100000, "not valid JSON"),
    ("tokenizer.json", b'{"model": {"vocab": 5}}', r"model\.vocab"),
    ("tokenizer.json", b'{"model": {"vocab": {}, "dropout": 0.1}}', r"model\.dropout"),
    ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": 3}', "added_tokens"),
    ("tokenizer.json", b'{"model": {"vocab": {}, "dropout": NaN}}', "not valid JSON"),
    ("tokenizer.json", b'{"version": "1.0", "model": {"type": "?", "vocab": {}}}', "library refuses"),
    ("tokenizer_config.json", b"nope", r"tokenizer_config\.json"),
    ("tokenizer_config.json", b'{"eos_token": 5}', "eos_token: 5"),
    ("tokenizer_config.json", b'{"eos_token": ""}', "eos_token: ''"),
    ("tokenizer_config.json", b'{"eos_token": "\\ud800"}', "eos_token"),
    ("tokenizer_config.json", b'{"eos_token": {"content": 1}}', r"eos_token\.content"),
    ("tokenizer_config.json", b'{"eos_token": {"content": "x", "lstrip": 1}}', r"eos_token\.lstrip"),
    ("tokenizer_config.json", b'{"eos_token": "<far>"}', "eos_token: '<far>' has id 400"),
    ("tokenizer_config.json", b'{"split_special_tokens": "no"}', "split_special_tokens"),
    ("tokenizer_config.json", b'{"additional_special_tokens": "x"}', "additional_special_tokens"),
    ("tokenizer_config.json", b'{"additional_special_tokens": [null]}', r"additional_special_tokens\[0\]"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": []}', "added_tokens_decoder"),
    (
        "tokenizer_config.json",
        b'{"added_tokens_decoder": {"-1": {"content": "x"}}}',
        "added_tokens_decoder: key",
    ),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": "x"}}', r"added_tokens_decoder\[1\]"),
    ("special_tokens_map.json", b"5", r"special_tokens_map\.json"),
    ("added_tokens.json", b'{"x": "y"}', r"added_tokens\.json"),
]


@pytest.mark.parametrize(("file", "content", "message"), BAD_FILES)
def test_bad_files(gpt2: Path, file: str, content: bytes, message: str) -> None:
    if file not in ("tokenizer.json", "tokenizer_config.json"):
        (gpt2 / "tokenizer_config.json").unlink()
    (gpt2 / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(gpt2, VOCAB)


def test_a_prefix_that_cuts_characters(gpt2: Path) -> None:
    """The library would cut the first byte off "Ł" and abort the process."""
    edit(gpt2, "tokenizer.json", lambda root: root["model"].update(continuing_subword_prefix="a"))
    with pytest.raises(CheckpointError, match=r"model\.merges\[0\].*continuing_subword_prefix 'a'"):
        load_tokenizer(gpt2, VOCAB)


def test_file_size_limit(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_TOKENIZER_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: larger than the limit of 1000"):
        load_tokenizer(gpt2, VOCAB)


def test_post_processor_with_a_token_the_model_lacks(tmp_path: Path) -> None:
    make_tokenizer("llama3", tmp_path, VOCAB)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="post_processor"):
        load_tokenizer(tmp_path, VOCAB - 10)


def test_decoder_without_a_streaming_form(gpt2: Path) -> None:
    ctc = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    edit(gpt2, "tokenizer.json", lambda root: root.update(decoder=ctc))
    with pytest.raises(CheckpointError, match="CTC"):
        load_tokenizer(gpt2, VOCAB)
