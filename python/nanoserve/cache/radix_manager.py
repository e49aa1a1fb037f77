"""The prefix cache of the engine: the radix tree, the page references it holds, and what requests take from it.

Contract:
  - the tree holds exactly one reference on each of its pages; every other holder has its own;
  - shared pages are never written: the one page a request must write inside (a fully cached prompt recomputes its last
    token) is copied first;
  - only pages whose KV is computed and led to finite logits enter the tree (`validated_len`), so a match is always
    ready to read, also by a request of the same batch;
  - eviction drops the tree's reference only. A page that somebody else holds is not counted as freed;
  - every call does all it says or leaves pool, tree and request as they were.

Two sequences may compute the same page before either is in the tree. The first to commit shares its page, the second
keeps its own for as long as it runs: its page table never changes under a step, at the price of one copy's memory.

`cache_hits` and `cache_misses` count prompt tokens, found and not found, at each request's first admission: a
preempted request that finds its own pages again is no hit.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from nanoserve.cache.kv_pool import KVCachePool, PageTable, PoolExhausted
from nanoserve.cache.radix_audit import audit_requests
from nanoserve.cache.radix_cache import MatchResult, RadixCache
from nanoserve.errors import InvariantViolation
from nanoserve.request import Request


class RadixCacheManager:
    """Prefix reuse over one pool.

    Args:
        kv_pool: the pool whose pages are shared.
        enabled: False never matches and never keeps a page; every call still works.
    """

    def __init__(self, kv_pool: KVCachePool, enabled: bool = True) -> None:
        self.kv_pool = kv_pool
        self.enabled = enabled
        self.page_size: int = kv_pool.page_size
        self.tree = RadixCache(self.page_size)
        self.cache_hits = 0
        self.cache_misses = 0
        self.total_evictions = 0  # pages evicted from the tree
        # Callers of get_or_allocate, match_prefix and insert_sequence may hold tree pages without a pin. From then on
        # an evictable page may be one that eviction would not free, and pages are counted one by one.
        self._has_unpinned_holders = False

    # ---- requests

    def acquire(self, request: Request, page_table: PageTable, *, find: bool = True) -> None:
        """Gives a request the cached pages of its longest known prefix, pinned until `release`.

        `page_table` is empty and becomes the request's. At least the last token stays to be computed. With `find` False
        nothing is looked up, for a request that must compute all of its tokens; it can share them all the same.
        """
        if request.page_table is not None or len(page_table):
            raise InvariantViolation(f"request {request.req_id!r} acquires a prefix but has pages already")
        cached = 0
        if self.enabled and find:
            request.radix_node, cached = self._adopt_prefix(request.cache_key(), page_table)
        elif self.enabled:
            request.radix_node = self._match_and_pin(array("i")).node_id
        request.page_table = page_table
        request.cached_len = request.prefix_hit_len = request.validated_len = cached
        if not request.prefix_counted:
            request.prefix_counted = True
            request.cached_prompt_tokens = min(cached, request.num_prompt_tokens)
            self._count(request.cached_prompt_tokens, request.num_prompt_tokens)

    def commit(self, request: Request) -> None:
        """Shares the whole pages of a request's first `validated_len` tokens, and moves its pin to their end."""
        held = request.radix_node
        table = request.page_table
        if held is None or table is None:
            return
        num_pages = request.validated_len // self.page_size
        if num_pages <= self.tree.arena[held].end_page:
            return
        if request.validated_len > request.cached_len:
            raise InvariantViolation(
                f"request {request.req_id!r}: {request.validated_len} validated tokens, {request.cached_len} computed"
            )
        tokens = request.cache_key(num_pages * self.page_size)
        result = self.tree.insert(tokens, table.pages, start=held)
        if result.new_pages:
            self.kv_pool.ref(result.new_pages)
        if result.node_id != held:
            self.tree.move_pin(held, result.node_id)
            request.radix_node = result.node_id

    def release(self, request: Request) -> None:
        """Takes the request's pages and pin back; what it committed stays cached. Idempotent."""
        table, node_id = request.page_table, request.radix_node
        request.page_table = request.radix_node = None
        if node_id is not None:
            self.tree.unpin(node_id)
        if table is None:
            return
        table.release()
        if (
            request.prefix_counted
            and request.num_preemptions == 0
            and request.cached_len == request.prefix_hit_len
        ):
            # An admission that was taken back before anything ran: the next one is the first.
            request.prefix_counted = False
            self._count(-request.cached_prompt_tokens, -request.num_prompt_tokens)
            request.cached_prompt_tokens = 0
        request.cached_len = request.validated_len = 0

    def peek(self, tokens: Sequence[int]) -> int:
        """Leading tokens that are cached; touches neither the LRU order nor the statistics."""
        return self.tree.peek(tokens) if self.enabled else 0

    # ---- memory

    @property
    def num_available_pages(self) -> int:
        """Pages that are free or would be after evicting everything unpinned."""
        free: int = self.kv_pool.num_free_pages
        return free + self._num_reclaimable_pages()

    def reserve(self, num_pages: int) -> bool:
        """Makes at least `num_pages` pages free, evicting if need be; False, with nothing evicted, if it cannot."""
        missing: int = num_pages - self.kv_pool.num_free_pages
        if missing <= 0:
            return True
        if missing > self._num_reclaimable_pages():
            return False
        return self.evict_lru(missing) >= missing

    def evict_lru(self, num_pages: int) -> int:
        """Evicts unpinned pages, least recently used first, until `num_pages` became free; returns how many did."""
        freed = 0
        while freed < num_pages:
            evicted = self.tree.evict(num_pages - freed)
            if not evicted:
                break
            self.total_evictions += len(evicted)
            freed += len(self.kv_pool.unref(evicted))
        return freed

    def clear(self) -> int:
        """Forgets every prefix that no running request uses; returns the pages that became free."""
        freed: list[int] = self.kv_pool.unref(self.tree.evict(self.tree.num_pages))
        self._has_unpinned_holders = self._has_unpinned_holders and self.tree.num_pages > 0
        return len(freed)

    def _num_reclaimable_pages(self) -> int:
        if not self._has_unpinned_holders:
            return self.tree.num_evictable_pages
        unpinned = (node for _, node in self.tree.walk() if not node.is_pinned)
        return sum(self.kv_pool.ref_count(page) == 1 for node in unpinned for page in node.pages)

    # ---- without a request: the lessons' calls

    def match_prefix(self, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """(tokens cached, their pages). The caller gets no reference: the pages are good until the next eviction."""
        if not self.enabled:
            return 0, []
        self._has_unpinned_holders = True
        match = self.tree.match_prefix(tokens)
        return match.num_tokens, match.pages

    def get_or_allocate(self, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """Pages for all of `tokens`, the cached prefix shared and the rest new: (tokens cached, pages).

        The caller owns one reference on each page and computes the tokens from the first that is not cached. As for a
        request, the last token is never cached: its page is a copy if the cache holds it.

        Raises:
            PoolExhausted: even evicting everything unpinned would not do; nothing was taken.
        """
        if not len(tokens):
            raise ValueError("get_or_allocate: no tokens, at least one is needed")
        known = array("i", tokens)
        table = PageTable(self.kv_pool)
        node_id, cached = self._adopt_prefix(known, table)  # a disabled cache's tree is empty
        try:
            missing = self.kv_pool.pages_needed(len(known)) - len(table)
            if not self.reserve(missing):
                raise PoolExhausted(
                    f"{missing} more pages are needed for {len(known)} tokens ({cached} cached), "
                    f"{self.num_available_pages} are free or evictable"
                )
            table.grow_to(len(known))
            pages = list(table.pages)
            self.kv_pool.ref(pages)
        finally:
            table.release()
            self.tree.unpin(node_id)
        self._has_unpinned_holders = True
        self._count(cached, len(known))
        return cached, pages

    def insert_sequence(self, tokens: Sequence[int], pages: Sequence[int]) -> int:
        """Shares the whole pages of computed tokens; the caller keeps its references. Returns the tokens added."""
        if not self.enabled:
            return 0
        for page in pages:
            if self.kv_pool.ref_count(page) == 0:
                raise ValueError(f"insert_sequence: page {page} is free, nobody holds its content")
        self._has_unpinned_holders = True
        result = self.tree.insert(tokens, pages)
        self.kv_pool.ref(result.new_pages)
        return len(result.new_pages) * self.page_size

    # ---- statistics and checks

    @property
    def cache_hit_rate(self) -> float:
        """Share of prompt tokens found in the cache, 0 to 1."""
        total = self.cache_hits + self.cache_misses
        return self.cache_hits / total if total else 0.0

    def clear_stats(self) -> None:
        self.cache_hits = self.cache_misses = self.total_evictions = 0

    def tree_pages(self) -> list[int]:
        """Every page the tree holds a reference on: one holder's list for KVCachePool.audit."""
        return [page for _, node in self.tree.walk() for page in node.pages]

    def audit(self, requests: Iterable[Request] | None = None) -> list[str]:
        """Problems of tree, pins and page references; with all live `requests`, also that no other pins exist."""
        problems = self.tree.audit()
        free = [page for page in self.tree_pages() if self.kv_pool.ref_count(page) == 0]
        problems += [f"page {page} is in the tree but free" for page in free]
        if requests is not None:
            problems += audit_requests(self.tree, requests)
        return problems

    def _count(self, hits: int, tokens: int) -> None:
        self.cache_hits = max(0, self.cache_hits + hits)
        self.cache_misses = max(0, self.cache_misses + tokens - hits)

    # ---- matching

    def _adopt_prefix(self, tokens: array[int], table: PageTable) -> tuple[int, int]:
        """Shares the longest cached prefix into an empty table; returns (the node pinned for it, tokens cached)."""
        match = self._match_and_pin(tokens)
        try:
            last = len(tokens) - 1  # must be computed, so it is never cached
            copy = match.num_tokens > last
            if copy and (self.page_size == 1 or not self.reserve(1)):
                # No page for the copy, or nothing in it to keep: one page less is shared, that one becomes evictable.
                self.tree.unpin(match.node_id)
                match = self._match_and_pin(tokens[: match.num_tokens - self.page_size])
                copy = False
            table.adopt(match.pages)
            if copy:
                table.make_writable(len(match.pages) - 1)
        except BaseException:
            table.release()
            self.tree.unpin(match.node_id)
            raise
        return match.node_id, min(match.num_tokens, last)

    def _match_and_pin(self, tokens: array[int]) -> MatchResult:
        match = self.tree.match_prefix(tokens)
        self.tree.pin(match.node_id)
        return match
