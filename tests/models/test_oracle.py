"""transformers in float32 is the oracle: same greedy tokens, logits within 1e-4, for every family and however scheduled."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from nanoserve import ModelConfig, NanoServingEngine, load_weights
from support.families import CASES, FAMILIES, Case
from support.hub_configs import HUB
from support.oracle import forward, make_checkpoint, oracle_generate, oracle_logits, random_model
from support.recording import greedy, record

NUM_PROMPTS, NUM_OUTPUT, NUM_LONG, LONG_OUTPUT = 50, 8, 4, 40
TOLERANCE = 1e-4
# Where the oracle's two best are closer than float32 sums on another machine, either is right: about one token in 20 000.
NEAR_TIE, MOST_TIES = 2e-5, 2
SCHEDULES = list(
    itertools.product((1, 16), (7, 64, 512), (False, True))
)  # batch size, chunk size, prefix cache


@pytest.fixture(scope="module", params=sorted(CASES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory named after its case."""
    return make_checkpoint(request.param, tmp_path_factory.mktemp("checkpoints"))


def random_prompts(vocab: int, count: int, longest: int = 300) -> list[list[int]]:
    """Lengths from 1; a third of them continue an earlier prompt, so that the prefix cache has something to find."""
    generator = np.random.default_rng(7)
    prompts: list[list[int]] = []
    for index in range(count):
        prompt = generator.integers(0, vocab, int(generator.integers(1, longest + 1))).tolist()
        if index % 3 == 2:
            head = prompts[int(generator.integers(0, index))]
            prompt = (head[: int(generator.integers(1, len(head) + 1))] + prompt)[:longest]
        prompts.append(prompt)
    return prompts


class Comparison:
    """Compares an engine's finished requests to the oracle; each sequence is put to the oracle once."""

    def __init__(self, path: Path, case: Case) -> None:
        self.path, self.case = path, case
        self.known: dict[tuple[int, ...], np.ndarray] = {}
        self.ties: set[tuple[tuple[int, ...], int]] = set()

    def check(self, request: Any, rows: dict[int, np.ndarray], what: str) -> None:
        """Greedy tokens equal by induction: each of ours is the oracle's argmax given those before it."""
        prompt, output = request.prompt_tokens, request.output_tokens
        sequence = (*prompt, *output)
        if sequence not in self.known:
            self.known[sequence] = oracle_logits(self.path, list(sequence), self.case, len(prompt))
        logits = self.known[sequence]
        positions = range(len(prompt) - 1, len(sequence) - 1)
        assert sorted(rows) == list(positions), what
        worst = max(float(np.abs(rows[at] - logits[at]).max()) for at in positions)
        assert worst < TOLERANCE, f"{what}: logits differ by {worst}"
        for at, token in zip(positions, output, strict=True):
            if token != logits[at].argmax():
                assert logits[at].max() - logits[at][token] < NEAR_TIE, (
                    f"{what}: token {token} after position {at}"
                )
                self.ties.add((sequence, at))
        assert len(self.ties) <= MOST_TIES, what


def serve(
    path: Path, prompts: list[list[int]], params: list[Any], **options: Any
) -> tuple[Any, list[Any], Any]:
    """(engine, finished requests, recorder)"""
    config = ModelConfig.from_pretrained(path)
    engine = NanoServingEngine(
        config, load_weights(path), **{"kv_cache_pages": 1200, "max_num_batched_tokens": 600, **options}
    )
    recorder = record(engine)
    return engine, engine.generate(prompts, params), recorder


def test_greedy_tokens_and_logits_equal_transformers_under_every_schedule(checkpoint: Path) -> None:
    """50 random prompts, batched / chunked / cached in every combination, against one transformers forward each."""
    case = CASES[checkpoint.name]
    transformers_config = case.config()
    prompts = random_prompts(
        transformers_config.vocab_size,
        NUM_PROMPTS,
        transformers_config.max_position_embeddings if case.steps else 300,
    )
    counts = [LONG_OUTPUT] * NUM_LONG + [NUM_OUTPUT] * (NUM_PROMPTS - NUM_LONG)
    params = [greedy(count, ignore_eos=True) for count in counts]
    for trained in (case.original, transformers_config.max_position_embeddings if case.steps else None):
        if trained is not None:  # both sides of the border, and across it while decoding
            ends = [(len(prompt), len(prompt) + count) for prompt, count in zip(prompts, counts, strict=True)]
            assert any(end <= trained for _, end in ends)
            assert any(begin <= trained < end for begin, end in ends)
            assert case.steps or any(begin > trained for begin, _ in ends)
    comparison = Comparison(checkpoint, case)
    for batch_size, chunk_size, cache in SCHEDULES:
        engine, finished, recorder = serve(
            checkpoint,
            prompts,
            params,
            max_chunk_size=chunk_size,
            max_batch_size=batch_size,
            enable_prefix_cache=cache,
        )
        if cache and case.original is None:
            assert engine.get_stats()["cache_hit_rate"] > (0.05 if batch_size == 1 else 0)
        for index, request in enumerate(finished):
            what = f"{checkpoint.name}: prompt {index}, batch {batch_size}, chunk {chunk_size}, cache {cache}"
            assert len(request.output_tokens) == counts[index], f"{what}: {request.error}"
            comparison.check(request, recorder.rows[request.req_id], what)


def test_generate_of_transformers_gives_the_same_tokens(checkpoint: Path) -> None:
    """A second opinion that shares no code with the comparison above: transformers' own generate(), with its KV cache."""
    case = CASES[checkpoint.name]
    border = case.original or (case.config().max_position_embeddings if case.steps else 60)
    vocab = case.config().vocab_size
    lengths = (5, border - 4) if case.steps else (5, border - 4, 200)
    prompts = [np.random.default_rng(length).integers(0, vocab, length).tolist() for length in lengths]
    _, finished, _ = serve(
        checkpoint, prompts, [greedy(12, ignore_eos=True)] * len(prompts), max_chunk_size=32
    )
    for prompt, request in zip(prompts, finished, strict=True):
        if case.fields.get("sliding_window") == 1:
            # transformers' cache of a window keeps the last window - 1 tokens, and all of them when that is 0.
            assert request.output_tokens != oracle_generate(checkpoint, prompt, 12)
        else:
            assert request.output_tokens == oracle_generate(checkpoint, prompt, 12), len(prompt)


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.off))
def test_every_option_of_a_case_changes_the_logits(name: str) -> None:
    """The same weights with an option off give other logits, or the comparison above would say nothing about the option."""
    case = CASES[name]
    model = random_model(case.config(), name)
    tokens = np.random.default_rng(3).integers(0, case.config().vocab_size, 250).tolist()
    expected = forward(model, tokens)
    for off in case.off:
        other = random_model(case.config(**off), name)
        other.load_state_dict(model.state_dict())
        assert np.abs(forward(other, tokens) - expected).max() > 5 * TOLERANCE, off


@pytest.mark.parametrize("order", ["short first", "long first"])
@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.original is not None))
def test_one_beginning_on_both_sides_of_the_border(tmp_path: Path, name: str, order: str) -> None:
    """Sequences that share a beginning but not its angles: no page of one side may serve the other, cached or in company."""
    path, case = make_checkpoint(name, tmp_path), CASES[name]
    border = case.original or 0
    tokens = np.random.default_rng(5).integers(0, case.config().vocab_size, 250).tolist()
    lengths = [border // 2, border - 20, border - 1, border, border + 1, border + 16, 220]
    prompts = [tokens[:length] for length in (lengths if order == "short first" else reversed(lengths))] * 2
    comparison = Comparison(path, case)
    for batch_size, pages in ((1, 300), (5, 300), (5, 22)):
        engine, finished, recorder = serve(
            path, prompts, [greedy(30, ignore_eos=True)] * len(prompts), max_batch_size=batch_size, max_chunk_size=16,
            kv_cache_pages=pages,
        )  # fmt: skip
        for request in finished:
            what = f"{name}, {len(request.prompt_tokens)} tokens, batch {batch_size}, {pages} pages"
            comparison.check(request, recorder.rows[request.req_id], what)
        stats = engine.get_stats()
        assert stats["preemptions"] > 0 or pages > 100
        assert stats["cache_hit_rate"] > 0.2 or pages < 100
        engine.audit()


@pytest.mark.parametrize("name", sorted(HUB))
def test_published_configs(tmp_path: Path, name: str) -> None:
    """config.json as published, every leftover field included: served, with the logits transformers gives for that file."""
    path = tmp_path / name
    path.mkdir()
    text = json.dumps(HUB[name])
    (path / "config.json").write_text(text)
    random_model(AutoConfig.from_pretrained(path), name).save_pretrained(path)
    (path / "config.json").write_text(text)
    original = HUB[name].get("original_max_position_embeddings") if HUB[name].get("rope_scaling") else None
    comparison = Comparison(path, Case(HUB[name]["model_type"], {}, original=original))
    prompts = [[3], *random_prompts(301, 9, 250), np.random.default_rng(1).integers(0, 301, 60).tolist()]
    assert max(map(len, prompts)) > 129  # beyond every window and original length above
    for chunk_size, cache in ((7, True), (512, False)):
        _, finished, recorder = serve(
            path, prompts, [greedy(NUM_OUTPUT, ignore_eos=True)] * len(prompts), max_chunk_size=chunk_size,
            enable_prefix_cache=cache,
        )  # fmt: skip
        for request in finished:
            comparison.check(request, recorder.rows[request.req_id], f"{name}, chunk {chunk_size}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_and_sharded_checkpoints(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """The file's rounded weights in float32 arithmetic, from several shards."""
    name = next(name for name, case in CASES.items() if case.family == family)
    path = make_checkpoint(name, tmp_path, dtype=dtype, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    assert json.loads((path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    comparison = Comparison(path, CASES[name])
    prompts = random_prompts(CASES[name].config().vocab_size, 6, 200)
    _, finished, recorder = serve(path, prompts, [greedy(NUM_OUTPUT, ignore_eos=True)] * len(prompts))
    for request in finished:
        comparison.check(request, recorder.rows[request.req_id], f"{name} in {dtype}")


def test_the_comparison_notices_a_wrong_weight(tmp_path: Path) -> None:
    """A model whose one bias is off by 0.01 must not pass as equal, or the oracle test could not fail."""
    path = make_checkpoint("gpt2", tmp_path)
    config, weights = ModelConfig.from_pretrained(path), dict(load_weights(path))
    name = next(name for name in weights if name.endswith("ln_f.bias"))
    weights[name] = weights[name] + np.float32(0.01)
    engine = NanoServingEngine(config, weights)
    recorder = record(engine)
    request = engine.generate(random_prompts(config.vocab_size, 1), greedy(1))[0]
    with pytest.raises(AssertionError, match="logits differ"):
        Comparison(path, CASES["gpt2"]).check(request, recorder.rows[request.req_id], "mutant")
