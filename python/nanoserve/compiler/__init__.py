"""From a Python function that describes a kernel to machine code in the process.

builder, control, vector_math   the authoring layer: write MLIR as ordinary Python
lowering                        the passes, as an ordered list of named stages
jit                             LLVM IR -> object -> shared object -> address
object_cache                    shared objects on disk, verified before every load
target                          what the host CPU can do
bindings                        the only module that imports MLIR; nothing else in the package needs it to be installed
explain                         a kernel's text after every stage

Nothing here is imported by `import nanoserve`, and a start with a filled cache never imports MLIR.
"""
