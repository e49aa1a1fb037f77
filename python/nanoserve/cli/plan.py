"""`nanoserve plan`: what a model needs and what fits, from its config.json and the headers of its files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nanoserve.cli.byte_size import format_size, parse_size
from nanoserve.cli.options import with_engine

if TYPE_CHECKING:
    from nanoserve.memory_plan import MemoryPlan
    from nanoserve.models.config import ModelConfig

_CHOICE = {"dtype": "auto", "quantization": None, "kv_cache_dtype": "auto"}  # LLM's defaults
_WEIGHTS = {
    "float32": "as stored: 16 bits are widened in the kernels; arithmetic in float32",
    "bfloat16": "bfloat16, and so is the arithmetic",
    "int8": "int8, and so is the arithmetic",
}
_CONTEXTS = [256 * 4**power for power in range(8)]  # of the concurrency table


@with_engine
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory, its config.json, or hub name.",
                                         show_default=False)],
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Budget for weights, activations and KV cache, e.g. 16GB. Without "
                     "it, what this machine has available, of which the KV cache takes at most a quarter.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as one JSON object.")] = False,
    *,
    engine: dict[str, Any],
) -> None:  # fmt: skip
    """Show what a model takes and what fits beside it, without loading it.

    Reads config.json and the headers of weight files that are here, never the weights (of a hub name, only the small files are
    downloaded). What does not fit is refused with the numbers and exit code 2, by the same rules as nanoserve generate and chat.

    Examples:
      nanoserve plan models/tiny-gpt
      nanoserve plan Qwen/Qwen3-0.6B --memory 8GB --max-model-len 8192
      nanoserve plan MODEL --kv-cache 2GiB --json
    """
    from nanoserve.memory_plan import plan_memory

    if "weight_cache" in engine:
        raise ValueError("--weight-cache: changes nothing about memory, leave it out")
    memory_bytes = None if memory is None else parse_size("--memory", memory)
    choice = {name: engine.pop(name, default) for name, default in _CHOICE.items()}
    config, weights = _look_at(model, engine.pop("revision", None), choice)
    made = plan_memory(config, memory_bytes=memory_bytes, **weights, **engine)
    if as_json:
        print(json.dumps(_as_dict(made)))
        return
    console = Console(highlight=False)
    console.print(_sizes(config, made))
    console.print(_concurrency(made))


def _look_at(model: str, revision: str | None, choice: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """Config, and what plan_memory is to know of the weights: from their files, else from the dtype config.json names."""
    from nanoserve.models.checkpoint import checkpoint_directory, load_weights
    from nanoserve.models.config import ModelConfig
    from nanoserve.models.weights import bind_weights, loaded_bytes, stored_dtype
    from nanoserve.precision import choose_precision

    path = Path(model)
    if path.is_file():
        config = ModelConfig.from_pretrained(path)
        return config, _as_config_says(config, path, choice)
    directory = checkpoint_directory(model, revision=revision, weights=False)
    config = ModelConfig.from_pretrained(directory)
    if not any(directory.glob("*.safetensors")):
        return config, _as_config_says(config, directory / "config.json", choice)
    tensors = load_weights(directory)
    bound = bind_weights(config, tensors)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    precision = choose_precision(**choice, stored=stored_dtype(bound), head_dim=config.dim_per_head)
    weight_bytes = loaded_bytes(config, bound, precision)
    return config, {"stored_bytes": stored, "weight_bytes": weight_bytes, "precision": precision}


def _as_config_says(config: ModelConfig, file: Path, choice: dict[str, Any]) -> dict[str, Any]:
    """The same without weight files: their dtype is what config.json says."""
    from nanoserve.checkpoint_json import read_object
    from nanoserve.models.config_file import MAX_CONFIG_BYTES
    from nanoserve.models.weights import expected_bytes
    from nanoserve.precision import choose_precision

    raw = read_object(file, MAX_CONFIG_BYTES)
    named = raw.get("dtype", raw.get("torch_dtype"))
    stored = {"bfloat16": "bf16", "float16": "f16"}.get(named, "f32") if isinstance(named, str) else "f32"
    precision = choose_precision(**choice, stored=stored, head_dim=config.dim_per_head)
    return {"weight_bytes": expected_bytes(config, stored, precision), "precision": precision}


def _contexts(plan: MemoryPlan) -> list[int]:
    return [*(tokens for tokens in _CONTEXTS if tokens < plan.max_model_len), plan.max_model_len]


def _as_dict(plan: MemoryPlan) -> dict[str, Any]:
    names = ("kv_cache_bytes", "num_tokens", "total_bytes", "concurrency")
    derived = {name: getattr(plan, name) for name in names}
    at = {str(tokens): plan.concurrency_at(tokens) for tokens in _contexts(plan)}
    return {**asdict(plan), **derived, "concurrency_at": at}


def _sizes(config: ModelConfig, plan: MemoryPlan) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    stored = "unknown" if plan.stored_bytes is None else format_size(plan.stored_bytes)
    shape = f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, {config.kv_heads} of KV"
    rows = [
        ("parameters", f"{plan.num_parameters:,}", f"{config.family}: {shape}"),
        ("weights on disk", stored, ""),
        ("weights in memory", format_size(plan.weight_bytes), _WEIGHTS[plan.precision.arithmetic]),
        ("activations", format_size(plan.activation_bytes), "buffers, rotary tables and logits of the largest step"),
        ("KV cache", format_size(plan.kv_cache_bytes),
         f"{plan.num_pages:,} pages of {plan.page_size} tokens, {format_size(plan.page_bytes)} each"),
        ("total", format_size(plan.total_bytes), _of_budget(plan)),
        ("KV per token", format_size(plan.kv_bytes_per_token), f"keys and values of all layers, {plan.precision.kv_cache}"),
        ("tokens in the cache", f"{plan.num_tokens:,}", ""),
        ("longest sequence", f"{plan.max_model_len:,}", f"prompt + output; the model's limit is {config.max_seq_len:,}"),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    return table


def _of_budget(plan: MemoryPlan) -> str:
    if plan.memory_bytes is None:
        return "no budget given"
    share = 100 * plan.total_bytes / plan.memory_bytes
    return f"{share:.0f}% of {format_size(plan.memory_bytes)}"


def _concurrency(plan: MemoryPlan) -> Table:
    table = Table(
        title="\nSequences that fit at once", title_justify="left", box=None, pad_edge=False, title_style=""
    )
    table.add_column("tokens each", justify="right", no_wrap=True)
    table.add_column("sequences", justify="right", no_wrap=True)
    table.add_column(style="dim")
    for tokens in _contexts(plan):
        fit = plan.concurrency_at(tokens)
        note = f"at most {plan.max_num_seqs} run: --max-num-seqs" if fit > plan.max_num_seqs else ""
        table.add_row(f"{tokens:,}", f"{fit:,}", note)
    return table
