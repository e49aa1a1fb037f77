"""NanoServingEngine as a player's server."""

from __future__ import annotations

from nanoserve.nano_engine import NanoServingEngine
from nanoserve.sampling import SamplingParams


class EngineServer:
    """Greedy requests by number. The engine is not to be used by others meanwhile."""

    def __init__(self, engine: NanoServingEngine) -> None:
        self.engine = engine

    def add(self, key: int, prompt: list[int], output_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        self.engine.add_request(prompt, params, req_id=key)

    def step(self) -> list[tuple[int, list[int]]]:
        """One step.

        Raises:
            RuntimeError: a request failed; with what it failed.
        """
        output = self.engine.step()
        for request in output.finished:
            if request.finish_reason != "length":
                raise RuntimeError(
                    f"request {request.req_id} ended with {request.finish_reason}: {request.error}"
                )
        return [(int(key), [token]) for key, token in output.new_tokens.items()]
