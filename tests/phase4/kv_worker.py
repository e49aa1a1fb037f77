"""Stands in for scheduler and model: computes requests over real pages and can tell whether every KV is still right.

The KV of a position is a number made from all tokens up to it, as in a transformer, so that a page that is shared
wrongly, overwritten, or matched before it was computed holds the wrong numbers, and `problems` says so.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanoserve.cache.kv_pool import KVCachePool, PageTable
from nanoserve.cache.radix_manager import RadixCacheManager
from nanoserve.request import Request

LAYERS = 2


def expected_kv(tokens: Sequence[int]) -> np.ndarray:
    """float32[len(tokens)]: what each position's K holds, exact small integers that depend on the whole prefix."""
    state, values = 0, []
    for token in tokens:
        state = zlib.crc32(int(token).to_bytes(4, "little"), state)
        values.append(state % 2**22 + 1)
    return np.array(values, dtype=np.float32)


class KVWorker:
    def __init__(self, num_pages: int, page_size: int = 4, enabled: bool = True) -> None:
        self.pool = KVCachePool(num_pages, page_size, num_layers=LAYERS, num_heads=1, head_dim=1)
        self.manager = RadixCacheManager(self.pool, enabled=enabled)
        self.live: list[Request] = []

    def admit(self, tokens: Sequence[int], req_id: Any = None, **fields: Any) -> Request:
        request = Request(len(self.live) if req_id is None else req_id, tokens, **fields)
        self.resume(request)
        return request

    def resume(self, request: Request) -> None:
        self.manager.acquire(request, PageTable(self.pool))
        self.live.append(request)

    def compute(self, request: Request, count: int | None = None) -> bool:
        """Computes the next `count` tokens (all by default); False, with nothing done, when pages are short."""
        table = request.page_table
        assert table is not None
        start = request.cached_len
        stop = start + (request.extend_len if count is None else min(count, request.extend_len))
        if not self.manager.reserve(self.pool.pages_needed(stop) - len(table)):
            return False
        table.grow_to(stop)
        self.write(request.token_ids[:stop], table.slots(start, stop - start), start)
        request.cached_len = request.validated_len = stop
        return True

    def write(self, tokens: Sequence[int], slots: np.ndarray, start: int) -> None:
        values = expected_kv(tokens)[start:].reshape(-1, 1, 1)
        for layer in range(LAYERS):
            self.pool.store_kv(values + layer, -values - layer, slots, layer)

    def run(self, tokens: Sequence[int], outputs: Sequence[int] = (), **fields: Any) -> Request:
        """One request from admission to release, committed at its end."""
        request = self.admit(tokens, **fields)
        assert self.compute(request)
        for token in outputs:
            request.append_output(token)
            assert self.compute(request)
        self.manager.commit(request)
        self.finish(request)
        return request

    def finish(self, request: Request) -> None:
        self.live.remove(request)
        self.manager.release(request)

    def kv(self, pages: Sequence[int], count: int, layer: int = 0) -> np.ndarray:
        k_view, _ = self.pool.get_layer_cache(layer)
        flat: np.ndarray = k_view[list(pages)].reshape(-1)[:count]
        return flat

    def problems(self, *other_holders: Sequence[int]) -> list[str]:
        """Everything that does not agree: references, tree, pins, and the KV under live requests and in the tree."""
        found = self.pool.audit([self.manager.tree_pages(), *map(list, other_holders)])
        found += self.manager.audit(self.live)
        for request in self.live:
            found += self._wrong_kv(
                f"request {request.req_id!r}", request.token_ids, request.kv_pages, request.cached_len
            )
        tree = self.manager.tree
        for _, node in tree.walk():
            tokens = array("i")
            tokens.frombytes(tree.path_key(node.node_id))
            pages = self._path_pages(node.node_id)
            found += self._wrong_kv(f"node {node.node_id}", tokens, pages, len(tokens))
        return found

    def _path_pages(self, node_id: int) -> list[int]:
        node, pages = self.manager.tree.node(node_id), []
        while node.node_id != self.manager.tree.ROOT:
            pages = node.pages + pages
            node = self.manager.tree.node(node.parent)
        return pages

    def _wrong_kv(self, name: str, tokens: Sequence[int], pages: Sequence[int], count: int) -> list[str]:
        wanted = expected_kv(tokens[:count])
        return [
            f"{name}: KV of layer {layer} is not that of its tokens, first at {int(np.argmax(got != wanted + layer))}"
            for layer in range(LAYERS)
            if not np.array_equal(got := self.kv(pages, count, layer), wanted + layer)
        ]
