"""Damaged checkpoint files: a CheckpointError that names the file, or a tokenizer that works. Never a crash, never a hang."""

from __future__ import annotations

import copy
import functools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanoserve.errors import CheckpointError
from nanoserve.text import ChatTemplate, GenerationConfig, Tokenizer, load_tokenizer
from support import chat_templates
from support.tokenizers_small import KINDS, make_tokenizer

VOCAB = 400
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**70, 10**400, 1e308, -0.5, "", "a", "\x00", "\ud800", "é" * 50, [], {},
    [[]], [None], ["a", 1], {"type": "Sequence"}, {"type": "ByteLevel"}, {"content": "x"}, {"a": {"b": []}},
]  # fmt: skip
SECONDS = 5.0


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a JSON value, but of a few entries only of long lists and objects."""
    found = [path] if path else []
    items = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    if len(items) > 40:
        items = items[:6] + items[-6:]
    for key, item in items:
        found += places(item, (*path, key))
    return found


def same_kind(value: Any, rng: random.Random) -> Any:
    """Another value of the same type: what no check of types finds."""
    if value is None:
        return rng.choice([True, 0, "a", "Ġ", 0.5])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, 0, VOCAB, 2**31, 2**32 - 1, 2**63 - 1])
    if isinstance(value, float):
        return rng.choice([-value, 0.0, 1e300, -1e-300])
    if isinstance(value, str):
        return rng.choice(
            [
                value + "a",
                value[1:],
                value[::-1],
                "é",
                "\u2581",
                " ",
                "##",
                "[",
                "(a+)+$",
                "ByteLevel",
                "Fuse",
                "never",
            ]
        )
    if isinstance(value, list):
        return [*value, *value[:1]] if rng.random() < 0.5 else value[::-1]
    return dict(reversed(value.items()))


def mutated(root: Any, rng: random.Random) -> Any:
    root = copy.deepcopy(root)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        paths = places(root)
        if not paths:
            return root
        *way, last = rng.choice(paths)
        parent = root
        for key in way:
            parent = parent[key]
        action = rng.random()
        if action < 0.3:
            parent[last] = copy.deepcopy(rng.choice(JUNK))
        elif action < 0.6:
            parent[last] = same_kind(parent[last], rng)
        elif action < 0.8:
            del parent[last]
        elif isinstance(parent, list):
            parent.insert(last, copy.deepcopy(parent[rng.randrange(len(parent))]))
        else:
            parent[rng.choice(["x", "type", "eos_token", "vocab"])] = copy.deepcopy(parent[last])
    return root


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    action = rng.randrange(4)
    at = rng.randrange(len(data))
    if action == 0:
        return data[:at]
    if action == 1:
        return data[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 5))) + data[at + 1 :]
    if action == 2:
        end = min(len(data), at + rng.randrange(1, 200))
        return data[:at] + data[end:]
    end = min(len(data), at + rng.randrange(1, 200))
    return data[:end] + data[at:]


def outcome(call: Callable[[], Any]) -> tuple[Any, ValueError | None]:
    """(result, None), or (None, the refusal). Any other exception is a failure of the test."""
    try:
        return call(), None
    except ValueError as error:
        return None, error


def survive(directory: Path) -> bool:
    """Whether it still loads; whatever loads must work or say ValueError."""
    begin = time.thread_time()
    tokenizer, refusal = outcome(lambda: load_tokenizer(directory, VOCAB))
    if refusal is not None:
        assert isinstance(refusal, CheckpointError)
        assert ".json: " in str(refusal)
        assert len(str(refusal)) < 1000
        return False
    assert isinstance(tokenizer, Tokenizer)
    for text in ("", "hello wörld <s>你好👋</s>\n", " a" * 300):
        ids, refusal = outcome(functools.partial(tokenizer.encode, text))
        assert refusal is None or str(refusal).startswith("text: ")
        tokenizer.decode(ids or [])
    tokenizer.decode(range(VOCAB), skip_special_tokens=False)
    for token in range(0, VOCAB, 37):
        tokenizer.token_text(token)
    assert time.thread_time() - begin < SECONDS
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_files(kind: str, tmp_path: Path) -> None:
    make_tokenizer(kind, tmp_path, VOCAB)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    config = (tmp_path / "tokenizer_config.json").read_bytes()
    parsed, parsed_config = json.loads(whole), json.loads(config)
    rng = random.Random(KINDS.index(kind))
    loaded = 0
    for _ in range(120):
        (tmp_path / "tokenizer.json").write_text(json.dumps(mutated(parsed, rng)))
        loaded += survive(tmp_path)
    for _ in range(30):
        (tmp_path / "tokenizer.json").write_bytes(damaged_bytes(whole, rng))
        loaded += survive(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(whole)
    for _ in range(60):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(mutated(parsed_config, rng)))
        loaded += survive(tmp_path)
        (tmp_path / "tokenizer_config.json").write_bytes(damaged_bytes(config, rng))
        loaded += survive(tmp_path)
    assert 20 < loaded < 260, "some damage is fatal, some is not: else this test tests nothing"


def test_special_token_files(tmp_path: Path) -> None:
    make_tokenizer("gpt2", tmp_path, VOCAB)
    (tmp_path / "tokenizer_config.json").unlink()
    maps = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "pad_token": "<|endoftext|>",
            "additional_special_tokens": ["a", {"content": "b", "normalized": True}]}  # fmt: skip
    rng = random.Random(1)
    for _ in range(150):
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(mutated(maps, rng)))
        (tmp_path / "added_tokens.json").write_text(json.dumps(mutated({"zz": 3, "yy": 400}, rng)))
        survive(tmp_path)


def test_generation_config(tmp_path: Path) -> None:
    values = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.1,
              "repetition_penalty": 1.1, "num_beams": 2, "min_new_tokens": 1, "max_length": 20}  # fmt: skip
    rng = random.Random(2)
    path = tmp_path / "generation_config.json"
    for i in range(600):
        if i % 3:
            path.write_text(json.dumps(mutated(values, rng)))
        else:
            path.write_bytes(damaged_bytes(json.dumps(values).encode(), rng))
        config, refusal = outcome(lambda: GenerationConfig.load(tmp_path, VOCAB))
        if refusal is not None:
            assert isinstance(refusal, CheckpointError)
            assert str(refusal).startswith("generation_config.json: ")
        else:
            assert all(0 <= token < VOCAB for token in config.eos_token_ids)
            assert all(isinstance(value, int | float) for value in config.defaults.values())


class Names:
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}  # noqa: RUF012


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # jinja's own, of a damaged string
@pytest.mark.parametrize("name", chat_templates.ALL)
def test_chat_templates(name: str, tmp_path: Path) -> None:
    """Characters cut out, doubled and moved around: refused at load, at rendering, or a text."""
    source = chat_templates.ALL[name]
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "x"},
    ]
    rng = random.Random(name)
    rendered = 0
    for _ in range(60):
        begin = time.thread_time()
        data = source.encode()
        for _ in range(rng.choice([1, 1, 3])):
            data = damaged_bytes(data, rng) or b"x"
        (tmp_path / "chat_template.jinja").write_bytes(data)
        template, refusal = outcome(lambda: ChatTemplate.load(tmp_path, Names()))
        if refusal is not None:
            assert isinstance(refusal, CheckpointError)
            assert str(refusal).startswith("chat_template.jinja: ")
        else:
            _, refusal = outcome(functools.partial(template.render, messages))
            rendered += refusal is None
            assert refusal is None or str(refusal).startswith("chat template: ")
        assert time.thread_time() - begin < SECONDS
    assert rendered < 60


def test_messages_of_any_shape() -> None:
    """JSON of any shape in place of messages: a ValueError or a text."""
    template = ChatTemplate(chat_templates.QWEN3)
    messages = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1]}}}],
        },
        {"role": "tool", "content": [{"type": "text", "text": "x"}], "tool_call_id": "1"},
    ]
    rng = random.Random(3)
    rendered = 0
    for _ in range(1500):
        _, refusal = outcome(functools.partial(template.render, mutated(messages, rng)))
        rendered += refusal is None
        assert refusal is None or "messages" in str(refusal) or str(refusal).startswith("chat template: ")
    assert 50 < rendered < 1450
