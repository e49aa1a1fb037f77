"""A tiny random Llama with a real tokenizer and a chat template: everything LLM and the command line read."""

from __future__ import annotations

from pathlib import Path

from support.families import CASES
from support.oracle import random_model
from support.tokenizers_small import make_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_text_checkpoint(
    directory: Path, kind: str = "llama3", *, chat_template: str | None = CHAT_TEMPLATE, positions: int = 512
) -> Path:
    """config.json, model.safetensors, tokenizer files and generation_config.json (EOS: the tokenizer's) in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(kind, directory, chat_template=chat_template)
    eos = tokenizer.eos_token_id
    config = CASES["llama"].config(
        vocab_size=max(len(tokenizer), 320), eos_token_id=eos, bos_token_id=tokenizer.bos_token_id,
        max_position_embeddings=positions,
    )  # fmt: skip
    model = random_model(config, kind)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(directory)
    return directory
