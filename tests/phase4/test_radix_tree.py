"""Phase 4: the prefix tree by itself. Tokens in, page ids out, no pool."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from nanoserve.cache.radix_cache import RadixCache
from nanoserve.cache.radix_node import INVALID_NODE, RadixNode

A, B, C, D = [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3], [4, 4, 4, 4]


@pytest.fixture
def tree() -> RadixCache:
    return RadixCache(page_size=4)


def shape(tree: RadixCache) -> list[tuple[int, list[int]]]:
    """(depth, pages) of every node, parents first."""
    return [(depth, node.pages) for depth, node in tree.walk()]


def test_a_new_tree_is_a_root_without_tokens(tree: RadixCache) -> None:
    """The root is always there, is nobody's child and never counts as a node."""
    root = tree.node(tree.ROOT)
    assert (root.parent, root.pages, root.children, root.end_page) == (INVALID_NODE, [], {}, 0)
    assert (tree.num_nodes, tree.num_pages, tree.num_tokens, tree.num_evictable_pages) == (0, 0, 0, 0)
    assert list(tree.walk()) == []
    assert tree.audit() == []


def test_nothing_matches_in_an_empty_tree(tree: RadixCache) -> None:
    """A miss is the root with no pages, also for tokens shorter than a page and for none."""
    for tokens in (A + B, [1], []):
        assert tree.match_prefix(tokens) == (tree.ROOT, 0, [])
        assert tree.peek(tokens) == 0
    assert tree.evict(5) == []


def test_inserted_pages_are_found_by_their_tokens(tree: RadixCache) -> None:
    """The pages of a prefix come back in order; a longer query finds the same."""
    result = tree.insert(A + B + C, [7, 5, 9])
    assert (result.num_existing, result.new_pages) == (0, [7, 5, 9])
    assert tree.match_prefix(A + B + C + D) == (result.node_id, 12, [7, 5, 9])
    assert (tree.num_nodes, tree.num_pages, tree.num_tokens) == (1, 3, 12)
    assert tree.audit() == []


def test_only_whole_pages_are_kept_and_matched(tree: RadixCache) -> None:
    """A partly filled page still changes, so it is never shared, on neither side."""
    assert tree.insert([*A, *B, 3, 3], [0, 1, 2]).new_pages == [0, 1]
    assert tree.match_prefix([*A, *B, 3, 3]).num_tokens == 8
    assert tree.match_prefix([*A, 2, 2, 2]).num_tokens == 4
    assert tree.match_prefix(A[:3]).num_tokens == 0


def test_a_branch_splits_the_edge_at_a_page(tree: RadixCache) -> None:
    """Two sequences share the node of their common pages and part below it."""
    tree.insert(A + B + C, [0, 1, 2])
    result = tree.insert(A + B + D, [10, 11, 12])
    assert (result.num_existing, result.new_pages) == (8, [12])
    assert shape(tree) == [(1, [0, 1]), (2, [2]), (2, [12])]
    assert tree.match_prefix(A + B + D).pages == [0, 1, 12]
    assert (tree.num_nodes, tree.num_pages) == (3, 4)
    assert tree.audit() == []


def test_sequences_that_part_inside_a_page_share_nothing_of_it(tree: RadixCache) -> None:
    """Sharing is by page: a difference in a page's last token makes it another page."""
    tree.insert(A + B, [0, 1])
    result = tree.insert([*A, 2, 2, 2, 9], [5, 6])
    assert (result.num_existing, result.new_pages) == (4, [6])
    assert shape(tree) == [(1, [0]), (2, [1]), (2, [6])]


def test_a_match_inside_an_edge_ends_at_a_node(tree: RadixCache) -> None:
    """The holder of a match pins exactly what it matched, not the rest of a long edge."""
    tree.insert(A + B + C, [0, 1, 2])
    match = tree.match_prefix(A + D)
    assert (match.num_tokens, match.pages, tree.node(match.node_id).end_page) == (4, [0], 1)
    tree.pin(match.node_id)
    assert tree.evict(10) == [2, 1]
    assert tree.audit() == []


def test_known_tokens_keep_the_trees_own_pages(tree: RadixCache) -> None:
    """Two requests computed the same prefix: the second's pages do not enter, so each page has one place."""
    tree.insert(A + B, [0, 1])
    result = tree.insert(A + B, [8, 9])
    assert (result.num_existing, result.new_pages) == (8, [])
    assert tree.match_prefix(A + B).pages == [0, 1]
    assert tree.num_pages == 2


def test_a_growing_sequence_extends_its_node(tree: RadixCache) -> None:
    """Path compression: page after page of one sequence is one edge, not a chain of nodes."""
    node_id = tree.insert(A, [0]).node_id
    tree.pin(node_id)
    for count, tokens in ((2, A + B), (3, A + B + C), (4, A + B + C + D)):
        assert tree.insert(tokens, list(range(count)), start=node_id).node_id == node_id
    assert shape(tree) == [(1, [0, 1, 2, 3])]
    assert tree.num_evictable_pages == 0
    assert tree.audit() == []


def test_a_node_that_another_holder_pins_is_not_extended(tree: RadixCache) -> None:
    """The other's pin ends where its tokens do: growing the node under it would protect, and claim, foreign pages."""
    node_id = tree.insert(A, [0]).node_id
    tree.pin(node_id)
    tree.pin(node_id)
    child = tree.insert(A + B, [0, 1], start=node_id).node_id
    assert child != node_id
    assert tree.node(node_id).end_page == 1
    assert tree.evict(5) == [1]


def test_a_split_leaves_the_id_to_the_deeper_half(tree: RadixCache) -> None:
    """A holder of the node still pins its whole path: the upper half gets the new id and every pin that passes it."""
    node_id = tree.insert(A + B + C, [0, 1, 2]).node_id
    tree.pin(node_id)
    tree.insert(A + D, [0, 9])
    lower = tree.node(node_id)
    upper = tree.node(lower.parent)
    assert (lower.pages, lower.end_page, lower.pin_count) == ([1, 2], 3, 1)
    assert (upper.pages, upper.end_page, upper.pin_count) == ([0], 1, 1)
    assert tree.evict(10) == [9]
    tree.unpin(node_id)
    assert [node.pin_count for _, node in tree.walk()] == [0, 0]
    assert tree.evict(10) == [2, 1, 0]
    assert tree.audit() == []


def test_a_pin_protects_the_path_to_the_root(tree: RadixCache) -> None:
    """Evicting above a pinned node would leave a request attending to pages that are somebody else's by now."""
    tree.insert(A + B, [0, 1])
    leaf = tree.insert(A + B + C, [0, 1, 2]).node_id
    tree.insert(A + D, [0, 3])
    tree.pin(leaf)
    assert tree.num_evictable_pages == 1
    assert tree.evict(10) == [3]
    tree.unpin(leaf)
    assert tree.num_evictable_pages == 3
    assert tree.evict(10) == [2, 1, 0]
    assert (tree.num_nodes, tree.num_pages) == (0, 0)


def test_two_pins_need_two_unpins(tree: RadixCache) -> None:
    """Pins are counted, not flagged: one of two holders leaving must not expose the other."""
    leaf = tree.insert(A, [0]).node_id
    tree.pin(leaf)
    tree.pin(leaf)
    tree.unpin(leaf)
    assert tree.evict(1) == []
    tree.unpin(leaf)
    assert tree.evict(1) == [0]
    with pytest.raises(ValueError, match=f"node {leaf} is not in the tree"):
        tree.unpin(leaf)
    other = tree.insert(B, [1]).node_id
    with pytest.raises(ValueError, match=f"node {other} is not pinned"):
        tree.unpin(other)


def test_moving_a_pin_down_keeps_the_count_on_the_way(tree: RadixCache) -> None:
    """A growing request moves its pin to its new end: one pin on every node of the path, before and after."""
    top = tree.match_prefix(A).node_id
    tree.pin(top)
    tree.insert(A + D, [0, 3])
    bottom = tree.insert(A + B + C, [0, 1, 2]).node_id
    tree.move_pin(top, bottom)
    pins = {tuple(node.pages): node.pin_count for _, node in tree.walk()}
    assert pins == {(0,): 1, (3,): 0, (1, 2): 1}
    with pytest.raises(ValueError, match="is not below"):
        tree.move_pin(bottom, tree.match_prefix(A + D).node_id)
    tree.unpin(bottom)
    assert tree.num_evictable_pages == 4
    assert tree.audit() == []


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda t: array("i", t), lambda t: array("q", t)])
def test_tokens_may_come_in_any_integer_sequence(tree: RadixCache, kind: object) -> None:
    """The same tokens are the same prefix, whatever holds them."""
    tree.insert(A + B, [0, 1])
    assert tree.match_prefix(kind(A + B + C)).pages == [0, 1]  # type: ignore[operator]
    assert tree.insert(kind(A + B + C), [0, 1, 2]).new_pages == [2]  # type: ignore[operator]


def test_too_few_pages_for_the_tokens_is_an_error(tree: RadixCache) -> None:
    """Tokens without a page would be matched later by a request that then reads nothing."""
    with pytest.raises(ValueError, match="2 whole pages of tokens but only 1 pages"):
        tree.insert(A + B, [0])
    with pytest.raises(ValueError, match="page_size: 0"):
        RadixCache(page_size=0)
    assert tree.num_pages == 0
    deep = tree.insert(A + B, [0, 1]).node_id
    with pytest.raises(ValueError, match=f"node {deep} ends at page 2, the tokens at page 1"):
        tree.insert(A, [0], start=deep)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tree, node: node.pages.append(9), "bytes of tokens for"),
        (lambda tree, node: node.pages.clear(), "has no pages"),
        (lambda tree, node: node.pages.__setitem__(0, 2), "page 2 is in the tree 2 times"),
        (lambda tree, node: setattr(node, "parent", 1), "not filed under its first page"),
        (lambda tree, node: setattr(node, "end_page", 5), "ends at page 5"),
        (lambda tree, node: setattr(node, "pin_count", 1), "num_evictable_pages is"),
        (lambda tree, node: setattr(tree.node(node.parent), "pin_count", -1), "pins, its children"),
        (lambda tree, node: setattr(node, "last_access", 10**9), "after now"),
        (lambda tree, node: setattr(node, "in_queue", False), "eviction does not know"),
        (lambda tree, node: tree.queue.heap.clear(), "eviction queue names"),
        (lambda tree, node: setattr(tree, "num_pages", 7), "num_pages is 7"),
        (lambda tree, node: tree.free_ids.append(node.node_id), "node ids are not"),
        (lambda tree, node: tree.arena.append(RadixNode(9)), "node ids are not"),
    ],
)  # fmt: skip
def test_the_audit_reports_each_kind_of_damage(tree: RadixCache, damage: object, message: str) -> None:
    """An audit that cannot fail is no check: every invariant is broken on purpose once."""
    tree.insert(A + B, [0, 1])
    leaf = tree.node(tree.insert(A + C, [0, 2]).node_id)
    assert tree.audit() == []
    damage(tree, tree.node(leaf.parent) if "2 times" in message else leaf)  # type: ignore[operator]
    assert any(message in problem for problem in tree.audit()), tree.audit()
