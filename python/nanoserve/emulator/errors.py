"""What can go wrong in an emulated kernel: one exception per meaning, all with the place where it happened."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """A kernel failed, or cannot be emulated.

    Attributes:
        kernel: its name. block, thread: who failed, (x, y, z). address: of memory, 0 where none is meant.
        line: of the LLVM IR text, 0 where unknown. All are None for what failed before anything ran.
    """

    def __init__(
        self,
        message: str,
        kernel: str | None = None,
        block: tuple[int, int, int] | None = None,
        thread: tuple[int, int, int] | None = None,
        address: int | None = None,
        line: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kernel = kernel
        self.block = block
        self.thread = thread
        self.address = address
        self.line = line


class EmulatorMissing(EmulatorError):
    """The native library is not built, or this machine cannot run it."""


class UnsupportedInstruction(EmulatorError):
    """The module uses something the emulator does not know."""


class InvalidLaunch(EmulatorError):
    """A launch that the driver refuses: dimensions, shared memory, arguments."""


class IllegalAddress(EmulatorError):
    """A load or store outside everything that is allocated."""


class MisalignedAddress(EmulatorError):
    """A vector access whose address is not a multiple of its alignment."""


class Deadlock(EmulatorError):
    """Threads wait at a barrier for others, or for bytes, that do not come."""


class Divergence(EmulatorError):
    """The lanes of a warp are not together at an instruction that they must execute together."""


class AsyncRace(EmulatorError):
    """Shared memory was touched while an asynchronous operation uses it: a wait or a proxy fence is missing."""


class AsyncAtExit(EmulatorError):
    """A thread, or its block, ended before an asynchronous operation that it started."""


class InvalidOperand(EmulatorError):
    """An instruction's operands are not what the hardware takes."""


# By the number of nvemu::FailureKind in src/emulator/abi.h.
BY_KIND: dict[int, type[EmulatorError]] = {
    1: IllegalAddress,
    2: MisalignedAddress,
    3: Deadlock,
    4: Divergence,
    5: AsyncRace,
    6: AsyncAtExit,
    7: InvalidLaunch,
    8: InvalidOperand,
}
