"""Where KV lives and how prefixes are shared: pages (native) below, the radix tree over them above."""

from nanoserve.cache.kv_pool import KVCachePool, PageTable, PoolExhausted, pages_for_budget
from nanoserve.cache.radix_cache import InsertResult, MatchResult, RadixCache
from nanoserve.cache.radix_manager import RadixCacheManager
from nanoserve.cache.radix_node import INVALID_NODE, RadixNode

__all__ = [
    "INVALID_NODE",
    "InsertResult",
    "KVCachePool",
    "MatchResult",
    "PageTable",
    "PoolExhausted",
    "RadixCache",
    "RadixCacheManager",
    "RadixNode",
    "pages_for_budget",
]
