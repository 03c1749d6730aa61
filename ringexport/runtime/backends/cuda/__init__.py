"""The fast engine: packed weights, run by the kernels of plugins/ under CUDA graphs."""
