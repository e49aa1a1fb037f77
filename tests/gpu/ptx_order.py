"""What stands in PTX before griddepcontrol.wait: where a kernel that is launched early may not touch what others write."""

from __future__ import annotations

import re

_WAIT = "griddepcontrol.wait;"
_MEMORY = re.compile(
    r"\b(?:ld(?!\.param)|st|atom|red|cp\.async(?!\.bulk\.prefetch\.L2)|cp\.reduce|ldmatrix|mbarrier|wgmma|bar|barrier|tex|multimem)\.\S+"
)
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$?\w+);")
_LEAVES = re.compile(r"\b(?:ret|exit|trap|call|brx)\b")
# Not to be used on what changes while a kernel is there: what those in front of it still write.
_READ_ONLY = re.compile(r"\bld\.global(?:\.\w+)*\.nc\.\S+")


def faults(ptx: str) -> list[str]:
    """Why the kernel may not be launched before the one in front has ended; none if it may."""
    if ptx.count(".entry ") != 1:
        return [f"{ptx.count('.entry ')} kernels"]
    body = ptx[ptx.index("{", ptx.index(".entry ")) :]
    if body.count(_WAIT) != 1:
        return [f"{body.count(_WAIT)} waits"]
    before, _, after = body.partition(_WAIT)
    found = [f"{access} before the wait" for access in _MEMORY.findall(before)]
    found += [f"{way} before the wait" for way in _LEAVES.findall(before)]
    for label in _BRANCH.findall(before):
        if not re.search(rf"^{re.escape(label)}:", before, re.MULTILINE):
            found.append(f"a branch past the wait, to {label}")
    if re.search(r"^\s*@!?%\w+\s*$", before.rpartition("\n")[0][-40:] or "", re.MULTILINE):
        found.append("a wait of some threads")
    labels = re.findall(r"^(\$\w+):", before, re.MULTILINE)
    found += [f"a loop around the wait, to {label}" for label in labels if f"bra {label};" in after]
    return found + [f"{load}, which supposes that nobody writes" for load in _READ_ONLY.findall(body)]
