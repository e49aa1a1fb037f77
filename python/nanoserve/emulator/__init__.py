"""A CUDA device in software: GPU kernels run, and are made to fail, on any x86-64 Linux machine.

A GPU runs a kernel as a grid of blocks; a block is up to 1024 threads that share some memory and meet at barriers, and 32
neighbouring threads are a warp, whose lanes exchange registers and feed the tensor cores together. All of that is emulated, for
the very LLVM IR that the NVPTX code generator gets, so what is tested is the kernel and not a model of it:

    rewrite       LLVM IR for NVPTX -> LLVM IR for this machine: intrinsics, inline PTX and accesses become calls
    image         ... -> a shared object, which the emulator and the fake driver load
    emulator      launches, and exceptions that name kernel, block, thread and address
    src/emulator  the library underneath: threads as fibers, shared memory, warp collectives, mma, wgmma, cp.async, TMA
    src/fake_cuda the CUDA driver's interface on top of it, for programs that load libcuda.so.1

It is hostile on purpose. A kernel with a missing barrier often gives the right answer on a GPU, and then does not. Here shared
memory starts as NaN, asynchronous copies land at the last moment that the program allows, reading early is an error, memory
beyond an allocation faults, and the same launch can be run in many orders of its threads. What passes is not proved right:
the emulator interleaves threads only where they meet or wait, does not model caches, and says nothing about speed.

A thread that doubles a number, and one that goes too far:

    >>> import numpy as np
    >>> from nanoserve.emulator import Emulator, IllegalAddress
    >>> emulator = Emulator('''
    ... declare i32 @llvm.nvvm.read.ptx.sreg.tid.x()
    ... define ptx_kernel void @twice(ptr addrspace(1) %x) {
    ...   %t = call i32 @llvm.nvvm.read.ptx.sreg.tid.x()
    ...   %p = getelementptr float, ptr addrspace(1) %x, i32 %t
    ...   %v = load float, ptr addrspace(1) %p, align 4
    ...   %w = fadd float %v, %v
    ...   store float %w, ptr addrspace(1) %p, align 4
    ...   ret void
    ... }''')
    >>> x = np.arange(4, dtype=np.float32)
    >>> emulator.launch("twice", grid=1, block=4, shared_bytes=0, args=[x])
    >>> x.tolist()
    [0.0, 2.0, 4.0, 6.0]
    >>> try:
    ...     emulator.launch("twice", grid=1, block=5, shared_bytes=0, args=[x])
    ... except IllegalAddress as error:
    ...     print(error.thread)
    (4, 0, 0)
"""

from __future__ import annotations

from nanoserve.emulator.device_array import DeviceArray
from nanoserve.emulator.emulator import Emulator
from nanoserve.emulator.errors import (
    AsyncAtExit,
    AsyncRace,
    Deadlock,
    Divergence,
    EmulatorError,
    EmulatorMissing,
    IllegalAddress,
    InvalidLaunch,
    InvalidOperand,
    MisalignedAddress,
    UnsupportedInstruction,
)
from nanoserve.emulator.image import image
from nanoserve.emulator.library import FAKE_DRIVER, library_path

__all__ = [
    "FAKE_DRIVER",
    "AsyncAtExit",
    "AsyncRace",
    "Deadlock",
    "DeviceArray",
    "Divergence",
    "Emulator",
    "EmulatorError",
    "EmulatorMissing",
    "IllegalAddress",
    "InvalidLaunch",
    "InvalidOperand",
    "MisalignedAddress",
    "UnsupportedInstruction",
    "image",
    "library_path",
]
