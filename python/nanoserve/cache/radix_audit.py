"""The prefix tree's invariants as a program: every sentence of radix_cache's head, checked node by node.

Costs a walk of the whole tree, so it runs after every step in tests and on demand in production, never per token.
Each function returns the problems found as sentences; an empty list means that everything agrees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from nanoserve.cache.radix_node import INVALID_NODE, TOKEN_BYTES

if TYPE_CHECKING:
    from nanoserve.cache.radix_cache import RadixCache
    from nanoserve.request import Request


def audit_tree(tree: RadixCache) -> list[str]:
    """Structure, counts, pins and the eviction queue."""
    problems: list[str] = []
    page_bytes = tree.page_size * TOKEN_BYTES
    reached = [tree.ROOT]
    pages: Counter[int] = Counter()
    evictable = 0
    for _, node in tree.walk():
        name = f"node {node.node_id}"
        parent = tree.arena[node.parent] if 0 <= node.parent < len(tree.arena) else None
        reached.append(node.node_id)
        pages.update(node.pages)
        evictable += 0 if node.is_pinned else node.num_pages
        if not node.pages:
            problems.append(f"{name} has no pages")
        if len(node.key) != node.num_pages * page_bytes:
            problems.append(f"{name} has {len(node.key)} bytes of tokens for {node.num_pages} pages")
        if parent is None or parent.children.get(node.key[:page_bytes]) != node.node_id:
            problems.append(f"{name} is not filed under its first page in its parent, node {node.parent}")
        elif node.end_page != parent.end_page + node.num_pages:
            problems.append(f"{name} ends at page {node.end_page}, its parent at {parent.end_page}")
        if node.last_access > tree.clock:
            problems.append(f"{name} was used at {node.last_access}, after now ({tree.clock})")
        if node.is_leaf and not node.is_pinned and not node.in_queue:
            problems.append(f"{name} is an unpinned leaf that eviction does not know")
    problems += [f"page {page} is in the tree {count} times" for page, count in pages.items() if count > 1]
    problems += _audit_arena(tree, reached)
    for node_id in reached:
        node = tree.arena[node_id]
        below = sum(tree.arena[child].pin_count for child in node.children.values())
        if node.pin_count < below:
            problems.append(f"node {node_id} counts {node.pin_count} pins, its children {below}")
    if tree.num_pages != pages.total():
        problems.append(f"num_pages is {tree.num_pages}, the nodes have {pages.total()}")
    if tree.num_evictable_pages != evictable:
        problems.append(
            f"num_evictable_pages is {tree.num_evictable_pages}, the unpinned nodes have {evictable}"
        )
    return problems


def _audit_arena(tree: RadixCache, reached: list[int]) -> list[str]:
    """Every id is a node of the tree or free; every queue entry belongs to one node."""
    problems = []
    ids = Counter(reached) + Counter(tree.free_ids)
    if ids != Counter(range(len(tree.arena))):
        problems.append(
            f"{len(tree.arena)} node ids are not {len(reached)} in the tree and {len(tree.free_ids)} free"
        )
    if any(tree.arena[node_id].parent != INVALID_NODE for node_id in tree.free_ids):
        problems.append("a free node id still has a parent")
    queued = tree.queue.node_ids()
    if queued != [node.node_id for node in tree.arena if node.in_queue]:
        problems.append(f"the eviction queue names nodes {queued}, not those marked as in it")
    return problems


def audit_requests(tree: RadixCache, requests: Iterable[Request]) -> list[str]:
    """Each live request's pinned path spells its own tokens, all computed; there are no other pins."""
    problems = []
    holders: Counter[int] = Counter()
    for request in requests:
        if request.radix_node is None:
            continue
        holders[request.radix_node] += 1
        node = tree.node(request.radix_node)
        name = f"request {request.req_id!r} pins node {node.node_id}"
        if tree.path_key(node.node_id) != request.cache_key(node.end_page * tree.page_size).tobytes():
            problems.append(f"{name}, which spells other tokens than its own")
        if request.page_table is None:
            problems.append(f"{name} but has no pages")
    for node_id in [tree.ROOT, *(node.node_id for _, node in tree.walk())]:
        node = tree.arena[node_id]
        own = node.pin_count - sum(tree.arena[child].pin_count for child in node.children.values())
        if own != holders[node_id]:
            problems.append(
                f"node {node_id} has {own} pins of its own but {holders[node_id]} requests hold it"
            )
    return problems
