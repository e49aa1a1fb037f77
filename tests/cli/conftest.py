"""The command line run in this process, and the checkpoints it is run on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench.random_checkpoint import write_random_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from nanoserve.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
TINY_GPT = ROOT / "models" / "tiny-gpt"
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ("system", "user", "assistant") -%}{{ raise_exception("unknown role") }}{%- endif -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


@pytest.fixture
def run() -> Callable[..., Any]:
    """run("generate", ...) -> a result with exit_code, stdout and stderr."""

    def invoke(*arguments: str | Path, stdin: str | bytes | None = None) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return invoke


@pytest.fixture(scope="session")
def byte_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-gpt with a chat template: its tokens are bytes, so an answer's text always becomes the same tokens again."""
    directory = tmp_path_factory.mktemp("byte-chat")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY_GPT / name, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def random_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of 65536 positions with a tokenizer, special tokens, a template and a generation config."""
    directory = tmp_path_factory.mktemp("random-chat")
    width, vocab, heads = 32, 258, 2
    layer = {
        "input_layernorm.weight": (width,), "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (width, width), "self_attn.v_proj.weight": (width, width),
        "self_attn.o_proj.weight": (width, width), "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (width, width), "mlp.up_proj.weight": (width, width), "mlp.down_proj.weight": (width, width),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
    }
    shapes |= {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": width,
        "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": heads,
        "max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
        "eos_token_id": 257,
    }  # fmt: skip
    write_random_checkpoint(directory, config, shapes, dtype="float32")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"temperature": 0.0, "eos_token_id": 257, "no_repeat_ngram_size": 3}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory
