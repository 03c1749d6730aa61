"""The Python host of the CUDA kernel library in plugins/."""
