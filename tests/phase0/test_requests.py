"""Phase 0: a request and its lengths."""

from __future__ import annotations

import numpy as np
import pytest

from nanoserve.cache.kv_pool import KVCachePool, PageTable
from nanoserve.request import Request, RequestState
from nanoserve.sampling import SamplingParams


def test_a_new_request_waits_with_its_whole_prompt_to_compute() -> None:
    """Nothing is computed or held before admission: a request in the queue must cost no memory."""
    request = Request("a", [5, 6, 7], max_tokens=4, temperature=0.0)
    assert (request.state, request.is_finished, request.finish_reason) == (RequestState.WAITING, False, None)
    assert (request.total_len, request.cached_len, request.extend_len, request.device_len) == (3, 0, 3, 3)
    assert (request.output_tokens, request.kv_pages, request.radix_node) == ([], [], None)
    assert request.max_total_len == 7


def test_lengths_follow_prefill_decode_and_preemption() -> None:
    """extend_len is the prompt, then 1, then everything again: one formula, no phase flag that could disagree."""
    request = Request(1, [1, 2, 3, 4], max_tokens=8)
    request.cached_len = 4
    request.append_output(9)
    assert (request.total_len, request.extend_len, request.device_len) == (5, 1, 5)
    request.cached_len = 5
    request.append_output(8)
    assert (request.total_len, request.extend_len, request.output_tokens) == (6, 1, [9, 8])
    request.cached_len = 0
    assert request.extend_len == 6
    assert list(request.token_ids) == [1, 2, 3, 4, 9, 8]


def test_a_cached_prefix_shortens_what_is_left_to_compute() -> None:
    """With 12 of 16 prompt tokens cached only 4 are computed, but all 16 will be on the device."""
    request = Request(1, list(range(16)), cached_len=12)
    assert (request.extend_len, request.total_len, request.device_len) == (4, 16, 16)


@pytest.mark.parametrize("cached_len", [-1, 4, 5])
def test_cached_len_leaves_at_least_one_prompt_token(cached_len: int) -> None:
    """A prompt cached to its end would be a prefill of zero tokens, which yields no logits to sample from."""
    with pytest.raises(
        ValueError, match=rf"cached_len: {cached_len} must be in \[0, prompt length - 1 = 3\]"
    ):
        Request(1, [1, 2, 3, 4], cached_len=cached_len)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "empty"),
        ([1, -1], r"prompt_tokens\[1\]: -1"),
        ([2**31], r"prompt_tokens\[0\]: 2147483648"),
        ([1, 2.0], r"prompt_tokens\[1\]: 2.0"),
        ([True], r"prompt_tokens\[0\]: True"),
        (["7"], r"prompt_tokens\[0\]: '7'"),
        ("text", "prompt_tokens: 'text' must be a sequence of token ids"),
        (iter([1]), "prompt_tokens: .* must be a sequence of token ids"),
        (5, "prompt_tokens: 5 must be a sequence of token ids"),
    ],
)
def test_bad_prompt_tokens_are_refused_by_position(tokens: object, message: str) -> None:
    """Ids index memory later: each is checked at the door, and the message says which one is wrong."""
    with pytest.raises(ValueError, match=message):
        Request(1, tokens)  # type: ignore[arg-type]


def test_numpy_token_ids_become_plain_integers() -> None:
    """Tokenizers return NumPy arrays; the request must not keep a view of the caller's memory."""
    ids = np.array([3, 4], dtype=np.int64)
    request = Request(1, ids)  # type: ignore[arg-type]
    ids[0] = 99
    assert request.prompt_tokens == [3, 4]
    assert all(type(token) is int for token in request.prompt_tokens)


def test_keywords_are_shorthands_and_params_win() -> None:
    """The course's keywords and a full SamplingParams describe the same request; the explicit one decides."""
    short = Request(1, [1], max_tokens=3, temperature=0.5, ignore_eos=True)
    assert (short.max_tokens, short.temperature, short.ignore_eos) == (3, 0.5, True)
    full = Request(2, [1], max_tokens=3, params=SamplingParams(max_tokens=7, temperature=0.0, seed=5))
    assert (full.max_tokens, full.temperature, full.ignore_eos, full.seed) == (7, 0.0, False, 5)


def test_a_request_checks_its_parameters() -> None:
    """A shorthand passes through the same limits as SamplingParams."""
    with pytest.raises(ValueError, match="max_tokens: 0"):
        Request(1, [1], max_tokens=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("req_id", 1.5),
        ("req_id", None),
        ("params", {"max_tokens": 3}),
        ("priority", 1001),
        ("priority", "high"),
    ],
)
def test_other_fields_of_a_request_are_checked_by_name(field: str, value: object) -> None:
    """What is wrong with a request is said at its construction, not by the scheduler in the middle of a step."""
    with pytest.raises(ValueError, match=f"^{field}: "):
        Request(**{"req_id": 1, "prompt_tokens": [1], field: value})  # type: ignore[arg-type]


def test_kv_pages_are_those_of_the_page_table() -> None:
    """A request's pages in token order, as its page table lists them."""
    pool = KVCachePool(num_pages=4, page_size=2)
    request = Request(1, [1, 2, 3])
    request.page_table = PageTable(pool)
    request.page_table.grow_to(request.total_len)
    assert request.kv_pages == [0, 1]
