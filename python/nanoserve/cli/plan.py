"""`nanoserve plan`: what a model needs and what fits, from its config.json and the headers of its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
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
    from nanoserve.precision import Precision

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
                     "it, what this machine has available, of which the KV cache takes at most a quarter. With --device cuda: the "
                     "memory of a GPU that is not here.", show_default=False),
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
      nanoserve plan MODEL --device cuda --memory 80GiB    on a GPU that is not here
    """
    from nanoserve.device_name import device_ordinal, refuse_options
    from nanoserve.memory_plan import plan_memory
    from nanoserve.models.weights import weights_in_memory

    if "weight_cache" in engine:
        raise ValueError("--weight-cache: changes nothing about memory, leave it out")
    memory_bytes = None if memory is None else parse_size("--memory", memory)
    device = engine.pop("device", "cpu")
    on_gpu = device_ordinal(device) is not None
    gpu_only: dict[str, Any] = {
        name: engine.pop(name) for name in ("gpu_memory_utilization", "gemm") if name in engine
    }
    refuse_options(device, {"num_threads": engine.get("num_threads")}, gpu_only)
    choice = {**{name: engine.pop(name, default) for name, default in _CHOICE.items()}, "gpu": on_gpu}
    config, files = _look_at(model, engine.pop("revision", None), choice)
    origin = ""
    if on_gpu:
        made, origin = _plan_gpu(device, memory_bytes, config, files, {**engine, **gpu_only})
    else:
        made = plan_memory(
            config, memory_bytes=memory_bytes, stored_bytes=files.stored_bytes,
            weight_bytes=weights_in_memory(config, files.dtypes, files.precision), precision=files.precision, **engine,
        )  # fmt: skip
    if as_json:
        print(json.dumps({"device": device, **_as_dict(made)}))
        return
    console = Console(highlight=False)
    console.print(_sizes(config, made, origin))
    console.print(_concurrency(made))


def _plan_gpu(
    device: str, memory_bytes: int | None, config: ModelConfig, files: Files, options: dict[str, Any]
) -> tuple[MemoryPlan, str]:
    """The plan, and where its budget comes from in words."""
    from nanoserve.compiler.gpu.chip import CHIPS
    from nanoserve.cuda.backend import open_device
    from nanoserve.cuda.memory_plan import plan_cuda_memory, utilization

    share = utilization(options.get("gpu_memory_utilization"), options.get("kv_cache_bytes"))
    if memory_bytes is not None:  # the sizes are the same on every chip; this one has all instructions
        name, chip, total, free = "a GPU", CHIPS["sm_90a"], memory_bytes, None
    else:
        gpu = open_device(device)
        name, chip, total, free = gpu.name, gpu.chip, gpu.device.total_bytes, gpu.device.free_bytes
    made = plan_cuda_memory(
        config, files.dtypes, chip, total, free_bytes=free, precision=files.precision, stored_bytes=files.stored_bytes,
        **options,
    )  # fmt: skip
    if made.memory_bytes == free:
        return made, f"{format_size(total)} of {name} that are free"
    of = f"{format_size(total)} of {name}"
    return made, of if options.get("kv_cache_bytes") is not None else f"{share:g} x {of}"


@dataclass(frozen=True, slots=True)
class Files:
    """What a plan is to know of a checkpoint's files.

    Attributes:
        dtypes: how each weight is stored, by the decoder's names. stored_bytes: None where they are not here.
    """

    dtypes: dict[str, str]
    precision: Precision
    stored_bytes: int | None = None


def _look_at(model: str, revision: str | None, choice: dict[str, Any]) -> tuple[ModelConfig, Files]:
    """Config, and what is to be known of the weights: from their files, else from the dtype config.json names."""
    from nanoserve.models.checkpoint import checkpoint_directory, load_weights
    from nanoserve.models.config import ModelConfig
    from nanoserve.models.weights import bind_weights, stored_dtype
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
    return config, Files({name: weight.dtype for name, weight in bound.items()}, precision, stored)


def _as_config_says(config: ModelConfig, file: Path, choice: dict[str, Any]) -> Files:
    """The same without weight files: their dtype is what config.json says."""
    from nanoserve.checkpoint_json import read_object
    from nanoserve.models.config_file import MAX_CONFIG_BYTES
    from nanoserve.models.weights import expected_dtypes
    from nanoserve.precision import choose_precision

    raw = read_object(file, MAX_CONFIG_BYTES)
    named = raw.get("dtype", raw.get("torch_dtype"))
    stored = {"bfloat16": "bf16", "float16": "f16"}.get(named, "f32") if isinstance(named, str) else "f32"
    precision = choose_precision(**choice, stored=stored, head_dim=config.dim_per_head)
    return Files(expected_dtypes(config, stored), precision)


def _contexts(plan: MemoryPlan) -> list[int]:
    return [*(tokens for tokens in _CONTEXTS if tokens < plan.max_model_len), plan.max_model_len]


def _as_dict(plan: MemoryPlan) -> dict[str, Any]:
    names = ("kv_cache_bytes", "num_tokens", "total_bytes", "concurrency")
    derived = {name: getattr(plan, name) for name in names}
    at = {str(tokens): plan.concurrency_at(tokens) for tokens in _contexts(plan)}
    return {**asdict(plan), **derived, "concurrency_at": at}


def _sizes(config: ModelConfig, plan: MemoryPlan, origin: str) -> Table:
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
        ("total", format_size(plan.total_bytes), _of_budget(plan, origin)),
        ("KV per token", format_size(plan.kv_bytes_per_token), f"keys and values of all layers, {plan.precision.kv_cache}"),
        ("tokens in the cache", f"{plan.num_tokens:,}", ""),
        ("longest sequence", f"{plan.max_model_len:,}", f"prompt + output; the model's limit is {config.max_seq_len:,}"),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    return table


def _of_budget(plan: MemoryPlan, origin: str) -> str:
    if plan.memory_bytes is None:
        return "no budget given"
    share = 100 * plan.total_bytes / plan.memory_bytes
    return f"{share:.0f}% of {format_size(plan.memory_bytes)}" + (f" = {origin}" if origin else "")


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
