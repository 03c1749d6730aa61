"""Pack a checkpoint for the kernels of plugins/: fused projections, stacked experts, scales."""
