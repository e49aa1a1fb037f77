"""From a Python function that describes a GPU kernel to a cubin, on a machine that needs no GPU.

chip                            what a GPU has, as far as generated code depends on it
spec                            what a kernel depends on, and how it is launched: data, no compiler needed
kernel, memory, threads, tensor_core
                                the authoring layer: the CPU's values and loops, and what only GPU kernels say
lowering                        MLIR to LLVM IR, as an ordered list of named stages
ptx, cubin                      LLVM IR to PTX (llvmlite), PTX to machine code (ptxas)
artifact                        what came out, on disk, for machines with and without those compilers

Numerics are those of compiler/builder.py: nothing is reassociated or contracted, `fma` is fused because it says so,
division and square root are IEEE's. No CUDA toolkit, no libdevice.
"""
