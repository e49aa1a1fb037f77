"""One node of the prefix tree: a run of whole pages that follow its parent's.

    root ── [p0 p1] ── [p2]          the path from the root spells a prefix, one page of tokens at a time
                    └─ [p3 p4 p5]    siblings differ in their first page

Nodes live in the tree's arena and name each other by integer id, so that a request can hold one across splits without
keeping anything alive. `key` is the tokens as int32 bytes: an edge of any length is compared with one memcmp.

    [0 ................ end_page - len(pages))                       the parent's path
                       [end_page - len(pages) ...... end_page)       this node's own pages

`end_page` of a pinned node changes only when its sole holder extends it: a split gives the upper part a new id.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

INVALID_NODE = -1
TOKEN_BYTES = array("i").itemsize


@dataclass(slots=True)
class RadixNode:
    node_id: int
    parent: int = INVALID_NODE
    key: bytes = b""  # len(pages) * page_size int32 tokens
    pages: list[int] = field(default_factory=list)
    end_page: int = 0  # pages from the root through this node
    children: dict[bytes, int] = field(default_factory=dict)  # first page's bytes -> node id
    pin_count: int = 0  # holders at this node or anywhere below: 0 means the whole subtree may be evicted
    last_access: int = 0  # logical time
    in_queue: bool = False  # an entry of the eviction queue names this node

    @property
    def num_pages(self) -> int:
        return len(self.pages)

    @property
    def is_leaf(self) -> bool:
        return not self.children

    @property
    def is_pinned(self) -> bool:
        return self.pin_count > 0

    @property
    def is_evictable(self) -> bool:
        """An unpinned leaf; the root never is."""
        return not self.children and self.pin_count == 0 and self.parent != INVALID_NODE

    def common_pages(self, raw: bytes, page_bytes: int) -> int:
        """Leading pages of the key that `raw` spells too, by bisection: each probe is one memcmp."""
        low, high = 0, min(len(raw), len(self.key)) // page_bytes
        while low < high:
            middle = (low + high + 1) // 2
            if (
                raw[low * page_bytes : middle * page_bytes]
                == self.key[low * page_bytes : middle * page_bytes]
            ):
                low = middle
            else:
                high = middle - 1
        return low
