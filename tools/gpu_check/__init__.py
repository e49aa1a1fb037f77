"""The check on a GPU: is every kernel right there, does the engine give the same bits, how fast is it, and against what.

    python -m tools.gpu_check prepare [--chip sm_90a]     where compilers are: kernels into build/gpu_check
    python -m tools.gpu_check run --out FILE.json         where the GPU is: builds the native module, runs all parts

The GPU's machine needs Python, PyTorch, NumPy, transformers and a C++ compiler; no network and no kernel compiler. Parts
(parts.py) run in processes of their own, so that one that dies, or spoils its CUDA context, costs no other.
"""
