"""vLLM's engine for CPUs, in this process: LLMEngine.add_request and step, no HTTP and no detokenizer."""

from __future__ import annotations

import os
from typing import Any

from bench.peers.drivers.channel import run_driver


class VllmServer:
    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._keys: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._count = 0

    def add(self, key: int, prompt: list[int], output_tokens: int) -> None:
        from vllm import SamplingParams, TokensPrompt

        name = str(self._count)
        self._count += 1
        self._keys[name], self._seen[name] = key, 0
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=0.0, detokenize=False)
        self._engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)

    def step(self) -> list[tuple[int, list[int]]]:
        came = []
        for output in self._engine.step():
            name, tokens = output.request_id, list(output.outputs[0].token_ids)
            came.append((self._keys[name], tokens[self._seen[name] :]))
            self._seen[name] = len(tokens)
            if output.finished:
                del self._keys[name], self._seen[name]
        return came


def load(options: dict[str, Any]) -> tuple[VllmServer, dict[str, Any]]:
    cpus = sorted(os.sched_getaffinity(0))[: options["threads"]]
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(options["kv_cache_bytes"] / 2**30))),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    import vllm

    dtype = "float32" if options["width"] == "float32" else "bfloat16"
    llm = vllm.LLM(
        model=options["model"], dtype=dtype, skip_tokenizer_init=True, max_model_len=options["max_model_len"],
        max_num_seqs=options["max_num_seqs"], enable_prefix_caching=True, disable_log_stats=True, seed=0,
        **options.get("extra", {}),
    )  # fmt: skip
    return VllmServer(llm.llm_engine), {"version": vllm.__version__, "arithmetic": options["width"]}


if __name__ == "__main__":
    run_driver(load)
