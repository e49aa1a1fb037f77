"""Small random checkpoints made by transformers, and its float32 forward pass as the oracle.

The oracle's answer at position i is what transformers gives for the sequence that ends there, fresh. For most models one
forward over everything has them all; where angles depend on the sequence's length it does not, and `oracle_logits` runs
what `generate()` would.
"""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from support.families import CASES, Case

torch.set_num_threads(1)


def random_model(config: PreTrainedConfig, name: str) -> Any:
    """A float32 model seeded by a name; biases and norms are randomised too, transformers leaves them at 0 and 1."""
    torch.manual_seed(zlib.crc32(name.encode()))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    tied = config.tie_word_embeddings
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                # Norms behind a block weigh more and tied embeddings less: otherwise the residual stream stays its own
                # token's embedding, and a tied head repeats the prompt's last token for ever.
                last = tied and key in ("model.norm.weight", "transformer.ln_f.weight")
                parameter.add_(torch.randn_like(parameter) * 0.1 + ("post_" in key) + 1.5 * last)
        if tied:
            model.get_input_embeddings().weight.mul_(0.4)
    return model


def make_checkpoint(
    name: str, directory: Path, *, dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """Save the seeded random model of one of CASES as safetensors; options go to save_pretrained."""
    path = directory / name
    random_model(CASES[name].config(), name).to(dtype).save_pretrained(path, **options)
    return path


@functools.cache
def load_oracle(path: Path) -> Any:
    """transformers' own model of a checkpoint, in float32 whatever the file holds."""
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model.eval()


def forward(model: Any, tokens: list[int]) -> np.ndarray:
    """float32[len(tokens), vocab] of one forward over a whole sequence."""
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def oracle_logits(path: Path, tokens: list[int], case: Case, prompt_len: int) -> np.ndarray:
    """float32[len(tokens), vocab]: row i is transformers' answer to tokens[: i + 1], for i >= prompt_len - 1."""
    model = load_oracle(path)
    if case.steps:
        return _step_by_step(model, tokens, prompt_len)
    logits = forward(model, tokens)
    if case.original is not None and len(tokens) > case.original >= prompt_len:
        # Causal, so one forward over all tokens up to the border answers for every shorter sequence, and one over all
        # tokens for every longer one: within each, all sequences have the same angles.
        logits = logits.copy()
        logits[: case.original] = forward(model, tokens[: case.original])
    return logits


def _step_by_step(model: Any, tokens: list[int], prompt_len: int) -> np.ndarray:
    """The prompt in one forward, then token by token with a KV cache, as generate() does."""
    with torch.inference_mode():
        model(torch.tensor([tokens[:1]]))  # a short sequence resets what a longer one before it left behind
        out = model(torch.tensor([tokens[:prompt_len]]), use_cache=True)
        rows = [out.logits[0]]
        for token in tokens[prompt_len:]:
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0])
    return torch.cat(rows).numpy()


def oracle_generate(path: Path, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy generation, with its KV cache."""
    model = load_oracle(path)
    with torch.inference_mode():
        model(torch.tensor([prompt[:1]]), use_cache=False)
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            use_cache=True, max_new_tokens=count, min_new_tokens=count, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()
