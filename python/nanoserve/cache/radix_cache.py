"""The prefix tree: which pages hold the KV of which token prefixes.

A path-compressed radix tree over whole pages. Only whole pages are shared, so a prefix is a multiple of page_size and
a node's edges never part inside a page; the price is that up to page_size - 1 tokens of a common prefix are recomputed.
It compares exact tokens, never hashes: two different prompts cannot collide into one entry.

Invariants (`audit` checks them):
  - a page is in the tree once, at one place;
  - pin_count of a node counts the holders at it or below, so 0 means that its whole subtree may go;
  - only unpinned leaves are evicted, oldest access first and from their last page backwards: a prefix is never cut
    out from under its extensions, and a long prefix shrinks instead of vanishing for one page.

Node ids. A pinned node keeps its id and its end for as long as it is pinned: a split gives the *upper* part a new id,
so a holder of the lower part still holds its whole path. An unpinned id is good only until the tree next changes.

The tree knows tokens and page ids. References on pages are RadixCacheManager's, which owns both.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nanoserve.cache.eviction_queue import EvictionQueue
from nanoserve.cache.radix_audit import audit_tree
from nanoserve.cache.radix_node import INVALID_NODE, TOKEN_BYTES, RadixNode


class MatchResult(NamedTuple):
    """`node_id` ends exactly at `num_tokens`; nothing found is the root with 0 tokens."""

    node_id: int
    num_tokens: int
    pages: list[int]


class InsertResult(NamedTuple):
    """`new_pages` entered the tree; the first `num_existing` tokens were there already, under the tree's own pages."""

    node_id: int
    num_existing: int
    new_pages: list[int]


class RadixCache:
    """Tokens -> pages, page-granular.

    Args:
        page_size: tokens per page, at least 1.
    """

    ROOT = 0

    def __init__(self, page_size: int = 16) -> None:
        if page_size < 1:
            raise ValueError(f"page_size: {page_size} must be at least 1")
        self.page_size = page_size
        self.num_pages = 0
        self.num_evictable_pages = 0  # pages of nodes with pin_count 0
        self.clock = 0  # logical: one tick per access
        self.arena = [RadixNode(self.ROOT)]
        self.free_ids: list[int] = []
        self.queue = EvictionQueue(self.arena)
        self._step = page_size * TOKEN_BYTES  # bytes of one page's tokens in a key

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def num_nodes(self) -> int:
        """Nodes with pages: the root is not counted."""
        return len(self.arena) - len(self.free_ids) - 1

    def node(self, node_id: int) -> RadixNode:
        """The node behind an id; ValueError when no node has it."""
        if 0 <= node_id < len(self.arena):
            node = self.arena[node_id]
            if node_id == self.ROOT or node.parent != INVALID_NODE:
                return node
        raise ValueError(f"node {node_id} is not in the tree")

    # ---- lookup

    def match_prefix(self, tokens: Sequence[int]) -> MatchResult:
        """The longest cached prefix, in whole pages. Splits an edge if need be, so that a node ends at the match."""
        node, at, below, shared = self._descend(self._raw(tokens, 0, len(tokens)), self.arena[self.ROOT])
        if below is not None:
            node = self._split(below, shared)
            at += shared * self._step
        parts = [step.pages for step in self._touch(node)]
        return MatchResult(
            node.node_id, at // TOKEN_BYTES, [page for part in reversed(parts) for page in part]
        )

    def peek(self, tokens: Sequence[int]) -> int:
        """How many tokens match_prefix would find; changes nothing, not even the LRU order."""
        _, at, _, shared = self._descend(self._raw(tokens, 0, len(tokens)), self.arena[self.ROOT])
        return at // TOKEN_BYTES + shared * self.page_size

    def _raw(self, tokens: Sequence[int], begin: int, end: int) -> bytes:
        """The whole pages of tokens[begin:end] as int32 bytes."""
        part = tokens[begin : end - end % self.page_size]
        if not (isinstance(part, array) and part.typecode == "i"):
            part = array("i", part)
        return part.tobytes()

    def _descend(self, raw: bytes, node: RadixNode) -> tuple[RadixNode, int, RadixNode | None, int]:
        """Follows `raw` down from `node`.

        Returns the last node matched whole, the bytes matched through it, and, where the match ends inside an edge,
        the node below and how many of its pages match (at least one: it was found by its first).
        """
        arena, step, at = self.arena, self._step, 0
        while at < len(raw):
            child_id = node.children.get(raw[at : at + step])
            if child_id is None:
                break
            child = arena[child_id]
            if not raw.startswith(child.key, at):
                return node, at, child, child.common_pages(raw[at : at + len(child.key)], step)
            node = child
            at += len(child.key)
        return node, at, None, 0

    def _touch(self, node: RadixNode) -> list[RadixNode]:
        """Sets the access time of a node and its ancestors to now; returns them, root left out, deepest first."""
        self.clock += 1
        path = []
        while node.node_id != self.ROOT:
            node.last_access = self.clock
            path.append(node)
            node = self.arena[node.parent]
        return path

    # ---- growth

    def insert(self, tokens: Sequence[int], pages: Sequence[int], start: int = ROOT) -> InsertResult:
        """Adds the whole pages of `tokens`; where tokens are known already, the tree keeps its own pages.

        Args:
            pages: the sequence's pages from its beginning, at least one for each whole page of tokens.
            start: a node that is known to lie on this sequence's path, pinned once by the caller. The walk begins
                there, so that a growing sequence pays for its new pages only.
        """
        whole = len(tokens) // self.page_size
        if len(pages) < whole:
            raise ValueError(f"insert: {whole} whole pages of tokens but only {len(pages)} pages")
        origin = self.node(start)
        if origin.end_page > whole:
            raise ValueError(
                f"insert: node {start} ends at page {origin.end_page}, the tokens at page {whole}"
            )
        raw = self._raw(tokens, origin.end_page * self.page_size, len(tokens))
        node, at, below, shared = self._descend(raw, origin)
        if below is not None:
            node = self._split(below, shared)
            at += shared * self._step
        self._touch(node)
        num_existing = node.end_page * self.page_size
        new_pages = list(pages[node.end_page : whole])
        if new_pages:
            node = self._append(node, raw[at:], new_pages, own_pins=1 if node is origin else 0)
        return InsertResult(node.node_id, num_existing, new_pages)

    def _append(self, node: RadixNode, key: bytes, pages: list[int], own_pins: int) -> RadixNode:
        """Puts pages below `node`: into it when nobody else's pin ends there (path compression), else in a child."""
        self.num_pages += len(pages)
        if node.is_leaf and node.node_id != self.ROOT and node.pin_count <= own_pins:
            node.key += key
            node.pages += pages
            node.end_page += len(pages)
            if not node.is_pinned:
                self.num_evictable_pages += len(pages)
            return node
        child = self._new_node(node.node_id, key, pages, node.end_page + len(pages))
        child.last_access = self.clock
        node.children[key[: self._step]] = child.node_id
        self.num_evictable_pages += len(pages)
        self.queue.offer(child)
        return child

    def _split(self, lower: RadixNode, num_pages: int) -> RadixNode:
        """Gives the first `num_pages` pages of `lower` to a new node above it; every pin on `lower` covers both."""
        cut = num_pages * self._step
        end_page = lower.end_page - lower.num_pages + num_pages
        upper = self._new_node(lower.parent, lower.key[:cut], lower.pages[:num_pages], end_page)
        upper.pin_count = lower.pin_count  # its access time is set by the caller, which came to use it
        self.arena[lower.parent].children[lower.key[: self._step]] = upper.node_id
        lower.parent = upper.node_id
        lower.key = lower.key[cut:]
        lower.pages = lower.pages[num_pages:]
        upper.children[lower.key[: self._step]] = lower.node_id
        return upper

    def _new_node(self, parent: int, key: bytes, pages: list[int], end_page: int) -> RadixNode:
        node_id = self.free_ids.pop() if self.free_ids else len(self.arena)
        node = RadixNode(node_id, parent, key, pages, end_page)
        if node_id == len(self.arena):
            self.arena.append(node)
        else:
            self.arena[node_id] = node
        return node

    # ---- pins

    def pin(self, node_id: int) -> None:
        """Protects the node and its path to the root from eviction, until unpin."""
        self._add_pins(self.node(node_id), self.ROOT, +1)
        self.arena[self.ROOT].pin_count += 1

    def unpin(self, node_id: int) -> None:
        node = self.node(node_id)
        if not node.is_pinned:
            raise ValueError(f"node {node_id} is not pinned")
        self._add_pins(node, self.ROOT, -1)
        self.arena[self.ROOT].pin_count -= 1

    def move_pin(self, node_id: int, descendant: int) -> None:
        """Moves one pin from a node to one at or below it."""
        top, bottom = self.node(node_id), self.node(descendant)
        above = bottom
        while above.end_page > top.end_page:
            above = self.arena[above.parent]
        if above is not top:
            raise ValueError(f"node {descendant} is not below node {node_id}")
        self._add_pins(bottom, node_id, +1)

    def _add_pins(self, node: RadixNode, stop: int, count: int) -> None:
        """Adds to every node from `node` up to, not including, `stop`; a pin's end is an access too."""
        self.clock += 1
        while node.node_id != stop:
            if node.pin_count == 0:
                self.num_evictable_pages -= len(node.pages)
            node.pin_count += count
            node.last_access = self.clock
            if node.pin_count == 0:
                self.num_evictable_pages += len(node.pages)
                self.queue.offer(node)
            node = self.arena[node.parent]

    # ---- eviction

    def evict(self, num_pages: int) -> list[int]:
        """Removes up to `num_pages` pages, oldest unpinned leaves first, and returns them; fewer if no more may go."""
        evicted: list[int] = []
        while len(evicted) < num_pages:
            leaf = self.queue.pop_oldest()
            if leaf is None:
                break
            evicted += self._trim(leaf, num_pages - len(evicted))
        return evicted

    def _trim(self, leaf: RadixNode, num_pages: int) -> list[int]:
        """Cuts pages off a popped leaf's end; an emptied leaf leaves the tree, and its parent may be a leaf then."""
        keep = max(0, leaf.num_pages - num_pages)
        tail = leaf.pages[keep:]
        tail.reverse()
        self.num_pages -= len(tail)
        self.num_evictable_pages -= len(tail)
        if keep:
            del leaf.pages[keep:]
            leaf.key = leaf.key[: keep * self._step]
            leaf.end_page -= len(tail)
            self.queue.offer(leaf)
        else:
            parent = self.arena[leaf.parent]
            del parent.children[leaf.key[: self._step]]
            self.arena[leaf.node_id] = RadixNode(leaf.node_id)
            self.free_ids.append(leaf.node_id)
            self.queue.offer(parent)
        return tail

    # ---- the whole tree

    def walk(self) -> Iterator[tuple[int, RadixNode]]:
        """(depth, node) from the top, each parent before its children; for drawing and auditing."""
        stack = [(1, child) for child in reversed(self.arena[self.ROOT].children.values())]
        while stack:
            depth, node_id = stack.pop()
            node = self.arena[node_id]
            yield depth, node
            stack += [(depth + 1, child) for child in reversed(node.children.values())]

    def path_key(self, node_id: int) -> bytes:
        """The tokens from the root through a node, as int32 bytes."""
        node = self.node(node_id)
        parts = []
        while node.node_id != self.ROOT:
            parts.append(node.key)
            node = self.arena[node.parent]
        return b"".join(reversed(parts))

    def audit(self) -> list[str]:
        """Problems found, one sentence each; walks the whole tree."""
        return audit_tree(self)
