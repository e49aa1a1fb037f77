"""From checkpoint files to the weights the decoder names.

`load_weights(path)` returns what is in the files, under the files' names. `bind_weights(config, tensors)` maps those names
to the decoder's through a table per family, joins what the kernels want joined (q|k|v, gate|up), and checks that every
weight is there with its shape and that nothing is left over. Arrays stay memory-mapped until they are packed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoserve.errors import CheckpointError
from nanoserve.models.config import ModelConfig
from nanoserve.models.decoder import weight_shapes
from nanoserve.models.safetensors_file import read_safetensors

Weights = dict[str, NDArray[Any]]
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


def load_weights(path: str | Path) -> Weights:
    """Tensors by name from a safetensors file, a checkpoint directory (single or sharded), or a torch `.pt` state dict.

    Raises:
        CheckpointError: nothing loadable there, or a damaged file.
    """
    file = Path(path)
    if file.is_dir():
        if (file / _INDEX).is_file():
            return _load_sharded(file)
        if (file / _SINGLE).is_file():
            return read_safetensors(file / _SINGLE)
        hint = ""
        if any(file.glob("*.bin")):
            hint = "; it has .bin files, convert them once with transformers: model.save_pretrained(dir)"
        raise CheckpointError(f"{file}: holds neither {_SINGLE} nor {_INDEX}{hint}")
    if file.suffix == ".pt":
        return _load_torch(file)
    return read_safetensors(file)


def _load_sharded(directory: Path) -> Weights:
    try:
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        weight_map = index["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{_INDEX}: must hold an object with a weight_map of names ({type(error).__name__})"
        ) from error
    tensors: Weights = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{_INDEX}: shard {shard!r} must be a file name beside the index")
        for name, array in read_safetensors(directory / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{shard}: tensor {name!r} is not what {_INDEX} places there")
            tensors[name] = array
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(f"{_INDEX}: {len(missing)} tensors are in no shard, first {missing[0]!r}")
    return tensors


def _load_torch(file: Path) -> Weights:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{file.name}: reading a .pt file needs torch >= 2.6; or convert it to safetensors where torch is installed"
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise CheckpointError(
            f"{file.name}: torch {torch.__version__} cannot load it safely, torch >= 2.6 is needed"
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged or unsafe files; all mean the same here
        raise CheckpointError(
            f"{file.name}: not a state dict torch can read safely ({type(error).__name__})"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{file.name}: must hold a state dict of tensors")
    return {str(name): tensor.detach().float().numpy() for name, tensor in state.items()}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a decoder weight comes from: checkpoint tensors joined along their output rows, transposed when stored [in, out]."""

    names: tuple[str, ...]
    transposed: bool = False


def _gpt2(i: str) -> dict[str, Source]:
    sources = {"embed.weight": Source(("wte.weight",)), "pos_embed.weight": Source(("wpe.weight",)),
               "final_norm.weight": Source(("ln_f.weight",)), "final_norm.bias": Source(("ln_f.bias",)),
               "head.weight": Source(("lm_head.weight",))}  # fmt: skip
    for ours, theirs in (("attn_norm", "ln_1"), ("qkv", "attn.c_attn"), ("out", "attn.c_proj"), ("mlp_norm", "ln_2"),
                         ("up", "mlp.c_fc"), ("down", "mlp.c_proj")):  # fmt: skip
        # GPT-2's Conv1D keeps its matrices as [in, out].
        sources[f"layers.{i}.{ours}.weight"] = Source(
            (f"h.{i}.{theirs}.weight",), transposed="norm" not in ours
        )
        sources[f"layers.{i}.{ours}.bias"] = Source((f"h.{i}.{theirs}.bias",))
    return sources


def _llama(i: str) -> dict[str, Source]:
    sources = {"embed.weight": Source(("model.embed_tokens.weight",)), "final_norm.weight": Source(("model.norm.weight",)),
               "head.weight": Source(("lm_head.weight",))}  # fmt: skip
    layer = f"model.layers.{i}"
    joined = {
        "attn_norm": ("input_layernorm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }
    for ours, theirs in joined.items():
        for part in ("weight", "bias"):
            sources[f"layers.{i}.{ours}.{part}"] = Source(tuple(f"{layer}.{name}.{part}" for name in theirs))
    return sources


_NAME_MAPS = {"gpt2": _gpt2, "llama": _llama}
_PREFIXES = {"gpt2": "transformer.", "llama": ""}  # GPT2LMHeadModel has it, GPT2Model has not
# Buffers older checkpoints carry; they are constants of the architecture, not weights.
_NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def _source(config: ModelConfig, name: str) -> Source:
    """Where the decoder's weight `name` lies in a checkpoint of the config's family."""
    layer = name.split(".")[1] if name.startswith("layers.") else "0"
    return _NAME_MAPS[config.family](layer)[name]


def bind_weights(config: ModelConfig, tensors: Mapping[str, NDArray[Any]]) -> Weights:
    """The decoder's weights by its own names, shapes checked against `config`.

    Raises:
        CheckpointError: missing, unexpected, or wrongly shaped tensors, or tensors that are not floating point.
    """
    prefix = _PREFIXES[config.family]
    given: Weights = {}
    for name, array in tensors.items():
        bare = name.removeprefix(prefix)
        if bare in given:
            raise CheckpointError(f"weights: tensor {bare!r} is there with and without the prefix {prefix!r}")
        if not bare.endswith(_NOT_WEIGHTS):
            given[bare] = array
    bound: Weights = {}
    used: set[str] = set()
    missing: list[str] = []
    for name, shape in weight_shapes(config).items():
        source = _source(config, name)
        absent = [part for part in source.names if part not in given]
        missing += absent
        used.update(source.names)
        if not absent:
            bound[name] = _join(name, shape, source, given, config)
    if missing:
        raise CheckpointError(f"weights: {len(missing)} tensors are missing: {_few(missing)}")
    extra = set(given) - used
    head = _source(config, "head.weight").names[0]
    if config.tie_embeddings and head in extra:
        if not np.array_equal(given[head], bound["embed.weight"]):
            raise CheckpointError(f"weights: {head!r} differs from the embedding, but the config ties them")
        extra.discard(head)
    if extra:
        raise CheckpointError(f"weights: {len(extra)} tensors are unexpected: {_few(sorted(extra))}")
    return bound


def _join(
    name: str, shape: tuple[int, ...], source: Source, given: Mapping[str, NDArray[Any]], config: ModelConfig
) -> NDArray[Any]:
    parts = []
    rows = _split_rows(name, config) if len(source.names) > 1 else [0, shape[0]]
    for part_name, begin, end in zip(source.names, rows[:-1], rows[1:], strict=True):
        part = np.asarray(given[part_name])
        if part.dtype not in _FLOATS:
            raise CheckpointError(
                f"weights: tensor {part_name!r} has dtype {part.dtype}, must be floating point"
            )
        wanted = (end - begin, *shape[1:])
        if name == "pos_embed.weight" and part.ndim == 2 and part.shape[0] > end:
            part = part[:end]  # a shorter context than the model was trained for
        found = part.shape[::-1] if source.transposed else part.shape
        if found != wanted:
            needed = wanted[::-1] if source.transposed else wanted
            raise CheckpointError(f"weights: {part_name!r} has shape {part.shape}, the config needs {needed}")
        parts.append(part.T if source.transposed else part)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _few(names: list[str], limit: int = 5) -> str:
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed}, and {len(names) - limit} more"


def random_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Weights of the right shapes under the checkpoint's names, for tests and benchmarks: normal, sigma 0.02, norms at 1."""
    generator = np.random.default_rng(seed)
    tensors: Weights = {}
    for name, shape in weight_shapes(config).items():
        source = _source(config, name)
        array = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        if "norm.weight" in name:
            array += np.float32(1)
        if len(source.names) == 1:
            tensors[source.names[0]] = array.T if source.transposed else array
            continue
        bounds = _split_rows(name, config)
        for part_name, begin, end in zip(source.names, bounds[:-1], bounds[1:], strict=True):
            tensors[part_name] = array[begin:end]
    return tensors


def _split_rows(name: str, config: ModelConfig) -> list[int]:
    if "qkv" in name:
        heads, kv = config.n_head * config.dim_per_head, config.kv_heads * config.dim_per_head
        return [0, heads, heads + kv, heads + 2 * kv]
    return [0, config.mlp_width, 2 * config.mlp_width]
