"""Small random checkpoints made by transformers, and its float32 forward pass as the oracle."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=301, n_positions=512, n_embd=64, n_layer=2, n_head=4, initializer_range=0.15)
    ),
    "gpt2-odd": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=512, n_embd=60, n_layer=1, n_head=3, n_inner=100,
                   activation_function="gelu", initializer_range=0.15)
    ),
    "llama-gqa": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=301, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.15)
    ),
    "llama-odd": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=131, hidden_size=72, intermediate_size=90, num_hidden_layers=2, num_attention_heads=6,
                    num_key_value_heads=2, head_dim=20, max_position_embeddings=512, initializer_range=0.15,
                    attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
}  # fmt: skip


def make_checkpoint(name: str, directory: Path) -> Path:
    """Save a seeded random model of one of SHAPES; biases and norms are randomised too, transformers leaves them at 0 and 1."""
    torch.manual_seed(sorted(SHAPES).index(name))
    model = SHAPES[name]().float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    path = directory / name
    model.save_pretrained(path)
    return path


@functools.cache
def load_oracle(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def oracle_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """float32[len(tokens), vocab]: transformers' logits after each token."""
    with torch.no_grad():
        return load_oracle(path)(torch.tensor([tokens])).logits[0].numpy()
