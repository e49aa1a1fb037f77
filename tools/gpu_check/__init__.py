"""The check on a GPU: is every kernel right there, does the engine give the same bits, how fast is it, and against what.

    python -m tools.gpu_check prepare --chip sm_90a               where compilers are: kernels into build/gpu_check
    python3 -m tools.gpu_check run --out build/gpu_check.json     where the GPU is, with the checkout and build/gpu_check in it

The GPU's machine needs Python, PyTorch, NumPy, transformers and a C++ compiler: no network, no pip, no git, no kernel compiler.
`run` builds the native module, then runs all parts (parts.py), each in a process of its own, so that one that dies, or spoils its
CUDA context, costs no other. It refuses kernels of other sources than those that are there.

A call has `--minutes`, nine by default. What it had no time for is named, and a later call adds it to the same file:

    python3 -m tools.gpu_check run --out build/gpu_check.json --only switches,sanitizer

As long as that is of the same commit and kernels, parts of both stay, a part that ran again as it went the last time. Where only
results travel back, put the file where `--out` says before the second call. `show FILE` prints it again, `--all` every number.
"""
