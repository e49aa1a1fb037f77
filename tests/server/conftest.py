"""Servers in this process, on a free port, whose engine can be looked at: whatever a client does, it must be clean afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanoserve import LLM
from nanoserve.server.run import Server
from nanoserve.server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[2]
TINY_GPT = ROOT / "models" / "tiny-gpt"
# Qwen's and Hermes' way to write tools and calls; tokens are bytes, so that every text is tokens and back.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool.function.name }} {% endfor %}in <tool_call></tool_call><|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments.items() | list }}</tool_call>{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def numbers(client: httpx.Client) -> dict[str, float]:
    """What /metrics tells, by names with their labels."""
    text = client.get("/metrics").text
    return {
        sample.name + "".join(f",{key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Running:
    """A server in a thread of its own.

    Attributes:
        url: where it listens. server: to look inside.
    """

    def __init__(self, llm: LLM, **settings: Any) -> None:
        self.llm = llm
        self.failure: RuntimeError | None = None
        self._listening = threading.Event()
        self.finished: bool | None = None
        settings = {"port": 0, "model_name": "tiny", **settings}
        self._thread = threading.Thread(target=self._run, args=(ServerSettings(**settings),), daemon=True)
        self._thread.start()
        assert self._listening.wait(60), "the server does not listen"
        self.url: str = self.server.url
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def _run(self, settings: ServerSettings) -> None:
        async def serve() -> bool:
            self.loop = asyncio.get_running_loop()
            self.server = Server(self.llm, settings, on_listening=lambda url: self._listening.set())
            return await self.server.serve()

        try:
            self.finished = asyncio.run(serve())
        except RuntimeError as error:  # the engine failed
            self.failure = error

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "none-needed", "max_retries": 0, **options}
        )

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def complete(self, **fields: Any) -> Any:
        answer = self.post("/v1/completions", {"model": "tiny", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    @property
    def engine(self) -> Any:
        return self.llm.engine

    def wait_until_idle(self, seconds: float = 10.0) -> None:
        """Until nothing is left of any request; then the engine's books must balance."""
        gateway, deadline = self.server.gateway, time.monotonic() + seconds
        while (
            gateway.num_running
            or gateway.num_waiting
            or self.engine.has_unfinished
            or not gateway._idle.is_set()  # what ended is counted, too
        ):
            assert time.monotonic() < deadline, (
                gateway.num_running,
                gateway.num_waiting,
                self.engine.get_stats(),
            )
            time.sleep(0.005)
        self.engine.audit()
        held = self.engine.kv_pool.num_used_pages
        assert held == self.engine.radix_mgr.tree.num_tokens // self.engine.kv_pool.page_size
        assert not gateway._per_key
        assert gateway._sequences == 0

    def wait_until_idle_but(self, worker: threading.Thread, seconds: float = 20.0) -> None:
        """Until nobody but one worker, who sends one request at a time, has a request."""
        deadline = time.monotonic() + seconds
        while self.server.gateway.num_running + self.server.gateway.num_waiting > 1:
            assert worker.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def close(self) -> None:
        self.client.close()
        with contextlib.suppress(RuntimeError):  # it ended by itself
            self.loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server does not end"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-gpt with a chat template that knows tools."""
    directory = tmp_path_factory.mktemp("served") / "tiny"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY_GPT / name, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def start(checkpoint: Path) -> Iterator[Callable[..., Running]]:
    """start(engine={...}, **settings) -> a server; all are closed at the end."""
    started: list[Running] = []

    def make(engine: dict[str, Any] | None = None, **settings: Any) -> Running:
        options = {"num_threads": 1, "kv_cache_bytes": 16 << 20, "max_num_seqs": 8, **(engine or {})}
        running = Running(LLM(checkpoint, **options), **settings)
        started.append(running)
        return running

    yield make
    for running in started:
        running.close()


@pytest.fixture(scope="session")
def shared(start: Callable[..., Running]) -> Running:
    """One server for tests that leave it as it was."""
    return start()


@pytest.fixture
def served(shared: Running) -> Iterator[Running]:
    """It, clean before and after."""
    shared.wait_until_idle()
    yield shared
    shared.wait_until_idle()
