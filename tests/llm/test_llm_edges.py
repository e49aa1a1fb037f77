"""Where the text layer and the engine meet: several drivers of one engine, ends, usage, seeds, what a checkpoint asks for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nanoserve import LLM, CheckpointError, ModelConfig, SamplingParams, load_weights
from nanoserve.models.weights import bind_weights
from support.oracle import make_checkpoint
from support.text_checkpoint import make_text_checkpoint

KV_BYTES = 16 * 2**20
LONG = "The quick brown fox jumps over the lazy dog, don't you think? " * 3


def greedy(max_tokens: int = 24, **fields: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_checkpoint(tmp_path_factory.mktemp("edges") / "llama3")


@pytest.fixture
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, kv_cache_bytes=KV_BYTES)


def test_two_streams_on_one_engine_each_end_at_their_own_end(llm: LLM) -> None:
    """b finishes inside a's steps, and still tells everything, and does not run a to its end."""
    alone = llm.generate("def main():", greedy(5, ignore_eos=True))[0]
    a = llm.stream("The quick", greedy(200, ignore_eos=True))
    b = llm.stream("def main():", greedy(5, ignore_eos=True))
    next(a)
    next(b)
    for _ in range(10):
        next(a)
    rest = list(b)
    assert rest[-1].finish_reason == "length"
    assert rest[-1].output is not None
    assert rest[-1].output.token_ids == alone.token_ids
    assert llm.engine.has_unfinished, "a was not run to its end"
    a.close()
    assert not llm.engine.has_unfinished


def test_an_abort_does_not_run_the_neighbour_to_its_end(llm: LLM) -> None:
    outsider = llm.engine.add_request([1, 2, 3], greedy(300, ignore_eos=True))
    stream = llm.stream("The quick", greedy(100, ignore_eos=True))
    next(stream)
    for req_id in [r for r in llm.engine.batcher.scheduler.pool.live if r != outsider.req_id]:
        llm.engine.abort(req_id)
    assert [delta.finish_reason for delta in stream][-1] == "abort"
    assert len(outsider.output_tokens) < 10
    llm.engine.abort(outsider.req_id)


@pytest.mark.parametrize("beyond", [-1, 0, 1, 2])
def test_text_and_engine_agree_on_where_min_tokens_ends(llm: LLM, beyond: int) -> None:
    """A stop string in a token that may not end the request stays in the text; the first that may, ends both."""
    free = llm.generate(LONG, greedy(12, ignore_eos=True))[0]
    tokenizer = llm.get_tokenizer()
    pieces = [tokenizer.token_text(token) for token in free.token_ids]
    at = next(i for i, piece in enumerate(pieces) if i >= 1 and piece.strip() and piece.isascii())
    stop = pieces[at].strip()
    first = next(i for i in range(12) if stop in "".join(pieces[: i + 1]))
    min_tokens = max(0, first + beyond)  # the stop string is complete with token number first + 1
    output = llm.generate(LONG, greedy(12, ignore_eos=True, stop=[stop], min_tokens=min_tokens))[0]
    text = str(output.text)
    assert (stop in text) == (first + 1 <= min_tokens), (
        "it flows by where it may not end the request, and is cut else"
    )
    if output.finish_reason == "stop":
        assert output.outputs[0].stop_reason == stop
        assert len(output.token_ids) > min_tokens
        if first + 1 > min_tokens:
            assert len(output.token_ids) == first + 1
            assert stop not in text
    else:
        assert text == llm.decode(output.token_ids), "nothing was cut, so nothing may be missing"


def test_a_stop_string_that_the_end_completes_is_told(llm: LLM) -> None:
    """Bytes held back as half a character become U+FFFD at the end; if that is a stop string, it ended the text."""
    for seed in range(60):
        params = SamplingParams(temperature=3.0, seed=seed, max_tokens=6, stop=["\ufffd"], ignore_eos=True)
        deltas = list(llm.stream("a", params))
        last = deltas[-1]
        assert last.output is not None
        completion = last.output.outputs[0]
        whole = llm.decode(completion.token_ids)
        if "\ufffd" in whole:
            assert (completion.finish_reason, completion.stop_reason) == ("stop", "\ufffd")
            assert last.finish_reason == "stop"
            assert completion.text == whole[: whole.index("\ufffd")]
        else:
            assert completion.finish_reason == "length"


def test_cached_tokens_are_the_prompts(checkpoint: Path) -> None:
    """A preempted request finds its own pages again: no hit of the prompt's."""
    llm = LLM(checkpoint, kv_cache_bytes=12 * 16 * 512, max_num_seqs=8)
    outputs = llm.generate([f"{i}: once upon a time" for i in range(6)], greedy(60, ignore_eos=True))
    assert llm.engine.get_stats()["preemptions"] > 0
    for output in outputs:
        assert 0 <= output.num_cached_tokens < output.usage.prompt_tokens


def test_unseeded_siblings_do_not_depend_on_the_cache(checkpoint: Path) -> None:
    """n sequences of two prompts, cold and with one prompt cached: the same answers."""
    params = SamplingParams(temperature=1.0, max_tokens=8, n=3)
    told = []
    for warm in (False, True):
        llm = LLM(checkpoint, kv_cache_bytes=KV_BYTES, seed=9, max_chunk_size=16)
        if warm:
            llm.generate(LONG, greedy(1, seed=1))
            llm.engine.batcher.scheduler.pool.num_arrived = 0
        told.append(
            [[c.token_ids for c in out.outputs] for out in llm.generate([LONG, "def main():"], params)]
        )
    assert told[0] == told[1]


def test_n_sequences_with_prompt_logprobs_compute_the_prompt_once(llm: LLM) -> None:
    output = llm.generate(LONG, SamplingParams(seed=1, max_tokens=4, n=6, prompt_logprobs=1))[0]
    size = output.usage.prompt_tokens
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == size
    assert llm.engine.get_stats()["prefill_tokens"] <= size + 5 * 17
    llm.engine.audit()


def test_stop_ids_give_no_text_unless_asked_for(llm: LLM) -> None:
    free = llm.generate(LONG, greedy(8, ignore_eos=True))[0]
    third = free.token_ids[2]
    cut = free.token_ids.index(third)
    for include in (False, True):
        params = greedy(8, ignore_eos=True, stop_token_ids=[third], include_stop_str_in_output=include)
        output = llm.generate(LONG, params)[0]
        assert output.token_ids == free.token_ids[: cut + 1]
        assert output.outputs[0].stop_reason == third
        assert output.text == llm.decode(output.token_ids[: None if include else -1])


def test_deltas_carry_logprobs(llm: LLM) -> None:
    deltas = list(llm.stream(LONG, greedy(6, logprobs=1, ignore_eos=True)))
    told = [entry for delta in deltas for entry in delta.logprobs or []]
    assert deltas[-1].output is not None
    assert told == deltas[-1].output.logprobs
    total = deltas[-1].output.outputs[0].cumulative_logprob
    assert total == pytest.approx(sum(entry.logprob for entry in told))


def test_prompts_as_dictionaries(llm: LLM) -> None:
    tokens = llm.encode("The quick")
    expected = llm.generate("The quick", greedy(4))[0].token_ids
    for prompt in ({"prompt": "The quick"}, {"prompt_token_ids": tokens}, [{"prompt": "The quick"}]):
        assert llm.generate(prompt, greedy(4))[0].token_ids == expected
    for wrong in (
        {"text": "x"},
        {"prompt": [1]},
        {"prompt_token_ids": "x"},
        {"prompt": "x", "prompt_token_ids": [1]},
    ):
        with pytest.raises(ValueError, match="prompt"):
            llm.generate([wrong], greedy(4))


def test_mistakes_are_named(llm: LLM, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"params\[0\]: None must be SamplingParams"):
        llm.generate(["a"], [None])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="kv_cache_pages: LLM has no such option"):
        LLM(checkpoint, kv_cache_pages=5)
    with pytest.raises(TypeError, match="add_generation_promt"):
        llm.chat([{"role": "user", "content": "x"}], greedy(1), add_generation_promt=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="messages"):
        llm.chat([], greedy(1))
    assert not llm.engine.has_unfinished


def test_bad_words_without_tokens_are_refused(tmp_path: Path) -> None:
    """WordPiece normalises a zero-width space away: there is nothing to forbid, and that is said."""
    llm = LLM(make_text_checkpoint(tmp_path / "m", "wordpiece"), kv_cache_bytes=KV_BYTES)
    with pytest.raises(ValueError, match=r"bad_words: .*200b.* has no tokens"):
        llm.generate("the", greedy(2, bad_words=["quick", "\u200b"]))


@pytest.mark.parametrize(
    "asked", [{"min_new_tokens": 200}, {"do_sample": True, "top_k": -1, "repetition_penalty": 0.01}]
)
def test_what_a_checkpoint_may_ask_for(tmp_path: Path, asked: dict[str, object]) -> None:
    path = make_text_checkpoint(tmp_path / "m")
    (path / "generation_config.json").write_text(json.dumps(asked))
    params = LLM(path, kv_cache_bytes=KV_BYTES).default_params
    assert params.max_tokens >= params.min_tokens == asked.get("min_new_tokens", 0)


def test_what_a_checkpoint_asks_for_in_vain_is_said(tmp_path: Path) -> None:
    path = make_text_checkpoint(tmp_path / "m")
    (path / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 3}))
    with pytest.warns(UserWarning, match="no_repeat_ngram_size=3"):
        LLM(path, kv_cache_bytes=KV_BYTES)
    (path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 0.001}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: repetition_penalty"):
        LLM(path, kv_cache_bytes=KV_BYTES)


def test_a_transposed_weight_is_read_by_columns(tmp_path: Path) -> None:
    """GPT-2 stores [in, out]: any rows of ours are those columns, from a file of any type and from arrays."""
    import torch

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        path = make_checkpoint("gpt2", tmp_path / str(dtype), dtype=dtype)
        config, stored = ModelConfig.from_pretrained(path), load_weights(path)
        lazy = bind_weights(config, stored)["layers.0.up.weight"]
        arrays = bind_weights(config, {name: np.asarray(tensor) for name, tensor in stored.items()})
        whole = np.asarray(stored["transformer.h.0.mlp.c_fc.weight"]).T
        for begin, end in ((0, 5), (7, 8), (100, 256), (0, 256)):
            np.testing.assert_array_equal(lazy[begin:end], whole[begin:end])
            np.testing.assert_array_equal(arrays["layers.0.up.weight"][begin:end], whole[begin:end])
