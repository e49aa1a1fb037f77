"""The scheduler alone and the paged calls, as people with a model of their own use them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from nanoserve import KVCachePool, PageTable, Request, SamplingParams, Scheduler, paged_attention, write_kv

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "bring_your_own_model", ROOT / "examples" / "bring_your_own_model.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def dense_greedy(model: Any, example: ModuleType, prompt: list[int], count: int) -> list[int]:
    """The same weights with torch's own attention over the whole sequence, anew for every token."""
    tokens = list(prompt)
    heads, dim = example.HEADS, example.WIDTH // example.HEADS
    with torch.inference_mode():
        for _ in range(count):
            x = model.tokens(torch.tensor(tokens)) + model.positions(torch.arange(len(tokens)))
            for layer in model.layers:
                q, k, v = layer.qkv(layer.norm1(x)).view(len(tokens), 3, heads, dim).permute(1, 2, 0, 3)
                mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + layer.out(mixed.transpose(0, 1).flatten(1))
                x = x + layer.mlp(layer.norm2(x))
            tokens.append(int((model.norm(x[-1]) @ model.tokens.weight.T).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("pages", [12, 64])
def test_a_torch_model_is_served_with_the_tokens_it_gives_alone(example: ModuleType, pages: int) -> None:
    """Eight prompts with a shared beginning through the example's model: the tokens of plain torch, also when pages run out."""
    torch.manual_seed(1)
    pool = KVCachePool(pages, 16, example.LAYERS, example.HEADS, example.WIDTH // example.HEADS)
    model = example.Model(pool).eval()
    scheduler = Scheduler(pool, vocab_size=example.VOCAB, max_model_len=example.LENGTH)
    generator = np.random.default_rng(0)
    system = generator.integers(0, 256, 40).tolist()
    prompts = [system + generator.integers(0, 256, int(generator.integers(1, 60))).tolist() for _ in range(8)]
    requests = [
        Request(i, prompt, params=SamplingParams(temperature=0, max_tokens=10))
        for i, prompt in enumerate(prompts)
    ]
    example.serve(model, scheduler, requests)
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_tokens == dense_greedy(model, example, prompt, 10)


def test_the_example_runs(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    assert capsys.readouterr().out.count("finished") == 3


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 20), (8, 1, 8), (3, 3, 80)])
def test_paged_attention_equals_dense_attention(heads: int, kv_heads: int, dim: int) -> None:
    """Decode rows and chunks of several sequences, grouped heads, odd head sizes, NumPy and torch."""
    rng = np.random.default_rng(0)
    pool = KVCachePool(64, 16, 2, kv_heads, dim)
    shapes = [(0, 70), (33, 1), (50, 5), (0, 1), (64, 64)]  # (tokens before, new tokens)
    queries, tables, expected = [], [], []
    for before, new in shapes:
        table = PageTable(pool)
        table.grow_to(before + new)
        tables.append(table)
        k, v = rng.standard_normal((2, before + new, kv_heads, dim), dtype=np.float32)
        write_kv(k, v, pool, 1, table.slots(0, before + new))
        q = rng.standard_normal((new, heads, dim), dtype=np.float32)
        queries.append(q)
        for row in range(new):
            seen = before + row + 1
            scores = np.einsum("hd,thd->ht", q[row], k[:seen].repeat(heads // kv_heads, 1)) / np.sqrt(dim)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            expected.append(np.einsum("ht,thd->hd", weights, v[:seen].repeat(heads // kv_heads, 1)))
    width = max(len(table) for table in tables)
    blocks = np.array([table.pages + [0] * (width - len(table)) for table in tables], dtype=np.int32)
    starts, counts = zip(*shapes, strict=True)
    out = paged_attention(np.concatenate(queries), pool, 1, blocks, starts, counts)
    np.testing.assert_allclose(out, np.stack(expected), atol=2e-6)
    as_torch = paged_attention(torch.from_numpy(np.concatenate(queries)), pool, 1, blocks, starts, counts)
    assert isinstance(as_torch, torch.Tensor)
    assert as_torch.numpy().tobytes() == out.tobytes()


def test_paged_calls_refuse_what_does_not_fit() -> None:
    """Shapes, dtypes, page ids and lengths are checked before a kernel sees them."""
    pool = KVCachePool(4, 16, 1, 2, 16)
    q = np.zeros((1, 4, 16), np.float32)
    ok = np.array([[0]], np.int32)
    for bad, words in (
        (lambda: paged_attention(q.astype(np.float64), pool, 0, ok, [0], [1]), "float64"),
        (lambda: paged_attention(q[:, :3], pool, 0, ok, [0], [1]), "heads"),
        (lambda: paged_attention(q, pool, 0, np.array([[9]], np.int32), [0], [1]), "9"),
        (lambda: paged_attention(q, pool, 0, ok, [16], [1]), "17 tokens"),
        (lambda: paged_attention(q, pool, 0, ok, [0], [2]), "2"),
        (lambda: paged_attention(q, pool, 5, ok, [0], [1]), "5"),
        (lambda: paged_attention(q, pool, 0, ok, [2**32], [1]), "starts: must hold 32-bit integers"),
        (lambda: paged_attention(q, pool, 0, ok * 1.0, [0], [1]), "block_tables: must hold 32-bit integers"),
        (lambda: paged_attention(q, pool, 0, ok, [0], [1], scale=float("nan")), "scale: nan"),
        (lambda: write_kv(q[:, :2], q[:, :2], pool, 0, [2**32 + 3]), "slot_mapping: must hold"),
        (lambda: write_kv(q[:, :2], q[:, :2], pool, 0, [64]), "64"),
        (lambda: write_kv(q[:, :3], q[:, :3], pool, 0, [0]), "3"),
    ):
        with pytest.raises((ValueError, IndexError), match=words):
            bad()
