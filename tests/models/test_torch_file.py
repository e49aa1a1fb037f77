"""Torch `.pt` state dicts: read without running anything, refused when they are not plain dense tensors."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoserve import CheckpointError
from nanoserve.models.checkpoint import load_weights
from nanoserve.models.stored_tensor import StoredTensor


def test_pt_files_are_read_without_unpickling_code(tmp_path: Path) -> None:
    """Plain state dicts load, bfloat16 and views included; a file that would run code when unpickled runs nothing."""
    torch = pytest.importorskip("torch", reason="writes the .pt files")
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    given = {"a": base, "half": base.half(), "bf": base.bfloat16(), "t": base.t(), "row": base[1], "one": base[0, 0],
             "none": base[:0], "ids": torch.arange(3), "double": base.double()}  # fmt: skip
    torch.save(given, tmp_path / "good.pt")
    tensors = load_weights(tmp_path / "good.pt")
    for name, tensor in given.items():
        if name == "ids":
            continue
        assert tensors[name].dtype == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(tensors[name][:], tensor.float().numpy())
    np.testing.assert_array_equal(tensors["t"][2:4], base.t()[2:4].numpy())
    with pytest.raises(CheckpointError, match=r"good\.pt: dtype int64 of tensor 'ids' is not supported"):
        tensors["ids"][:]
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt: not a state dict torch can read safely"):
        load_weights(tmp_path / "evil.pt")
    assert not marker.exists()


def test_pt_files_that_are_no_state_dicts(tmp_path: Path) -> None:
    """Lists, other keys, sparse tensors, noise, compressed archives, and a few bytes that would unfold to terabytes."""
    torch = pytest.importorskip("torch", reason="writes the .pt files")
    contents: dict[str, tuple[Any, str]] = {
        "list.pt": ([1, 2], "must hold a state dict of tensors, holds list"),
        "key.pt": ({1: torch.ones(1)}, "1 must be the name of a tensor"),
        "value.pt": ({"a": 3}, "'a' must be the name of a tensor, is int"),
        "sparse.pt": ({"a": torch.eye(3).to_sparse()}, "tensor 'a' must be dense"),
        "wide.pt": ({"a": torch.ones(1).expand(2**40)}, "has more elements than the file holds"),
    }
    for name, (value, words) in contents.items():
        torch.save(value, tmp_path / name)
        with pytest.raises(CheckpointError, match=words) as caught:
            load_weights(tmp_path / name)
        assert str(caught.value).startswith(name)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zip/data/0", bytes(10**6))
    with pytest.raises(CheckpointError, match=r"'zip/data/0' in it is compressed"):
        load_weights(tmp_path / "zip.pt")
    (tmp_path / "noise.pt").write_bytes(b"not a zip file")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("noise.pt", "old.pt", "absent.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_weights(tmp_path / name)


@pytest.mark.parametrize("version", ["2.5.1+cpu", "1.13.0", "nightly"])
def test_an_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Before 2.6 weights_only could be walked around; the file is not opened then."""
    torch = pytest.importorskip("torch", reason="its version is changed")
    (tmp_path / "m.pt").write_bytes(b"")
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(CheckpointError, match=r"torch >= 2.6 is needed; or convert it to safetensors"):
        load_weights(tmp_path / "m.pt")


def test_a_tensor_in_memory_has_nothing_to_forget() -> None:
    """And cannot be written through either."""
    tensor = StoredTensor("m.pt", "a", "float32", (2,), 8, np.ones(2, np.float32).view(np.uint8))
    tensor.forget()
    np.testing.assert_array_equal(tensor[:], [1, 1])
    assert not tensor[:].flags.writeable
