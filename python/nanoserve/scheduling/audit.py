"""Do pool, page tables, prefix tree, queues and requests tell the same story?

True of a scheduler between any two of its calls, also while a step is in flight. Tests ask after every step; in
production it may be asked at any time, at the price of walking the tree and every request.
"""

from __future__ import annotations

from collections.abc import Iterator

from nanoserve.errors import InvariantViolation
from nanoserve.request import Request, RequestState
from nanoserve.scheduling.scheduler import Scheduler


def audit(scheduler: Scheduler) -> None:
    """Raises InvariantViolation with one sentence per disagreement."""
    problems = [
        *_pages(scheduler),
        *_places(scheduler),
        *_waiting(scheduler),
        *_running(scheduler),
        *_gone(scheduler),
    ]
    if problems:
        raise InvariantViolation("; ".join(problems))


def _pages(scheduler: Scheduler) -> Iterator[str]:
    radix = scheduler.radix_mgr
    yield from scheduler.kv_pool.audit([radix.tree_pages()])
    yield from radix.audit([*scheduler.pool.running.values(), *scheduler.gone_in_flight])


def _places(scheduler: Scheduler) -> Iterator[str]:
    """Every live request is in exactly one queue, the one its state says."""
    pool = scheduler.pool
    places: dict[int, list[str]] = {id(request): [] for request in pool.live.values()}
    for name, requests in (
        ("waiting", pool.waiting),
        ("prefill", scheduler.prefill_mgr.active_requests),
        ("decode", scheduler.decode_mgr.requests),
    ):
        for request in requests:
            if id(request) in places:
                places[id(request)].append(name)
            else:
                yield f"{name} has request {request.req_id!r}, which is not live"
    expected = {
        RequestState.WAITING: "waiting",
        RequestState.PREEMPTED: "waiting",
        RequestState.PREFILL: "prefill",
        RequestState.DECODE: "decode",
    }
    for req_id, request in pool.live.items():
        place = expected.get(request.state, "nowhere")
        if places[id(request)] != [place]:
            yield f"request {req_id!r} is {request.state.value} and in {places[id(request)]}, not in {place}"
        if (req_id in pool.running) != (place in ("prefill", "decode")):
            yield f"request {req_id!r} is {request.state.value}, in running: {req_id in pool.running}"
    if pool.num_running > scheduler.decode_mgr.max_batch_size:
        yield f"{pool.num_running} requests run, at most {scheduler.decode_mgr.max_batch_size} may"
    if set(pool.running) - set(pool.live):
        yield f"running but not live: {sorted(map(str, set(pool.running) - set(pool.live)))}"


def _waiting(scheduler: Scheduler) -> Iterator[str]:
    for request in scheduler.pool.waiting:
        yield from _holds_nothing(request, "waiting")
        if request.cached_len or request.validated_len:
            yield f"waiting request {request.req_id!r} has {request.cached_len} computed tokens and no pages"


def _running(scheduler: Scheduler) -> Iterator[str]:
    pool = scheduler.kv_pool
    for request in scheduler.pool.running.values():
        name = f"running request {request.req_id!r}"
        table = request.page_table
        if table is None:
            yield f"{name} has no page table"
            continue
        if not request.validated_len <= request.cached_len < request.total_len:
            yield f"{name}: {request.validated_len} validated, {request.cached_len} computed, {request.total_len} known"
        if request.cached_len > table.capacity:
            yield f"{name}: {request.cached_len} computed tokens in {len(table)} pages"
        if request.state is RequestState.DECODE and request.extend_len != 1:
            yield f"{name} decodes with {request.extend_len} tokens to compute"
        next_page = request.cached_len // pool.page_size
        for page in table.pages[next_page:]:
            if pool.ref_count(page) != 1:
                yield f"{name} is about to write page {page}, which has {pool.ref_count(page)} holders"


def _gone(scheduler: Scheduler) -> Iterator[str]:
    if scheduler.gone_in_flight and scheduler.in_flight is None:
        yield f"{len(scheduler.gone_in_flight)} aborted requests wait for a step that is over"
    for request in scheduler.pool.finished:
        if not any(request is gone for gone in scheduler.gone_in_flight):
            yield from _holds_nothing(request, "finished")


def _holds_nothing(request: Request, what: str) -> Iterator[str]:
    if request.page_table is not None or request.radix_node is not None:
        yield f"{what} request {request.req_id!r} holds pages {request.kv_pages} and pin {request.radix_node}"
