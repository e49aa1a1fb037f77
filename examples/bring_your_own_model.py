"""Serve a model of your own: nanoserve schedules and owns the KV cache, torch computes.

    python examples/bring_your_own_model.py

Needs torch. The model is plain torch; the only lines that know about serving are the two calls in `attend`. The scheduler
gives each step's tokens, positions, slots and block tables; `write_kv` and `paged_attention` do the paged part. Continuous
batching, chunked prefill, the prefix cache and preemption come with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanoserve import (
    KVCachePool,
    Request,
    SamplingParams,
    Scheduler,
    SchedulerOutput,
    paged_attention,
    write_kv,
)

VOCAB, WIDTH, HEADS, LAYERS, LENGTH = 256, 64, 4, 2, 512


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


class Model(nn.Module):
    """A GPT over rows of tokens: no batch dimension, no padding, no mask."""

    def __init__(self, pool: KVCachePool) -> None:
        super().__init__()
        self.pool = pool
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def attend(self, qkv: Tensor, index: int, step: SchedulerOutput) -> Tensor:
        q, k, v = qkv.view(len(qkv), 3, HEADS, WIDTH // HEADS).unbind(1)
        write_kv(k, v, self.pool, index, step.slot_mapping)
        return paged_attention(q, self.pool, index, step.block_tables, step.starts, step.counts).flatten(1)

    def forward(self, step: SchedulerOutput) -> Tensor:
        x = self.tokens(torch.from_numpy(step.input_ids)) + self.positions(torch.from_numpy(step.positions))
        for index, layer in enumerate(self.layers):
            x = x + layer.out(self.attend(layer.qkv(layer.norm1(x)), index, step))
            x = x + layer.mlp(layer.norm2(x))
        return self.norm(x[torch.from_numpy(step.sample_rows)]) @ self.tokens.weight.T


@torch.inference_mode()
def serve(model: Model, scheduler: Scheduler, requests: list[Request]) -> None:
    """Run requests to completion, greedily."""
    for request in requests:
        scheduler.add_request(request)
    while not all(request.is_finished for request in requests):
        step = scheduler.step()
        if step is not None:
            scheduler.update(step, model(step).argmax(dim=1).tolist())


def main() -> None:
    torch.manual_seed(0)
    pool = KVCachePool(
        num_pages=64, page_size=16, num_layers=LAYERS, num_heads=HEADS, head_dim=WIDTH // HEADS
    )
    scheduler = Scheduler(pool, vocab_size=VOCAB, max_model_len=LENGTH)
    system = list(b"You are a model with random weights. ")
    questions = (b"Who are you?", b"What is a page?", b"Say something.")
    params = SamplingParams(temperature=0, max_tokens=12)
    requests = [Request(i, system + list(question), params=params) for i, question in enumerate(questions)]
    serve(Model(pool).eval(), scheduler, requests)
    for request in requests:
        print(request, request.output_tokens)


if __name__ == "__main__":
    main()
