"""This engine."""

from __future__ import annotations

from typing import Any

from bench.peers.drivers.channel import run_driver
from nanoserve import LLM, __version__
from nanoserve.workloads.engine_server import EngineServer

# Keywords of LLM for each width.
WIDTHS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
}


def load(options: dict[str, Any]) -> tuple[EngineServer, dict[str, Any]]:
    common = {
        "kv_cache_bytes": options["kv_cache_bytes"], "max_num_seqs": options["max_num_seqs"],
        "max_model_len": options["max_model_len"], "num_threads": options["threads"],
    }  # fmt: skip
    width = options["width"]
    facts = {"version": __version__, "arithmetic": width}
    try:
        llm = LLM(options["model"], **common, **WIDTHS[width])
    except (TypeError, ValueError) as error:
        # A build that has no 16-bit arithmetic yet runs the next wider one; the results say so.
        if width != "bfloat16" or not str(error).startswith("dtype:"):
            raise
        llm = LLM(options["model"], **common)
        facts["arithmetic"] = "float32, weights stored as in the checkpoint"
    return EngineServer(llm.engine), facts


if __name__ == "__main__":
    run_driver(load)
