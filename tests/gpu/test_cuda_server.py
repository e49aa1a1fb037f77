"""The server over a model on a CUDA device in software: the same answers, and it says where it runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.gpu.emulated_images import load_images

from nanoserve import LLM, SamplingParams
from nanoserve.cli.app import app
from nanoserve.server import run as run_module
from nanoserve.server.run import Server
from support.text_checkpoint import make_text_checkpoint

NAME = "cuda:0, nanoserve emulated GPU (sm_90a)"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    """`nanoserve serve --device cuda` in a thread: the command itself, in this process, whose kernels are the emulator's."""
    patch = pytest.MonkeyPatch()
    load_images(patch)
    listening, held = threading.Event(), dict[str, Any]()

    class Reachable(Server):
        """Tells the test where it listens, and lets itself be stopped."""

        async def serve(self) -> bool:
            held["loop"], held["server"] = asyncio.get_running_loop(), self
            self._on_listening = lambda url: listening.set()
            return await super().serve()

    patch.setattr(run_module, "Server", Reachable)
    words = ["serve", str(checkpoint), "--port", "0", "--device", "cuda", "--gpu-memory-utilization", "0.5",
             "--max-num-seqs", "4", "--log-level", "info"]  # fmt: skip
    thread = threading.Thread(target=lambda: held.update(code=app(words, standalone_mode=False)), daemon=True)
    records: list[tuple[str, Any]] = []
    patch.setattr(run_module._log, "info", lambda text, extra=None: records.append((text, extra)))
    thread.start()
    assert listening.wait(60), "the server does not listen"
    assert ("listening", {"fields": {"url": held["server"].url, "device": NAME}}) in records
    yield held["server"].url
    held["loop"].call_soon_threadsafe(held["server"].stop)
    thread.join(20)
    patch.undo()
    assert held["code"] in (None, 0)


def test_an_answer_is_the_cpus(url: str, checkpoint: Path) -> None:
    body = {
        "model": "tiny", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    (output,) = LLM(checkpoint).generate(
        [body["prompt"]], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    )
    assert answer.json()["choices"][0]["text"] == output.text
    assert answer.json()["usage"]["completion_tokens"] == 8


def test_health_and_metrics_name_the_device(url: str) -> None:
    assert httpx.get(f"{url}/health").json()["device"] == NAME
    assert f'nanoserve:device_info{{device="{NAME}"}} 1.0' in httpx.get(f"{url}/metrics").text
