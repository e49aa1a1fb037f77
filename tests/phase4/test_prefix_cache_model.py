"""Phase 4: tree, pool and page tables together against a dictionary, under random use of every call.

The model is `{tokens of a prefix: page}`, one entry per whole page. Between evictions the tree must hold exactly the
model; an eviction may remove entries, but only unpinned ones and never a prefix before its extensions. After every
step all references, pins and counts are audited and every KV, live or cached, is compared with its tokens.
"""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanoserve.cache.kv_pool import PoolExhausted
from nanoserve.request import Request
from phase4.kv_worker import KVWorker

PAGE, PAGES = 2, 12
Prefixes = dict[tuple[int, ...], int]

# Two conversations cut anywhere and continued by up to two tokens: prefixes meet, part and repeat all the time.
TALKS = [[0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1], [0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1]]
tails = st.lists(st.integers(0, 1), max_size=2)
token_lists = st.builds(
    lambda talk, count, tail: talk[:count] + tail, st.sampled_from(TALKS), st.integers(1, 14), tails
)
index = st.integers(0, 3)


class PrefixCacheMachine(RuleBasedStateMachine):
    # Over all runs: a machine that never gets into a corner proves nothing about it.
    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.worker = KVWorker(PAGES, PAGE)
        self.manager = self.worker.manager
        self.model: Prefixes = {}
        self.admitted = 0
        self.waiting: list[Request] = []  # preempted
        self.owned: list[list[int]] = []  # pages that a caller of get_or_allocate holds

    # ---- the model

    def content(self) -> Prefixes:
        found: Prefixes = {}
        for _, node in self.manager.tree.walk():
            tokens = array("i")
            tokens.frombytes(self.manager.tree.path_key(node.node_id))
            start = node.end_page - node.num_pages
            for i, page in enumerate(node.pages):
                found[tuple(tokens[: (start + i + 1) * PAGE])] = page
        return found

    def known(self, tokens: Any) -> int:
        """Tokens of the longest prefix in the model."""
        count = 0
        while tuple(tokens[: count + PAGE]) in self.model and count + PAGE <= len(tokens):
            count += PAGE
        return count

    def add(self, tokens: Any, pages: list[int]) -> None:
        for i in range(len(tokens) // PAGE):
            self.model.setdefault(tuple(tokens[: (i + 1) * PAGE]), pages[i])

    def pinned(self) -> set[tuple[int, ...]]:
        """Every prefix on the path of a live request's node."""
        paths = set()
        for request in self.worker.live:
            node = self.manager.tree.node(request.radix_node or 0)
            paths |= {tuple(request.token_ids[: (i + 1) * PAGE]) for i in range(node.end_page)}
        return paths

    def accept_evictions(self, at_most: int = PAGES) -> int:
        """The tree may have lost entries: takes them out of the model after checking that they could go."""
        now = self.content()
        gone = self.model.keys() - now.keys()
        assert len(gone) <= at_most
        assert not gone & self.pinned()
        self.model = {prefix: page for prefix, page in self.model.items() if prefix not in gone}
        return len(gone)

    def freeable(self, protected: int = 0, tokens: Any = ()) -> int:
        """Pages that are free or could be, with the first `protected` of `tokens` pinned as well."""
        kept = self.pinned() | {tuple(tokens[: i + PAGE]) for i in range(0, protected, PAGE)}
        idle = [page for prefix, page in self.model.items() if prefix not in kept]
        return self.worker.pool.num_free_pages + sum(self.worker.pool.ref_count(page) == 1 for page in idle)

    # ---- requests

    def acquire(self, request: Request) -> None:
        tokens = list(request.token_ids)
        found = self.known(tokens)
        room = self.freeable(found, tokens) > 0
        kept = self.pinned() | {tuple(tokens[: i + PAGE]) for i in range(0, found, PAGE)}
        # Evicted pages that a lesson's caller holds, too, free nothing: eviction goes on.
        shared = sum(
            self.worker.pool.ref_count(page) > 1 for prefix, page in self.model.items() if prefix not in kept
        )
        self.worker.resume(request)
        if found < len(tokens):
            assert request.cached_len == found
        else:
            assert request.cached_len == (len(tokens) - 1 if room else found - PAGE)
            self.seen["copied" if room else "one page less"] += 1
        assert request.prefix_hit_len == request.cached_len
        self.seen["evicted for a copy"] += self.accept_evictions(at_most=1 + shared)

    @precondition(lambda self: len(self.worker.live) < 4)
    @rule(tokens=token_lists)
    def admit(self, tokens: list[int]) -> None:
        self.admitted += 1
        self.acquire(Request(self.admitted, tokens))

    @precondition(lambda self: self.waiting and len(self.worker.live) < 4)
    @rule(i=index)
    def resume(self, i: int) -> None:
        self.acquire(self.waiting.pop(i % len(self.waiting)))

    @precondition(lambda self: self.worker.live)
    @rule(i=index, count=st.integers(1, 9), validated=st.booleans())
    def compute(self, i: int, count: int, validated: bool) -> None:
        request = self.worker.live[i % len(self.worker.live)]
        table = request.page_table
        assert table is not None
        if request.extend_len == 0:
            return
        before, room = request.validated_len, self.freeable()
        missing = self.worker.pool.pages_needed(request.cached_len + min(count, request.extend_len)) - len(
            table
        )
        done = self.worker.compute(request, count)
        assert done == (missing <= 0 or missing <= room)
        lost = self.accept_evictions()
        assert done or not lost
        self.seen["evicted to grow" if lost else "grown" if done else "out of pages"] += 1
        if not validated:
            request.validated_len = before

    @precondition(lambda self: self.worker.live)
    @rule(i=index, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def decode(self, i: int, tokens: list[int]) -> None:
        """Computes what is left, then token by token, committed at each."""
        self.compute(i, 99, True)
        request = self.worker.live[i % len(self.worker.live)]
        for token in tokens:
            if request.extend_len == 0 and request.total_len < 2 * PAGES:
                request.append_output(token)
                self.compute(i, 1, True)
                self.commit(i)

    @precondition(lambda self: self.worker.live)
    @rule(i=index)
    def finish(self, i: int) -> None:
        """The usual end: everything computed is committed and the pages stay behind."""
        self.compute(i, 99, True)
        self.commit(i)
        self.release(i, False)

    @precondition(lambda self: self.worker.live)
    @rule(i=index)
    def commit(self, i: int) -> None:
        request = self.worker.live[i % len(self.worker.live)]
        pages = request.kv_pages
        self.manager.commit(request)
        assert request.kv_pages == pages
        in_tree = self.manager.tree_pages()
        self.seen["kept a duplicate"] += any(
            page not in in_tree for page in pages[: request.validated_len // PAGE]
        )
        self.add(request.token_ids[: request.validated_len], pages)

    @precondition(lambda self: self.worker.live)
    @rule(i=index, preempt=st.booleans())
    def release(self, i: int, preempt: bool) -> None:
        request = self.worker.live[i % len(self.worker.live)]
        self.worker.finish(request)
        self.manager.release(request)
        if preempt and len(self.waiting) < 3:
            request.num_preemptions += 1
            self.waiting.append(request)

    # ---- calls without a request

    @precondition(lambda self: len(self.owned) < 2)
    @rule(tokens=token_lists)
    def allocate(self, tokens: list[int]) -> None:
        found = self.known(tokens)
        full = found == len(tokens)
        needed = -(-len(tokens) // PAGE) - found // PAGE + full
        room = self.freeable(found - PAGE * full, tokens)
        try:
            cached, pages = self.manager.get_or_allocate(tokens)
        except PoolExhausted:
            assert needed > room
            self.seen["exhausted"] += 1
            self.accept_evictions(at_most=0)
            return
        lost = self.accept_evictions()
        assert needed <= room or lost
        assert cached in ({found} if not full else {len(tokens) - 1, found - PAGE})
        slots = [pages[pos // PAGE] * PAGE + pos % PAGE for pos in range(cached, len(tokens))]
        self.worker.write(tokens, slots, cached)  # type: ignore[arg-type]
        assert self.manager.insert_sequence(tokens, pages) % PAGE == 0
        self.add(tokens, pages)
        self.owned.append(pages)

    @precondition(lambda self: self.owned)
    @rule(i=index)
    def free(self, i: int) -> None:
        self.worker.pool.free(self.owned.pop(i % len(self.owned)))

    @rule(tokens=token_lists)
    def look(self, tokens: list[int]) -> None:
        assert self.manager.peek(tokens) == self.known(tokens)
        cached, pages = self.manager.match_prefix(tokens)
        assert (cached, pages) == (
            self.known(tokens),
            [self.model[tuple(tokens[: i + PAGE])] for i in range(0, cached, PAGE)],
        )

    @rule(count=st.integers(1, 6))
    def evict(self, count: int) -> None:
        free, could = self.worker.pool.num_free_pages, self.freeable()
        freed = self.manager.evict_lru(count)
        self.seen["left somebody's page"] += could - free < len(self.model) - len(
            self.pinned() & self.model.keys()
        )
        assert freed == self.worker.pool.num_free_pages - free == min(count, could - free)
        self.accept_evictions()

    @rule(count=st.integers(1, PAGES + 1))
    def reserve(self, count: int) -> None:
        could = self.freeable()
        assert self.manager.num_available_pages == could
        assert self.manager.reserve(count) == (count <= could)
        lost = self.accept_evictions()
        assert not lost or count <= could
        assert self.worker.pool.num_free_pages >= count or count > could

    @rule()
    def clear(self) -> None:
        self.manager.clear()
        self.accept_evictions()
        assert self.model.keys() <= self.pinned()

    # ---- always

    @invariant()
    def the_tree_is_the_model(self) -> None:
        assert self.content() == self.model

    @invariant()
    def everything_agrees(self) -> None:
        assert self.worker.problems(*self.owned) == []

    def teardown(self) -> None:
        for request in list(self.worker.live):
            self.worker.finish(request)
        for pages in self.owned:
            self.worker.pool.free(pages)
        self.manager.clear()
        assert self.worker.pool.num_free_pages == PAGES


def test_tree_pool_and_tables_follow_a_naive_dictionary() -> None:
    """Random admissions, chunks, commits, preemptions, evictions and lesson calls on twelve pages, audited each step."""
    corners = {"copied", "one page less", "evicted for a copy", "evicted to grow", "out of pages", "grown"}
    corners |= {"kept a duplicate", "exhausted", "left somebody's page"}
    for examples in (250, 2000):  # which corners the first come to depends on everything that is imported
        steps = settings(max_examples=examples, stateful_step_count=60)
        run_state_machine_as_test(PrefixCacheMachine, settings=steps)
        if all(PrefixCacheMachine.seen[corner] for corner in corners):
            break
    assert {corner: PrefixCacheMachine.seen[corner] > 0 for corner in corners} == dict.fromkeys(corners, True)
