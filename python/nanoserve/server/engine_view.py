"""What the page shows of the engine: who holds which page, the prefix tree, the last steps. Numbers only, no text, no tokens.

Taken in the engine's thread, a few times a second while somebody watches, and bounded whatever the engine holds: it takes a
millisecond or two from the steps.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from nanoserve.nano_engine import NanoServingEngine

MAX_PAGES = 4096  # shown; of a larger pool every k-th
MAX_NODES = 512
MAX_REQUESTS = 256
STEPS = 120
WATCHED_S = 3.0  # after each look


class EngineView:
    """Makes EngineLoop's snapshots."""

    def __init__(self, shows_view: bool) -> None:
        self._shows_view = shows_view
        self._steps: deque[dict[str, int]] = deque(maxlen=STEPS)
        self._before: dict[str, Any] = {}
        self._watched_until_s = float("-inf")

    def watch(self) -> None:
        """Somebody looks; from any thread."""
        self._watched_until_s = time.monotonic() + WATCHED_S

    def __call__(self, engine: NanoServingEngine) -> dict[str, Any]:
        stats, radix = engine.get_stats(), engine.radix_mgr
        made = {
            "kv_pages_total": engine.kv_pool.num_pages,
            "kv_pages_used": engine.kv_pool.num_used_pages,
            "prefix_queries": radix.cache_hits + radix.cache_misses,
            "prefix_hits": radix.cache_hits,
            "preemptions": stats["preemptions"],
        }
        if self._shows_view:
            before, self._before = self._before, stats
            if before and stats["steps"] > before["steps"]:
                self._steps.append(
                    {
                        name: stats[name] - before[name]
                        for name in ("steps", "prefill_tokens", "decode_tokens", "preemptions")
                    }
                )
        if self._shows_view and time.monotonic() < self._watched_until_s:
            made["view"] = {
                **_pages(engine),
                "tree": _tree(engine),
                "requests": _requests(engine),
                "timeline": list(self._steps),
            }
        return made


def _pages(engine: NanoServingEngine) -> dict[str, Any]:
    """`pages`: 0 free, 1 of the prefix tree only, 2 and up the requests' in `requests`, by their place there."""
    pool = engine.kv_pool
    stride = -(-pool.num_pages // MAX_PAGES)
    owners = bytearray(pool.num_pages)
    for page in range(0, pool.num_pages, stride):
        owners[page] = 1 if pool.ref_count(page) else 0
    for place, request in enumerate(_live(engine)):
        for page in request.kv_pages:
            owners[page] = min(255, 2 + place)
    return {
        "pages": list(owners[::stride]),
        "page_stride": stride,
        "num_pages": pool.num_pages,
        "page_size": pool.page_size,
    }


def _live(engine: NanoServingEngine) -> list[Any]:
    return list(engine.batcher.scheduler.pool.live.values())[:MAX_REQUESTS]


def _requests(engine: NanoServingEngine) -> list[dict[str, Any]]:
    return [
        {
            "state": request.state.value, "prompt": request.num_prompt_tokens, "cached": request.cached_prompt_tokens,
            "computed": request.cached_len, "output": len(request.output_tokens), "max_tokens": request.max_tokens,
        }
        for request in _live(engine)
    ]  # fmt: skip


def _tree(engine: NanoServingEngine) -> list[dict[str, int]]:
    """Nodes, parents first: place of the parent in this list or -1, pages, pins."""
    places: dict[int, int] = {}
    nodes: list[dict[str, int]] = []
    for _, node in engine.radix_mgr.tree.walk():
        if len(nodes) == MAX_NODES:
            break
        places[node.node_id] = len(nodes)
        nodes.append({"parent": places.get(node.parent, -1), "pages": node.num_pages, "pins": node.pin_count})
    return nodes
