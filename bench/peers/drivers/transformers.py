"""transformers: the reference, one static batch at a time with left padding, its model's forward and DynamicCache.

A batch goes on until its longest answer is done, as `generate` does; rows that are done early are computed along.
"""

from __future__ import annotations

from typing import Any

from bench.peers.drivers.channel import run_driver

MAX_BATCH = 32


class TransformersServer:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._waiting: list[tuple[int, list[int], int]] = []
        self._batch: list[tuple[int, int]] = []  # key and tokens still to come
        self._cache: Any = None
        self._mask: Any = None
        self._last: Any = None  # each row's latest token

    def add(self, key: int, prompt: list[int], output_tokens: int) -> None:
        self._waiting.append((key, prompt, output_tokens))

    def step(self) -> list[tuple[int, list[int]]]:
        import torch

        with torch.inference_mode():
            self._last = self._decode() if any(left for _, left in self._batch) else self._prefill()
        came = [
            (key, [token])
            for (key, left), token in zip(self._batch, self._last.tolist(), strict=True)
            if left
        ]
        self._batch = [(key, max(0, left - 1)) for key, left in self._batch]
        return came

    def _prefill(self) -> Any:
        import torch
        from transformers import DynamicCache

        batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
        longest = max(len(prompt) for _, prompt, _ in batch)
        padding = [longest - len(prompt) for _, prompt, _ in batch]
        ids = torch.tensor([[0] * pad + prompt for pad, (_, prompt, _) in zip(padding, batch, strict=True)])
        self._mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        self._batch = [(key, output) for key, _, output in batch]
        self._cache = DynamicCache(config=self._model.config)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        return self._forward(ids, positions)

    def _decode(self) -> Any:
        import torch

        self._mask = torch.cat([self._mask, self._mask.new_ones((len(self._mask), 1))], dim=1)
        return self._forward(self._last[:, None], self._mask.sum(-1, keepdim=True) - 1)

    def _forward(self, ids: Any, positions: Any) -> Any:
        output = self._model(
            input_ids=ids, attention_mask=self._mask, position_ids=positions, past_key_values=self._cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return output.logits[:, -1].argmax(-1)


def load(options: dict[str, Any]) -> tuple[TransformersServer, dict[str, Any]]:
    import torch
    import transformers

    if options["width"] == "int8":
        raise ValueError("width: transformers has no int8 arithmetic for CPUs")
    torch.set_num_threads(options["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options["model"], dtype=getattr(torch, options["width"]), attn_implementation="sdpa"
    )
    model.eval()
    facts = {"version": transformers.__version__, "torch": torch.__version__, "arithmetic": options["width"]}
    return TransformersServer(model), facts


if __name__ == "__main__":
    run_driver(load)
