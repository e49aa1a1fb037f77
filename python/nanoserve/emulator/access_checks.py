"""A check before every load and store: aligned, and where a kernel may go.

The host would do any access that happens not to fault. What a GPU demands besides (vectors aligned to their size, addresses
of the device) is tested here in a few instructions per access, against constants; only what these do not show to be right
calls nvemu_check_access, which says what is wrong or finds that nothing is.
"""

from __future__ import annotations

import re

from nanoserve.emulator.function_text import Declarations, FunctionText
from nanoserve.emulator.ir_text import leading_type, split_list, type_bytes

# As in src/emulator/abi.h and shared_memory.h.
DEVICE_BASE = 0x2000_0000_0000
DEVICE_BYTES = 1 << 40
SHARED_BASE = 0x7000_0000
SHARED_BYTES = 256 * 1024
_SHADOW_BASE = SHARED_BASE + 0x10_0000
_GRANULE = 4
_CLOSED = 0x01  # not to be read
_NO_WRITE = 0xFD  # what a store looks at

SHARED_SPACE = 3
_CHECKED_SPACES = (0, 1, SHARED_SPACE)
_ACCESS = re.compile(r"^\s*(?:%\S+ = )?(?:tail )?(load|store|atomicrmw|cmpxchg)\s+(.*)$")
_WORDS = re.compile(r"^(?:(?:atomic|volatile|weak)\s+)*")


class AccessChecks:
    """The check functions a module needs, one per kind of access.

    Args:
        notes_writes: stores to shared memory are to be reported, because wgmma reads it through another proxy.
    """

    def __init__(self, declarations: Declarations, notes_writes: bool) -> None:
        self._declarations = declarations
        self._notes_writes = notes_writes
        self._texts: dict[str, str] = {}

    @property
    def texts(self) -> list[str]:
        return list(self._texts.values())

    def before(self, line: str, number: int) -> list[str]:
        """The calls that belong before an instruction: none, if it is no access or touches no memory of the device."""
        found = _ACCESS.match(line)
        if found is None:
            return []
        parts = split_list(found[2])
        kind = found[1]
        body = _WORDS.sub("", parts[0])
        if kind in ("load", "store"):
            type_, pointer = leading_type(body), parts[1]
        else:
            type_ = leading_type(parts[1])
            pointer = body.split(" ", 1)[1] if kind == "atomicrmw" else body
        pointer_type = leading_type(pointer)
        address = pointer[len(pointer_type) :].strip()
        space = int(re.sub(r"\D", "", pointer_type) or 0)
        num_bytes = type_bytes(type_)
        if (
            space not in _CHECKED_SPACES
            or num_bytes is None
            or (space != SHARED_SPACE and address.startswith("@"))
        ):
            return []
        aligned = re.search(r"\balign (\d+)", parts[-1])
        alignment = int(aligned[1]) if aligned else num_bytes
        operand = f"{pointer_type} {address}"
        calls = []
        if kind in ("atomicrmw", "cmpxchg"):
            self._declarations.add("void", "nvemu_interleave", [])
            calls.append("  call void @nvemu_interleave()")
        for is_store in (False, True) if kind in ("atomicrmw", "cmpxchg") else (kind == "store",):
            name = self.function(space, num_bytes, alignment, is_store)
            calls.append(f"  call void @{name}(i32 {number}, {operand})")
        return calls

    def function(self, space: int, num_bytes: int, alignment: int, is_store: bool) -> str:
        """Name of the function that checks such an access: (line, pointer)."""
        name = f"emu.check.p{space}.{'store' if is_store else 'load'}.{num_bytes}.{alignment}"
        if name not in self._texts:
            self._texts[name] = self._text(name, space, num_bytes, alignment, is_store)
        return name

    def _text(self, name: str, space: int, num_bytes: int, alignment: int, is_store: bool) -> str:
        pointer = f"ptr addrspace({space})" if space else "ptr"
        f = FunctionText(name, "void", [pointer], self._declarations)
        address = f.value(f"ptrtoint {pointer} %a0 to i64")
        shared = space == SHARED_SPACE
        base, size = (SHARED_BASE, SHARED_BYTES) if shared else (DEVICE_BASE, DEVICE_BYTES)
        offset = f.value(f"sub i64 {address}, {base}")
        inside = f.value(f"icmp ule i64 {offset}, {size - num_bytes}")
        low = f.value(f"and i64 {address}, {alignment - 1}")
        aligned = f.value(f"icmp eq i64 {low}, 0")
        good = f.value(f"and i1 {inside}, {aligned}")
        f.emit(f"  br i1 {good}, label %near, label %wrong")
        f.place("near")
        if shared:
            # An access that is not aligned to its granules may touch one more.
            granules = -(-num_bytes // _GRANULE) + (
                0 if alignment % _GRANULE == 0 or num_bytes <= alignment else 1
            )
            mask = _NO_WRITE if is_store else _CLOSED
            bits = 8 * granules
            index = f.value(f"lshr i64 {offset}, 2")
            place = f.value(f"add i64 {index}, {_SHADOW_BASE}")
            state = f.value(f"load i{bits}, ptr {f.value(f'inttoptr i64 {place} to ptr')}, align 1")
            masked = f.value(f"and i{bits} {state}, {int.from_bytes(bytes([mask] * granules), 'little')}")
            f.emit(f"  br i1 {f.value(f'icmp eq i{bits} {masked}, 0')}, label %noted, label %wrong")
            f.place("noted")
            if is_store and self._notes_writes:
                f.call("void", "nvemu_shared_written", [("i64", address), ("i32", str(num_bytes))])
        f.emit("  br label %done")
        f.place("wrong")
        args = [
            ("i64", address),
            ("i32", str(num_bytes)),
            ("i32", str(alignment)),
            ("i32", str(int(is_store))),
        ]
        f.call("void", "nvemu_check_access", [*args, ("i32", "%line")])
        f.emit("  br label %done")
        f.place("done")
        f.ret()
        return f.text()
