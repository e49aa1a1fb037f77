"""One file per kernel: what it computes and in which order, its spec (plain data), and the function that builds it.

Spec functions and packing need no MLIR; `build` imports the authoring layer when something must be compiled. Kernels are
called through `library.load_kernels`.
"""
