"""Health: what the server says of itself, without asking the engine's thread, which may be stuck."""

from __future__ import annotations

from typing import Any

from nanoserve.server.engine_view import EngineView
from nanoserve.server.gateway import Gateway


class Health:
    """Live while it answers; ready while the engine makes progress and new requests are let in."""

    def __init__(self, gateway: Gateway, view: EngineView, device: str) -> None:
        self._gateway, self._view, self._device = gateway, view, device

    def report(self) -> tuple[int, dict[str, Any]]:
        """(status, body)."""
        gateway = self._gateway
        status = "ready"
        if gateway.is_draining:
            status = "draining"
        elif not gateway.is_ready:
            status = "starting"
        elif gateway.is_wedged:
            status = "wedged"
        return (200 if status == "ready" else 503), {
            "status": status,
            "device": self._device,
            **self._progress(),
        }

    def gauges(self) -> dict[str, Any]:
        """For the metrics."""
        gateway, loop = self._gateway, self._gateway.engine_loop
        stats = loop.snapshot
        return {
            "device": self._device,
            "num_requests_running": gateway.num_running,
            "num_requests_waiting": gateway.num_waiting,
            "kv_cache_usage_perc": stats["kv_pages_used"] / max(1, stats["kv_pages_total"]),
            "last_step_age_seconds": self._progress()["last_step_age"],
            "last_token_age_seconds": self._progress()["last_token_age"],
            "prefix_cache_queries": stats["prefix_queries"],
            "prefix_cache_hits": stats["prefix_hits"],
            "num_preemptions": stats["preemptions"],
            "engine_steps": loop.steps,
            "engine_step_failures": loop.failed_steps,
        }

    def engine_state(self) -> dict[str, Any]:
        """For the page: numbers and shapes, never text. Who looks for the first time sees the engine the next time."""
        gateway = self._gateway
        self._view.watch()
        gateway.engine_loop.refresh()
        return {
            "running": gateway.num_running, "waiting": gateway.num_waiting, "steps": gateway.engine_loop.steps,
            **self._progress(), **gateway.engine_loop.snapshot.get("view", {}),
        }  # fmt: skip

    def _progress(self) -> dict[str, Any]:
        gateway, loop = self._gateway, self._gateway.engine_loop
        now = gateway.clock()
        return {
            "last_step_age": round(now - loop.last_step_s, 3),
            "last_token_age": round(now - loop.last_token_s, 3),
            "step_running_for": round(loop.stuck_for_s(), 3),
        }
