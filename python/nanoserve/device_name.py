"""Where a model runs, by name: "cpu", "cuda" (the first GPU) or "cuda:1". Importing this needs no driver."""

from __future__ import annotations

import re
from typing import Any

from nanoserve.checks import shown


def device_ordinal(name: Any) -> int | None:
    """The number of a GPU; None for the CPU.

    Raises:
        ValueError: the name is not one of a device.
    """
    if name == "cpu":
        return None
    found = re.fullmatch(r"cuda(?::(\d{1,3}))?", name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"device: {shown(name)} must be cpu, cuda or cuda:N")
    return int(found[1] or 0)
