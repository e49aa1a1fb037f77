"""Installation: which engines there are, and where their environments and converted models live.

engines.json beside this file is the layout that README.md's commands make under one folder; a file of that name in the
folder itself replaces it. Per engine:

    driver        module of bench.peers.drivers
    python        interpreter it runs in; without it, this one
    binary        program the driver needs besides, e.g. llama-server
    environment   further environment variables; {peers} in a value is the folder
    checkpoints   width -> file or folder; {model} is the model's name
    options       passed on to the driver

Relative paths are below the folder. What is not there is left out of a comparison, and the results say why.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT = Path(__file__).parent / "engines.json"
WIDTHS = ("float32", "bfloat16", "int8")
OURS = "nanoserve"
_FIELDS = {
    "driver": str,
    "python": str,
    "binary": str,
    "environment": dict,
    "checkpoints": dict,
    "options": dict,
}


class NotInstalled(RuntimeError):
    """An engine that cannot take part; the message says what is missing."""


@dataclass(frozen=True)
class Engine:
    """An entry of engines.json with its paths made absolute."""

    name: str
    folder: Path
    driver: str
    python: Path
    checkpoints: dict[str, Path]  # {model} is still in them
    binary: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def checkpoint(self, model: str, width: str) -> Path:
        """What the driver loads.

        Raises:
            NotInstalled: interpreter, program or checkpoint is missing.
        """
        for path in (self.python, self.binary):
            if path is not None and not path.exists():
                raise NotInstalled(f"there is no {self._below(path)}")
        if width not in self.checkpoints:
            raise NotInstalled(f"it has no {width} checkpoints")
        path = Path(str(self.checkpoints[width]).replace("{model}", model))
        if not path.exists():
            raise NotInstalled(f"there is no {self._below(path)}")
        return path

    def _below(self, path: Path) -> Path:
        """The path as engines.json has it: results are read on other machines."""
        return path.relative_to(self.folder) if path.is_relative_to(self.folder) else path


def read_engines(folder: Path) -> dict[str, Engine]:
    """The engines of a peers folder, by name.

    Raises:
        ValueError: naming the file, the engine and the field.
    """
    folder = folder.resolve()
    own = folder / DEFAULT.name
    file = own if own.exists() else DEFAULT
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(held, dict):
        raise ValueError(f"{file}: must hold an object, is {type(held).__name__}")
    return {name: _engine(f"{file}: {name}", name, entry, folder) for name, entry in held.items()}


def _engine(place: str, name: str, entry: Any, folder: Path) -> Engine:
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: must be an object, is {type(entry).__name__}")
    for key, value in entry.items():
        if key not in _FIELDS:
            raise ValueError(f"{place}: {key}: no such field; there are {', '.join(_FIELDS)}")
        if not isinstance(value, _FIELDS[key]):
            raise ValueError(f"{place}: {key}: {value!r:.80} must be a {_FIELDS[key].__name__}")
    for key in ("driver", "checkpoints"):
        if key not in entry:
            raise ValueError(f"{place}: {key}: is missing")
    if importlib.util.find_spec(f"bench.peers.drivers.{entry['driver']}") is None:
        raise ValueError(f"{place}: driver: there is no bench.peers.drivers.{entry['driver']}")
    if unknown := sorted(entry["checkpoints"].keys() - set(WIDTHS)):
        raise ValueError(f"{place}: checkpoints: {unknown[0]!r} must be one of {', '.join(WIDTHS)}")
    return Engine(
        name=name,
        folder=folder,
        driver=entry["driver"],
        python=folder / entry["python"] if "python" in entry else Path(sys.executable),
        checkpoints={width: folder / str(path) for width, path in entry["checkpoints"].items()},
        binary=folder / entry["binary"] if "binary" in entry else None,
        environment={
            key: str(value).replace("{peers}", str(folder))
            for key, value in entry.get("environment", {}).items()
        },
        options=entry.get("options", {}),
    )
