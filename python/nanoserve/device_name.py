"""Where a model runs, by name, and which options mean something there. Importing this needs no driver."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nanoserve.checks import shown


def device_ordinal(name: Any) -> int | None:
    """The number of a GPU, from "cuda" (the first) or "cuda:1"; None for "cpu".

    Raises:
        ValueError: the name is not one of a device.
    """
    if name == "cpu":
        return None
    found = re.fullmatch(r"cuda(?::(\d{1,3}))?", name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"device: {shown(name)} must be cpu, cuda or cuda:N")
    return int(found[1] or 0)


def refuse_options(device: str, for_cpu: Mapping[str, Any], for_gpu: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that is given (not None) and means nothing on that device."""
    refused, kind = (for_gpu, "a GPU") if device_ordinal(device) is None else (for_cpu, "the CPU")
    for name, value in refused.items():
        if value is not None:
            raise ValueError(f"{name}: {shown(value)} is for {kind}, device is {device!r}: leave it out")
