"""OpenVINO GenAI's ContinuousBatchingPipeline on the CPU, stepped by hand."""

from __future__ import annotations

from typing import Any

from bench.peers.drivers.channel import run_driver


class OpenVinoServer:
    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._live: dict[int, tuple[Any, int]] = {}  # handle and tokens still to come, by key
        self._count = 0

    def add(self, key: int, prompt: list[int], output_tokens: int) -> None:
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.stop_token_ids = set()
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        self._live[key] = self._pipeline.add_request(self._count, ids, config), output_tokens
        self._count += 1

    def step(self) -> list[tuple[int, list[int]]]:
        if self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        came = []
        for key, (handle, left) in list(self._live.items()):
            while handle.can_read():
                for output in handle.read().values():
                    came.append((key, list(output.generated_ids)))
                    left -= len(output.generated_ids)
            if left:
                self._live[key] = handle, left
            else:
                del self._live[key]
        return came


def load(options: dict[str, Any]) -> tuple[OpenVinoServer, dict[str, Any]]:
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = max(1, round(options["kv_cache_bytes"] / 2**30))
    scheduler.max_num_batched_tokens = 2048
    scheduler.max_num_seqs = options["max_num_seqs"]
    scheduler.enable_prefix_caching = True
    scheduler.dynamic_split_fuse = True
    precision = "f32" if options["width"] == "float32" else "bf16"
    properties = {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": options["threads"], "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": True, **options.get("extra", {}),
    }  # fmt: skip
    pipeline = openvino_genai.ContinuousBatchingPipeline(options["model"], scheduler, "CPU", properties)
    facts = {
        "version": openvino_genai.__version__,
        "openvino": openvino.__version__,
        "arithmetic": options["width"],
    }
    return OpenVinoServer(pipeline), facts


if __name__ == "__main__":
    run_driver(load)
