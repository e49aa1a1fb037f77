"""What stands in a kernel's PTX before griddepcontrol.wait: a kernel that is launched early may touch nothing there that others write.

No order of threads shows such a mistake where kernels run one after the other, so the text of every kernel is read when it is
compiled: between its beginning and its only wait there is arithmetic and there are hints, every thread gets to the wait, and
nothing is read by the path for memory that never changes while a kernel is there (ld.global.nc).
"""

from __future__ import annotations

import re

_WAIT = "griddepcontrol.wait;"
_MEMORY = re.compile(
    r"\b(?:ld(?!\.param)|st|atom|red|cp\.async(?!\.bulk\.prefetch\.L2)|cp\.reduce|ldmatrix|mbarrier|wgmma|bar|barrier|tex|multimem)"
    r"\.\S+"
)
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$?\w+);")
_LEAVES = re.compile(r"\b(?:ret|exit|trap|call|brx)\b")
_READ_ONLY = re.compile(r"\bld\.global(?:\.\w+)*\.nc\.\S+")
_PREDICATE = re.compile(r"\s*@!?%\w+\s*$")


class TooEarly(RuntimeError):
    """A kernel could touch memory before those in front of it have ended."""


def check_early_start(ptx: str, symbol: str) -> None:
    """Raises TooEarly unless the kernel may be launched before the one in front has ended."""
    found = faults(ptx)
    if found:
        raise TooEarly(f"{symbol}: {', '.join(found)}")


def faults(ptx: str) -> list[str]:
    """Why the kernel may not be launched so; none if it may."""
    if ptx.count(".entry ") != 1:
        return [f"{ptx.count('.entry ')} kernels"]
    body = ptx[ptx.index("{", ptx.index(".entry ")) :]
    if body.count(_WAIT) != 1:
        return [f"{body.count(_WAIT)} waits"]
    before, _, after = body.partition(_WAIT)
    found = [f"{what} before the wait" for what in (*_MEMORY.findall(before), *_LEAVES.findall(before))]
    if _PREDICATE.match(before.rpartition("\n")[2]):
        found.append("a wait of some threads")
    labels = re.findall(r"^(\$?\w+):", before, re.MULTILINE)
    found += [
        f"a branch past the wait, to {label}" for label in _BRANCH.findall(before) if label not in labels
    ]
    found += [f"a loop around the wait, to {label}" for label in _BRANCH.findall(after) if label in labels]
    return found + [f"{load}, which supposes that nobody writes" for load in _READ_ONLY.findall(body)]
