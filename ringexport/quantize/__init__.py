"""Quantization: schemes, recipes, pure per-module transforms, and the quantized checkpoint."""
