"""Where a checkpoint is, and the tensors its files hold.

`checkpoint_directory(model)` turns a path or a hub name into a directory that has a config.json. `load_weights(path)` opens
the tensors in it, or in one file, under the file's names. Opening maps and checks; reading happens row by row, later, where
the weights are packed. Only safetensors is served from: what else a directory holds is refused with the way to convert it.
A path that cannot be a hub name (absolute, with a dot or a second slash in front) never reaches the network.
"""

from __future__ import annotations

from pathlib import Path

from nanoserve.checkpoint_json import read_object
from nanoserve.checks import few, shown
from nanoserve.errors import CheckpointError
from nanoserve.models import hub
from nanoserve.models.safetensors_file import read_safetensors
from nanoserve.models.stored_tensor import StoredTensor
from nanoserve.models.torch_file import read_torch

MAX_INDEX_BYTES = 64 * 1024 * 1024
MAX_SHARDS = 10_000
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_FORMATS = (".bin", ".pth", ".pt", ".gguf")


def checkpoint_directory(model: str | Path, *, revision: str | None = None, weights: bool = True) -> Path:
    """The directory of a checkpoint that is here, or of a model on the Hugging Face Hub after its download.

    Args:
        model: a directory, or "org/name" (a str, and no such path here) for the hub.
        revision: branch, tag or commit on the hub.
        weights: False for who only reads config and tokenizer: the weights are not downloaded.

    Raises:
        CheckpointError: no such directory, one without a config.json, or the hub cannot give it (see `hub.download`).
    """
    try:
        return _directory(model, revision, weights)
    except OSError as error:
        raise CheckpointError(f"{model}: cannot be read ({error.strerror})") from error


def _directory(model: str | Path, revision: str | None, weights: bool) -> Path:
    path = Path(model)
    if revision is not None and (not isinstance(revision, str) or not revision):
        raise CheckpointError(f"revision: {shown(revision)} must be the name of a branch, a tag or a commit")
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"revision: {shown(revision)} is for the hub, but {path} is a local path")
    elif isinstance(model, str) and hub.is_repo_id(model):
        path = hub.download(model, revision, weights=weights)
    else:
        raise CheckpointError(f"{path}: no such directory")
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: is a file, must be the directory that holds config.json and the weights"
        )
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: holds no config.json; {_contents(path)}{_conversion(path)}")
    return path


def load_weights(path: str | Path) -> dict[str, StoredTensor]:
    """Tensors by name from a checkpoint directory (one file or shards), a safetensors file, or a torch `.pt` state dict.

    Nothing is read yet and nothing is allocated, except for `.pt`, which torch reads whole.

    Raises:
        CheckpointError: nothing loadable there, or a damaged file.
    """
    try:
        return _load(Path(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _load(file: Path) -> dict[str, StoredTensor]:
    if file.is_dir():
        if (file / _SINGLE).is_file():
            return read_safetensors(file / _SINGLE)
        if (file / _INDEX).is_file():
            return _load_sharded(file)
        return read_safetensors(_only_file(file))
    if file.suffix == ".pt":
        return read_torch(file)
    if file.suffix in _OTHER_FORMATS and file.is_file():
        raise CheckpointError(f"{file}: must be safetensors or .pt{_conversion(file.parent)}")
    return read_safetensors(file)


def _only_file(directory: Path) -> Path:
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise CheckpointError(
            f"{directory}: holds neither {_SINGLE} nor {_INDEX}; {_contents(directory)}{_conversion(directory)}"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{directory}: holds neither {_SINGLE} nor {_INDEX}, and several files that could be meant: "
            f"{few([file.name for file in found])}"
        )
    return found[0]


def _load_sharded(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards. `metadata.total_size` is not compared: writers disagree whether tied weights count twice."""
    weight_map = _weight_map(directory)
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{directory}: {len(absent)} of {len(shards)} shards are missing: {few(absent)}"
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in read_safetensors(directory / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{shard}: tensor {shown(name)} is not what {_INDEX} places there")
            tensors[name] = tensor
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{_INDEX}: {len(missing)} tensors are in no shard, first {shown(missing[0])}, "
            f"which {weight_map[missing[0]]} should hold"
        )
    return tensors


def _weight_map(directory: Path) -> dict[str, str]:
    weight_map = read_object(directory / _INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{_INDEX}: must hold an object with a weight_map of tensor names to file names"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise CheckpointError(
                f"{_INDEX}: tensor {shown(name)}: shard {shown(shard)} must be a file name beside the index, "
                "ending in .safetensors"
            )
    if (num_shards := len(set(weight_map.values()))) > MAX_SHARDS:
        raise CheckpointError(f"{_INDEX}: {num_shards} shards, the limit is {MAX_SHARDS}")
    return weight_map


def _is_plain_name(shard: str) -> bool:
    """A file beside the index: printable ASCII, so no separators of any system, no NUL, no lookalikes."""
    return (
        shard.endswith(".safetensors")
        and not shard.startswith(".")
        and shard.isascii()
        and shard.isprintable()
        and len(shard) <= 255
        and not set(shard) & set('/\\:*?"<>|')
    )


def _contents(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    return f"it holds {few(names)}" if names else "it is empty"


def _conversion(directory: Path) -> str:
    """How to make safetensors of what is there; empty when there is nothing to convert."""
    found = sorted({file.suffix for file in directory.iterdir() if file.suffix in _OTHER_FORMATS})
    if not found:
        return ""
    source = "dir, gguf_file=name" if found == [".gguf"] else "dir"
    return (
        f"; convert its {', '.join(found)} files once with transformers: "
        f"AutoModelForCausalLM.from_pretrained({source}).save_pretrained(new_dir)"
    )
