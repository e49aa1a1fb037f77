"""The mixed workload by transformers' continuous batching: as it is by itself, and with CUDA graphs asked for.

It takes its fast path (graphs, batches prepared ahead) where flash attention is installed; "sdpa" without it becomes a slow one.
Which one it was goes with the number.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

from tools.gpu_check.engine_work import workload
from tools.gpu_check.shapes import RAW

WAYS: dict[str, dict[str, Any]] = {
    "transformers": {},
    "transformers, graphs asked for": {"use_cuda_graph": True, "use_async_batching": True},
}


def make_model(torch: Any, name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = dict(RAW[name])
    with torch.device("cuda"):
        config = AutoConfig.for_model(raw.pop("model_type"), **raw)
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()


def make_manager(model: Any, most: int, options: dict[str, Any]) -> Any:
    """For answers of at most so many tokens; `options` of its config."""
    from transformers import GenerationConfig

    how = GenerationConfig(
        do_sample=True, temperature=0.6, max_new_tokens=most, eos_token_id=-1, pad_token_id=0
    )
    if not options:
        return model.init_continuous_batching(generation_config=how)
    from transformers.generation import ContinuousBatchingConfig

    config = ContinuousBatchingConfig(**options)
    return model.init_continuous_batching(generation_config=how, continuous_batching_config=config)


def mixed(
    model: Any, manager: Any, vocab: int, seconds_left: Callable[[], float], most_s: float
) -> dict[str, Any]:
    """Tokens of the workload in the time, those of unfinished requests too, and how it computed them."""
    prompts, counts = workload(vocab, False)
    if hasattr(manager, "warmup"):
        manager.warmup()
    manager.start()
    try:
        manager.add_request(prompts[0], request_id="first", max_new_tokens=4)
        _results(manager, {"first": 4}, seconds_left() / 2)
        how = about(model, manager)
        # Now that the model is built, and warm.
        limit = min(most_s, seconds_left())
        begin = time.perf_counter()
        wanted = {}
        for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            manager.add_request(prompt, request_id=str(number), max_new_tokens=count, streaming=True)
            wanted[str(number)] = count
        tokens = sum(_results(manager, wanted, limit).values())
        seconds = time.perf_counter() - begin
    finally:
        _stop(manager)
    return {"tokens": tokens, "seconds": seconds, "whole": tokens >= sum(counts), **how}


def about(model: Any, manager: Any) -> dict[str, Any]:
    """Its attention, and whether it has graphs: None where it does not say."""
    config = getattr(manager, "continuous_batching_config", None)
    return {
        "attention": model.config._attn_implementation,
        "use_cuda_graph": getattr(config, "use_cuda_graph", None),
        "use_async_batching": getattr(config, "use_async_batching", None),
    }


def _stop(manager: Any) -> None:
    """Requests that are not done are given up: to finish them would take their time."""
    known = inspect.signature(manager.stop).parameters
    options = {"block": True, "timeout": 5.0, **({"hard_stop": True} if "hard_stop" in known else {})}
    if "hard_stop" not in known:
        options["block"] = False
    manager.stop(**{name: value for name, value in options.items() if name in known})


def _results(manager: Any, wanted: dict[str, int], limit: float) -> dict[str, int]:
    """Tokens by request, until all are there or the time is up."""
    end, found = time.perf_counter() + limit, dict.fromkeys(wanted, 0)
    while time.perf_counter() < end and any(found[key] < count for key, count in wanted.items()):
        result = manager.get_result(timeout=0.2)
        if result is not None and result.request_id in found:
            if result.error:
                raise RuntimeError(result.error)
            found[result.request_id] = max(found[result.request_id], len(result.generated_tokens))
        elif result is None and not manager.is_running():
            raise RuntimeError("its thread has ended")
    return found
