"""The forward pass on a GPU of NVIDIA's: weights and pages in device memory, a plan of kernels, graphs of them."""
