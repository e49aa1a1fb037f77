"""Which leaf of the prefix tree goes next: a heap by last access whose entries may be out of date.

Invariant: a leaf that may be evicted has exactly one entry, never newer than its real last access; so when an entry
surfaces and is up to date, no other leaf is older. One that is out of date goes back with its new time, one that no
longer names an unpinned leaf is dropped (the tree offers the node again when it becomes one).

The price is that order is repaired on eviction, O(log n) amortised, so that a cache hit pays nothing for it; scanning
the leaves instead would cost their number on every eviction, which is when the cache is full and has most of them.
"""

from __future__ import annotations

import heapq

from nanoserve.cache.radix_node import RadixNode


class EvictionQueue:
    """Unpinned leaves of `arena`, oldest first."""

    def __init__(self, arena: list[RadixNode]) -> None:
        self.arena = arena
        self.heap: list[tuple[int, int]] = []  # (last_access when pushed, node_id)

    def offer(self, node: RadixNode) -> None:
        """Enters a node that may be evicted now; does nothing for any other."""
        if node.is_evictable and not node.in_queue:
            node.in_queue = True
            heapq.heappush(self.heap, (node.last_access, node.node_id))

    def pop_oldest(self) -> RadixNode | None:
        """Takes out the least recently used leaf that may be evicted."""
        while self.heap:
            pushed, node_id = heapq.heappop(self.heap)
            node = self.arena[node_id]
            node.in_queue = False
            if pushed == node.last_access and node.is_evictable:
                return node
            self.offer(node)
        return None

    def node_ids(self) -> list[int]:
        """The nodes that entries name, for the audit."""
        return sorted(node_id for _, node_id in self.heap)
