"""Where a module's shared memory variables lie: constant addresses.

Each gets exactly the alignment that it declares and no more, for a kernel that needs more must say so; a GPU may well give it
no more either. Gaps between them are closed in the shadow, so that an index past the end of one is found. Dynamic shared
memory, the array without a size that every kernel shares, comes last. Where it is all there is, it begins at a multiple of
1024, whatever it declares: so it does on a GPU, and Triton's swizzled tiles count on that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nanoserve.emulator.access_checks import SHARED_BASE, SHARED_BYTES
from nanoserve.emulator.errors import UnsupportedInstruction
from nanoserve.emulator.ir_text import VALUE, leading_type, split_list, type_bytes

_GLOBAL = re.compile(rf"^({VALUE}) = .*?\baddrspace\(3\) (?:global|constant) (.*)$")
_GAP = 16
_DEFAULT_ALIGNMENT = 16
_FIRST_ALIGNMENT = 1024  # of what comes first in a block's shared memory


@dataclass(frozen=True)
class SharedVariable:
    name: str  # as in the text: "@tile"
    offset: int
    num_bytes: int

    @property
    def is_dynamic(self) -> bool:
        return self.num_bytes == 0

    @property
    def address(self) -> str:
        return f"inttoptr (i64 {SHARED_BASE + self.offset} to ptr addrspace(3))"


@dataclass(frozen=True)
class SharedLayout:
    variables: tuple[SharedVariable, ...]
    dynamic_offset: int

    def place(self, line: str) -> str:
        """A line with the variables' addresses in the place of their names."""
        if "@" not in line:
            return line
        for variable in self.variables:
            if variable.name in line:
                line = re.sub(re.escape(variable.name) + r"(?![-\w.$])", variable.address, line)
        return line


def declared(line: str) -> tuple[str, int, int] | None:
    """(name, bytes, alignment) of a shared memory variable, None for any other line."""
    found = _GLOBAL.match(line)
    if found is None:
        return None
    parts = split_list(found[2])
    type_ = leading_type(parts[0])
    size = type_bytes(type_)
    if size is None:
        raise UnsupportedInstruction(f"a shared memory variable of type {type_}")
    alignment = re.search(r"\balign (\d+)", line)
    return found[1], size, int(alignment[1]) if alignment else _DEFAULT_ALIGNMENT


def lay_out(lines: list[str]) -> SharedLayout:
    """Places for all shared memory variables that a module's lines declare."""
    found = [variable for line in lines if (variable := declared(line)) is not None]
    static = [variable for variable in found if variable[1] > 0]
    dynamic = [variable for variable in found if variable[1] == 0]  # several names mean one place
    end = 0
    placed = []
    for name, size, alignment in static:
        offset = _exactly_aligned(end, max(alignment, 4))
        placed.append(SharedVariable(name, offset, size))
        end = offset + size + _GAP
    alignment = max((alignment for _, _, alignment in dynamic), default=_DEFAULT_ALIGNMENT)
    dynamic_offset = _exactly_aligned(end, alignment if static else max(alignment, _FIRST_ALIGNMENT))
    if dynamic_offset > SHARED_BYTES:
        raise UnsupportedInstruction(f"{end} bytes of shared memory variables, there are {SHARED_BYTES}")
    placed += [SharedVariable(name, dynamic_offset, 0) for name, _, _ in dynamic]
    return SharedLayout(tuple(placed), dynamic_offset)


def _exactly_aligned(at_least: int, alignment: int) -> int:
    """The next odd multiple: aligned to this and to no larger power of two."""
    multiple = -(-at_least // alignment)
    return alignment * (multiple + 1 - multiple % 2)
