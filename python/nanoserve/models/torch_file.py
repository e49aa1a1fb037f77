"""A torch `.pt` state dict, read by torch with weights_only=True: a restricted unpickler that builds tensors and runs nothing.

torch before 2.6 could be made to run code even so, and is refused; so is everything but the uncompressed zip archive that
torch.save has written since 1.6. The whole file is read into memory: convert anything large to safetensors.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

from nanoserve.checks import shown
from nanoserve.errors import CheckpointError
from nanoserve.models.stored_tensor import StoredTensor

_OLDEST = (2, 6)


def read_torch(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict by name.

    Raises:
        CheckpointError: no such file, torch is missing or too old, the file is damaged, or holds more than tensors.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{file.name}: reading a .pt file needs torch >= 2.6; or convert it to safetensors where torch is installed"
        ) from error
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or (int(version[1]), int(version[2])) < _OLDEST:
        raise CheckpointError(
            f"{file.name}: torch {torch.__version__} cannot load it safely, torch >= 2.6 is needed; "
            "or convert it to safetensors"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            compressed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if compressed:  # a few kilobytes can unpack to any size
            raise CheckpointError(
                f"{file.name}: {compressed[0].filename!r} in it is compressed, torch.save never does"
            )
        state = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many types for damaged or unsafe files; all mean the same here
        raise CheckpointError(
            f"{file.name}: not a state dict torch can read safely ({type(error).__name__})"
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file.name}: must hold a state dict of tensors, holds {type(state).__name__}")
    return {name: _stored(file.name, name, tensor) for name, tensor in state.items()}


def _stored(file: str, name: object, tensor: object) -> StoredTensor:
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise CheckpointError(
            f"{file}: {shown(name)} must be the name of a tensor, is {type(tensor).__name__}"
        )
    nbytes = tensor.numel() * tensor.element_size()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{file}: tensor {shown(name)} must be dense, not sparse, quantized or without data"
        )
    if nbytes > tensor.untyped_storage().nbytes():  # strides of 0: a few bytes that would unfold to any size
        raise CheckpointError(
            f"{file}: tensor {shown(name)} of shape {tuple(tensor.shape)} has more elements than the file holds"
        )
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(file, name, dtype, tuple(tensor.shape), nbytes, flat.numpy())
