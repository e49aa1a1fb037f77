"""Checks that pool, page tables, prefix tree and scheduler tell the same story.

True of a scheduler between steps. Tests call it after every step; in production it may be called at any time between two.
"""

from __future__ import annotations

from nanoserve.errors import InvariantViolation
from nanoserve.request import RequestState
from nanoserve.scheduling.scheduler import Scheduler


def audit(scheduler: Scheduler) -> None:
    """Raise InvariantViolation with everything that disagrees."""
    problems = [*_pages(scheduler), *_requests(scheduler)]
    if problems:
        raise InvariantViolation("; ".join(problems))


def _pages(scheduler: Scheduler) -> list[str]:
    radix = scheduler.radix_mgr
    problems = list(scheduler.kv_pool.audit([radix.tree_pages()]))
    problems += radix.audit(scheduler.pool.running.values())
    return problems


def _requests(scheduler: Scheduler) -> list[str]:
    pool, prefill, decode = scheduler.pool, scheduler.prefill_mgr, scheduler.decode_mgr
    problems = []
    for request in pool.waiting:
        name = f"waiting request {request.req_id!r}"
        if request.state not in (RequestState.WAITING, RequestState.PREEMPTED):
            problems.append(f"{name} is in state {request.state.value}")
        if request.page_table is not None or request.radix_node is not None or request.cached_len:
            problems.append(f"{name} holds pages, a pin or computed tokens")
        if request.req_id in pool.running or request.req_id in prefill.active or request.req_id in decode.running:
            problems.append(f"{name} is running too")
    for request in pool.running.values():
        name = f"running request {request.req_id!r}"
        where = (request.req_id in prefill.active, request.req_id in decode.running)
        wanted = (request.state is RequestState.PREFILL, request.state is RequestState.DECODE)
        if where != wanted or not any(wanted):
            problems.append(f"{name} is {request.state.value} but in prefill={where[0]}, decode={where[1]}")
        if request.page_table is None:
            problems.append(f"{name} has no page table")
        elif request.cached_len > request.page_table.capacity:
            problems.append(f"{name}: {request.cached_len} computed tokens in {request.page_table.capacity} slots")
        if not request.validated_len <= request.cached_len < request.total_len:
            problems.append(f"{name}: lengths {request.validated_len} <= {request.cached_len} < {request.total_len} do not hold")
        if request.state is RequestState.DECODE and request.extend_len != 1:
            problems.append(f"{name} decodes with {request.extend_len} tokens to compute")
    for request in pool.finished:
        if request.page_table is not None or request.radix_node is not None:
            problems.append(f"finished request {request.req_id!r} holds pages or a pin")
    strangers = (set(prefill.active) | set(decode.running)) - set(pool.running)
    if strangers:
        problems.append(f"managers hold requests that do not run: {sorted(map(str, strangers))}")
    return problems
