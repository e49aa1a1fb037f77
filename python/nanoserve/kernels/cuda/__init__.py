"""The decoder's kernels for NVIDIA GPUs, one file per kernel: what kernels/*.py are for CPUs, with the same meanings.

Layouts (layout.py), all row-major in device memory:
    activations   [rows][ld], ld a multiple of 8
    weights       [n][ld] as checkpoints store them, rows begin on 16 bytes; a gated weight is n rows of the gate, then
                  n others
    keys, values  of a layer, each by itself: [page][kv_head][slot of the page][head_dim]

An output row's bits depend on that row only: never on how many rows there are, or where among them it is. Rows of a
captured CUDA graph that hold no token are computed like any other and thrown away; their slot is -1, so that they
write no keys.
"""
