"""nanoserve: a complete LLM serving system, small enough to read.

Names are imported on first use, so `import nanoserve` costs nothing and needs neither the native module nor a compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nanoserve.batch import Batch
    from nanoserve.cache.kv_pool import KVCachePool, PageTable, PoolExhausted
    from nanoserve.cache.radix_cache import RadixCache
    from nanoserve.cache.radix_manager import RadixCacheManager
    from nanoserve.cache.radix_node import INVALID_NODE, RadixNode
    from nanoserve.errors import CheckpointError, IllegalTransition, InvariantViolation, RequestRefused
    from nanoserve.executor import ModelExecutor
    from nanoserve.llm import LLM
    from nanoserve.logprobs import TokenLogprob
    from nanoserve.models.checkpoint import load_weights
    from nanoserve.models.config import ModelConfig
    from nanoserve.models.weights import random_weights
    from nanoserve.nano_engine import NanoServingEngine
    from nanoserve.outputs import Completion, RequestOutput, TextDelta
    from nanoserve.paged import paged_attention, write_kv
    from nanoserve.request import Request, RequestState
    from nanoserve.sampling import Sampler, SamplingParams
    from nanoserve.scheduling.chunked_prefill import ChunkedPrefillManager
    from nanoserve.scheduling.chunked_request import ChunkedRequest
    from nanoserve.scheduling.continuous_batcher import ContinuousBatcher
    from nanoserve.scheduling.decode_manager import DecodeManager
    from nanoserve.scheduling.prefill_manager import PrefillManager
    from nanoserve.scheduling.request_pool import RequestPool
    from nanoserve.scheduling.scheduler import Scheduler, SchedulerOutput
    from nanoserve.structured import StructuredOutputs

_HOME = {
    "Batch": "batch",
    "CheckpointError": "errors",
    "Completion": "outputs",
    "ChunkedPrefillManager": "scheduling.chunked_prefill",
    "ChunkedRequest": "scheduling.chunked_request",
    "ContinuousBatcher": "scheduling.continuous_batcher",
    "DecodeManager": "scheduling.decode_manager",
    "INVALID_NODE": "cache.radix_node",
    "IllegalTransition": "errors",
    "InvariantViolation": "errors",
    "KVCachePool": "cache.kv_pool",
    "LLM": "llm",
    "ModelConfig": "models.config",
    "ModelExecutor": "executor",
    "NanoServingEngine": "nano_engine",
    "PageTable": "cache.kv_pool",
    "PoolExhausted": "cache.kv_pool",
    "PrefillManager": "scheduling.prefill_manager",
    "RadixCache": "cache.radix_cache",
    "RadixCacheManager": "cache.radix_manager",
    "RadixNode": "cache.radix_node",
    "Request": "request",
    "RequestOutput": "outputs",
    "RequestPool": "scheduling.request_pool",
    "RequestRefused": "errors",
    "RequestState": "request",
    "Sampler": "sampling",
    "SamplingParams": "sampling",
    "Scheduler": "scheduling.scheduler",
    "SchedulerOutput": "scheduling.scheduler",
    "StructuredOutputs": "structured",
    "TextDelta": "outputs",
    "TokenLogprob": "logprobs",
    "load_weights": "models.checkpoint",
    "paged_attention": "paged",
    "random_weights": "models.weights",
    "write_kv": "paged",
}
__all__ = [
    "INVALID_NODE",
    "LLM",
    "Batch",
    "CheckpointError",
    "ChunkedPrefillManager",
    "ChunkedRequest",
    "Completion",
    "ContinuousBatcher",
    "DecodeManager",
    "IllegalTransition",
    "InvariantViolation",
    "KVCachePool",
    "ModelConfig",
    "ModelExecutor",
    "NanoServingEngine",
    "PageTable",
    "PoolExhausted",
    "PrefillManager",
    "RadixCache",
    "RadixCacheManager",
    "RadixNode",
    "Request",
    "RequestOutput",
    "RequestPool",
    "RequestRefused",
    "RequestState",
    "Sampler",
    "SamplingParams",
    "Scheduler",
    "SchedulerOutput",
    "StructuredOutputs",
    "TextDelta",
    "TokenLogprob",
    "load_weights",
    "paged_attention",
    "random_weights",
    "write_kv",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nanoserve' has no attribute {name!r}")
    value = getattr(import_module(f"nanoserve.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
